"""Settings of trainings that are measured."""

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from icm.cli import CONF
from icm.config import Config, parse_config


def train_settings(*overrides: str) -> Config:
    """Settings of train.py with `overrides`."""
    GlobalHydra.instance().clear()  # this may run within another Hydra application
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse_config(compose("config", list(overrides)))
