"""Disagreement of an ensemble of forward models."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.collectives import own
from icm.curiosity.signal import Errors, Signal, random_features
from icm.models import Fnet, Phi
from icm.ranks import WORLD_SIZE


class Disagreement(Signal):
    """Variance of several forward models' predictions, averaged over random features.

    Pathak, Gandhi, Gupta: Self-Supervised Exploration via Disagreement (2019), eq. 1. All models
    predict the mean of what is unpredictable, like noise: they agree, and it bores.

    Args:
        phi: encoder that never learns; its features are normalised to mean 0 and variance 1.
        ensemble: forward models; each learns from a random half of every batch.
    """

    def __init__(self, phi: Phi, ensemble: list[Fnet]) -> None:
        super().__init__()
        self.phi, self.ensemble = phi.requires_grad_(False), nn.ModuleList(ensemble)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network under the name it has in a checkpoint."""
        return {"phi": self.phi, "ensemble": self.ensemble}

    def encode(self, x: Tensor) -> Tensor:
        """Random features, (batch, 1, F)."""
        return random_features(self.phi, x).unsqueeze(1)

    def forward(
        self,
        features: Tensor,
        actions: Tensor,
        next_features: Tensor,
        behaviour: Tensor,
        previous: Tensor | None = None,
    ) -> Errors:
        """Variance and mean error of the forward models, see `Signal.forward`."""
        predicted = torch.stack(
            [fnet(features[:, 0], actions, previous).float() for fnet in self.ensemble]
        )
        variance = predicted.detach().var(0, correction=0).mean(1)
        errors = (predicted - next_features[:, 0]).square().mean(2)
        if self.training:
            # drawn for all ranks, so that every part of the batch has its own
            shown = F.dropout(errors.new_ones(len(errors), errors.shape[1] * WORLD_SIZE), 0.5)
            errors = errors * own(shown, dim=1)
        return Errors(variance, errors.mean(0))
