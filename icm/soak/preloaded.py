"""Imports what scripts need: the state of the process from which `icm.soak.forked` forks them."""

import gc

import torch._dynamo  # noqa: F401 - which an optimizer imports
from hydra.core.plugins import Plugins

import icm.evaluation
import icm.training
import icm.viz.mind
import icm.viz.playback  # noqa: F401

Plugins.instance()  # which imports those that are installed
gc.freeze()  # so that forks share these objects' memory
