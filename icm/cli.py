"""What the Hydra applications share: one-line errors, the run folder, resuming."""

import functools
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from icm.config import parse_config
from icm.errors import UserError
from icm.processes import discard

CONF = Path(__file__).resolve().parents[1] / "conf"


def fail(error: Exception) -> None:
    """Print one line on stderr and exit with status 2."""
    text = " ".join(str(error).split())
    if unknown := re.match(r"Could not override '([^']*)'", text):
        text = f"{unknown[1]}: unknown setting (--help lists all)"
    text = text.partition(" Config search path:")[0]  # of an unknown option of a group
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
    sys.exit(2)


def leave() -> None:
    """Exit with status 1 because nobody reads the output any more."""
    discard(sys.stdout.fileno())
    sys.exit(1)


def run(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run `task` as a Hydra application; a mistake of the user is one line and exit status 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on instead of printing them

    @functools.wraps(task)
    def careful(settings: DictConfig) -> None:
        try:
            task(settings)
        except (UserError, OmegaConfBaseException) as error:
            fail(error)
        except BrokenPipeError:  # here, because Hydra would print it
            leave()

    application = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    try:
        application(careful)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        fail(error)
    except BrokenPipeError:  # of --help
        leave()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


class RunFolder(Callback):
    """Before Hydra writes: takes over a checkpoint's settings, checks, claims a new folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """See the class. Hydra only warns of exceptions here, so a mistake exits at once."""
        try:
            if config.resume is not None:
                adopt_settings(config)
            parse_config(config)
            claim_folder(config)
        except (UserError, OmegaConfBaseException) as error:
            fail(error)


def adopt_settings(config: DictConfig) -> None:
    """Replace the settings by those of the checkpoint `resume`, then apply the given overrides.

    Of a damaged `latest.pt` those of the newest whole checkpoint beside it, which is then `resume`.

    Raises:
        UserError: another group (`preset=…`) is chosen, or the checkpoint cannot be read.
    """
    from icm import checkpoint  # here, because torch takes its time to import

    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    path, content = checkpoint.newest_whole(Path(config.resume))
    merged = OmegaConf.create(content["config"])
    for override in overrides:
        key = override.key_or_group
        if key not in config.hydra.runtime.choices:
            OmegaConf.update(merged, key, OmegaConf.select(config, key))
        # agent=ppo lets Hydra know the settings of a checkpoint of that agent
        elif override.value() != OmegaConf.select(merged, f"{key}.name"):
            raise UserError(
                f"{override.input_line}: a resumed run keeps the groups of its checkpoint; "
                "single settings (group.key=value) can be changed"
            )
    with read_write(config), open_dict(config):
        for key, value in merged.items():
            config[key] = value
        config.resume = str(path)


def claim_folder(config: DictConfig) -> None:
    """Create the run folder; a name that exists gets a number, unless the user gave it.

    Of two runs that claim one folder at the same time, one gets it.

    Raises:
        UserError: the folder the user gave holds something, or it cannot be created.
    """
    wanted = Path(config.hydra.run.dir)
    if any(o.startswith("hydra.run.dir=") for o in config.hydra.overrides.hydra):
        is_empty = wanted.is_dir() and not any(wanted.iterdir())
        if not _made(wanted / str(config.hydra.output_subdir) if is_empty else wanted):
            raise UserError(f"hydra.run.dir={wanted}: exists; a run needs a new or an empty folder")
        return
    folders = (wanted.with_name(f"{wanted.name}_{number}") for number in itertools.count(2))
    folder = next(filter(_made, itertools.chain([wanted], folders)))
    with read_write(config):
        config.hydra.run.dir = str(folder)


def _made(folder: Path) -> bool:
    """Create a folder; False if there is one."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"cannot create the run folder {folder}: {error.strerror}") from None
    return True
