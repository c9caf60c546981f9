"""Memory of a training with default settings, over an hour."""

import os
import signal
import time
from pathlib import Path
from statistics import fmean

import psutil

from icm.soak.program import Findings, Training

EVERY = 10.0  # seconds between two looks
MOST_GROWTH = 0.01
MOST_SAVING = 0.02  # share of the time


def hour(folder: Path, settings: list[str], minutes: float) -> Findings:
    """Let a training run, and watch the memory of all its lasting processes.

    After a third of the time, it may not grow any more.
    """
    found = Findings(tried=1)
    training = Training(folder / "run", (*settings, "total_steps=100000000"))
    if not training.has_begun():
        found.failures.append(f"did not begin: {training.last_words()}")
        training.end(signal.SIGTERM, found)
        return found
    cores = os.process_cpu_count() or 1  # as many run environments; one more draws
    looks: list[tuple[float, int, int]] = []
    start = time.monotonic()
    while training.process.poll() is None and time.monotonic() - start < 60 * minutes:
        time.sleep(EVERY)
        processes = [psutil.Process(training.process.pid), *training.workers()[:cores]]
        used = sum(_own_bytes(process) for process in processes)
        looks.append((round(time.monotonic() - start), training.step(), used))
    lines = training.lines()
    found.expect(training.end(signal.SIGTERM, found) == 143, training.last_words())
    warm = [used for _, _, used in looks[len(looks) // 3 :]]
    tenth = max(1, len(warm) // 10)
    early, late = fmean(warm[:tenth]), fmean(warm[-tenth:])
    found.expect(late < early * (1 + MOST_GROWTH), f"grew from {early:.0f} to {late:.0f} bytes")
    shares = [line.get("speed/save_share", 0.0) for line in lines]
    found.expect(fmean(shares) < MOST_SAVING, f"saving took {fmean(shares):.1%} of the time")
    found.figures = {
        "growth": late / early - 1,
        "bytes": late,
        "save_share": fmean(shares),
        "agent_steps": looks[-1][1],
        "seconds, agent steps, bytes": looks,
    }
    return found


def _own_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
