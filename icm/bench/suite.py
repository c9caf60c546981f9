"""All measurements of scripts/bench.py, and what follows from them."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from hydra.errors import HydraException

from icm.bench import contenders, emulation
from icm.bench.apart import Measure
from icm.bench.machine import machine
from icm.bench.settings import train_settings
from icm.config import Config, EnvConfig
from icm.envs.cores import installed_cores
from icm.errors import UserError

STARTED = time.monotonic()
PART = 0.12  # share of a turn's time, for measuring one part
SETTLING = {"nes_py": 4, "libretro": 9}
"""Turns for environments to move to workers with time for them: more, the more of it goes into
learning."""


@dataclass
class BenchConfig:
    """See `conf/bench.yaml`."""

    quick: bool
    seconds: float | None
    rounds: int | None
    train: list[str]
    out: str

    @property
    def overrides(self) -> list[str]:
        """Overrides for all trainings."""
        return ["compile=off", *self.train] if self.quick else self.train


def say(what: str) -> None:
    """Print progress on stderr, so that stdout has only the result."""
    print(f"{time.monotonic() - STARTED:3.0f} s: {what}", file=sys.stderr, flush=True)


def in_turn(measures: dict[str, Measure], seconds: float, rounds: int) -> dict[str, list[float]]:
    """The results of all measures, taken in turn, once per round."""
    found = defaultdict(list)
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure(seconds))
    return found


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def trained(options: BenchConfig) -> Config:
    """Settings of the trainings.

    Raises:
        UserError: scripts/train.py would refuse them.
    """
    try:
        return train_settings(*options.overrides)
    except (UserError, HydraException) as error:
        raise UserError(f"train={options.train}: {error}") from None


def measure(options: BenchConfig, config: Config) -> dict[str, Any]:
    """Measure everything that is installed here; return what goes into the JSON.

    Args:
        config: of the trainings, see `trained`.
    """
    before, overrides = machine(), options.overrides
    seconds = options.seconds or (2.0 if options.quick else 4.0)
    rounds = options.rounds or (1 if options.quick else 3)
    part = PART * seconds
    cores = installed_cores()
    emulators = {"nes_py": replace(config.env, emulator="nes_py")}
    for name, path in cores.items():
        emulators[name] = replace(config.env, emulator="libretro", core=str(path))
    backends = {"nes_py": emulators["nes_py"]}
    if cores:
        backends["libretro"] = emulators[next(iter(cores))]
    else:
        say("no libretro core found: env.emulator=libretro is not measured")

    say("emulators and environments")
    emulator, environment = emulator_speeds(emulators, part, rounds)
    say("many environments")
    vector = {
        name: vector_speeds(backend, before["cores"], part, rounds)
        for name, backend in backends.items()
    }
    scaling = {}
    if not options.quick:
        fastest = list(backends)[-1]
        scaling = {fastest: emulation.scaling(backends[fastest], before["cores"], part)}
    say("getting ready: a learner compiles, and trainings start beside it")
    with learning(part, overrides) as learner, ExitStack() as running:
        entered = trainings(options.quick, overrides, backends)
        for name, contender in entered.items():
            running.enter_context(contender).get_ready()
            say(f"{name} is ready")
        if not options.quick:
            settle(entered, seconds)
        alone = {name: emulation.environment_steps(config) for name, config in backends.items()}
        rates, emulating = defaultdict(list), defaultdict(list)
        learned = []
        for done in range(1, rounds + 1):
            learned.append(learner())
            for name, measure_alone in alone.items():
                emulating[name].append(measure_alone(2 * part))
            for name, contender in entered.items():
                rates[name].append(contender.turn(seconds))
            latest = ", ".join(f"{name} {found[-1]:.1f}" for name, found in rates.items())
            say(f"round {done} of {rounds}: {latest} agent steps/s")
        device = entered["nes_py"].said()
    ideal = {
        name: [
            before["cores"] / (1 / steps + each["seconds_per_agent_step"])
            for steps, each in zip(found, learned, strict=True)
        ]
        for name, found in emulating.items()
    }
    return {
        "end_to_end": compared(rates, ideal),
        "vector": vector,
        "scaling": scaling,
        "update": updates(learned),
        "environment": environment,
        "emulator": emulator,
        "cores": list(cores),
        "quick": options.quick,
        "seconds": seconds,
        "train": overrides,
        "device": device,
        "machine": before,
    }


def emulator_speeds(
    emulators: dict[str, EnvConfig], seconds: float, rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Frames/s of every emulator alone, and agent steps/s of one environment on each.

    `overhead` is a game frame's extra cost over one of the emulator (which draws every frame), as
    a share of that; `overhead_with_state` includes what the agent sees.
    """
    measures: dict[str, Measure] = {}
    for name, config in emulators.items():
        measures[f"{name} bare"] = emulation.bare_frames(config, skipping=False)
        if config.emulator == "libretro":
            measures[f"{name} skipping"] = emulation.bare_frames(config, skipping=True)
        measures[f"{name} game"] = emulation.environment_steps(config, with_state=False)
        measures[f"{name} environment"] = emulation.environment_steps(config)
    found = in_turn(measures, seconds, rounds)
    emulator, environment = {}, {}
    for name, config in emulators.items():
        bare = found[f"{name} bare"]
        emulator[name] = {"frames_per_s": median(bare), "rounds": bare}
        if skipping := found.get(f"{name} skipping"):
            emulator[name] |= {"skipping_frames_per_s": median(skipping)}
        steps = found[f"{name} environment"]
        environment[name] = {
            "agent_steps_per_s": median(steps),
            "frames_per_s": median(steps) * config.action_repeat,
            "rounds": steps,
            "overhead": median(ratios(bare, found[f"{name} game"])) / config.action_repeat - 1,
            "overhead_with_state": median(ratios(bare, steps)) / config.action_repeat - 1,
        }
    return emulator, environment


