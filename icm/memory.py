"""How much memory there is, asked before much of it is taken, and what becomes of what is freed."""

import ctypes
from contextlib import suppress
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def available_bytes() -> int:
    """Bytes this process can still take: free memory of the machine, or less in a container."""
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2; "max" where there is no limit
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def memory_device(needed: int, device: torch.device) -> torch.device:
    """Where a replay memory of `needed` bytes is kept: on a GPU if that has twice the room."""
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0] // 2:
        return device
    return torch.device("cpu")


def keep_freed() -> None:
    """Let this process keep what it frees, up to blocks of 32 MiB, for what it allocates next.

    GNU's C library gives large blocks back to the system. An update would take the same ones again
    and again, page by page: a tenth of its time and more (docs/performance.md). Nothing happens
    where there is another C library.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for option, value in (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 1 << 30):
            library.mallopt(option, value)
