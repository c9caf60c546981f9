"""The networks: layers only. Losses live in `curiosity` and `agents`, devices with the caller.

Default sizes (3 stacked 42x42 images, 12 actions) give the layers and `state_dict` keys of the
PyTorch tutorial this project grew from, so a `state_dict` written there loads here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.collectives import own
from icm.config import INPUT_NORMS
from icm.ranks import WORLD_SIZE

CONTRAST = 2.5
"""Std of `contrast` input: about that of `standard` in Super Mario Bros. 1-1."""
NO_ACTION = -1
"""Stands for the previous action where an episode has just begun."""


class InputNorm(nn.Module):
    """Turns uint8 states into network input; its statistics are part of the saved state.

    Modes:
        `standard`: (x - mean image) / std, both measured from a random agent with `measure`
            (Burda et al. 2018, section 2.2). Until then mean is 0 and std 255.
        `contrast`: every state with mean 0 and std CONTRAST over its own pixels, so a dark level
            is seen as well as a bright one. Nothing is measured.
        `scale`: x / 255.
        `stack`: unit L2 norm over the frame stack, as the tutorial's `F.normalize` did. Three equal
            frames become a constant image, so the first state of an episode is blank.
    """

    def __init__(self, mode: str, image_shape: tuple[int, int]) -> None:
        super().__init__()
        if mode not in INPUT_NORMS:
            raise ValueError(f"input norm {mode!r} is not one of {', '.join(INPUT_NORMS)}")
        self.mode = mode
        if mode == "standard":
            self.mean: Tensor
            self.std: Tensor
            self.register_buffer("mean", torch.zeros(image_shape))
            self.register_buffer("std", torch.tensor(255.0))

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set mean image and std from uint8 `images` of shape (n, H, W); other modes ignore it.

        One std for all pixels (the mean over pixels of their stds) keeps rarely changing pixels
        from being blown up.
        """
        if self.mode != "standard":
            return
        x = images.to(self.mean.device, torch.float32)
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0, correction=0).mean().clamp_min(1.0))

    def forward(self, states: Tensor) -> Tensor:
        """Map uint8 states (..., C, H, W) to float32 of the same shape."""
        if self.mode == "contrast":
            return CONTRAST * contrast_normalised(states)
        x = states.to(torch.float32)
        if self.mode == "standard":
            return (x - self.mean) / self.std
        if self.mode == "scale":
            return x / 255
        return F.normalize(x, dim=-3)


def contrast_normalised(states: Tensor) -> Tensor:
    """Float32 of uint8 states (..., C, H, W), each with mean 0 and std 1 over all its pixels.

    So a dark level is seen as well as a bright one; by the statistics of a bright one, as in
    `InputNorm`, all pictures of a dark one look much the same.
    """
    x = states.to(torch.float32)
    variance, mean = torch.var_mean(x, (-3, -2, -1), correction=0, keepdim=True)
    return (x - mean) / variance.sqrt().clamp_min(1.0)  # a blank picture stays blank


def one_hot(actions: Tensor, num_actions: int) -> Tensor:
    """Float32 (batch, num_actions) of int64 actions (batch,); zeros for NO_ACTION."""
    return F.one_hot(actions - NO_ACTION, num_actions + 1)[:, 1:].float()


def with_previous(x: Tensor, previous: Tensor | None, num_previous: int) -> Tensor:
    """Inputs (batch, n), followed by the one-hot previous action for networks that are told it.

    A picture does not show what the controller did, which matters: in Super Mario Bros. a jump
    begins only if A was up before.

    Args:
        x: float (batch, n).
        previous: int64 (batch,), NO_ACTION where an episode has just begun.
        num_previous: number of actions; 0 for a network that is not told the previous one.

    Returns:
        float (batch, n + num_previous).

    Raises:
        ValueError: a network that is told the previous action was not given it.
    """
    if not num_previous:
        return x
    if previous is None:
        raise ValueError("this network needs the previous actions")
    return torch.cat((x, one_hot(previous, num_previous)), dim=1)


