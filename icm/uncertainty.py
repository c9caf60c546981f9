"""How far a mean may be from the truth."""

import math

import numpy as np


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis, sample std / sqrt(n); 0 for a single one."""
    if len(values) == 1:
        return np.zeros(values.shape[1:])
    return values.std(0, ddof=1) / math.sqrt(len(values))
