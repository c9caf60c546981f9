"""The run folder of a training: claimed before Hydra writes, and what a run there continues."""

import itertools
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from icm.cli import fail, quoted
from icm.config import ELSEWHERE, SETTINGS, Config, flat, parse_config, settings_of
from icm.errors import UserError
from icm.files import LOCK, latest, lock, numbered
from icm.ranks import RANK, WORLD_SIZE

OF_A_START = {LOCK, Path(SETTINGS).parent.name}
"""Names in a run folder in which nothing has begun."""


class RunFolder(Callback):
    """Before Hydra writes: adopts a checkpoint's settings, checks them, claims a new folder.

    The first rank claims; the others get temporary folders.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """See the class. Hydra only warns of exceptions here, so a mistake exits at once."""
        try:
            content = None if config.resume is None else adopt_settings(config)
            settings = parse_config(config)
            if content is not None:
                must_go_on(content, settings)
            if RANK > 0:
                self.folder = tempfile.TemporaryDirectory(prefix="icm-rank-")
                with read_write(config):
                    config.hydra.run.dir = self.folder.name
                return
            claim_folder(config, settings)
            # as long as this process lives
            self.lock = lock(Path(config.hydra.run.dir))
        except Exception as error:
            fail(error)
            traceback.print_exc()
            sys.exit(1)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Create a new folder for a sweep that is given none.

        Its runs are named after what they differ in.
        """
        if WORLD_SIZE > 1:
            fail(UserError("-m: torchrun trains one agent at a time; a sweep needs a launcher"))
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        if any(each.get_key_element() == "resume" for each in overrides):
            fail(UserError("-m: the runs of a sweep begin anew; resume=PATH is for one run"))
        equal = [each.get_key_element() for each in overrides if not each.is_sweep_override()]
        more = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(equal)}]"]
        folder = Path(config.hydra.sweep.dir)
        try:
            if not is_given(config.hydra, "hydra.sweep.dir"):
                more.append(quoted(f"hydra.sweep.dir={new_folder(folder)}"))
            elif not _made(folder) and not folder.is_dir():
                raise UserError(f"hydra.sweep.dir={folder}: is no folder")
        except UserError as error:
            fail(error)
        more.append("hydra.output_subdir=null")  # see `record`
        with read_write(config), open_dict(config):  # Hydra makes each run's settings from these
            config.hydra.overrides.hydra.extend(more)


def record(settings: DictConfig, folder: Path) -> None:
    """Write into a run folder of a sweep what Hydra itself writes into that of a single run.

    Hydra would do so before it is known that a run there has these settings.
    """
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        of_hydra = OmegaConf.create({"hydra": hydra})
        contents = {"config": settings, "overrides": hydra.overrides.task, "hydra": of_hydra}
        (folder / SETTINGS).parent.mkdir(exist_ok=True)
        for name, content in contents.items():
            OmegaConf.save(content, (folder / SETTINGS).with_name(f"{name}.yaml"))


def adopt_settings(config: DictConfig) -> dict[str, Any] | None:
    """Replace the settings by those of the checkpoint `resume`, then apply the given overrides.

    Except for where environments run, and on which libretro core: that differs between machines,
    and a core is a program.

    If `latest.pt` is damaged, the newest whole checkpoint beside it becomes `resume`.

    Where the command is given again, its run goes on from its own checkpoint, with the settings of
    that: whatever has become of `resume` meanwhile does not matter.

    Returns:
        the content of the checkpoint `resume`; None where the command is given again.

    Raises:
        UserError: another group (`preset=…`) is chosen, or the checkpoint cannot be read.
    """
    from icm import checkpoint  # here, because importing torch takes time

    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    own = given_again(config)
    path, content = checkpoint.newest_whole(own or Path(config.resume))
    merged = OmegaConf.create(content["config"])
    for key in ("collector", "env.core"):
        OmegaConf.update(merged, key, OmegaConf.select(config, key))
    for override in overrides:
        key = override.key_or_group
        if key not in config.hydra.runtime.choices:
            OmegaConf.update(merged, key, OmegaConf.select(config, key))
        # agent=ppo makes Hydra accept the settings of that agent's checkpoint
        elif override.value() not in (merged[key], OmegaConf.select(merged, f"{key}.name")):
            raise UserError(
                f"{override.input_line}: a resumed run keeps the groups of its checkpoint; "
                "single settings (group.key=value) can be changed"
            )
    with read_write(config), open_dict(config):
        for key, value in merged.items():
            config[key] = value
        if own is not None:
            return None
        config.resume = str(path)
    return content


