"""Surprise of a forward model in random features."""

from torch import Tensor, nn

from icm.curiosity.signal import Errors, Signal, random_features
from icm.models import Fnet, Phi


class RandomFeatures(Signal):
    """Forward error ||fnet(phi(s), a) - phi(s')||^2 / F with an untrained phi.

    Burda, Edwards, Pathak, Storkey, Darrell, Efros: Large-Scale Study of Curiosity-Driven Learning
    (2018), section 2.1, "random features". Features are normalised to mean 0 and variance 1.
    """

    def __init__(self, phi: Phi, fnet: Fnet) -> None:
        super().__init__()
        self.phi, self.fnet = phi.requires_grad_(False), fnet

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network under the name it has in a checkpoint."""
        return {"phi": self.phi, "fnet": self.fnet}

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
        """Errors of the forward model, see `Signal.forward`."""
        predicted = self.fnet(features[:, 0], actions, previous).float()
        error = (predicted - next_features[:, 0]).square().mean(1)
        return Errors(error.detach(), error)
