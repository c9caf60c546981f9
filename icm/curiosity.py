"""Curiosity: surprise of a forward model in features learned by an inverse model.

Pathak, Agrawal, Efros, Darrell: Curiosity-driven Exploration by Self-supervised Prediction (2017).

The surprise is measured on features of a *moving average* of phi, normalised, much as in
BYOL-Explore (Guo et al. 2022): phi itself changes faster than a forward model can follow, and then
every state is as surprising as any other. It counts by how new the state is in its episode.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.models import Fnet, InverseNet, Phi, follow


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


@dataclass
class ICMErrors:
    """Per-transition errors of the two models, each of shape (batch,), and the action logits."""

    forward: Tensor
    inverse: Tensor
    logits: Tensor


class ICM(nn.Module):
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
        target_tau: share of phi that enters its moving average, the target phi, per update; with 1
            the two are the same.
        normalize_features: whether the features of the target phi are normalised to mean 0 and
            variance 1 (layer normalisation without parameters), so that their scale cannot drift.
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
        target_tau: float = 1.0,
        normalize_features: bool = False,
        policy_prior: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction {reduction!r} is not one of mean, sum")
        self.phi, self.fnet, self.inverse = phi, fnet, inverse
        self.target_phi = copy.deepcopy(phi).requires_grad_(False)
        self.beta, self.eta = beta, eta
        self.reduction = reduction
        self.forward_scale, self.inverse_scale = forward_scale, inverse_scale
        self.target_tau, self.normalize_features = target_tau, normalize_features
        self.policy_prior = policy_prior

    def encode(self, x: Tensor) -> Tensor:
        """Features of normalised states (batch, C, H, W), shape (batch, 2, F).

        First those of phi, which learn from the inverse loss; then those of the target phi, which
        the forward model sees and predicts, without gradient: no loss on them reaches phi.
        """
        learned = self.phi(x).float()
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
    ) -> ICMErrors:
        """Errors of both models on transitions.

        By Bayes' rule p(a | s, s') is proportional to pi(a | s) p(s' | s, a). With `policy_prior`
        the policy's part is handed to the inverse model, which then has only the second factor to
        learn: what an action does, not which action an ever-changing policy prefers.

        Args:
            features: of s, (batch, 2, F), see `encode`.
            actions: int64, (batch,).
            next_features: of s', (batch, 2, F).
            behaviour: pi(. | s) the actions were drawn from, (batch, num_actions).
            previous: the actions before, int64 (batch,); for models that are told them.

        Returns:
            forward: ||fnet(phi(s), a) - phi(s')||^2 summed or averaged over F (eq. 5, without 1/2),
                phi being the target phi here;
            inverse: cross-entropy of the guessed action, in nats (eq. 3).
        """
        (learned, target), (next_learned, next_target) = features.unbind(1), next_features.unbind(1)
        logits = self.inverse(learned, next_learned, previous).float()
        if self.policy_prior:
            logits = logits + behaviour.clamp_min(1e-8).log()
        inverse_error = F.cross_entropy(logits, actions, reduction="none")
        predicted = self.fnet(target, actions, previous).float()
        squared = F.mse_loss(predicted, next_target, reduction="none")
        forward_error = squared.mean(1) if self.reduction == "mean" else squared.sum(1)
        return ICMErrors(forward_error, inverse_error, logits)

    def reward(self, errors: ICMErrors) -> Tensor:
        """Raw intrinsic reward eta * surprise (eq. 6), detached, (batch,)."""
        return self.eta * errors.forward.detach()

    def loss(self, errors: ICMErrors, valid: Tensor) -> Tensor:
        """(1 - beta) L_I + beta L_F (eq. 7) over the transitions where `valid` (batch,) is true."""
        forward = masked_mean(errors.forward, valid) * self.forward_scale
        inverse = masked_mean(errors.inverse, valid) * self.inverse_scale
        return (1 - self.beta) * inverse + self.beta * forward

    def update_target(self) -> None:
        """Let the target phi follow phi by one update."""
        follow(self.target_phi, self.phi, self.target_tau)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where the boolean `mask` of the same shape is true; 0 where none is."""
    return (values * mask).sum() / mask.sum().clamp_min(1)
