"""Turns surprise into rewards of steady size."""

from typing import Any

import torch
from torch import Tensor


class Moments:
    """Exponentially weighted mean and standard deviation of a stream of numbers.

    Averaging over all history would keep the huge first errors of a signal in its scale for
    hundreds of thousands of steps, and learning would stall.

    Args:
        half_life: updates after which a number counts half.
    """

    def __init__(self, half_life: float) -> None:
        self.decay = 0.5 ** (1.0 / half_life)
        self.weight = 0.0
        self.mean = 0.0  # of the numbers, and of their squares
        self.square = 0.0

    def update(self, numbers: Tensor) -> None:
        """Add float64 numbers (n,); every non-empty call has the same weight, whatever n."""
        if not len(numbers):
            return
        self.weight = self.decay * self.weight + 1.0
        step = 1.0 / self.weight
        self.mean += step * (numbers.mean().item() - self.mean)
        self.square += step * (numbers.square().mean().item() - self.square)

    @property
    def std(self) -> float:
        """Standard deviation; 1 as long as the numbers do not vary by more than rounding."""
        variance = self.square - self.mean**2
        return variance**0.5 if variance > 1e-12 * self.square else 1.0

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, in plain containers."""
        return {"weight": self.weight, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.weight, self.mean, self.square = state["weight"], state["mean"], state["square"]


class Interest:
    """The weight of surprise: itself, or a factor from 1 (usual) to `limit` (extraordinary).

    The factor is clip(1 + (surprise - mean) / std, 1, limit), with which Never Give Up (Badia et
    al. 2020, eq. 1 and section 2) weights episodic by lifelong novelty: where nothing surprises any
    more, a new place is still worth something.

    Args:
        limit: the paper's L; None: surprise counts as it is.
        half_life: updates after which a surprise counts half in mean and std.
    """

    def __init__(self, limit: float | None, half_life: float) -> None:
        self.limit = limit
        self.moments = Moments(half_life)

    def update(self, surprise: Tensor) -> None:
        """Add the surprises (n,) of one step."""
        self.moments.update(surprise.double())

    def usual(self) -> Tensor:
        """Mean and std of surprise, float32 (2,)."""
        return torch.tensor((self.moments.mean, self.moments.std))

    def __call__(self, surprise: Tensor, usual: Tensor) -> Tensor:
        """Weights of surprises of any shape; `usual()` must be on their device."""
        if self.limit is None:
            return surprise
        mean, std = usual
        return (1 + (surprise - mean) / std).clamp(1, self.limit)


class RewardScale:
    """Scales raw intrinsic rewards to a steady size.

    Burda et al. 2018 (section 2.4) divide the intrinsic reward by the running standard deviation of
    its discounted sum so that the scale of features does not matter.

    Args:
        num_envs: environments, each with a discounted sum over its own time.
        half_life: steps per environment after which a value counts half.
    """

    def __init__(self, num_envs: int, half_life: float) -> None:
        self.sums = torch.zeros(num_envs, dtype=torch.float64)
        self.moments = Moments(half_life)

    def update(self, rewards: Tensor, valid: Tensor, discount: float) -> None:
        """Add one step of raw rewards (num_envs,); where not `valid` (a reset), the sum stays.

        Args:
            rewards, valid: see above.
            discount: of the running sums.
        """
        self.sums = torch.where(valid, self.sums * discount + rewards.double(), self.sums)
        self.moments.update(self.sums)

    def __call__(self, rewards: Tensor) -> Tensor:
        """Scaled rewards of raw ones, of the same shape."""
        return rewards / self.std

    @property
    def std(self) -> float:
        """Standard deviation of the discounted sums; 1 if they vary by less than a hundredth.

        If all sums are alike, what remains of their variance is rounding.
        """
        moments = self.moments
        return moments.std if moments.std**2 > 1e-4 * moments.square else 1.0

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, in plain containers."""
        return {"sums": self.sums, **self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; with another number of envs the sums restart."""
        if state["sums"].shape == self.sums.shape:
            self.sums = state["sums"].clone()
        self.moments.load_state_dict(state)
