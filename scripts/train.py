"""Train an agent: `python scripts/train.py [key=value ...]`; `--help` lists the settings."""

from typing import Any

from omegaconf import DictConfig

from icm import cli


def main(settings: DictConfig) -> None:
    """Build environments and agent, train, and exit like the signal that stopped it, if any."""
    import sys
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from icm.config import parse_config
    from icm.device import busy_cores, describe_device, resolve_device, share_cores
    from icm.envs import action_count, describe_emulator, make_vector_env
    from icm.factory import build_agent
    from icm.trainer import Trainer

    config = parse_config(settings)
    device = resolve_device(config.device)
    share_cores()
    print(describe_device(device))
    envs = make_vector_env(config.env, busy_cores(device), scenery=config.map.every > 0)
    try:
        if emulator := describe_emulator(config.env):
            print(emulator)
        state_shape: Any = envs.single_observation_space.shape
        agent = build_agent(config, state_shape, action_count(envs.single_action_space), device)
        folder = Path(HydraConfig.get().runtime.output_dir)
        trainer = Trainer(agent, envs, folder, config)
        if config.resume is not None:
            trainer.resume(Path(config.resume))
        print(f"run folder: {folder}")
        stopped_by = trainer.run()
    finally:
        envs.close()
    if stopped_by is not None:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    cli.run(main, "config")
