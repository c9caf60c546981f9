"""Which of several learners this process is, from `torchrun`'s environment variables.

Ranks train one agent together (data-parallel). Each steps its own part of the environments and
computes its own part of every batch; all else is the same in all of them. Not a part of
`icm.collectives`, because worker processes and `--help` need no torch.
"""

import os

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
"""How many ranks there are; 1 without `torchrun`."""

RANK = int(os.environ.get("RANK", 0))
"""The number of this one; 0 keeps the run folder."""

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
"""Its number on its machine, and so that of its GPU."""

LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
"""How many ranks its machine has."""

CORES = max(1, (os.process_cpu_count() or 1) // LOCAL_WORLD_SIZE)
"""Cores of this machine for this rank."""
