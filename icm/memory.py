"""How much memory is free, checked before a large allocation; what becomes of freed memory."""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

CGROUPS, CGROUP_OF_THIS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def available_bytes() -> int:
    """Bytes this process can still take: the machine's free memory, or less in a container."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Bytes left by the limits of a container, a cluster job, and so on (cgroups, version 2)."""
    with suppress(OSError):
        name = CGROUP_OF_THIS.read_text().rpartition("0::/")[2].strip()
        for group in (CGROUPS / name, *(CGROUPS / name).parents):
            limit = group / "memory.max"  # "max" if there is none
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                used = int((group / "memory.current").read_text())
                rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
                # the file cache is given up as soon as the memory is needed
                cached = sum(int(n) for kind, n in rows if kind in ("active_file", "inactive_file"))
                yield int(text) - used + cached


def memory_device(needed: int, device: torch.device) -> torch.device:
    """Where a replay memory of `needed` bytes is kept: on a GPU if that has twice the room."""
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0] // 2:
        return device
    return torch.device("cpu")


def keep_freed() -> None:
    """Let this process reuse what it frees, up to blocks of 32 MiB, for its next allocations.

    GNU's C library returns large blocks to the system. Every update would fetch them again, page
    by page: a tenth of its time and more (docs/performance.md). With another C library, nothing
    happens.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for option, value in (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 1 << 30):
            library.mallopt(option, value)