class _ELU(torch.autograd.Function):
    """See `elu`. The gradient, 1 or y + 1, needs only the result y.

    No `setup_context`: each call would inspect signatures, as slow as the arithmetic itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # 1 hides small y in bfloat16
        y = wide.clamp(max=0).exp_().sub_(1).to(x.dtype)
        # new memory costs as much as the arithmetic; not when compiled, where PyTorch 2.11 cannot
        # take an `out`, and has no gradient of in-place changes
        result = torch.maximum(x, y, out=None if torch.compiler.is_compiling() else y)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        (y,) = ctx.saved_tensors
        return torch.ops.aten.elu_backward(gradient, 1.0, 1.0, 1.0, True, y)


def elu(x: Tensor, /) -> Tensor:
    """Exponential linear unit, x if positive, else exp(x) - 1 (Clevert et al. 2016, section 3).

    `F.elu` uses expm1, which takes a fifth of a compiled update's time, and once took most of an
    eager one's (docs/performance.md). Equal to it within rounding of 1.
    """
    return _ELU.apply(x)


def conv_features(height: int, width: int, convolutions: int = 4) -> int:
    """Length of the flattened output of the `convolutions` (42x42 -> 3x3x32 = 288)."""
    for _ in range(convolutions):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return height * width * 32


class _ConvBody(nn.Module):
    """3x3 convolutions of stride 2 (conv1, conv2, ...), each followed by ELU, then flattened.

    A body of three convolutions sees a 42x42 picture as 6x6 fields, one of four as 3x3.
    """

    activation: Callable[[Tensor], Tensor] = staticmethod(elu)

    def __init__(self, state_shape: tuple[int, int, int], convolutions: int = 4) -> None:
        super().__init__()
        channels, height, width = state_shape
        for number in range(convolutions):
            conv = nn.Conv2d(32 if number else channels, 32, kernel_size=3, stride=2, padding=1)
            self.add_module(f"conv{number + 1}", conv)
        self.num_features = conv_features(height, width, convolutions)

    @property
    def convs(self) -> list[nn.Conv2d]:
        """Convolutions in order."""
        return [module for module in self.children() if isinstance(module, nn.Conv2d)]

    def features(self, x: Tensor) -> Tensor:
        """Map (batch, C, H, W) to (batch, num_features)."""
        for conv in self.convs:
            x = self.activation(conv(x))
        return x.flatten(start_dim=1)


class Phi(_ConvBody):
    """Encoder phi of a state into a feature vector (Pathak et al. 2017, section 2.2).

    Its convolutions start orthogonal, so that even untrained features tell places apart: these are
    the random features of Burda et al. 2018.
    """

    def __init__(self, state_shape: tuple[int, int, int]) -> None:
        super().__init__(state_shape)
        for conv in self.convs:
            orthogonal(conv, math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised states (batch, C, H, W) to features (batch, num_features)."""
        return self.features(x)


class Fnet(nn.Module):
    """Forward model: predicts phi(s') from phi(s) and the action (Pathak et al. 2017, eq. 4)."""

    def __init__(
        self,
        num_features: int = 288,
        num_actions: int = 12,
        hidden: int = 256,
        previous_action: bool = False,
    ) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.num_previous = num_actions if previous_action else 0
        self.linear1 = nn.Linear(num_features + num_actions + self.num_previous, hidden)
        self.linear2 = nn.Linear(hidden, num_features)

    def forward(self, features: Tensor, actions: Tensor, previous: Tensor | None = None) -> Tensor:
        """Map features (batch, F) and int64 actions (batch,) to predicted features (batch, F)."""
        x = torch.cat((features, one_hot(actions, self.num_actions)), dim=1)
        return self.linear2(F.relu(self.linear1(with_previous(x, previous, self.num_previous))))


