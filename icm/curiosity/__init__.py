"""Curiosity: signals of surprise, one file each, and what turns surprise into rewards."""

from icm.curiosity.disagreement import Disagreement
from icm.curiosity.icm import ICM
from icm.curiosity.none import NoCuriosity
from icm.curiosity.novelty import EpisodicNovelty
from icm.curiosity.random_features import RandomFeatures
from icm.curiosity.rnd import RND
from icm.curiosity.scale import Interest, RewardScale
from icm.curiosity.signal import Errors, MaskedMean, Signal, random_features

__all__ = [
    "ICM",
    "RND",
    "Disagreement",
    "EpisodicNovelty",
    "Errors",
    "Interest",
    "MaskedMean",
    "NoCuriosity",
    "RandomFeatures",
    "RewardScale",
    "Signal",
    "random_features",
]
