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

LOCAL_WORLD_SIZE = max(1, _variable("LOCAL_WORLD_SIZE", 1))
"""How many ranks its machine has."""

CORES = max(1, (os.process_cpu_count() or 1) // LOCAL_WORLD_SIZE)
"""Cores of this machine for this rank."""


def check_ranks(may_be_several: bool) -> None:
    """Refuse what `torchrun` would not set, such as what is left of another program.

    Args:
        may_be_several: whether the script is for ranks.

    Raises:
        UserError: it is that, or there are several and should not be.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    named = " ".join(f"{name}={text}" for name, text in given.items())
    are_numbers = all(text.isdecimal() for text in given.values())
    if given and not (are_numbers and len(given) == 2 and RANK < WORLD_SIZE):
        raise UserError(f"{named}: must be torchrun's: RANK below WORLD_SIZE; else unset both")
    if WORLD_SIZE > 1 and not may_be_several:
        raise UserError(f"{named}: torchrun is for scripts/train.py; else unset both")
    if WORLD_SIZE > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(f"{named}: no MASTER_ADDR and MASTER_PORT, as torchrun's; else unset both")
