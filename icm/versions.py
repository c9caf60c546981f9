"""What a run depends on."""

import platform
from importlib.metadata import version

PACKAGES = ("icm", "torch", "gymnasium", "gym-super-mario-bros", "nes-py", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on, by their names."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
