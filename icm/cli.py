"""What the Hydra applications share: one-line errors, the run folder, resuming."""

import errno
import functools
import itertools
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from icm.config import Config, flat, parse_config
from icm.errors import UserError
from icm.files import LOCK, latest, lock
from icm.processes import discard
from icm.ranks import RANK, WORLD_SIZE

CONF = Path(__file__).resolve().parents[1] / "conf"
SETTINGS = ".hydra/config.yaml"
PATHS = ("ckpt", "resume", "out", "folder", "env.core", "hydra.run.dir", "hydra.sweep.dir")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

# the part of a run folder's name that says what is special: file systems allow 255 bytes, no slash
OmegaConf.register_new_resolver(
    "file_name", lambda text: re.sub(r"[^\w=,.+-]+", "_", text)[:100], replace=True
)


def fail(error: Exception) -> None:
    """Print one line on stderr and exit with status 2."""
    text = " ".join(str(error).split())
    if unknown := re.match(r"Could not override '([^']*)'", text):
        text = f"{unknown[1]}: unknown setting (--help lists all)"
    text = text.partition(" Config search path:")[0]  # of an unknown option of a group
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
    sys.exit(2)


def quoted(argument: str) -> str:
    """A path as an argument that Hydra takes for a path, whatever characters it has."""
    name, _, path = argument.partition("=")
    if name not in PATHS:
        return argument
    try:
        if not OverridesParser.create().parse_override(argument).is_sweep_override():
            return argument
    except HydraException:
        pass
    path = re.sub(r"(\\*)'", r"\1\1\\'", path)  # as its grammar has it, so in the end of all
    return f"{name}='{re.sub(r'(\\+)$', r'\1\1', path)}'"


def leave() -> None:
    """Exit with status 1 because nobody reads the output any more."""
    discard(sys.stdout.fileno())
    sys.exit(1)


def one_voice() -> AbstractContextManager[None]:
    """Inside, of all ranks the first alone prints."""
    return nullcontext() if RANK == 0 else redirect_stdout(None)


def run(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run `task` as a Hydra application; a mistake of the user is one line and exit status 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on instead of printing them

    @functools.wraps(task)
    def careful(settings: DictConfig) -> Any:
        is_one_of_many = HydraConfig.get().mode == RunMode.MULTIRUN
        if is_one_of_many:  # joblib's workers have a start method that their children do not know
            multiprocessing.set_start_method("spawn", force=True)
        try:
            return task(settings)
        except (UserError, OmegaConfBaseException) as error:
            if is_one_of_many:  # the others go on
                raise
            fail(error)
        except BrokenPipeError:  # here, because Hydra would print it
            leave()

    sys.argv[1:] = map(quoted, sys.argv[1:])
    application = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    try:
        application(careful)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        fail(error)
    except BrokenPipeError:  # of --help
        leave()
    except OSError as error:  # of Hydra, which writes before it begins
        if error.errno not in UNWRITABLE:
            raise
        fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


class RunFolder(Callback):
    """Before Hydra writes: takes over a checkpoint's settings, checks, claims a new folder.

    The first rank does; the others have a folder that goes with them.
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
        except (UserError, OmegaConfBaseException) as error:
            fail(error)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep that is given no folder gets one that no other has.

        Its runs are named by what they differ in.
        """
        if WORLD_SIZE > 1:
            fail(UserError("-m: torchrun trains one agent at a time; a sweep needs a launcher"))
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        if any(each.get_key_element() == "resume" for each in overrides):
            fail(UserError("-m: the runs of a sweep begin anew; resume=PATH is for one run"))
        equal = [each.get_key_element() for each in overrides if not each.is_sweep_override()]
        more = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(equal)}]"]
        if not is_given(config, "hydra.sweep.dir"):
            try:
                folder = new_folder(Path(config.hydra.sweep.dir))
            except UserError as error:
                fail(error)
            more.append(quoted(f"hydra.sweep.dir={folder}"))
        more.append("hydra.output_subdir=null")  # see `record`
        with read_write(config), open_dict(config):  # Hydra makes the settings of each run of these
            config.hydra.overrides.hydra.extend(more)


def record(settings: DictConfig, folder: Path) -> None:
    """Write into a run folder of a sweep what Hydra writes itself into that of a single run.

    Hydra would do so before it is known that a run there has these settings.
    """
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        of_hydra = OmegaConf.create({"hydra": hydra})
        contents = {"config": settings, "overrides": hydra.overrides.task, "hydra": of_hydra}
        (folder / SETTINGS).parent.mkdir(exist_ok=True)
        for name, content in contents.items():
            OmegaConf.save(content, (folder / SETTINGS).with_name(f"{name}.yaml"))