def vector_speeds(config: EnvConfig, cores: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Agent steps/s of the vector environment, and of processes with one environment each."""
    with (
        emulation.vector_steps(config) as together,
        emulation.separate_steps(config, cores) as alone,
    ):
        found = in_turn({"vector": together, "alone": alone}, 2 * seconds, rounds)
    shares = ratios(found["vector"], found["alone"])
    return {
        "agent_steps_per_s": median(found["vector"]),
        "alone_agent_steps_per_s": median(found["alone"]),
        "share_of_alone": median(shares),
        "rounds": found["vector"],
        "share_of_alone_rounds": shares,
    }


@contextmanager
def learning(seconds: float, overrides: list[str]) -> Generator[Callable[[], dict[str, Any]]]:
    """Start a learner, which compiles; yield what measures it, see `icm.bench.learner`."""
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads can fill up
        process = subprocess.Popen(
            [sys.executable, "-m", "icm.bench.learner", str(seconds), *overrides],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def measured() -> dict[str, Any]:
            with suppress(BrokenPipeError):
                print(file=asks, flush=True)
            if not (answer := answers.readline()):
                errors.seek(0)
                raise RuntimeError(f"icm.bench.learner: {errors.read()}")
            result: dict[str, Any] = json.loads(answer)
            return result

        with process:
            try:
                yield measured
            finally:
                process.kill()


def updates(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what `icm.bench.learner` measured.

    Returns:
        `modes`: for each way to compute an update, its median and single times, samples/s, and its
        speed as a multiple of the plain one's; `speedup`: that of the mode that a training takes;
        `act_ms`, `observe_ms` and `seconds_per_agent_step`, see there.
    """
    times = {name: [each["modes"][name] for each in rounds] for name in rounds[0]["modes"]}
    plain = next(iter(times.values()))
    modes = {
        name: {
            "ms": median(ms),
            "rounds_ms": ms,
            "samples_per_s": rounds[0]["samples"] / median(ms) * 1e3,
            "speedup": median(ratios(plain, ms)),
        }
        for name, ms in times.items()
    }
    names = "act_ms", "observe_ms", "seconds_per_agent_step"
    return {
        "modes": modes,
        "speedup": list(modes.values())[-1]["speedup"],
        **{name: median(each[name] for each in rounds) for name in names},
    }


def trainings(
    quick: bool, overrides: list[str], backends: dict[str, EnvConfig]
) -> dict[str, contenders.Contender]:
    """All contenders; those that compile come last: by then the learner may have compiled."""
    repeat = backends["nes_py"].action_repeat  # of all: their agent steps are as long
    entered = {"tutorial": contenders.tutorial(repeat)}
    if not quick and importlib.util.find_spec("stable_baselines3") is None:
        say("Stable-Baselines3 is not measured: pip install -e .[bench] installs it")
    elif not quick:
        for rival in ("ppo", "dqn"):
            entered[f"sb3_{rival}"] = contenders.stable_baselines3(rival, repeat)
    for name, config in backends.items():
        chosen = [f"env.emulator={config.emulator}", f"env.core={config.core}"]
        entered[name] = contenders.training([*overrides, *chosen])
    return entered


def settle(entered: dict[str, contenders.Contender], seconds: float) -> None:
    """Let our trainings run for some turns of so many seconds, see `SETTLING`."""
    for name, turns in SETTLING.items():
        if name in entered:
            say(f"settling {name}")
            entered[name].turn(turns * seconds)


def compared(rates: dict[str, list[float]], ideal: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of the rates; those with an ideal compared with it and with the others, by round."""
    result: dict[str, Any] = {
        name: {"agent_steps_per_s": median(found), "rounds": found} for name, found in rates.items()
    }
    rivals = [name for name in rates if name.startswith("sb3_")]
    for name in ideal:
        ours = rates[name]
        over_tutorial, shares = ratios(ours, rates["tutorial"]), ratios(ours, ideal[name])
        result[name] |= {
            "vs_tutorial": median(over_tutorial),
            "vs_tutorial_rounds": over_tutorial,
            "ideal_agent_steps_per_s": median(ideal[name]),
            "share_of_ideal": median(shares),
            "share_of_ideal_rounds": shares,
            "vs_sb3": None,
        }
        if rivals:
            fastest = max(rivals, key=lambda rival: median(rates[rival]))
            result[name] |= {"vs_sb3": median(ratios(ours, rates[fastest])), "sb3": fastest}
    return result
