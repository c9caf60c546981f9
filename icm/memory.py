"""How much memory there is, asked before much of it is taken."""

from pathlib import Path

import psutil
import torch


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
