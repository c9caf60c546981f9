"""The real scripts/train.py as a process, and what it leaves behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from icm import checkpoint
from icm.files import ROOT, json_lines, latest
from icm.processes import signals_handled

SCRIPT = ROOT / "scripts" / "train.py"
PATIENCE = 120.0  # seconds for a training to begin or to end by itself

LOG_EVERY = 32  # agent steps

QUICK = (
    "env.num_envs=2",
    "env.num_workers=2",
    "env.stuck_steps=20",
    "agent.sequence_length=4",
    "agent.warmup_steps=32",
    "agent.replay_capacity=2000",
    "checkpoint.every=100",
    f"log.every={LOG_EVERY}",
    "map.every=0",
    "video.every=0",
    "report.every=0",
    "compile=off",
    "device=cpu",
    "total_steps=1000000",
)
"""Settings with which much happens in a second: short episodes, small updates, many checkpoints."""

ROLLOUTS = ("agent.rollout_steps=16", "agent.epochs=1", "agent.replayed=2", "agent.batch_size=2")
LEARNERS = {
    "dqn": ("agent=dqn", "agent.steps_per_update=8", "agent.batch_size=4"),
    "ppo": ("agent=ppo", *ROLLOUTS),
    "pqn": ("agent=pqn", *ROLLOUTS),
}


@dataclass
class Findings:
    """What a part of the soak test has found.

    tried: how often something was broken.
    failures: where the program broke a promise, a line each.
    figures: numbers by name.
    """

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a failure if something does not hold."""
        if not holds:
            self.failures.append(otherwise)


def _begin(terminal: int | None) -> None:
    """Begin as in a terminal, even if this process was started with `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if terminal is not None:
        os.login_tty(terminal)


_STARTED: list[subprocess.Popen[bytes]] = []
_OVER = threading.Event()  # no more trainings are started


@contextmanager
def ended_by_signals() -> Generator[None]:
    """Inside, a signal ends all trainings, and this process, whose threads would start more."""

    def end(number: int, frame: object) -> None:
        _OVER.set()
        end_all()
        sys.exit(128 + number)

    with signals_handled(end):
        yield


def end_all() -> None:
    """Kill trainings left running by a part that failed or was interrupted."""
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Training:
    """A training that runs in a session of its own.

    Args:
        folder: its run folder.
        settings: of scripts/train.py.
        environment: variables that it gets besides ours.
        output: descriptor of a file that it prints to; None: one beside its run folder.
        terminal: descriptor of a terminal that it runs in instead.
    """

    def __init__(
        self,
        folder: Path,
        settings: tuple[str, ...],
        environment: dict[str, str] | None = None,
        output: int | None = None,
        terminal: int | None = None,
    ) -> None:
        if _OVER.is_set():
            raise InterruptedError("the soak test is being ended")
        self.folder = folder
        self.printed = folder.with_name(f"{folder.name}.txt")
        self.printed.parent.mkdir(parents=True, exist_ok=True)
        with self.printed.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT, *settings, f"hydra.run.dir={folder}"],
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file if output is None else output,
                stderr=file if output is None else output,
                start_new_session=terminal is None,
                preexec_fn=partial(_begin, terminal),
            )
        _STARTED.append(self.process)

    @property
    def latest(self) -> Path:
        """Its newest checkpoint."""
        return latest(self.folder)

    def saved(self) -> int:
        """The agent step of its newest checkpoint.

        Raises:
            UserError: that is damaged, or has no memory beside it.
        """
        step = int(checkpoint.load(self.latest)["step"])
        checkpoint.load_file(self.latest.with_name(checkpoint.memory_name(step)))
        return step

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged."""
        try:
            return json_lines(self.folder / "metrics.jsonl")
        except FileNotFoundError:
            return []

    def step(self) -> int:
        """The agent step of the latest line, or 0."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else 0

    def wait_for(self, what: Path | int) -> bool:
        """Wait until a file is there, or an agent step is logged.

        Returns:
            False if it ended before, or stopped logging.
        """
        step, limit = 0, time.monotonic() + PATIENCE
        while not (what.exists() if isinstance(what, Path) else self.step() >= what):
            if step != (step := self.step()):
                limit = time.monotonic() + PATIENCE
            if self.process.poll() is not None or time.monotonic() > limit:
                return False
            time.sleep(0.02)
        return True

    def has_begun(self) -> bool:
        """Wait until its loop begins; False if it never does."""
        return self.wait_for(self.folder / "metrics.jsonl")

    def children(self) -> list[psutil.Process]:
        """Its descendant processes."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """Those that run environments."""
        found = []
        for child in self.children():
            try:
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                pass
        return found

    def end(self, number: signal.Signals, findings: Findings) -> int:
        """Send a signal and wait; return exit status. No process may be left."""
        children = self.children()
        self.process.send_signal(number)
        return self.ended(findings, children)

    def ended(self, findings: Findings, children: list[psutil.Process] | None = None) -> int:
        """Wait for its end; return exit status. None of `children` may be left."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
            findings.failures.append(f"{self.folder}: did not end")
        left = psutil.wait_procs(children or [], timeout=10)[1]
        findings.expect(not left, f"{self.folder}: {len(left)} processes are left")
        for process in left:
            process.kill()
        findings.expect(
            "Traceback" not in self.text(), f"{self.folder}: {self.last_words()} (a traceback)"
        )
        return status

    def text(self) -> str:
        """What it printed."""
        return self.printed.read_text()

    def last_words(self) -> str:
        """The last line that it printed."""
        return next(iter(self.text().strip().splitlines()[-1:]), "nothing printed")


def compare_with_undisturbed(
    folder: Path, settings: tuple[str, ...], logged: dict[int, dict[str, Any]], findings: Findings
) -> None:
    """An undisturbed training in `folder` must log the same: `facts` by agent step."""
    reference = Training(folder, settings)
    if not reference.wait_for(max(logged, default=0)):
        findings.failures.append(f"{folder}: did not get there: {reference.last_words()}")
    reference.end(signal.SIGTERM, findings)
    truth = {line["step"]: facts(line) for line in reference.lines()}
    different = [step for step, line in logged.items() if truth.get(step) != line]
    findings.expect(
        not different, f"{folder}: was otherwise from step {min(different, default=0)} on"
    )


def facts(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the log without what depends on the machine."""
    return {k: v for k, v in line.items() if not k.startswith(("speed/", "workers/"))}


def leftovers(folder: Path) -> list[str]:
    """Temporary files anywhere below a folder."""
    return [str(file) for file in folder.rglob(".*.tmp")]


def shared_memory() -> set[str]:
    """Names in /dev/shm, where there is one."""
    place = Path("/dev/shm")
    return {file.name for file in place.iterdir()} if place.is_dir() else set()
