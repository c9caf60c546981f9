"""Train an agent: `python scripts/train.py [key=value ...]`; `--help` lists the settings."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(settings: "DictConfig") -> float:
    """Train in the run folder, or continue there; returns what a search for settings maximises."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from icm.config import parse_config

    config = parse_config(settings)

    # only now, because torch is slow to import
    from icm.training import train

    return train(config, settings, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    from icm import cli  # here, because worker processes import this file, too

    cli.run(main, "config", of_ranks=True)
