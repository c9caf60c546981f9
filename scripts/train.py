"""Train an agent: `python scripts/train.py [key=value ...]`; `--help` lists the settings."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from icm import cli
from icm.config import Config, parse_config


def main(settings: DictConfig) -> float:
    """Train in the run folder, or go on there; the result is what a search for settings maximises.

    Exits like the signal that stopped it, if any did.
    """
    from hydra.core.hydra_config import HydraConfig

    from icm.exploration import restored
    from icm.files import lock

    config = parse_config(settings)
    folder = Path(HydraConfig.get().runtime.output_dir)
    with lock(folder):
        if own := cli.own_checkpoint(config, folder):
            path, content = own
            if content["step"] >= config.total_steps:
                print(f"complete: {folder}")
                return restored(content["exploration"]).objective()
            config.resume = str(path)
        return train(config, folder)


def train(config: Config, folder: Path) -> float:
    """Build environments and agent, and let them train; see `main`."""
    import sys

    # only now, because torch takes its time to import
    from icm.device import busy_cores, describe_device, resolve_device, share_cores
    from icm.envs import action_count, describe_emulator, make_vector_env
    from icm.factory import build_agent
    from icm.trainer import Trainer

    device = resolve_device(config.device)
    share_cores()
    print(describe_device(device))
    scenery = config.map.every > 0
    envs = make_vector_env(config.env, busy_cores(device), scenery, config.collector)
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
        sys.exit(128 + stopped_by)
    return trainer.exploration.objective()


if __name__ == "__main__":
    cli.run(main, "config")
