"""Curiosity: surprise of a forward model in features learned by an inverse model.

Pathak, Agrawal, Efros, Darrell: Curiosity-driven Exploration by Self-supervised Prediction (2017).

Either surprise is measured in the features of phi itself, as in the paper: the forward loss then
reaches phi, too, which forgets what cannot be predicted. Or it is measured in those of a *moving
average* of phi, much as in BYOL-Explore (Guo et al. 2022), and phi learns from the inverse loss
alone. Phi then changes faster than a forward model could follow: in its own features, all states
would be equally surprising.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.collectives import mean_of_ranks
from icm.curiosity.signal import Errors, MaskedMean, Signal
from icm.models import Fnet, InverseNet, Phi, soft_update


class ICM(Signal):
    """Intrinsic Curiosity Module: encoder, forward model, inverse model and their losses.

    Args:
        phi: encoder of states.
        fnet: forward model.
        inverse: inverse model.
        beta: weight of the forward against the inverse loss (Pathak et al. 2017, eq. 7).
        eta: scale of the intrinsic reward (eq. 6).
        reduction: `mean` or `sum` of the squared error over features.
        forward_scale: factor on the forward loss (the tutorial's forward scale).
        inverse_scale: factor on the inverse loss (the tutorial's inverse scale).
        target_tau: share of phi mixed into its moving average, the target phi, per optimizer step;
            with 1 the two are the same. None: there is no average, and phi learns from both losses
            (eq. 7).
        normalize_features: whether the predicted features are normalised to mean 0 and variance 1
            within every state (layer normalisation without parameters), so that their scale cannot
            drift. If phi learns from the forward loss, that is also divided by their variance over
            the batch, or phi could lower it by making all states alike.
        policy_prior: whether the inverse model is told the policy, see `forward`.
    """

    def __init__(
        self,
        phi: Phi,
        fnet: Fnet,
        inverse: InverseNet,
        *,
        beta: float,
        eta: float,
        reduction: str = "mean",
        forward_scale: float = 1.0,
        inverse_scale: float = 1.0,
        target_tau: float | None = 1.0,
        normalize_features: bool = False,
        policy_prior: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction {reduction!r} is not one of mean, sum")
        self.phi, self.fnet, self.inverse = phi, fnet, inverse
        self.target_phi = None
        if target_tau is not None:
            self.target_phi = copy.deepcopy(phi).requires_grad_(False)
        self.beta, self.eta = beta, eta
        self.reduction = reduction
        self.forward_scale, self.inverse_scale = forward_scale, inverse_scale
        self.target_tau, self.normalize_features = target_tau, normalize_features
        self.policy_prior = policy_prior

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network under the name it has in a checkpoint."""
        networks: dict[str, nn.Module] = {
            "phi": self.phi,
            "fnet": self.fnet,
            "inverse": self.inverse,
        }
        if self.target_phi is not None:
            networks["target_phi"] = self.target_phi
        return networks

    def encode(self, x: Tensor) -> Tensor:
        """Features of normalised states (batch, C, H, W), shape (batch, 2, F).

        First those of phi, for the inverse model; then those that the forward model takes and
        predicts. If the latter are of a target phi, no loss on them reaches phi.
        """
        learned = target = self.phi(x).float()
        if self.target_phi is not None:
            with torch.no_grad():
                target = self.target_phi(x).float()
        if self.normalize_features:
            target = F.layer_norm(target, target.shape[1:])
        return torch.stack((learned, target), dim=1)

    def forward(
        self,
        features: Tensor,
        actions: Tensor,
        next_features: Tensor,
        behaviour: Tensor,
        previous: Tensor | None = None,
    ) -> Errors:
        """Errors of both models on transitions.

        By Bayes' rule p(a | s, s') is proportional to pi(a | s) p(s' | s, a). With `policy_prior`
        the inverse model is given the first factor and has only the second to learn: what an
        action does, not which action an ever-changing policy prefers.

        Args:
            features, actions, next_features, behaviour, previous: see `Signal.forward`.

        Returns:
            surprise: eta * forward (eq. 6);
            forward: ||fnet(phi(s), a) - phi(s')||^2 summed or averaged over F (eq. 5, without 1/2),
                phi being the target phi here if there is one;
            inverse: cross-entropy of the guessed action, in nats (eq. 3).
        """
        (learned, target), (next_learned, next_target) = features.unbind(1), next_features.unbind(1)
        logits = self.inverse(learned, next_learned, previous).float()
        if self.policy_prior:
            logits = logits + behaviour.clamp_min(1e-8).log()
        inverse_error = F.cross_entropy(logits, actions, reduction="none")
        predicted = self.fnet(target, actions, previous).float()
        forward_error = self._reduced((predicted - next_target).square())
        surprise = self.eta * forward_error.detach()
        is_share = self.training and self.normalize_features and self.target_phi is None
        share_of = next_target if is_share else None
        return Errors(surprise, forward_error, inverse_error, logits, share_of)

    def loss(self, errors: Errors, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(1 - beta) L_I + beta L_F (eq. 7) over the transitions where `valid` (batch,) is true."""
        assert errors.forward is not None
        assert errors.inverse is not None
        mean = MaskedMean(valid)
        forward, inverse = mean(errors.forward), mean(errors.inverse)
        if errors.share_of is not None:
            center = mean_of_ranks(mean(errors.share_of))
            variance = mean(self._reduced((errors.share_of - center).square()))
            forward = share(forward, variance)
        loss = (1 - self.beta) * inverse * self.inverse_scale
        loss = loss + self.beta * forward * self.forward_scale
        return loss, {"loss/forward": forward.detach(), "loss/inverse": inverse.detach()}

    def _reduced(self, squared: Tensor) -> Tensor:
        """Squared errors (batch, F) as one per transition, (batch,)."""
        return squared.mean(1) if self.reduction == "mean" else squared.sum(1)

    def update_target(self) -> None:
        """Move the target phi, if there is one, towards phi after an optimizer step."""
        if self.target_phi is not None and self.target_tau is not None:
            soft_update(self.target_phi, self.phi, self.target_tau)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Ratio of two means over the batch, each as `MaskedMean` gives it on a rank.

    Averaged over ranks, it and its gradient are those of the batch.
    """
    of_batch, whole_of_batch = mean_of_ranks(part), mean_of_ranks(whole).clamp_min(1e-8)
    gradient_of_whole = of_batch / whole_of_batch.square() * (whole - whole.detach())
    return part / whole_of_batch - gradient_of_whole
