"""No curiosity: a control."""

import torch
from torch import Tensor, nn

from icm.curiosity.signal import Errors, Signal


class NoCuriosity(Signal):
    """Nothing surprises, so that only the game's reward, if any, is left."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """There are none."""
        return {}

    def encode(self, x: Tensor) -> Tensor:
        """Constant features, (batch, 1, 1)."""
        return torch.zeros((len(x), 1, 1), device=x.device)

    def forward(
        self,
        features: Tensor,
        actions: Tensor,
        next_features: Tensor,
        behaviour: Tensor,
        previous: Tensor | None = None,
    ) -> Errors:
        """No surprise, see `Signal.forward`."""
        return Errors(torch.zeros(len(actions), device=actions.device))
