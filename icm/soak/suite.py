"""The parts of scripts/soak.py, and its report on them."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from icm.errors import UserError
from icm.files import write_bytes
from icm.soak.faults import faults
from icm.soak.files import files
from icm.soak.hour import hour
from icm.soak.pieces import kills, stops
from icm.soak.program import Findings, end_all
from icm.soak.workers import workers
from icm.versions import versions

SHOWN = 5  # failures of a part; soak.json has all


@dataclass
class SoakConfig:
    """See `conf/soak.yaml`."""

    parts: list[str]
    kills: int
    stops: int
    files: int
    worker_kills: int
    worker_hangs: int
    minutes: float
    train: list[str]
    seed: int
    folder: str


def soak(config: SoakConfig) -> bool:
    """Run the parts; True if everything held.

    Raises:
        UserError: a part is unknown, or the folder is not new.
    """
    folder = Path(config.folder).resolve()
    parts: dict[str, Callable[[Path], Findings]] = {
        "kills": lambda here: kills(here, config.kills, config.seed),
        "stops": lambda here: stops(here, config.stops, config.seed),
        "files": lambda here: files(here, config.files, config.seed),
        "workers": lambda here: workers(
            here, config.worker_kills, config.worker_hangs, config.seed
        ),
        "faults": faults,
        "hour": lambda here: hour(here, config.train, config.minutes),
    }
    unknown = [name for name in config.parts if name not in parts]
    if unknown or not config.parts:
        raise UserError(f"parts={','.join(unknown)}: must be some of {', '.join(parts)}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"folder={folder}: cannot be created: {error.strerror}") from None
    result = {"versions": versions(), "settings": asdict(config), "parts": {}}
    held = True
    for name in config.parts:
        start = time.monotonic()
        try:
            found = parts[name](folder / name)
        except Exception as error:  # what the other parts find is kept
            found = Findings(failures=[f"{type(error).__name__}: {error}"])
        finally:
            end_all()
        seconds = round(time.monotonic() - start)
        result["parts"][name] = {**asdict(found), "seconds": seconds}
        write_bytes(folder / "soak.json", json.dumps(result, indent=1).encode())
        held &= not found.failures
        print(f"{name}: {found.tried} tried, {len(found.failures)} failures, {seconds} s")
        for line in found.failures[:SHOWN]:
            print(f"  {line}")
    print(f"written to {folder / 'soak.json'}")
    return held
