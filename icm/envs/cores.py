"""Which libretro core is used. None is shipped: cores have their own licences."""

import importlib.util
import os
import sys
from pathlib import Path

from icm.errors import UserError

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

SYSTEM_FOLDERS = [
    *(Path(folder, "libretro") for folder in ("/usr/lib", "/usr/lib64", "/usr/local/lib")),
    *sorted(Path("/usr/lib").glob("*/libretro")),  # one folder per architecture
]


def find_core(core: str) -> Path:
    """The file of `env.core`: a path, or for `auto` QuickNES if there is one, else FCEUmm.

    Raises:
        UserError: there is no such file, or no core was found.
    """
    if core != "auto":
        if not os.path.isfile(core):  # pathlib raises for inaccessible paths
            raise UserError(f"env.core={core}: no such file; auto finds installed cores")
        return Path(core)
    for path in installed_cores().values():
        return path
    raise UserError(
        "env.core=auto: found no core; `uv run --extra fast` or "
        "`pip install --no-deps stable-retro==1.0.1` installs FCEUmm (Linux on x86-64, macOS on "
        "ARM), RetroArch has QuickNES; env.core=PATH names a core elsewhere, "
        "env.emulator=nes_py needs none"
    )


def installed_cores() -> dict[str, Path]:
    """The cores found, by name; the first is what `auto` takes."""
    found = {}
    for name in ("quicknes", "fceumm"):
        paths = [folder / f"{name}_libretro{SUFFIX}" for folder in core_folders()]
        if path := next((path for path in paths if os.path.isfile(path)), None):
            found[name] = path
    return found


def core_folders() -> list[Path]:
    """Where to look, in this order: LIBRETRO_DIRECTORY, stable-retro, RetroArch's usual folders."""
    folders = []
    if "LIBRETRO_DIRECTORY" in os.environ:  # RetroArch's own variable
        folders.append(Path(os.environ["LIBRETRO_DIRECTORY"]))
    package = importlib.util.find_spec("stable_retro")  # finds it without importing it
    if package is not None and package.submodule_search_locations:
        folders.append(Path(package.submodule_search_locations[0], "cores"))
    home = Path(os.path.expanduser("~"))  # stays as it is where nobody knows of a home
    if sys.platform == "win32":
        folders += [home / "AppData/Roaming/RetroArch/cores", Path("C:/RetroArch-Win64/cores")]
    elif sys.platform == "darwin":
        folders.append(home / "Library/Application Support/RetroArch/cores")
    else:
        settings = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        flatpak = home / ".var/app/org.libretro.RetroArch/config"
        snap = home / "snap/retroarch/current/.config"
        folders += [base / "retroarch/cores" for base in (settings, flatpak, snap)]
        folders += SYSTEM_FOLDERS
    return folders