def adopt_settings(config: DictConfig) -> dict[str, Any]:
    """Replace the settings by those of the checkpoint `resume`, then apply the given overrides.

    But not where environments live: that is another matter on every machine.

    Of a damaged `latest.pt` those of the newest whole checkpoint beside it, which is then `resume`.

    Returns:
        the content of the checkpoint.

    Raises:
        UserError: another group (`preset=…`) is chosen, or the checkpoint cannot be read.
    """
    from icm import checkpoint  # here, because torch takes its time to import

    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    path, content = checkpoint.newest_whole(Path(config.resume))
    merged = OmegaConf.create({**content["config"], "collector": config.collector})
    for override in overrides:
        key = override.key_or_group
        if key not in config.hydra.runtime.choices:
            OmegaConf.update(merged, key, OmegaConf.select(config, key))
        # agent=ppo lets Hydra know the settings of a checkpoint of that agent
        elif override.value() not in (merged[key], OmegaConf.select(merged, f"{key}.name")):
            raise UserError(
                f"{override.input_line}: a resumed run keeps the groups of its checkpoint; "
                "single settings (group.key=value) can be changed"
            )
    with read_write(config), open_dict(config):
        for key, value in merged.items():
            config[key] = value
        config.resume = str(path)
    return content


def must_go_on(content: dict[str, Any], config: Config) -> None:
    """Refuse to resume a checkpoint, of this content, with settings that cannot go on with it."""
    path, step, warmup = config.resume, content["step"], config.agent.warmup_steps
    if "optimizers" not in content:
        raise UserError(f"{path}: exported for playing; resume what it was exported from")
    if step >= config.total_steps:
        raise UserError(
            f"total_steps={config.total_steps}: {path} is at step {step} already; "
            "give a greater total_steps to go on"
        )
    if (before := content["config"]["agent"]["warmup_steps"]) != warmup:
        raise UserError(
            f"agent.warmup_steps={warmup}: {path} was made with {before}, which has to stay: "
            "it may be over"
        )


def claim_folder(config: DictConfig, settings: Config) -> None:
    """Create the run folder; a name that exists gets a number, unless the user gave it.

    A folder the user gave may hold a run of the same settings, which is to go on.

    Raises:
        UserError: the folder the user gave holds something else, or it cannot be created.
    """
    folder = Path(config.hydra.run.dir)
    if not is_given(config, "hydra.run.dir"):
        with read_write(config):
            config.hydra.run.dir = str(new_folder(folder))
        return
    _made(folder)
    if not folder.is_dir() or ({file.name for file in folder.iterdir()} - {LOCK}):
        if not (folder / SETTINGS).exists():
            raise UserError(
                f"hydra.run.dir={folder}: exists, and is no run folder; give another folder"
            )
        if own_checkpoint(settings, folder) is None:
            must_be_same(
                folder, OmegaConf.to_container(OmegaConf.load(folder / SETTINGS)), settings
            )


def is_given(config: DictConfig, key: str) -> bool:
    """Whether the user gave a setting of Hydra's."""
    return any(override.startswith(f"{key}=") for override in config.hydra.overrides.hydra)


def new_folder(wanted: Path) -> Path:
    """Create a folder of this name, or of this name and a number."""
    folders = (wanted.with_name(f"{wanted.name}_{number}") for number in itertools.count(2))
    return next(filter(_made, itertools.chain([wanted], folders)))


def own_checkpoint(config: Config, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint with which the run of a folder goes on, and its content, if there is one.

    Raises:
        UserError: the settings are not those of that run.
    """
    newest = latest(folder)
    if not newest.exists():
        return None
    from icm import checkpoint  # here, because torch takes its time to import

    path, content = checkpoint.newest_whole(newest)
    must_be_same(folder, content["config"], config)
    return path, content


def must_be_same(folder: Path, before: Any, config: Config) -> None:
    """Refuse settings that are not those, plain containers, of the run in a folder.

    Where environments live may change, and in how many processes.
    """
    # of settings that are newer than the run, it had the defaults
    was, now = (flat(asdict(each)) for each in (parse_config(OmegaConf.create(before)), config))
    for name in sorted(now.keys() - {"resume", "collector", "env.num_workers"}):
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
