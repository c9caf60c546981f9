"""Files that are written whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from icm.errors import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file or a folder under, which becomes `path` if nothing goes wrong.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]  # ffmpeg's has no number
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file so that `path` never holds half of it, not even after a power cut.

    Raises:
        UserError: it cannot be written.
    """
    with whole(path) as temporary, temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file at once, see `write_whole`."""
    write_whole(path, lambda file: file.write(content))
