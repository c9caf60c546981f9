"""From action values to actions: greedy, epsilon-greedy and softmax in one formula."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Schedule = Sequence[Sequence[float]]
"""Knots [agent step, value]: linear in between, constant before the first and after the last."""


MIN_TEMPERATURE = 1e-6
"""Below it the policy is greedy: float32 cannot tell, and may overflow."""


def scheduled(schedule: Schedule, step: int) -> float:
    """Value of `schedule` at an agent step."""
    steps, values = zip(*schedule, strict=True)
    return float(np.interp(step, steps, values))


def action_probabilities(q: Tensor, temperature: float, epsilon: float) -> Tensor:
    """Mixture (1 - epsilon) softmax(q / temperature) + epsilon / |A|, shape (batch, actions).

    A temperature of 0 stands for greedy, so (0, epsilon) is epsilon-greedy and (temperature, 0) is
    softmax sampling.
    """
    if temperature > MIN_TEMPERATURE:
        preferred = torch.softmax(q / temperature, dim=1)
    else:
        preferred = torch.zeros_like(q).scatter_(1, q.argmax(1, keepdim=True), 1.0)
    return (1 - epsilon) * preferred + epsilon / q.shape[1]


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats of each row, (batch,)."""
    return torch.special.entr(probabilities).sum(1)
