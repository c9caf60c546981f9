"""Trainings that take turns on one machine: each in processes of its own, paused between turns.

Processes, because the number of threads is a setting of a whole process; turns, because a machine's
speed changes from minute to minute; pauses, because starting takes longer than a turn.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from icm.errors import UserError
from icm.files import ROOT, json_lines

POLL = 0.1  # seconds between looks at a run; often enough, and next to no load
STARTING_TIME = 300.0  # seconds by which a training must learn
MAX_STEPS = 10_000_000  # agent steps; ends a training that nobody is left to stop
LOG_EVERY = 160  # agent steps
WARMUP_STEPS = 1_000  # agent steps, more than the default configuration needs for an update


class Contender:
    """A training that runs in turns.

    It reports on itself in a file of JSON lines with `step` (agent steps so far) and
    `speed/agent_steps_per_s` (since the previous line, by a clock that also runs in pauses).
    Entering starts it, `get_ready` pauses it once it learns; leaving ends it.

    Args:
        command: what to run, given a temporary folder.
        progress: the file of JSON lines in that folder; `output` is what the command prints.
        learning: lines without this key are from before learning; None: no lines are.

    Raises:
        UserError: (`get_ready`) the command refused its arguments, or ended before it learned.
    """

    def __init__(
        self,
        command: Callable[[Path], list[str]],
        progress: str = "output",
        learning: str | None = None,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="icm-bench-")
        self.folder = Path(self._temporary.name)
        self.command = command(self.folder)
        self.progress, self.learning = self.folder / progress, learning

    def __enter__(self) -> "Contender":
        # files, because a pipe that nobody reads can fill up and block the run
        with (self.folder / "output").open("wb") as out, (self.folder / "errors").open("wb") as err:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=err,
                # its own group, to pause it and to keep Ctrl-C from it, but in this session:
                # should this process be killed, the system ends what is paused
                process_group=0,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """End it by SIGTERM, so that it ends its own workers, else kill its group."""
        if self.process.poll() is None:
            self.process.terminate()
            os.killpg(self.process.pid, signal.SIGCONT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._temporary.cleanup()

    def get_ready(self) -> None:
        """Wait until it learns steadily, then pause it."""
        # the first line also covers one-time work
        self._wait(lambda: len(self._lines()) >= 2, STARTING_TIME)
        self._pause()

    def turn(self, seconds: float) -> float:
        """Let it run for about `seconds`; return agent steps/s.

        It warms up until its first line, which includes the pause, in which the system may have
        taken its memory from it.
        """
        counted = len(self._lines())
        os.killpg(self.process.pid, signal.SIGCONT)
        start = time.monotonic()
        self._wait(
            lambda: time.monotonic() - start >= seconds and len(self._lines()) >= counted + 2,
            seconds + STARTING_TIME,
        )
        self._pause()
        return rate_of(self._lines()[counted:])

    def said(self) -> str:
        """The first line it printed."""
        return (self.folder / "output").read_text().partition("\n")[0]

    def _pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)
        time.sleep(POLL)  # until it is in effect

    def _lines(self) -> list[dict[str, Any]]:
        if not self.progress.is_file():
            return []
        lines = json_lines(self.progress)
        return [line for line in lines if self.learning is None or self.learning in line]

    def _wait(self, done: Callable[[], bool], limit: float) -> None:
        end = time.monotonic() + limit
        while not done():
            status = self.process.poll()
            if status is None and time.monotonic() < end:
                time.sleep(POLL)
                continue
            errors = (self.folder / "errors").read_text().strip()
            if status == 2:  # its own one line for the user
                raise UserError(errors.rpartition("error: ")[2])
            if status == 0:
                raise UserError("the run ended before it had learned for a while")
            ended = "it hangs" if status is None else f"exit status {status}"
            raise RuntimeError(f"{' '.join(self.command)}: {ended}\n{errors}")


def rate_of(lines: list[dict[str, Any]]) -> float:
    """Agent steps/s from the first to the last line."""
    seconds = 0.0
    for before, line in pairwise(lines):
        seconds += (line["step"] - before["step"]) / line["speed/agent_steps_per_s"]
    return float((lines[-1]["step"] - lines[0]["step"]) / seconds)


def training(overrides: list[str]) -> Contender:
    """scripts/train.py; `overrides` of its settings come last.

    Warm-up, logging and checkpoints are set so that learning starts early, is logged often and is
    never interrupted.
    """
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        f"total_steps={MAX_STEPS}",
        f"checkpoint.every={MAX_STEPS}",
        f"log.every={LOG_EVERY}",
        f"agent.warmup_steps={WARMUP_STEPS}",
        *overrides,
    ]
    return Contender(
        lambda folder: [*command, f"hydra.run.dir={folder / 'run'}"],
        "run/metrics.jsonl",
        learning="speed/update_share",
    )


def tutorial(action_repeat: int) -> Contender:
    """The tutorial's loop."""
    return Contender(
        lambda folder: [sys.executable, "-m", "icm.bench.tutorial", str(action_repeat)]
    )


def stable_baselines3(algorithm: str, action_repeat: int) -> Contender:
    """`ppo` or `dqn` of Stable-Baselines3."""
    return Contender(
        lambda folder: [sys.executable, "-m", "icm.bench.sb3", algorithm, str(action_repeat)]
    )