def given_again(config: DictConfig) -> Path | None:
    """The checkpoint in the run folder, if a run of the same `resume` was begun there."""
    folder = Path(config.hydra.run.dir)
    if not is_given(config.hydra, "hydra.run.dir") or not has_checkpoint(folder):
        return None
    try:
        begun = settings_of(folder)
    except (OSError, UserError):
        return None
    return latest(folder) if begun.get("resume") == config.resume else None


def must_go_on(content: dict[str, Any], config: Config) -> None:
    """Refuse to resume a checkpoint (`content`) with settings that cannot continue it."""
    path, step, warmup = config.resume, content["step"], config.agent.warmup_steps
    if "optimizers" not in content:
        raise UserError(f"{path}: exported for playing; resume what it was exported from")
    if step >= config.total_steps:
        raise UserError(
            f"total_steps={config.total_steps}: {path} is at step {step} already; "
            "give a greater total_steps to go on"
        )
    if (before := flat(content["config"]).get("agent.warmup_steps")) != warmup:
        raise UserError(
            f"agent.warmup_steps={warmup}: {path} was made with {before}, which has to stay: "
            "it may be over"
        )


def claim_folder(config: DictConfig, settings: Config) -> None:
    """Create the run folder; a name that exists gets a number, unless the user gave it.

    A folder the user gave may hold a run with the same settings, to be continued.

    Raises:
        UserError: the folder the user gave holds something else, or it cannot be created.
    """
    folder = Path(config.hydra.run.dir)
    if not is_given(config.hydra, "hydra.run.dir"):
        with read_write(config):
            config.hydra.run.dir = str(new_folder(folder))
        return
    _made(folder)
    if not is_unused(folder):
        if not (folder / SETTINGS).exists():
            raise UserError(
                f"hydra.run.dir={folder}: exists, and is no run folder; give another folder"
            )
        try:
            before = parse_config(settings_of(folder))
        except UserError:  # of a file that was cut off, for instance
            if own_checkpoint(settings, folder) is None:  # which has them, too
                raise UserError(
                    f"hydra.run.dir={folder}: exists, with no settings in {SETTINGS}; "
                    "give another folder"
                ) from None
        else:
            must_be_same(folder, before, settings)


@contextmanager
def removed_if_unused(folder: Path) -> Generator[None]:
    """A mistake inside removes a run folder that got its name here, unless something has begun."""
    try:
        yield
    except UserError:
        hydra = HydraConfig.get()
        is_ours = RANK == 0 and hydra.mode == RunMode.RUN and not is_given(hydra, "hydra.run.dir")
        with suppress(OSError):  # what was wrong may be the disk
            if is_ours and is_unused(folder):
                shutil.rmtree(folder)
                os.removedirs(folder.parent)  # of a misspelt game, for instance
        raise


def is_unused(folder: Path) -> bool:
    """Whether this is a folder, and nothing has begun there."""
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= OF_A_START


def is_given(hydra: Any, key: str) -> bool:
    """Whether the user gave a setting of Hydra's (`hydra`: those settings)."""
    return any(override.startswith(f"{key}=") for override in hydra.overrides.hydra)


def new_folder(wanted: Path) -> Path:
    """Create a folder of this name, or of this name and a number."""
    folders = (wanted.with_name(f"{wanted.name}_{number}") for number in itertools.count(2))
    return next(filter(_made, itertools.chain([wanted], folders)))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder has one, be it damaged."""
    newest = latest(folder)
    return newest.exists() or bool(numbered(newest.parent, "step"))


def own_checkpoint(config: Config, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint from which a folder's run continues, and its content, if there is one.

    Raises:
        UserError: the settings are not those of that run.
    """
    if not has_checkpoint(folder):
        return None
    from icm import checkpoint  # here, because importing torch takes time

    path, content = checkpoint.newest_whole(latest(folder))
    with checkpoint.restoring(path):
        before = parse_config(OmegaConf.create(content["config"]))
    must_be_same(folder, before, config)
    return path, content


def must_be_same(folder: Path, before: Config, config: Config) -> None:
    """Refuse settings that are not those of the run in a folder.

    The machine (`ELSEWHERE`) may change. A run older than a setting had its default.
    """
    was, now = (flat(asdict(each)) for each in (before, config))
    for name in sorted(now.keys() - ELSEWHERE - {"resume"}):
        if now[name] != was.get(name):
            raise UserError(
                f"{folder}: exists, with a run of {name}={was.get(name)}, not {now[name]}; "
                "give another folder"
            )


def _made(folder: Path) -> bool:
    """Create a folder; False if there is one."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"cannot create the run folder {folder}: {error.strerror}") from None
    return True
