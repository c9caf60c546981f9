"""Worker processes that are killed or hang, again and again, in one run."""

import random
import signal
import statistics
import time
from pathlib import Path

import psutil

from icm.soak.program import (
    LEARNERS,
    LOG_EVERY,
    QUICK,
    Findings,
    Training,
    compare_with_undisturbed,
    facts,
)

BACK = 10.0  # seconds after which a training must be as fast as before
ON = 3 * LOG_EVERY  # agent steps, after which a training goes on
HANGING = 60.0  # seconds within which it must notice that a worker hangs


def workers(folder: Path, kills: int, hangs: int, seed: int) -> Findings:
    """Kill and stop workers of one training, which must go on as if undisturbed."""
    found, chance = Findings(), random.Random(seed)
    settings = (*LEARNERS["ppo"], *QUICK, f"seed={seed}")
    training = Training(folder / "run", settings)
    if not training.wait_for(2 * LOG_EVERY):
        found.failures.append(f"did not begin: {training.last_words()}")
    delays: dict[str, list[float]] = {"killed": [], "hung": []}
    for what in chance.sample(["killed"] * kills + ["hung"] * hangs, kills + hangs):
        time.sleep(chance.uniform(0.2, 1.0))
        running = training.workers()
        if not running:
            found.failures.append(f"no workers: {training.last_words()}")
            break
        worker = chance.choice(running)
        worker.send_signal(signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        start = time.monotonic()
        found.tried += 1
        gone = psutil.wait_procs([worker], timeout=HANGING)[0]
        found.expect(bool(gone), f"{what}: worker {worker.pid} was not replaced")
        noticed = time.monotonic()
        goes_on = training.wait_for(training.step() + ON)
        found.expect(goes_on, f"{what}: it did not go on: {training.last_words()}")
        delays[what].append(time.monotonic() - (start if what == "killed" else noticed))
        found.expect(delays[what][-1] < BACK, f"{what}: {delays[what][-1]:.0f} s without a step")
    failures = training.lines()[-1]["workers/failures"] if training.lines() else 0
    found.expect(failures == found.tried, f"{failures} failures counted, not {found.tried}")
    found.expect(
        training.end(signal.SIGTERM, found) == 143, f"it did not end: {training.last_words()}"
    )
    logged = {line["step"]: facts(line) for line in training.lines()}
    compare_with_undisturbed(folder / "undisturbed", settings, logged, found)
    found.figures = {
        "agent_steps": max(logged, default=0),
        "lines_compared": len(logged),
        **{
            f"seconds_until_{ON}_more_steps_after_{what}": {
                "median": statistics.median(seconds),
                "most": max(seconds),
            }
            for what, seconds in delays.items()
            if seconds
        },
    }
    return found
