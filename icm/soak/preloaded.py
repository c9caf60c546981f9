"""Imports what scripts need: the state of the process from which `icm.soak.forked` forks them."""

import gc

import torch._dynamo  # noqa: F401 - which an optimizer imports
from hydra.core.plugins import Plugins

import icm.cli
import icm.evaluation
import icm.factory
import icm.playing
import icm.run_folder
import icm.trainer
import icm.viz.mind  # noqa: F401

Plugins.instance()  # which imports those that are installed
gc.freeze()  # so that forks share these objects' memory
