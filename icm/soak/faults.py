"""Faults of real machines: each must end in a clear line, and nothing saved may be lost."""

import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from icm import checkpoint
from icm.errors import UserError
from icm.soak.program import LEARNERS, LOG_EVERY, QUICK, Findings, Training, end_all

SETTINGS = (*LEARNERS["ppo"], *QUICK)

TRIES = 6
PROMPTLY = 10.0  # seconds; many schedulers kill after that
COMPILERS = ("cc1plus", "g++", "clang++", "clang")

DAY_BACK = """
import time
begun, now = time.monotonic(), time.time
time.time = lambda: now() - 86400 * (time.monotonic() > begun + 8)
"""
"""A sitecustomize.py that sets the clock back by a day, eight seconds after the start."""


def faults(folder: Path) -> Findings:
    """Each fault once."""
    found = Findings()
    for name, fault in FAULTS.items():
        here = folder / name.replace(" ", "_")
        here.mkdir(parents=True)
        before = len(found.failures)
        try:
            found.figures[name] = fault(here, found)
        except Exception as error:  # the other faults are still tried
            found.failures.append(f"{type(error).__name__}: {error}")
        finally:
            end_all()
        found.tried += 1
        found.failures[before:] = [f"{name}: {line}" for line in found.failures[before:]]
    return found


def _refused(training: Training, found: Findings, words: str) -> str:
    """Expect exit status 2 and a last line with these words; return the line."""
    status = training.ended(found)
    line = training.last_words()
    found.expect(status == 2 and "error: " in line and words in line, f"exit {status}: {line}")
    return line


def _goes_on(latest: Path, folder: Path, found: Findings) -> None:
    """Resuming a checkpoint works, memory included."""
    step = int(checkpoint.load(latest)["step"])
    training = Training(folder, (f"resume={latest}", f"total_steps={step + 1000}"))
    status = training.ended(found)
    text = training.text()
    exact = "running episodes again" in text
    found.expect(status == 0 and exact, f"not resumed: {training.last_words()}")


