"""Common to all curiosity signals."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.collectives import summed
from icm.models import Phi
from icm.ranks import WORLD_SIZE


@dataclass
class Errors:
    """A signal's errors on transitions; all tensors are (batch,), except the last two."""

    surprise: Tensor  # before it is weighed and scaled, without gradient
    forward: Tensor | None = None  # minimised by the signal's predictor
    inverse: Tensor | None = None  # cross-entropy of the guessed action, nats
    logits: Tensor | None = None  # of the guess, (batch, actions)
    share_of: Tensor | None = None  # (batch, F), if forward / its variance is to be minimised


class Signal(nn.Module, ABC):
    """Judges how surprising transitions are, and learns from them so that they surprise less."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Every network under the name it has in a checkpoint."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Features of normalised states (batch, C, H, W), float32 (batch, kinds, F).

        Everything that depends on one state alone, so that a state that ends one transition and
        begins the next is encoded once.
        """

    @abstractmethod
    def forward(
        self,
        features: Tensor,
        actions: Tensor,
        next_features: Tensor,
        behaviour: Tensor,
        previous: Tensor | None = None,
    ) -> Errors:
        """Errors on transitions.

        Args:
            features: of s, as `encode` gives them.
            actions: int64, (batch,).
            next_features: of s'.
            behaviour: pi(. | s) the actions were drawn from, (batch, num_actions).
            previous: previous actions, int64 (batch,); for models that are told them.
        """

    def loss(self, errors: Errors, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts for the log.

        Over the transitions where `valid` (batch,) is true.
        """
        if errors.forward is None:
            return torch.zeros((), device=valid.device), {}
        forward = MaskedMean(valid)(errors.forward)
        return forward, {"loss/forward": forward.detach()}

    def update_target(self) -> None:
        """Update averaged weights after an optimizer step."""


@torch.no_grad()
def random_features(phi: Phi, x: Tensor) -> Tensor:
    """Features (batch, F) of a phi that never learns, normalised to mean 0 and variance 1.

    Of normalised states (batch, C, H, W); Burda et al. 2018 (Large-Scale Study), section 2.1.
    """
    features = phi(x).float()
    return F.layer_norm(features, features.shape[1:])


class MaskedMean:
    """Mean over the transitions of a batch where a mask is true; 0 if there is none.

    Each rank has a part of the batch; averaged over ranks, the results give the batch's mean.

    Args:
        mask: bool, of any shape.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.count = summed(mask.sum()).clamp_min(1) / WORLD_SIZE

    def __call__(self, values: Tensor) -> Tensor:
        """Mean of values of the mask's shape; (F,) if (*mask's shape, F)."""
        mask = self.mask.unsqueeze(-1) if values.ndim > self.mask.ndim else self.mask
        return (values * mask).sum(tuple(range(self.mask.ndim))) / self.count
