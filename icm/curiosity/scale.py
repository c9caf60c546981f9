"""Rewards of steady size from surprises of any."""

from typing import Any

import torch
from torch import Tensor


class RewardScale:
    """Turns raw intrinsic rewards into ones of steady size, by statistics over a *decaying* window.

    Burda et al. 2018 (section 2.4) divide the intrinsic reward by the running standard deviation of
    its discounted sum so that the scale of features does not matter. Averaging over all history
    keeps the huge first errors in the scale for hundreds of thousands of steps and stalls learning,
    so older values fade with a half-life.

    Args:
        num_envs: environments whose discounted sums run side by side, each over its own time.
        discount: of the running sum.
        half_life: steps per environment after which a value counts half.
    """

    def __init__(self, num_envs: int, discount: float, half_life: float) -> None:
        self.discount = discount
        self.decay = 0.5 ** (1.0 / half_life)
        self.sums = torch.zeros(num_envs, dtype=torch.float64)
        self.weight = 0.0
        self.mean = 0.0  # of the sums, and of their squares
        self.square = 0.0

    def update(self, rewards: Tensor, valid: Tensor) -> None:
        """Add one step of raw rewards (num_envs,); where not `valid` (a reset) the sum stands."""
        rewards, valid = rewards.double().cpu(), valid.cpu()
        self.weight = self.decay * self.weight + 1.0
        step = 1.0 / self.weight
        self.sums = torch.where(valid, self.sums * self.discount + rewards, self.sums)
        self.mean += step * (self.sums.mean().item() - self.mean)
        self.square += step * (self.sums.square().mean().item() - self.square)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Scaled rewards of raw ones, of the same shape."""
        return rewards / self.std

    @property
    def std(self) -> float:
        """Standard deviation of the discounted sums; 1 as long as they do not vary."""
        variance = self.square - self.mean**2
        return variance**0.5 if variance > 1e-16 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, in plain containers."""
        return {
            "sums": self.sums,
            "weight": self.weight,
            "mean": self.mean,
            "square": self.square,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; with another number of envs the sums restart."""
        if state["sums"].shape == self.sums.shape:
            self.sums = state["sums"].clone()
        self.weight, self.mean, self.square = state["weight"], state["mean"], state["square"]
