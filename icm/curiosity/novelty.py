"""How new a state is within its life."""

from typing import Any

import torch
from torch import Tensor

CAPACITY = 1_000
"""Latest states of a life that are remembered: Super Mario Bros. has time for 1600 steps."""

LEAST = torch.finfo(torch.float32).tiny
"""Novelty of a state seen before: 0 says that there is nothing to learn."""


class EpisodicNovelty:
    """How far a state is from all that its life has seen, between 0 and 1.

    1 - K with the kernel K(x, y) = scale / (|x - y|^2 / F + scale) of Never Give Up (Badia et al.
    2020, eq. 3) and only the nearest state: near 0 for a state seen before, 1/2 at a mean squared
    difference of `scale` per feature, near 1 for one that looks like nothing before.

    Surprise alone does not tell a new place from one where something keeps moving: an agent that
    waits among enemies is surprised for ever. With this weight, moving on pays.

    The features are random and never trained, whatever the signal: a life's memory needs them to
    be fixed, and those of an inverse model tell places apart less well, because they are made to
    tell what an action did (docs/search.md). Every state is normalised to its own contrast, or a
    dark level would look like one place.

    Args:
        num_envs: environments whose lives run in parallel.
        num_features: length F of the features.
        scale: see above; None: every state is new, and features are not needed.
        device: where everything is kept.
    """

    def __init__(
        self, num_envs: int, num_features: int, scale: float | None, device: torch.device
    ) -> None:
        self.scale = scale
        if scale is None:
            return
        self.seen = torch.zeros(num_envs, CAPACITY, num_features, device=device)
        # |f|^2 of what was seen, infinity in empty slots
        self.squares = torch.full((num_envs, CAPACITY), torch.inf, device=device)
        self.count = torch.zeros(num_envs, dtype=torch.int64)  # states of the running lives

    @staticmethod
    def nbytes(num_envs: int, num_features: int) -> int:
        """Bytes that it takes as lives grow long."""
        return num_envs * CAPACITY * 4 * (num_features + 1)

    @torch.no_grad()
    def __call__(self, features: Tensor, opens: Tensor, respawned: Tensor) -> Tensor:
        """Novelty of the states a step led to; from then on they count as seen.

        Args:
            features: of these states, float32 (num_envs, F).
            opens: whether a life begins with them, bool (num_envs,), on the CPU.
            respawned: whether no action led there, bool (num_envs,), on the CPU.

        Returns:
            float32 (num_envs,), on the CPU; 0 where `respawned`, and only there: such transitions
            are not learned from.
        """
        if self.scale is None:
            return torch.ones(len(opens)).masked_fill(respawned, 0.0)
        self.count[opens] = 0
        self.squares.masked_fill_(opens.to(self.squares.device).unsqueeze(1), torch.inf)
        filled = min(max(int(self.count.max()), 1), CAPACITY)
        # by far the quickest way to |x - y|^2: torch.cdist takes 7 to 30 times as long
        products = torch.bmm(features.unsqueeze(1), self.seen[:, :filled].mT).squeeze(1)
        square = features.square().sum(1)
        nearest = (self.squares[:, :filled] - 2 * products).amin(1) + square
        distance = nearest.clamp_min(0.0) / features.shape[1]
        at = torch.arange(len(opens)), self.count % CAPACITY
        self.seen[at], self.squares[at] = features, square
        self.count += 1
        novelty = (1 - self.scale / (distance + self.scale)).clamp_min(LEAST).cpu()
        return novelty.masked_fill(respawned, 0.0)

    def inherit(self, origin: Tensor, undone: Tensor) -> None:
        """Give lives that continue from the middle of others what these had seen by then.

        Args:
            origin: environment whose life each one continues, int64 (num_envs,), on the CPU; -1:
                none.
            undone: how many of its latest actions came after that, int64 (num_envs,), on the CPU.
        """
        rows = (origin >= 0).nonzero().squeeze(1)
        if self.scale is None or not len(rows):
            return
        for known in (self.seen, self.squares, self.count):
            known[rows] = known[origin[rows]]
        for row in rows.tolist():
            last = int(self.count[row])
            # one more: the state that it begins in is about to be seen again
            forgotten = min(int(undone[row]) + 1, last, CAPACITY)
            self.squares[row, torch.arange(last - forgotten, last) % CAPACITY] = torch.inf
            self.count[row] -= forgotten

    def state_dict(self) -> dict[str, Any]:
        """What the running lives have seen, on the CPU."""
        if self.scale is None:
            return {}
        filled = min(int(self.count.max()), CAPACITY)
        squares = self.squares[:, :filled].clone()
        of_lives_before = squares.isinf().unsqueeze(2)
        seen = self.seen[:, :filled].masked_fill(of_lives_before, 0.0)
        return {"seen": seen.cpu(), "squares": squares.cpu(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue these lives."""
        if self.scale is None:
            return
        filled = state["seen"].shape[1]
        self.seen[:, :filled] = state["seen"]
        self.squares[:, :filled] = state["squares"]
        self.squares[:, filled:] = torch.inf
        self.count = state["count"].clone()
