"""What figures depend on."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from icm.versions import versions


def machine() -> dict[str, Any]:
    """The CPU, how many cores this process may use, versions.

    `busy` is the number of cores that others keep busy, watched for a second: it should be near 0.
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
        "busy": psutil.cpu_percent(interval=1.0) / 100 * (os.cpu_count() or 1),
        **versions(),
    }
