"""What the tests share: the composed settings, and running the real scripts."""

import copy
import functools
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from icm.config import Config, parse_config
from icm.files import ROOT, json_lines, latest
from icm.soak.forked import run_forked, start_forked

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes that they have started."""
    return (os.process_cpu_count() or 1) + 1


def pytest_sessionfinish() -> None:
    """What a test that failed has left running ends with the tests."""
    for process in multiprocessing.active_children():
        process.kill()


@functools.cache
def composed(name: str, *overrides: str) -> DictConfig:
    """The settings of a script, to be read: Hydra takes a quarter of a second."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


PARSED: dict[str, Config] = {}
"""What `settings` has given, by its arguments: to check them takes a fortieth of a second."""


def settings(*overrides: str, **values: Any) -> Config:
    """The default settings of scripts/train.py with overrides.

    And with values that are given as they are: `agent__n_step=5` is `agent.n_step`.
    """
    if (known := repr((overrides, values))) not in PARSED:
        PARSED[known] = parsed(overrides, values)
    return copy.deepcopy(PARSED[known])


def parsed(overrides: tuple[str, ...], values: dict[str, Any]) -> Config:
    """See `settings`."""
    given = [OverridesParser.create().parse_override(override) for override in overrides]
    groups = {"agent", "curiosity", "preset"}
    choices = [o.input_line for o in given if o.key_or_group in groups]
    config = copy.deepcopy(composed("config", *choices))
    changes = {o.key_or_group: o.value() for o in given if o.key_or_group not in groups}
    for name, value in (changes | {k.replace("__", "."): v for k, v in values.items()}).items():
        OmegaConf.update(config, name, value)
    return parse_config(config)


def unseen() -> dict[str, str]:
    """The environment of a script without a GPU, without a display and with one thread."""
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    return environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_script(
    name: str, *arguments: object, env: dict[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a script of scripts/ as a user does, without a GPU and without a display.

    In a process of its own, forked from one that has imported what scripts need and done nothing
    else: importing would take most of the time. With `env`, in a wholly new one.
    """
    command = [str(ROOT / "scripts" / name), *map(str, arguments)]
    environment = unseen() | (env or {})
    if env is not None:
        return subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    ended = run_forked(name, tuple(map(str, arguments)), environment, timeout)
    if ended.returncode is None:
        raise subprocess.TimeoutExpired(command, timeout, ended.stdout, ended.stderr)
    return subprocess.CompletedProcess(command, ended.returncode, ended.stdout, ended.stderr)


def script_into(output: str | None, name: str, *arguments: object) -> tuple[int, str]:
    """Status and stderr of a script that prints into a file; None: into a pipe nobody reads."""
    if output is None:
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(output, os.O_WRONLY)
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=unseen())
    os.close(write)
    return done.returncode, done.stderr


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """What a run folder's metrics.jsonl has."""
    return json_lines(folder / "metrics.jsonl")


def without_speed(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what depends on the machine."""
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it is after `torch.save` and a loading that executes nothing."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def wait_for_lines(folder: Path, number: int, is_running: Callable[[], bool]) -> None:
    """Until a training has logged so many."""
    log = folder / "metrics.jsonl"
    while not (log.is_file() and len(metrics_of(folder)) >= number):
        assert is_running()
        time.sleep(0.05)


def wait_for_checkpoint(folder: Path, is_running: Callable[[], bool]) -> None:
    """Until a training has one in its folder."""
    while not latest(folder).exists():
        assert is_running()
        time.sleep(0.01)


def whole_training(folder: Path, *arguments: object) -> Path:
    """The folder of a training that has ended well."""
    done = run_script("train.py", *arguments, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def forked_training(place: Path, *arguments: object) -> BaseProcess:
    """Start scripts/train.py, forked as in `run_script`, in a session of its own.

    What it prints is written into a folder. Not for tests of how a process of its own begins, or of
    its terminal.
    """
    return start_forked("train.py", tuple(map(str, arguments)), unseen(), place, session=True)


def train_after(first: str, place: Path) -> str:
    """A script, written into a folder, that runs Python code and then, as it is, scripts/train.py.

    Not in workers, which import it, too.
    """
    script = place / "train_after.py"
    train = f"runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r}, run_name='__main__')"
    guarded = textwrap.indent(f"{first.strip()}\n{train}\n", "    ")
    script.write_text(f"import runpy\n\nif __name__ == '__main__':\n{guarded}")
    return str(script)


DYING = """
import os, signal
from icm import checkpoint

save = checkpoint.save

def save_and_die(path, content):
    save(path, content)
    if path.name == "latest.pt":
        os.killpg(0, signal.SIGKILL)

checkpoint.save = save_and_die
"""


def killed_training(folder: Path, *arguments: object) -> None:
    """A training that is killed, with all that belongs to it, as soon as it has a checkpoint."""
    with tempfile.TemporaryDirectory() as place:
        script, given = train_after(DYING, Path(place)), tuple(map(str, arguments))
        process = start_forked(script, given, unseen(), Path(place), session=True)
        process.join(120)
        process.kill()  # nothing happens to one that has ended
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert latest(folder).exists()


UNSEEN = ("map.every=0", "video.every=0", "report.every=0")
"""Overrides that let a training draw nothing."""

SMALL = (
    "agent=dqn",
    "env.emulator=libretro",
    "env.num_envs=1",
    "env.stuck_steps=20",  # short episodes
    "env.action_repeat=2",  # a third of the frames
    "env.size=16",  # and an eighth of the pixels
    "agent.batch_size=2",
    "agent.sequence_length=4",
    "agent.warmup_steps=32",
    "agent.replay_capacity=200",
    "agent.steps_per_update=8",
    "log.every=32",
    *UNSEEN,
    "precision=float32",
    "compile=off",
    "device=cpu",
)
"""Overrides that make a run of scripts/train.py take seconds."""

FULL = ("env.action_repeat=6", "env.size=42")
"""Overrides after those: as many frames and pixels as by default."""


@pytest.fixture(scope="session")
def for_all(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all test processes share."""
    mine = tmp_path_factory.getbasetemp()
    return mine if worker_id == "master" else mine.parent


@pytest.fixture
def shared_memory(for_all: Path) -> Iterator[None]:
    """For a test that has named shared memory, or looks whether any is left: one at a time."""
    with FileLock(for_all / "shared_memory.lock"):
        yield


@pytest.fixture(scope="session")
def trained(for_all: Path) -> Path:
    """The run folder of a real, short training on the real game; one for all test processes."""
    folder = for_all / "trained"
    drawn = ("map.every=32", "video.every=32", "report.every=32")
    more = (*FULL, *drawn, "env.emulator=nes_py", "compile=auto")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            given = (*SMALL, *more, "total_steps=96", f"hydra.run.dir={folder}")
            done = run_script("train.py", *given, timeout=400)  # drawing may wait
            assert done.returncode == 0, done.stderr
    return folder
