"""The command line of scripts that take paths, not settings."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from icm.output import fail, take_any_text


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that says what is `expected`, as all errors here."""

    def __init__(self, prog: str, description: str, expected: str) -> None:
        super().__init__(prog=prog, description=description)
        self.expected = expected

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit."""
        self.exit(2, f"{self.prog}: error: {message}; expected {self.expected}\n")


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with the status that `main` returns; 2, after one line, for a mistake of the user."""
    take_any_text()
    try:
        status = main()
        if sys.stdout is not None:  # the user may have closed it
            sys.stdout.flush()  # here, where errors are handled
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        fail(error)
        raise
    sys.exit(status)
