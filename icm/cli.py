"""What the Hydra applications share: how they start, and one-line errors."""

import argparse
import errno
import functools
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from icm.errors import UserError
from icm.files import ROOT
from icm.processes import discard
from icm.ranks import RANK

CONF = ROOT / "conf"
PATHS = ("ckpt", "resume", "out", "folder", "env.core", "hydra.run.dir", "hydra.sweep.dir")
OF_FILES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES),
    *(errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR),
)
"""Errors of the operating system that are not the program's fault: no traceback is wanted."""

# the part of a run folder's name that tells runs apart: file systems allow 255 bytes, no slash
OmegaConf.register_new_resolver(
    "file_name", lambda text: re.sub(r"[^\w=,.+-]+", "_", text)[:100], replace=True
)


def fail(error: Exception) -> None:
    """For a mistake of the user, print one line on stderr and exit with status 2.

    With status 1 if nobody reads the output any more. Returns for any other error.
    """
    if isinstance(error, BrokenPipeError):
        discard(sys.stdout.fileno())
        sys.exit(1)
    is_mistake = isinstance(error, UserError | HydraException | OmegaConfBaseException)
    # of `agent=null`, for instance, for which Hydra has no class of its own
    is_mistake |= str(error).startswith("Config group override must be")
    if not is_mistake and getattr(error, "errno", None) not in OF_FILES:
        return
    text = " ".join(str(error).split())
    if unknown := re.match(r"Could not override '([^']*)'", text):
        text = f"{unknown[1]}: unknown setting (--help lists all)"
    if isinstance(error, OverrideParseException):
        text = f"{error.override}: cannot be read as NAME=VALUE (--help lists all)"
    text = text.partition(" Config search path:")[0]  # of an unknown option of a group
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
    sys.exit(2)


def quoted(argument: str) -> str:
    """Quote a path argument so that Hydra takes it for one, whatever its characters."""
    name, equals, path = argument.partition("=")
    if name not in PATHS or not equals:
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
        # paths like a number or a list need the quotes
        if override.is_sweep_override():
            if {"-m", "--multirun"} & set(sys.argv):
                return argument
        elif isinstance(override.value(), str | None):
            return argument
    except HydraException:
        pass
    path = re.sub(r"(\\*)'", r"\1\1\\'", path)  # as Hydra's grammar wants; also at the end
    return f"{name}='{re.sub(r'(\\+)$', r'\1\1', path)}'"


def refuse(self: argparse.ArgumentParser, message: str) -> NoReturn:
    """Replaces what Hydra's parser does with unknown arguments: print its usage and an error."""
    fail(UserError(f"{message}; settings are given as NAME=VALUE (--help lists all)"))
    raise AssertionError  # `fail` ends the program


def one_voice() -> AbstractContextManager[None]:
    """Inside, only the first rank prints."""
    return nullcontext() if RANK == 0 else redirect_stdout(None)


def run(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run `task` as a Hydra application; a mistake of the user is one line and exit status 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them

    @functools.wraps(task)
    def careful(settings: DictConfig) -> Any:
        is_one_of_many = HydraConfig.get().mode == RunMode.MULTIRUN
        if is_one_of_many:  # joblib's workers have a start method that their children do not know
            multiprocessing.set_start_method("spawn", force=True)
        try:
            return task(settings)
        except Exception as error:
            # here, as Hydra would print it; in a sweep, the others go on
            if not is_one_of_many or isinstance(error, BrokenPipeError):
                fail(error)
            raise

    argparse.ArgumentParser.error = refuse
    sys.argv[1:] = map(quoted, sys.argv[1:])
    application = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    try:
        application(careful)()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # also Hydra's, which writes before it begins
        fail(error)
        raise
