"""Which of several learners this process is, from `torchrun`'s environment variables.

Ranks train one agent together (data-parallel). Each steps its own part of the environments and
computes its own part of every batch; all else is the same in all of them. Not a part of
`icm.collectives`, because worker processes and `--help` need no torch.
"""

import os

from icm.errors import UserError


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


WORLD_SIZE = _variable("WORLD_SIZE", 1)
"""How many ranks there are; 1 without `torchrun`."""

RANK = _variable("RANK", 0)
"""The number of this one; 0 keeps the run folder."""

LOCAL_RANK = _variable("LOCAL_RANK", 0)
"""Its number on its machine, and so that of its GPU."""

LOCAL_WORLD_SIZE = _variable("LOCAL_WORLD_SIZE", 1)
"""How many ranks its machine has."""

CORES = max(1, (os.process_cpu_count() or 1) // LOCAL_WORLD_SIZE)
"""Cores of this machine for this rank."""


def check_ranks() -> None:
    """Refuse what `torchrun` would not set, such as what is left of another program.

    Raises:
        UserError: it is that.
    """
    names = ("RANK", "WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    are_numbers = all(text.isdecimal() for text in given.values())
    if given and not (are_numbers and len(given) == 2 and RANK < WORLD_SIZE):
        named = " ".join(f"{name}={text}" for name, text in given.items())
        raise UserError(f"{named}: must be torchrun's: RANK below WORLD_SIZE; else unset both")
