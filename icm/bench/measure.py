"""One speed measurement at a time, in a process of its own: agent steps per second of learning.

A process of its own, because how many threads compute is a setting of a whole process.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from icm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.2  # seconds between looks at a run; often enough, and next to no load
MAX_RATE = 10_000  # agent steps/s; bounds a run that nobody is left to stop
LOG_EVERY = 320  # agent steps, a few seconds on two cores
WARMUP_STEPS = 320  # agent steps, what the default configuration's replay needs for an update


@dataclass
class BenchConfig:
    """See `conf/bench.yaml`."""

    seconds: float
    rounds: int
    train: list[str]
    out: str | None


def tutorial_rate(seconds: float) -> float:
    """Agent steps/s of the tutorial's loop, over `seconds` in which every step learns."""
    result = subprocess.run(
        [sys.executable, "-m", "icm.bench.tutorial", str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches us alone, and we stop it
        check=True,
    )
    measured = json.loads(result.stdout)
    return float(measured["agent_steps"] / measured["seconds"])


def training_rate(seconds: float, overrides: list[str]) -> tuple[float, str]:
    """Agent steps/s of scripts/train.py over at least `seconds` of steady learning, and its device.

    It is the real script in a temporary run folder. Warm-up, logging and checkpoints are set so
    that learning starts early, is logged often and is never interrupted; `overrides` come after.

    Raises:
        UserError: the script does not accept the `overrides`, or ends too early with them.
    """
    total_steps = int((seconds + 10) * MAX_RATE)
    with tempfile.TemporaryDirectory(prefix="icm-bench-") as temporary:
        folder = Path(temporary)
        command = [
            sys.executable,
            str(ROOT / "scripts" / "train.py"),
            f"total_steps={total_steps}",
            f"checkpoint.every={total_steps}",
            f"log.every={LOG_EVERY}",
            f"agent.warmup_steps={WARMUP_STEPS}",
            *overrides,
            f"hydra.run.dir={folder / 'run'}",
        ]
        # files, because a pipe that nobody reads can fill up and block the run
        with (folder / "output").open("wb") as output, (folder / "errors").open("wb") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=errors, start_new_session=True
            )
            try:
                steps, passed = 0, 0.0
                while passed < seconds and process.poll() is None:
                    time.sleep(POLL)
                    steps, passed = steady(folder / "run" / "metrics.jsonl")
                status = process.poll()  # None: it runs on, as it should
            finally:
                _stop(process)
        said = (folder / "errors").read_text()
        if status == 2:  # its own one line for the user
            raise UserError(f"train={overrides}: {said.strip().rpartition('error: ')[2]}")
        if status:
            raise RuntimeError(f"scripts/train.py: exit status {status}\n{said}")
        if not steps:
            raise UserError(f"train={overrides}: the run ended before it had learned for a while")
        return steps / passed, (folder / "output").read_text().partition("\n")[0]


def steady(metrics: Path) -> tuple[int, float]:
    """Agent steps and seconds of the log intervals in which a run learned all the time."""
    if not metrics.is_file():
        return 0, 0.0
    # what follows the last line break may be half a line
    lines = [json.loads(line) for line in metrics.read_text().split("\n")[:-1]]
    # learning begins within the first of these, which also pays for one-time work
    learning = [line for line in lines if "loss/q" in line]
    steps, passed = 0, 0.0
    for before, line in pairwise(learning):
        steps += line["step"] - before["step"]
        passed += (line["step"] - before["step"]) / line["speed/agent_steps_per_s"]
    return steps, passed


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a run: politely, so that it ends its own workers, else with its whole group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def machine() -> dict[str, Any]:
    """What figures depend on: the CPU, how many cores this process may use, versions.

    `load` is the number of processes that wanted a core over the last minute, so before measuring
    it should be about 0.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(": ")[2]
    return {
        "cpu": cpu,
        "cores": os.process_cpu_count(),
        "load": os.getloadavg()[0],
        "torch": version("torch"),
        "python": platform.python_version(),
    }
