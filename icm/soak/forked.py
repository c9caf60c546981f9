"""The real scripts, run often: forked from a process that has imported what they need.

Importing PyTorch would take most of the time.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from icm.files import ROOT

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["icm.soak.preloaded"])

OUTPUTS = ("stdout", "stderr", "status", "peak")
"""Files of what a script printed, its exit status, and its peak memory."""


@dataclass
class Ended:
    """How a script ended.

    returncode: as a shell sees it; None if it took too long, or crashed.
    peak: its peak memory, bytes.
    """

    returncode: int | None
    stdout: str
    stderr: str
    peak: int


def run_forked(
    name: str, arguments: tuple[str, ...], environment: dict[str, str], timeout: float
) -> Ended:
    """Run scripts/`name`, or what an absolute path names, for at most `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, file) for file in OUTPUTS]
        process = start_forked(name, arguments, environment, Path(folder))
        process.join(timeout)
        process.kill()  # no effect on one that has ended
        process.join()
        stdout, stderr, status, peak = (
            file.read_text() if file.exists() else "" for file in outputs
        )
    return Ended(int(status) if status else None, stdout, stderr, int(peak or 0))


def start_forked(
    name: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    folder: Path,
    session: bool = False,
) -> BaseProcess:
    """Start what `run_forked` runs; writes `OUTPUTS` into a folder.

    If `session`, in a session of its own, as from a terminal.
    """
    outputs = [folder / file for file in OUTPUTS]
    command = [str(ROOT / "scripts" / name), *arguments]
    process = _FORKS.Process(target=_as_script, args=(command, environment, outputs, session))
    process.start()
    return process


def _as_script(
    command: list[str], environment: dict[str, str], outputs: list[Path], session: bool
) -> None:
    if session:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` is not meant for these
    for number, path in enumerate(outputs[:2], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # it was read when PyTorch was imported, elsewhere
    os.chdir(ROOT)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    status: object = 1  # of an exception
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code or 0
        raise
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # files, because with several processes and threads an exit status may get lost
        outputs[3].write_text(str(peak if sys.platform == "darwin" else peak * 1024))
        outputs[2].write_text(str(status))
