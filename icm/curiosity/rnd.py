"""Random network distillation."""

import torch
from torch import Tensor, nn

from icm.curiosity.signal import Errors, Signal, random_features
from icm.models import Phi


class RND(Signal):
    """Error ||g(s') - phi(s')||^2 / F of a network g that learns to imitate a random one, phi.

    Burda, Edwards, Storkey, Klimov: Exploration by Random Network Distillation (2018), section 2.2.
    Nothing is predicted about the future: a state is surprising as long as it was rarely seen.

    Args:
        phi: the random network; its features are normalised to mean 0 and variance 1.
        predictor: encoder of the same size, followed by two layers of its own.
        hidden: units of the first of them.
    """

    def __init__(self, phi: Phi, predictor: Phi, hidden: int) -> None:
        super().__init__()
        self.phi = phi.requires_grad_(False)
        size = phi.num_features
        self.predictor = nn.Sequential(
            predictor, nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size)
        )

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network under the name it has in a checkpoint."""
        return {"phi": self.phi, "predictor": self.predictor}

    def encode(self, x: Tensor) -> Tensor:
        """The predictor's output for a state and its random features, (batch, 2, F)."""
        return torch.stack((self.predictor(x).float(), random_features(self.phi, x)), dim=1)

    def forward(
        self,
        features: Tensor,
        actions: Tensor,
        next_features: Tensor,
        behaviour: Tensor,
        previous: Tensor | None = None,
    ) -> Errors:
        """Errors of the predictor, see `Signal.forward`."""
        predicted, target = next_features.unbind(1)
        error = (predicted - target).square().mean(1)
        return Errors(error.detach(), error)
