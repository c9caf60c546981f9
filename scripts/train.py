"""Train an agent: `python scripts/train.py [key=value ...]`; `--help` lists the settings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from icm.config import Config, parse_config
from icm.ranks import WORLD_SIZE

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig


def main(settings: "DictConfig") -> float:
    """Train in the run folder, or continue there; returns what a search for settings maximises.

    If a signal stopped it, exits like that signal would.
    """
    from hydra.core.hydra_config import HydraConfig

    # only now, because torch is slow to import, and worker processes import this file, too
    from icm import cli
    from icm.collectives import all_objects, together
    from icm.device import resolve_device
    from icm.files import lock
    from icm.run_folder import record, removed_if_unused

    config = parse_config(settings)
    folder = Path(HydraConfig.get().runtime.output_dir)
    with removed_if_unused(folder):
        device = resolve_device(config.device)
        with lock(folder), together(device), cli.one_voice():
            config.resume, objective = all_objects(going_on(config, folder))[0]
            if objective is not None:
                print(f"complete: {folder}")
                return objective
            record(settings, folder)
            return train(config, folder, device)


def going_on(config: Config, folder: Path) -> tuple[str | None, float | None]:
    """The checkpoint to continue in a folder, and the result if the run there is complete.

    Raises:
        UserError: `resume` names another one of that run.
    """
    from icm import checkpoint
    from icm.errors import UserError
    from icm.exploration import restored
    from icm.run_folder import own_checkpoint

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


def train(config: Config, folder: Path, device: "torch.device") -> float:
    """Build environments and agent, and let them train; see `main`."""
    import signal
    import sys

    from icm.device import busy_cores, describe_device, share_cores
    from icm.envs import action_count, describe_emulator, make_vector_env
    from icm.errors import UserError
    from icm.factory import build_agent
    from icm.memory import keep_freed
    from icm.processes import TIME_IS_UP
    from icm.shared_envs import SharedVectorEnv
    from icm.trainer import Trainer

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


if __name__ == "__main__":
    from icm import cli

    cli.run(main, "config", of_ranks=True)
