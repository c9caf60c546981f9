"""How far a mean may be from the truth."""

import math

import numpy as np


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis, of at least 2 values: std / sqrt(n)."""
    return values.std(0, ddof=1) / math.sqrt(len(values))
