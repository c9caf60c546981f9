"""Files that are written whole or not at all."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from filelock import AcquireReturnProxy, FileLock, Timeout

from icm.errors import UserError, WriteError

ROOT = Path(__file__).resolve().parents[1]
"""The project's root, with `conf/` and `scripts/`."""


def latest(run: Path) -> Path:
    """The newest checkpoint of a run folder."""
    return run / "checkpoints" / "latest.pt"


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that may be growing: what follows the last line break is ignored.

    Raises:
        OSError: it cannot be read.
        UserError: a line is damaged, or has no `step`.
    """
    found = []
    for number, line in enumerate(path.read_bytes().rpartition(b"\n")[0].splitlines(), start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"{path}: line {number} is damaged; remove it") from None
        if not isinstance(found[-1].get("step"), int):
            raise UserError(f"{path}: line {number} has no step; remove it")
    return found


def numbered(folder: Path, kind: str) -> list[Path]:
    """A folder's files `kind`_<agent steps>.pt, sorted by steps; others are the user's own."""
    named = ((path.stem.removeprefix(f"{kind}_"), path) for path in folder.glob(f"{kind}_*.pt"))
    return [path for _, path in sorted((int(n), path) for n, path in named if n.isdecimal())]


LOCK = ".lock"


def lock(folder: Path) -> AcquireReturnProxy:
    """Let no other process write to a run folder while the result lives, or in its context.

    Raises:
        UserError: another one does.
    """
    try:
        return FileLock(folder.resolve() / LOCK, blocking=False, is_singleton=True).acquire()
    except Timeout:
        raise UserError(f"{folder}: another training writes there; give another folder") from None
    except OSError as error:
        raise WriteError(f"cannot write to {folder}: {error.strerror}") from None


def remove_leftovers(folder: Path) -> None:
    """Remove what processes of this machine were writing when they were killed.

    In a folder and its subfolders.
    """
    for file in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        name, _, process = file.stem.rpartition(".")
        is_ours = name.endswith(f".{socket.gethostname()}") and process.isdigit()
        # this process's id means an earlier process: in a container, all have the same id
        if is_ours and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            _remove(file)


def _remove(file: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if file.is_dir():
        shutil.rmtree(file, ignore_errors=True)
    else:
        with suppress(OSError):
            file.unlink()


@contextmanager
def whole(path: Path) -> Generator[Path]:
    """A temporary name for a file or a folder, which becomes `path` if nothing goes wrong.

    Raises:
        WriteError: it cannot be written.
    """
    if not path.name:  # of `.`, for instance
        raise WriteError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]  # ffmpeg's has no errno
        raise WriteError(f"cannot write {path}: {reason}") from None
    finally:
        _remove(temporary)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file so that `path` never holds half of it, not even after a power cut.

    Raises:
        WriteError: it cannot be written.
    """
    with whole(path) as temporary, temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file at once, see `write_whole`."""
    write_whole(path, lambda file: file.write(content))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file at once, see `write_whole`."""
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
