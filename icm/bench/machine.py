"""What figures depend on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The CPU, how many cores this process may use, versions.

    `load` is the number of processes that wanted a core over the last minute, so before measuring
    it should be about 0.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(": ")[2]
    return {
        "cpu": cpu,
        "cores": os.process_cpu_count(),
        "load": os.getloadavg()[0],
        "torch": version("torch"),
        "python": platform.python_version(),
    }
