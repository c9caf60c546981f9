"""How new a state is within its episode."""

import torch
from torch import Tensor


class EpisodicNovelty:
    """How new a state is within its episode, between 0 and 1.

    The elliptical bonus of E3B (Henaff et al. 2022, section 3), b = f^T C^-1 f with the features f
    of the state and C = ridge * I + the sum of f f^T over the states seen before in the episode, as
    the leverage b / (1 + b): 1 for a direction never seen, about 1 / (n + 1) after n times.

    Surprise alone does not tell a new place from one where something keeps moving: an agent that
    waits among enemies is surprised for ever. Multiplied with this (as Badia et al. 2020, eq. 1,
    multiply lifelong and episodic novelty), surprise pays where the episode has not been yet.

    Args:
        num_envs: environments whose episodes run side by side.
        num_features: length F of the features.
        ridge: how much of a feature counts as unseen at first; None: every state is new.
    """

    def __init__(self, num_envs: int, num_features: int, ridge: float | None) -> None:
        self.remembers = ridge is not None
        if ridge is None:
            return
        # in float32, rounding makes the inverse indefinite within a few thousand steps
        self.fresh = torch.eye(num_features, dtype=torch.float64) / ridge
        self.inverse = self.fresh.repeat(num_envs, 1, 1)

    @torch.no_grad()
    def __call__(self, features: Tensor, opens: Tensor) -> Tensor:
        """Novelty of the states that a step has led to; they are seen from then on.

        Args:
            features: of these states, (num_envs, F).
            opens: whether they open an episode, bool (num_envs,).

        Returns:
            float32 (num_envs,), on the CPU.
        """
        if not self.remembers:
            return torch.ones(len(opens))
        f = features.double().cpu().unsqueeze(1)
        self.inverse[opens] = self.fresh
        # f^T C^-1: PyTorch multiplies matrices with columns a fifth as fast as rows with matrices
        direction = f @ self.inverse
        bonus = direction @ f.mT
        # Sherman and Morrison: the inverse of C + f f^T
        self.inverse.baddbmm_(direction.mT, direction / (1 + bonus), alpha=-1.0)
        return (bonus / (1 + bonus)).flatten().float()