class InverseNet(nn.Module):
    """Inverse model: guesses the action between two states (Pathak et al. 2017, eq. 2).

    `dropout` hides the same features in both states, so that the model does not memorise
    transitions; 0 is the tutorial's model. Hidden independently, few features would be left in
    both, and it may learn nothing for 100 000 agent steps: actions show in their difference.

    `layer_norm` normalises the hidden units' inputs (Ba et al. 2016), so that some are active in
    every transition. Without it, one unit after the other may fall silent in all of them, and then
    learns no more: features have a mean far from 0, so one Adam step shifts the inputs of all
    units, and a model that knows nothing yet errs least when silent.
    """

    def __init__(
        self,
        num_features: int = 288,
        num_actions: int = 12,
        hidden: int = 256,
        dropout: float = 0.0,
        previous_action: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_previous = num_actions if previous_action else 0
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = layer_norm
        self.linear1 = nn.Linear(2 * num_features + self.num_previous, hidden)
        self.linear2 = nn.Linear(hidden, num_actions)

    def forward(
        self, features: Tensor, next_features: Tensor, previous: Tensor | None = None
    ) -> Tensor:
        """Map phi(s) and phi(s'), both (batch, F), to action logits (batch, num_actions)."""
        # drawn for all ranks, so that every part of the batch has its own
        shown = own(self.dropout(features.new_ones(len(features) * WORLD_SIZE, features.shape[1])))
        both = torch.cat((features * shown, next_features * shown), dim=1)
        hidden = self.linear1(with_previous(both, previous, self.num_previous))
        if self.layer_norm:
            hidden = F.layer_norm(hidden, hidden.shape[1:])
        return self.linear2(F.relu(hidden))


class Qnetwork(_ConvBody):
    """Action values of a state; `layer_norm` normalises the features and the hidden layer."""

    def __init__(
        self,
        state_shape: tuple[int, int, int] = (3, 42, 42),
        num_actions: int = 12,
        hidden: int = 100,
        previous_action: bool = False,
        convolutions: int = 4,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(state_shape, convolutions)
        self.num_previous = num_actions if previous_action else 0
        self.linear1 = nn.Linear(self.num_features + self.num_previous, hidden)
        self.linear2 = nn.Linear(hidden, num_actions)
        sizes = (self.num_features, hidden) if layer_norm else ()
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """Map normalised states (batch, C, H, W) to action values (batch, num_actions)."""
        before_hidden, before_last = self.norms or (nn.Identity(), nn.Identity())
        features = with_previous(before_hidden(self.features(x)), previous, self.num_previous)
        return self.linear2(self.activation(before_last(self.linear1(features))))


class ActorCritic(_ConvBody):
    """A policy and the value of a state, or several values (`heads`, h), from one body.

    Orthogonal weights; the policy's last layer is small, so that it begins nearly uniform
    (Andrychowicz et al. 2021, section 3.2).
    """

    def __init__(
        self,
        state_shape: tuple[int, int, int],
        num_actions: int,
        hidden: int,
        previous_action: bool = False,
        convolutions: int = 4,
        heads: int = 1,
    ) -> None:
        super().__init__(state_shape, convolutions)
        self.num_previous = num_actions if previous_action else 0
        self.linear1 = nn.Linear(self.num_features + self.num_previous, hidden)
        self.policy = nn.Linear(hidden, num_actions)
        self.value = nn.Linear(hidden, heads)
        for conv in self.convs:
            orthogonal(conv, math.sqrt(2))
        orthogonal(self.linear1, math.sqrt(2))
        orthogonal(self.policy, 0.01)
        orthogonal(self.value, 1.0)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map normalised states (batch, C, H, W) to logits (batch, actions), values (batch, h)."""
        features = with_previous(self.features(x), previous, self.num_previous)
        hidden = self.activation(self.linear1(features))
        return self.policy(hidden), self.value(hidden)


def orthogonal(layer: nn.Conv2d | nn.Linear, gain: float) -> None:
    """Orthogonal weights times `gain`, no bias (Saxe et al. 2014)."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def soft_update(average: nn.Module, newest: nn.Module, tau: float) -> None:
    """Move the weights of `average` by the share `tau` towards those of its twin `newest`."""
    torch._foreach_lerp_([*average.parameters()], [*newest.parameters()], tau)
