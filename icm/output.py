"""What scripts print: mistakes in one line, any text, and all of it also where nobody reads it."""

import errno
import io
import os
import stat
import sys
from pathlib import Path
from typing import TextIO

from icm.errors import UserError

OF_FILES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EMFILE),
)
"""Errors of the operating system that are not the program's fault: no traceback is wanted."""


def fail(error: Exception) -> None:
    """For a mistake of the user, print one line on stderr and exit with status 2.

    With status 1 if nobody reads the output any more. Returns for any other error.
    """
    if isinstance(error, BrokenPipeError):
        discard(sys.stdout.fileno())
        sys.exit(1)
    if isinstance(error, UserError) or getattr(error, "errno", None) in OF_FILES:
        text = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(2)


def take_any_text() -> None:
    """From now on, print what the encoding of stdout lacks as escape sequences."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def discard(output: int) -> None:
    """Silently discard what is written to a file descriptor from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def say(line: str, output: TextIO) -> None:
    """Print a line; if nobody reads it any more, go on without it."""
    try:
        print(line, file=output, flush=True)
    except OSError:
        discard(output.fileno())


def leave_terminal() -> None:
    """Stop writing to a lost terminal."""
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            discard(output)
