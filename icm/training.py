"""A whole training: settings and a run folder in, a complete run out."""

import signal
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from icm import checkpoint
from icm.cli import one_voice
from icm.collectives import all_objects, together
from icm.config import Config
from icm.device import busy_cores, describe_device, resolve_device, share_cores
from icm.envs import action_count, describe_emulator, make_vector_env
from icm.errors import UserError
from icm.exploration import restored
from icm.factory import build_agent
from icm.files import lock
from icm.memory import keep_freed
from icm.processes import TIME_IS_UP
from icm.ranks import WORLD_SIZE
from icm.run_folder import own_checkpoint, record, removed_if_unused
from icm.shared_envs import SharedVectorEnv
from icm.trainer import Trainer


def train(config: Config, settings: DictConfig, folder: Path) -> float:
    """Train in a run folder, or continue there.

    If a signal stopped it, exits like that signal would.

    Args:
        config: all settings.
        settings: what they were made from, to be kept in the folder.
        folder: the run folder.

    Returns:
        what a search for settings maximises, see `Exploration.objective`.

    Raises:
        UserError: the settings do not fit the machine, the game or what is in the folder, or the
            training cannot go on.
    """
    with removed_if_unused(folder):
        device = resolve_device(config.device)
        with lock(folder), together(device), one_voice():
            config.resume, objective = all_objects(_going_on(config, folder))[0]
            if objective is not None:
                print(f"complete: {folder}")
                return objective
            record(settings, folder)
            return _train(config, folder, device)


def _going_on(config: Config, folder: Path) -> tuple[str | None, float | None]:
    """The checkpoint to continue in a folder, and the result if the run there is complete.

    Raises:
        UserError: `resume` names another one of that run.
    """
    own = own_checkpoint(config, folder)
    if own is None:
        return config.resume, None
    path, content = own
    resumed = Path(config.resume or path)
    if resumed.resolve() != path.resolve() and resumed.parent.resolve() == path.parent.resolve():
        raise UserError(
            f"resume={resumed}: in its own folder a run goes on from {path.name}; give another "
            "hydra.run.dir"
        )
    if content["step"] < config.total_steps:
        return str(path), None
    with checkpoint.restoring(path):
        return str(path), restored(content["exploration"]).objective()


def _train(config: Config, folder: Path, device: torch.device) -> float:
    """Build environments and agent, and let them train; see `train`."""
    share_cores(device)
    keep_freed()
    print(describe_device(device))
    scenery = config.map.every > 0
    cores = busy_cores(device)
    envs = make_vector_env(config.env, cores, scenery, config.collector, config.practice)
    if WORLD_SIZE > 1:
        envs = SharedVectorEnv(envs)
    try:
        if emulator := describe_emulator(config.env):
            print(emulator)
        state_shape: Any = envs.single_observation_space.shape
        agent = build_agent(config, state_shape, action_count(envs.single_action_space), device)
        trainer = Trainer(agent, envs, folder, config)
        if config.resume is not None:
            trainer.resume(Path(config.resume))
        print(f"run folder: {folder}")
        stopped_by = trainer.run()
    finally:
        envs.close()
    if stopped_by is not None:
        if stopped_by == TIME_IS_UP and callable(signal.getsignal(stopped_by)):
            try:
                signal.raise_signal(stopped_by)  # a launcher's: exits, and the job comes again
            except Exception as error:
                raise UserError(f"{folder}: {error} The same command goes on there.") from None
        sys.exit(128 + stopped_by)
    return trainer.exploration.objective()
