"""The command line of scripts that take paths, not settings."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that says what is `expected`, as all errors here."""

    def __init__(self, prog: str, description: str, expected: str) -> None:
        super().__init__(prog=prog, description=description)
        self.expected = expected

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit."""
        self.exit(2, f"{self.prog}: error: {message}; expected {self.expected}\n")
