"""Speed of learning alone, without environments: `python -m icm.bench.learner SECONDS ...`.

A process of its own with as many threads as a training has. Further arguments are settings of
scripts/train.py. Compiles; then, for every line of input, measures and prints one JSON line, see
`learning`.
"""

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.agents.base import Agent
from icm.agents.on_policy import OnPolicy
from icm.bench.apart import Measure, apart
from icm.bench.settings import train_settings
from icm.compilation import WARM_UPS, Compiler
from icm.config import Config, RolloutConfig
from icm.device import busy_cores, resolve_device, resolve_precision, share_cores
from icm.envs import action_count, make_env
from icm.factory import build_agent
from icm.memory import keep_freed

PLAIN = "float32 as PyTorch comes"  # the unit: eager, PyTorch's ELU, freed memory given back
REMEMBERED = 40  # vector steps

type Sizes = tuple[tuple[int, int, int], int]
"""Shape of a state, and how many actions there are."""


def make_agent(config: Config, shape: tuple[int, int, int], actions: int) -> Agent:
    """An agent with random pictures in memory: their content costs nothing."""
    agent = build_agent(config, shape, actions, resolve_device(config.device))
    rollout = config.agent.rollout_steps if isinstance(config.agent, RolloutConfig) else 0
    for _ in range(max(REMEMBERED, rollout + 1)):
        agent.observe(**vector_step(agent, shape, actions))
    agent.input_norm.measure(agent.memory.recent_frames(1000))
    return agent


def update(agent: Agent) -> dict[str, torch.Tensor]:
    """One update, see `Agent.update`; a rollout is learned again and again."""
    if isinstance(agent, OnPolicy) and not len(agent.order):
        agent.plan()
    return agent.update()


def vector_step(agent: Agent, shape: tuple[int, ...], actions: int) -> dict[str, torch.Tensor]:
    """Arguments for `Agent.observe`, to be repeated: each step begins where the last one led."""
    n = agent.num_envs
    never = torch.zeros(n, dtype=torch.bool)
    states = torch.randint(0, 256, (n, *shape), dtype=torch.uint8)
    return {
        "states": states,
        "previous": torch.randint(0, actions, (n,)),
        "probabilities": torch.full((n, actions), 1 / actions),
        "values": torch.zeros(n, 1),
        "actions": torch.randint(0, actions, (n,)),
        "next_states": states,
        "rewards": torch.zeros(n),
        "terminated": never,
        "truncated": never,
        "reset": never,
        "respawned": never,
        "origin": torch.full((n,), -1),
        "undone": torch.zeros(n, dtype=torch.int64),
    }


def milliseconds(do: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Wall-clock time of one call, the mean over about `seconds`."""
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < seconds:
        do()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls * 1e3


def plain_updates(overrides: list[str], sizes: Sizes) -> Measure:
    """Milliseconds of an update as PyTorch comes."""
    config = train_settings(*overrides, "precision=float32", "compile=off")
    device = resolve_device(config.device)
    share_cores(device)
    agent = make_agent(config, *sizes)
    for network in agent.networks.values():
        for body in network.modules():
            if hasattr(body, "activation"):
                vars(body)["activation"] = F.elu
    update(agent)
    return lambda seconds: milliseconds(partial(update, agent), seconds, device)


@contextmanager
def learning(overrides: list[str]) -> Generator[Callable[[float], dict[str, Any]]]:
    """Get ready to measure acting, observing and updating, once per call.

    Args:
        overrides: settings; with `compile=off` nothing is compiled.

    Yields:
        what measures each of them for so many seconds, and returns: `modes`, the milliseconds of an
        update in each way to compute it, the plain one first and that of a training last; `act_ms`
        and `observe_ms` of a vector step, as in a training; `samples`, how many an update learns
        from; `seconds_per_agent_step`, acting, observing and the configured share of an update, in
        seconds of one core.
    """

    def settings(*more: str) -> Config:
        return train_settings(*overrides, *more)

    config = settings()
    device = resolve_device(config.device)
    share_cores(device)
    keep_freed()
    env = make_env(config.env)
    state_shape: Any = env.observation_space.shape
    sizes: Sizes = state_shape, action_count(env.action_space)
    env.close()

    agents: dict[str, Agent] = {}
    compiler = Compiler("off" if config.compile == "off" else "auto", device)
    compiler(torch.neg)(torch.ones(1, device=device))  # now it is off where nothing can be compiled
    bf16 = resolve_precision(config.precision, device)
    for precision in ("float32", "bf16") if bf16 else ("float32",):
        for compiling in ("off",) if compiler.mode == "off" else ("off", "on"):
            mode = f"{precision} compiled" if compiling == "on" else precision
            chosen = settings(f"precision={precision}", f"compile={compiling}")
            agents[mode] = make_agent(chosen, *sizes)
    agent = agents[mode]  # the last one is what a training takes
    step = vector_step(agent, *sizes)
    measured: dict[str, Callable[[], Any]] = {
        "act_ms": lambda: agent.act(step["states"], step["previous"], config.total_steps),
        "observe_ms": lambda: agent.observe(**step),
        **{name: partial(update, agents[name]) for name in agents},
    }
    for do in reversed(measured.values()):  # compiles, the mode of a training first
        for _ in range((WARM_UPS + 1) * config.agent.accumulate):
            do()
    core_seconds = busy_cores(device) / 1e3  # of a millisecond
    # in a process of its own: settings of the C library hold for a whole process
    with apart(partial(plain_updates, overrides, sizes)) as measure_plain:

        def measure(seconds: float) -> dict[str, Any]:
            plain = measure_plain(seconds)
            ms = {name: milliseconds(do, seconds, device) for name, do in measured.items()}
            acting = core_seconds * (ms["act_ms"] + ms["observe_ms"]) / config.env.num_envs
            updating = core_seconds * ms[mode] / config.agent.steps_between_updates
            return {
                "modes": {PLAIN: plain, **{name: ms[name] for name in agents}},
                "act_ms": ms["act_ms"],
                "observe_ms": ms["observe_ms"],
                "samples": config.agent.batch_size * config.agent.sequence_length,
                "seconds_per_agent_step": acting + updating,
            }

        yield measure


if __name__ == "__main__":
    # what is said about compiling is no answer
    with redirect_stdout(sys.stderr), learning(sys.argv[2:]) as measure:
        for _ in sys.stdin:
            print(json.dumps(measure(float(sys.argv[1]))), file=sys.__stdout__, flush=True)
