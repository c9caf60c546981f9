"""Exceptions that mean that the user has to change something."""


class UserError(Exception):
    """A mistake of the user: its message is one line that names the value and what would be right.

    The scripts print it on stderr and exit with status 2, without a traceback.
    """


class WriteError(UserError):
    """A file cannot be written."""