@contextmanager
def _disk(folder: Path, megabytes: int) -> Generator[Path]:
    """A disk of that size."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "soak", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _mount(*arguments: str | Path) -> None:
    """Mount something; this needs privileges.

    Raises:
        UserError: it cannot be done here.
    """
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"not tried: mounting needs root on Linux ({error})") from None


def _full_disk(folder: Path, found: Findings) -> str:
    with _disk(folder / "disk", 30) as disk:
        training = Training(disk / "run", (*SETTINGS, "checkpoint.keep=1000"))
        line = _refused(training, found, "No space left on device")
        found.expect(training.saved() > 0, "nothing saved")
        _goes_on(training.latest, folder / "resumed", found)
    return line


def _disk_filled_by_others(folder: Path, found: Findings) -> str:
    with _disk(folder / "disk", 30) as disk:
        training = Training(disk / "run", (*SETTINGS, "checkpoint.keep=1"))
        training.wait_for(training.latest)
        with (disk / "others").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        line = _refused(training, found, "No space left on device")
        found.expect(training.saved() > 0, "nothing saved")
        (disk / "others").unlink()
        _goes_on(training.latest, folder / "resumed", found)
    return line


def _read_only(folder: Path, found: Findings) -> str:
    training = Training(folder / "run", SETTINGS)
    training.wait_for(training.latest)
    place = training.latest.parent
    _mount("--bind", place, place)
    try:
        _mount("-o", "remount,bind,ro", place)
        line = _refused(training, found, "Read-only file system")
        found.expect(training.saved() > 0, "nothing saved")
        _goes_on(training.latest, folder / "resumed", found)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    return line


def _closed_terminal(folder: Path, found: Findings) -> int:
    terminal, end = os.openpty()
    training = Training(folder / "run", SETTINGS, terminal=end)
    os.close(end)
    begun = time.monotonic()
    while not training.latest.exists() and time.monotonic() < begun + 60:
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)
    children = training.children()
    os.close(terminal)
    status = training.ended(found, children)
    found.expect(status == 129, f"exit {status}")
    step = training.saved()
    found.expect(step >= training.step(), f"saved {step}, was at {training.step()}")
    return step


def _output_closed(folder: Path, found: Findings) -> int:
    end, output = os.pipe()
    training = Training(folder / "run", SETTINGS, output=output)
    os.close(output)
    training.wait_for(training.latest)
    os.close(end)
    (worker, *_) = training.workers()
    worker.kill()  # there is something to say now
    found.expect(training.wait_for(training.step() + 10 * LOG_EVERY), "it ended")
    status = training.end(signal.SIGTERM, found)
    found.expect(status == 143, f"exit {status}")
    return training.saved()


def _removed_folder(folder: Path, found: Findings) -> str:
    training = Training(folder / "run", SETTINGS)
    training.wait_for(training.latest)
    step = training.step()
    shutil.rmtree(training.folder)
    line = _refused(training, found, "No such file or directory")
    found.expect(training.saved() >= step, f"saved {training.saved()}, was at {step}")
    _goes_on(training.latest, folder / "resumed", found)
    return line


def _clock_set_back(folder: Path, found: Findings) -> int:
    (folder / "sitecustomize.py").write_text(DAY_BACK)
    training = Training(folder / "run", SETTINGS, {"PYTHONPATH": str(folder)})
    training.has_begun()
    time.sleep(12)
    events = [file.stat().st_size for file in training.folder.glob("events.*")]
    step = training.step()
    found.expect(
        training.wait_for(step + 10 * LOG_EVERY), f"it did not go on: {training.last_words()}"
    )
    grown = [file.stat().st_size for file in training.folder.glob("events.*")]
    found.expect(sum(grown) > sum(events), "TensorBoard gets nothing any more")
    status = training.end(signal.SIGTERM, found)
    found.expect(status == 143, f"exit {status}: {training.last_words()}")
    _goes_on(training.latest, folder / "resumed", found)
    return training.saved()


def _two_runs_in_one_folder(folder: Path, found: Findings) -> str:
    (folder / "run").mkdir()
    both = [Training(folder / "run", SETTINGS) for _ in range(2)]
    while all(each.process.poll() is None for each in both) and not both[0].latest.exists():
        time.sleep(0.05)
    loser, winner = sorted(both, key=lambda each: each.process.poll() is None)
    line = _refused(loser, found, "give another folder")
    found.expect(winner.wait_for(winner.latest), f"the other one too: {winner.last_words()}")
    third = Training(folder / "run", SETTINGS)
    _refused(third, found, "give another folder")
    status = winner.end(signal.SIGTERM, found)
    found.expect(status == 143 and winner.saved() > 0, f"exit {status}: {winner.last_words()}")
    return line


def _resumed_while_it_lives(folder: Path, found: Findings) -> int:
    training = Training(folder / "run", SETTINGS)
    training.wait_for(training.latest)
    _goes_on(training.latest, folder / "resumed", found)
    found.expect(
        training.wait_for(training.step() + 10 * LOG_EVERY), f"it ended: {training.last_words()}"
    )
    status = training.end(signal.SIGTERM, found)
    found.expect(status == 143, f"exit {status}: {training.last_words()}")
    return training.saved()


def _interrupted_while_compiling(folder: Path, found: Findings) -> list[float]:
    """Seconds from Ctrl-C, sent ever later, to the end."""
    seconds = []
    for delay in range(TRIES):
        settings = (*SETTINGS, "compile=on")
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache{delay}")}
        training = Training(folder / f"run{delay}", settings, cache)
        begun = time.monotonic()
        while not _compilers(training) and time.monotonic() < begun + 60:
            time.sleep(0.05)
        time.sleep(delay)
        children = training.children()
        start = time.monotonic()
        os.killpg(training.process.pid, signal.SIGINT)  # as a terminal does
        status = training.ended(found, children)
        seconds.append(round(time.monotonic() - start, 1))
        found.expect(status == 130, f"exit {status}: {training.last_words()}")
        found.expect(seconds[-1] < PROMPTLY, f"took {seconds[-1]} s")
        training.saved()
    return seconds


def _compilers(training: Training) -> list[psutil.Process]:
    return [child for child in training.children() if child.name() in COMPILERS]


def _learning_breaks_down(folder: Path, found: Findings) -> str:
    training = Training(folder / "run", (*SETTINGS, "agent.lr=1e30", "curiosity.lr=1e30"))
    return _refused(training, found, "not finite")


FAULTS = {
    "disk full": _full_disk,
    "disk filled by others": _disk_filled_by_others,
    "folder read-only": _read_only,
    "folder removed": _removed_folder,
    "clock set back": _clock_set_back,
    "two runs in one folder": _two_runs_in_one_folder,
    "resumed while it lives": _resumed_while_it_lives,
    "terminal closed": _closed_terminal,
    "output closed": _output_closed,
    "interrupted while compiling": _interrupted_while_compiling,
    "learning breaks down": _learning_breaks_down,
}
