"""What the Hydra applications share: how they start, and one-line errors."""

import argparse
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
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from icm import output
from icm.errors import UserError
from icm.files import ROOT
from icm.ranks import RANK, check_ranks

CONF = ROOT / "conf"
MULTIRUN = ("-m", "--multirun")
PATHS = ("ckpt", "resume", "out", "folder", "env.core", "hydra.run.dir", "hydra.sweep.dir")
# the part of a run folder's name that tells runs apart: file systems allow 255 bytes, no slash
OmegaConf.register_new_resolver(
    "file_name", lambda text: re.sub(r"[^\w=,.+-]+", "_", text)[:100], replace=True
)


def fail(error: Exception) -> None:
    """See `icm.output.fail`; what Hydra finds wrong is a mistake of the user, too."""
    text = " ".join(str(error).split())
    is_mistake = isinstance(error, HydraException | OmegaConfBaseException)
    # of `agent=null`, for instance, for which Hydra has no class of its own
    is_mistake |= text.startswith("Config group override must be")
    if unknown := re.match(r"Could not override '([^']*)'", text):
        text = f"{unknown[1]}: unknown setting (--help lists all)"
    if isinstance(error, OverrideParseException):
        text = f"{error.override}: cannot be read as NAME=VALUE (--help lists all)"
    text = text.partition(" Config search path:")[0]  # of an unknown option of a group
    output.fail(UserError(text) if is_mistake else error)


def quoted(argument: str) -> str:
    """Quote a path argument so that Hydra takes it for one, whatever its characters."""
    name, equals, path = argument.partition("=")
    if name not in PATHS or not equals:
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
        # paths like a number or a list need the quotes
        if override.is_sweep_override():
            if set(MULTIRUN) & set(sys.argv):
                return argument
        elif isinstance(override.value(), str | None):
            return argument
    except HydraException:
        pass
    return f"{name}={QuotedString(path, Quote.single).with_quotes()}"


def refuse(self: argparse.ArgumentParser, message: str) -> NoReturn:
    """Replaces what Hydra's parser does with unknown arguments: print its usage and an error."""
    fail(UserError(f"{message}; settings are given as NAME=VALUE (--help lists all)"))
    raise AssertionError  # `fail` ends the program


def one_voice() -> AbstractContextManager[None]:
    """Inside, only the first rank prints."""
    return nullcontext() if RANK == 0 else redirect_stdout(None)


def run(task: Callable[[DictConfig], Any], config_name: str, of_ranks: bool = False) -> None:
    """Run `task` as a Hydra application; a mistake of the user is one line and exit status 2.

    Args:
        task: is given the settings.
        config_name: of the file in `conf/` with their defaults.
        of_ranks: whether `torchrun` may run it.
    """
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
            elif isinstance(error, UserError):  # Hydra tells the first of all in the end
                run_name = HydraConfig.get().sweep.subdir
                print(f"{Path(sys.argv[0]).name}: {run_name}: error: {error}", file=sys.stderr)
            raise

    argparse.ArgumentParser.error = refuse
    # its parser wants all settings in a row
    sys.argv[1:] = sorted(map(quoted, sys.argv[1:]), key=lambda each: each not in MULTIRUN)
    output.take_any_text()
    application = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    try:
        check_ranks(of_ranks)
        application(careful)()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # also Hydra's, which writes before it begins
        fail(error)
        raise
