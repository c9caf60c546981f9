"""A training in pieces: ended at random moments, resumed, and compared with an undisturbed one."""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from icm.errors import UserError
from icm.soak.program import (
    LEARNERS,
    LOG_EVERY,
    QUICK,
    Findings,
    Training,
    compare_with_undisturbed,
    facts,
    leftovers,
    shared_memory,
)

LONGEST = 300  # agent steps of a piece, some three checkpoints
EARLY = 0.2  # share of the pieces that end within a second


def kills(folder: Path, number: int, seed: int) -> Findings:
    """`number` kill -9 at random moments, shared by all learners."""
    each = [number // len(LEARNERS) + (i < number % len(LEARNERS)) for i in range(len(LEARNERS))]
    return _all_learners(folder, signal.SIGKILL, each, seed)


def stops(folder: Path, number: int, seed: int) -> Findings:
    """`number` SIGTERM at random moments, per learner."""
    return _all_learners(folder, signal.SIGTERM, [number] * len(LEARNERS), seed)


def _all_learners(folder: Path, how: signal.Signals, numbers: list[int], seed: int) -> Findings:
    before = shared_memory()
    wanted = {learner: n for learner, n in zip(LEARNERS, numbers, strict=True) if n}
    with ThreadPoolExecutor(2) as side_by_side:
        parts = list(
            side_by_side.map(
                lambda learner: _chain(folder / learner, learner, how, wanted[learner], seed),
                wanted,
            )
        )
    found = Findings(
        tried=sum(part.tried for part in parts),
        failures=[line for part in parts for line in part.failures],
        figures={learner: part.figures for learner, part in zip(wanted, parts, strict=True)},
    )
    left = shared_memory() - before
    found.expect(not left, f"shared memory is left: {', '.join(left)}")
    return found


def _chain(folder: Path, learner: str, how: signal.Signals, number: int, seed: int) -> Findings:
    """One training that is ended `number` times."""
    found, chance = Findings(), random.Random(f"{learner} {seed}")
    settings = (*LEARNERS[learner], *QUICK, f"seed={seed}")
    logged: dict[int, dict[str, Any]] = {}
    newest: Path | None = None
    step = lost = 0
    for piece in range(number):
        given = settings if newest is None else (f"resume={newest}",)
        training = Training(folder / f"{piece:03d}", given)
        if not training.has_begun():
            found.failures.append(f"{training.folder}: did not begin: {training.last_words()}")
            training.end(signal.SIGKILL, found)
            continue
        if chance.random() < EARLY:
            time.sleep(chance.uniform(0, 1))
        else:  # until it has saved, or is about to
            training.wait_for(step + chance.randrange(LONGEST))
            time.sleep(chance.uniform(0, 0.5))
        status = training.end(how, found)
        found.tried += 1
        wanted = -how if how == signal.SIGKILL else 128 + how
        found.expect(status == wanted, f"{training.folder}: exit status {status}, not {wanted}")
        if newest is not None:
            left = leftovers(newest.parent)
            found.expect(not left, f"{newest.parent}: left behind: {', '.join(left)}")
            text = training.text()
            found.expect("running episodes again" in text, f"{training.folder}: no exact resume")
        compare(logged, training.lines(), step, found, training.folder)
        if training.latest.exists():
            newest, before = training.latest, step
            try:
                step = training.saved()
            except UserError as error:
                found.failures.append(f"a damaged checkpoint: {error}")
            found.expect(step >= before, f"{newest}: step {step} after {before}")
            lost += max(training.step() - step, 0)
    compare_with_undisturbed(folder / "never_ended", settings, logged, found)
    found.figures = {"agent_steps": step, "lines_compared": len(logged), "steps_lost": lost}
    return found


def compare(
    logged: dict[int, dict[str, Any]],
    lines: list[dict[str, Any]],
    resumed_at: int,
    found: Findings,
    folder: Path,
) -> None:
    """What was logged before must be logged alike again, and no line be missing."""
    expected = (resumed_at // LOG_EVERY + 1) * LOG_EVERY
    for line in lines:
        step, said = int(line["step"]), facts(line)
        found.expect(step == expected, f"{folder}: logged step {step}, not {expected}")
        expected = step + LOG_EVERY
        found.expect(logged.get(step, said) == said, f"{folder}: step {step} went otherwise")
        logged[step] = said
