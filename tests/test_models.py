"""Layers, sizes and `state_dict` keys of the networks, and what goes into them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from icm.factory import build_agent
from icm.models import (
    CONTRAST,
    INPUT_NORMS,
    NO_ACTION,
    ActorCritic,
    Fnet,
    InputNorm,
    InverseNet,
    Phi,
    Qnetwork,
    contrast_normalised,
    conv_features,
    elu,
)

# --- the tutorial's classes, written independently ------------------------------------------------


class TutorialPhi(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=(3, 3), stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 32, kernel_size=(3, 3), stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, kernel_size=(3, 3), stride=2, padding=1)
        self.conv4 = nn.Conv2d(32, 32, kernel_size=(3, 3), stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x)
        y = F.elu(self.conv1(x))
        y = F.elu(self.conv2(y))
        y = F.elu(self.conv3(y))
        y = F.elu(self.conv4(y))
        return y.flatten(start_dim=1)


class TutorialGnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(576, 256)
        self.linear2 = nn.Linear(256, 12)

    def forward(self, state1: Tensor, state2: Tensor) -> Tensor:
        x = torch.cat((state1, state2), dim=1)
        y = F.relu(self.linear1(x))
        return F.softmax(self.linear2(y), dim=1)


class TutorialFnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(300, 256)
        self.linear2 = nn.Linear(256, 288)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        one_hot = F.one_hot(action, num_classes=12)
        x = torch.cat((state, one_hot), dim=1)
        return self.linear2(F.relu(self.linear1(x)))


class TutorialQnetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=(3, 3), stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 32, kernel_size=(3, 3), stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, kernel_size=(3, 3), stride=2, padding=1)
        self.conv4 = nn.Conv2d(32, 32, kernel_size=(3, 3), stride=2, padding=1)
        self.linear1 = nn.Linear(288, 100)
        self.linear2 = nn.Linear(100, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x)
        y = F.elu(self.conv1(x))
        y = F.elu(self.conv2(y))
        y = F.elu(self.conv3(y))
        y = F.elu(self.conv4(y))
        y = y.flatten(start_dim=2)
        y = y.view(y.shape[0], -1, 32)
        y = y.flatten(start_dim=1)
        y = F.elu(self.linear1(y))
        return self.linear2(y)


CONVOLUTIONS = {
    "conv1.weight": (32, 3, 3, 3),
    "conv1.bias": (32,),
    "conv2.weight": (32, 32, 3, 3),
    "conv2.bias": (32,),
    "conv3.weight": (32, 32, 3, 3),
    "conv3.bias": (32,),
    "conv4.weight": (32, 32, 3, 3),
    "conv4.bias": (32,),
}
CONVOLUTION_COUNT = (3 * 9 * 32 + 32) + 3 * (32 * 9 * 32 + 32)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def random_states(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected", "count"),
    [
        (lambda: Phi((3, 42, 42)), CONVOLUTIONS, CONVOLUTION_COUNT),
        (
            Fnet,
            {
                "linear1.weight": (256, 300),
                "linear1.bias": (256,),
                "linear2.weight": (288, 256),
                "linear2.bias": (288,),
            },
            (300 * 256 + 256) + (256 * 288 + 288),
        ),
        (
            InverseNet,
            {
                "linear1.weight": (256, 576),
                "linear1.bias": (256,),
                "linear2.weight": (12, 256),
                "linear2.bias": (12,),
            },
            (576 * 256 + 256) + (256 * 12 + 12),
        ),
        (
            Qnetwork,
            CONVOLUTIONS
            | {
                "linear1.weight": (100, 288),
                "linear1.bias": (100,),
                "linear2.weight": (12, 100),
                "linear2.bias": (12,),
            },
            CONVOLUTION_COUNT + (288 * 100 + 100) + (100 * 12 + 12),
        ),
    ],
    ids=["phi", "fnet", "inverse", "qnetwork"],
)
def test_default_layers_are_the_tutorials(
    make: Callable[[], nn.Module], expected: dict[str, tuple[int, ...]], count: int
) -> None:
    network = make()
    assert shapes(network) == expected
    assert list(network.state_dict()) == list(expected)
    assert sum(p.numel() for p in network.parameters()) == count


def test_parameter_counts_in_digits() -> None:
    networks = (Phi((3, 42, 42)), Fnet(), InverseNet(), Qnetwork())
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [28_640, 151_072, 150_796, 58_752]


def test_convolutions_halve_and_pad() -> None:
    for network in (Phi((3, 42, 42)), Qnetwork()):
        for layer in (network.conv1, network.conv2, network.conv3, network.conv4):
            assert layer.kernel_size == (3, 3)
            assert layer.stride == (2, 2)
            assert layer.padding == (1, 1)


def test_tutorial_images_have_288_features() -> None:
    assert conv_features(42, 42) == 288
    phi = Phi((3, 42, 42))
    assert phi.num_features == 288
    assert phi(torch.rand(2, 3, 42, 42)).shape == (2, 288)


@pytest.mark.parametrize(
    "shape", [(3, 42, 42), (4, 84, 84), (2, 45, 30), (1, 16, 16), (4, 17, 33), (3, 1, 1)]
)
def test_sizes_follow_from_the_states(shape: tuple[int, int, int]) -> None:
    x = torch.rand(2, *shape)
    phi = Phi(shape)
    features = phi(x)
    assert features.shape == (2, conv_features(*shape[1:]))
    assert features.shape[1] == phi.num_features
    q = Qnetwork(shape, num_actions=5, hidden=7)
    assert q(x).shape == (2, 5)
    assert q.linear1.in_features == phi.num_features
    assert q.linear1.out_features == 7
    fnet = Fnet(phi.num_features, 5, 9)
    assert fnet(features, torch.tensor([0, 4])).shape == features.shape
    inverse = InverseNet(phi.num_features, 5, 9)
    assert inverse(features, features).shape == (2, 5)


def test_previous_action_is_one_more_input() -> None:
    """The same as without, where the weights of the new input are zero; else that column's sum."""
    told = {"previous_action": True}
    features, x = torch.rand(3, 288), torch.rand(3, 3, 42, 42)
    previous = torch.tensor([2, NO_ACTION, 11])
    pairs: list[tuple[nn.Module, nn.Module, tuple[Tensor, ...]]] = [
        (Fnet(), Fnet(**told), (features, torch.tensor([0, 1, 2]))),
        (InverseNet(), InverseNet(**told), (features, features.flip(0))),
        (Qnetwork(), Qnetwork(**told), (x,)),
    ]
    for plain, network, inputs in pairs:
        state = {name: value.clone() for name, value in plain.state_dict().items()}
        extra = torch.rand(len(state["linear1.bias"]), 12)
        state["linear1.weight"] = torch.cat((state["linear1.weight"], extra), 1)
        network.load_state_dict(state)
        with pytest.raises(ValueError, match="needs the previous actions"):
            network(*inputs)
        found = network(*inputs, previous)
        for row, action in enumerate(previous.tolist()):
            with torch.no_grad():
                bias = state["linear1.bias"] + (extra[:, action] if action >= 0 else 0)
                plain.get_parameter("linear1.bias").copy_(bias)
            torch.testing.assert_close(found[row], plain(*inputs)[row])


def test_batch_of_one_is_a_row_of_a_larger_batch() -> None:
    phi, fnet, inverse, q = Phi((3, 42, 42)), Fnet(), InverseNet(), Qnetwork()
    x, actions = torch.rand(4, 3, 42, 42), torch.tensor([0, 3, 11, 5])
    features = phi(x)
    one = slice(2, 3)
    for alone, batch in (
        (phi(x[one]), features),
        (q(x[one]), q(x)),
        (fnet(features[one], actions[one]), fnet(features, actions)),
        (inverse(features[one], features[:1]), inverse(features, features[:1].expand(4, -1))),
    ):
        assert alone.shape[0] == 1
        torch.testing.assert_close(alone, batch[one], rtol=1e-4, atol=1e-5)


# --- files of the tutorial ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_theirs", "make_ours"),
    [(TutorialPhi, lambda: Phi((3, 42, 42))), (TutorialQnetwork, Qnetwork)],
    ids=["phi", "qnetwork"],
)
def test_tutorial_image_networks_load_and_agree(
    make_theirs: Callable[[], nn.Module], make_ours: Callable[[], nn.Module]
) -> None:
    theirs, ours = make_theirs(), make_ours()
    states = random_states(5, 3, 42, 42)
    norm = InputNorm("stack", (42, 42))
    assert not torch.allclose(ours(norm(states)), theirs(states.float()), atol=1e-3)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(norm(states)), theirs(states.float()), rtol=1e-5, atol=1e-6)


def test_tutorial_fnet_loads_and_agrees() -> None:
    theirs, ours = TutorialFnet(), Fnet()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features, actions = torch.randn(12, 288), torch.randperm(12)
    torch.testing.assert_close(ours(features, actions), theirs(features, actions))


def test_tutorial_gnet_loads_and_agrees() -> None:
    theirs, ours = TutorialGnet(), InverseNet()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    before, after = torch.randn(6, 288), torch.randn(6, 288)
    torch.testing.assert_close(ours(before, after).softmax(1), theirs(before, after))


def test_inverse_model_with_dropout() -> None:
    """Half of the features are hidden while it learns, in both states; the rest counts twice."""
    plain, dropping = InverseNet(), InverseNet(dropout=0.5)
    assert shapes(dropping) == shapes(plain)
    dropping.load_state_dict(plain.state_dict(), strict=True)
    before, after = torch.randn(6, 288), torch.randn(6, 288)
    dropping.eval()
    assert torch.equal(dropping(before, after), plain(before, after))
    dropping.train()
    torch.manual_seed(3)
    found = dropping(before, after)
    torch.manual_seed(3)
    shown = F.dropout(torch.ones(6, 288), 0.5)
    assert (shown == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(found, plain(before * shown, after * shown))
    assert not torch.allclose(found, plain(before, after), atol=1e-2)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_hidden_units_of_the_inverse_model_fall_silent_without_layer_norm(layer_norm: bool) -> None:
    """Where the action cannot be known, as to one that knows nothing yet."""
    torch.manual_seed(0)
    inverse = InverseNet(32, 4, 64, dropout=0.5, layer_norm=layer_norm)
    active = []

    def count(_: nn.Module, given: tuple[Tensor]) -> None:
        active.append((given[0] > 0).float().mean().item())

    inverse.linear2.register_forward_pre_hook(count)
    optimizer = torch.optim.Adam(inverse.parameters(), lr=1e-2)
    for _ in range(300):
        before, after = F.elu(torch.randn(2, 64, 32) - 0.5)
        loss = F.cross_entropy(inverse(before, after), torch.randint(4, (64,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert active[0] > 0.4
    if layer_norm:
        assert active[-1] > 0.4
    else:
        assert active[-1] < 0.2


def weights(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()


def test_fnet_and_inverse_in_numpy() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.normal(size=(2, 4, 288)).astype(np.float32)
    actions = [3, 0, 11, 7]

    fnet = Fnet()
    (w1, b1), (w2, b2) = weights(fnet.linear1), weights(fnet.linear2)
    found = fnet(torch.from_numpy(before), torch.tensor(actions)).detach().numpy()
    for row, action in enumerate(actions):
        one_hot = np.zeros(12)
        one_hot[action] = 1
        hidden = np.maximum(w1 @ np.concatenate((before[row], one_hot)) + b1, 0)
        np.testing.assert_allclose(found[row], w2 @ hidden + b2, rtol=1e-3, atol=1e-5)

    inverse = InverseNet()
    (w1, b1), (w2, b2) = weights(inverse.linear1), weights(inverse.linear2)
    found = inverse(torch.from_numpy(before), torch.from_numpy(after)).detach().numpy()
    for row in range(4):
        hidden = np.maximum(w1 @ np.concatenate((before[row], after[row])) + b1, 0)
        np.testing.assert_allclose(found[row], w2 @ hidden + b2, rtol=1e-3, atol=1e-5)


def test_convolutions_in_numpy() -> None:
    """Phi of a 4x3 image, pixel by pixel."""
    phi = Phi((2, 4, 3))
    x = torch.rand(1, 2, 4, 3)
    y = x[0].double().numpy()
    for layer in (phi.conv1, phi.conv2, phi.conv3, phi.conv4):
        kernel, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        height, width = math.ceil(y.shape[1] / 2), math.ceil(y.shape[2] / 2)
        padded = np.pad(y, ((0, 0), (1, 2), (1, 2)))
        out = np.empty((32, height, width))
        for i in range(height):
            for j in range(width):
                patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                out[:, i, j] = (kernel * patch).sum((1, 2, 3)) + bias
        y = np.where(out > 0, out, np.expm1(out))
    np.testing.assert_allclose(phi(x)[0].detach().numpy(), y.ravel(), rtol=1e-4, atol=1e-6)


# --- input ----------------------------------------------------------------------------------------


def test_contrast_normalised_states_have_mean_0_and_std_1_each() -> None:
    states = random_states(2, 3, 5, 4)
    x = contrast_normalised(states)
    assert x.dtype == torch.float32
    for i in range(2):
        pixels = states[i].numpy().astype(np.float64)
        wanted = (pixels - pixels.mean()) / pixels.std()
        np.testing.assert_allclose(x[i].numpy(), wanted, rtol=1e-4, atol=1e-5)
    dark = states // 4
    darker, brighter = contrast_normalised(dark), contrast_normalised(3 * dark + 60)
    torch.testing.assert_close(brighter, darker, rtol=1e-4, atol=1e-4)
    blank = torch.full((1, 3, 5, 4), 7, dtype=torch.uint8)
    assert torch.equal(contrast_normalised(blank), torch.zeros(1, 3, 5, 4))


def test_contrast_is_every_states_own_and_measures_nothing() -> None:
    norm = InputNorm("contrast", (5, 4))
    states = random_states(2, 3, 5, 4)
    x = norm(states)
    torch.testing.assert_close(x.std((1, 2, 3), correction=0), torch.full((2,), CONTRAST))
    torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    norm.measure(random_states(9, 5, 4) // 4)
    assert torch.equal(norm(states), x)
    assert norm.state_dict() == {}


def test_scale_divides_by_255() -> None:
    norm = InputNorm("scale", (5, 4))
    states = random_states(2, 3, 5, 4)
    x = norm(states)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), states.numpy().astype(np.float64) / 255, rtol=1e-6)
    assert norm.state_dict() == {}
    norm.measure(random_states(9, 5, 4))
    assert torch.equal(norm(states), x)


def test_standard_is_scale_before_it_is_measured() -> None:
    norm = InputNorm("standard", (5, 4))
    assert torch.equal(norm.mean, torch.zeros(5, 4))
    assert norm.std.item() == 255
    states = random_states(2, 3, 5, 4)
    assert torch.equal(norm(states), InputNorm("scale", (5, 4))(states))


def test_standard_measures_mean_image_and_one_std() -> None:
    rng = np.random.default_rng(3)
    height, width = 5, 4
    base = rng.integers(60, 180, (height, width))
    spread = rng.integers(1, 60, (height, width))
    images = (base + rng.integers(-spread, spread + 1, (500, height, width))).astype(np.uint8)
    norm = InputNorm("standard", (height, width))
    norm.measure(torch.from_numpy(images))
    mean = images.mean(0)
    deviations = [images[:, i, j].std() for i in range(height) for j in range(width)]
    std = float(np.mean(deviations))
    np.testing.assert_allclose(norm.mean.numpy(), mean, rtol=1e-5)
    assert norm.std.shape == ()
    assert norm.std.item() == pytest.approx(std, rel=2e-3)  # n or n - 1 is all the same

    x = norm(torch.from_numpy(images[:6]).view(2, 3, height, width)).numpy()
    expected = (images[:6].reshape(2, 3, height, width) - mean) / std
    np.testing.assert_allclose(x, expected, rtol=5e-3, atol=1e-4)


def test_standard_keeps_constant_pixels_finite() -> None:
    norm = InputNorm("standard", (5, 4))
    norm.measure(torch.full((10, 5, 4), 77, dtype=torch.uint8))
    assert norm.std.item() == 1
    assert torch.equal(
        norm(torch.full((1, 2, 5, 4), 79, dtype=torch.uint8)), torch.full((1, 2, 5, 4), 2.0)
    )


def test_standard_measured_from_one_image_is_finite() -> None:
    """One environment and a warm-up of one step leave a single image to measure."""
    norm = InputNorm("standard", (5, 4))
    image = random_states(1, 5, 4)
    norm.measure(image)
    assert torch.equal(norm.mean, image[0].float())
    assert norm.std.isfinite().item()
    assert norm(random_states(2, 3, 5, 4)).isfinite().all().item()


def test_standard_is_saved_with_the_networks() -> None:
    measured, fresh = InputNorm("standard", (5, 4)), InputNorm("standard", (5, 4))
    measured.measure(random_states(20, 5, 4))
    assert shapes(measured) == {"mean": (5, 4), "std": ()}
    states = random_states(2, 3, 5, 4)
    assert not torch.equal(fresh(states), measured(states))
    fresh.load_state_dict(measured.state_dict(), strict=True)
    assert torch.equal(fresh(states), measured(states))
    assert not list(measured.parameters())


def test_stack_has_unit_norm_over_the_frames() -> None:
    norm = InputNorm("stack", (5, 4))
    states = random_states(2, 3, 5, 4).clamp_min(1)
    x = norm(states).numpy()
    pixels = states.numpy().astype(np.float64)
    lengths = np.sqrt((pixels**2).sum(1, keepdims=True))
    np.testing.assert_allclose(x, pixels / lengths, rtol=1e-5)


def test_stack_of_equal_frames_is_a_constant_image() -> None:
    norm = InputNorm("stack", (5, 4))
    frame = random_states(1, 1, 5, 4).clamp_min(1)
    x = norm(frame.expand(1, 3, 5, 4))
    torch.testing.assert_close(x, torch.full((1, 3, 5, 4), 1 / math.sqrt(3)))
    assert torch.equal(norm(torch.zeros(1, 3, 5, 4, dtype=torch.uint8)), torch.zeros(1, 3, 5, 4))


@pytest.mark.parametrize("mode", INPUT_NORMS)
def test_norm_takes_leading_dimensions_and_leaves_states_alone(mode: str) -> None:
    norm = InputNorm(mode, (5, 4))
    norm.measure(random_states(30, 5, 4))
    states = random_states(2, 6, 3, 5, 4)
    before = states.clone()
    x = norm(states)
    assert x.shape == states.shape
    assert x.dtype == torch.float32
    for i in range(2):
        assert torch.equal(x[i], norm(states[i]))
        for j in range(6):
            assert torch.equal(x[i, j], norm(states[i, j]))
    assert states.dtype == torch.uint8
    assert torch.equal(states, before)


@pytest.mark.parametrize("mode", ["", "Scale", "none", "batch"])
def test_unknown_norm(mode: str) -> None:
    with pytest.raises(ValueError, match=r"not one of standard, contrast, scale, stack"):
        InputNorm(mode, (5, 4))


# --- activation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_elu_and_its_gradient_are_those_of_pytorch(dtype: torch.dtype) -> None:
    x = torch.cat((torch.randn(4000), torch.tensor([0.0, 1e-9, -1e-9, -1e-3, 80.0, -200.0, 1e30])))
    weight = torch.randn(len(x)).to(dtype)
    ours, theirs = (x.to(dtype).requires_grad_() for _ in range(2))
    y, expected = elu(ours), F.elu(theirs)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    exact = {"rtol": 0.0, "atol": 2e-7 if dtype != torch.float64 else 1e-15}
    if dtype == torch.bfloat16:
        exact = {"rtol": 2**-7, "atol": 2e-7}  # neighbours, where the two round differently
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, **exact)
    step = 2**-7 if dtype == torch.bfloat16 else 2e-6  # of y + 1, where y is near -1
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=step)


def test_elu_lets_what_is_not_finite_through() -> None:
    y = elu(torch.tensor([math.nan, math.inf, -math.inf]))
    assert y[0].isnan()
    assert y[1:].tolist() == [math.inf, -1.0]


# --- policy and values ----------------------------------------------------------------------------


@pytest.mark.parametrize(("convolutions", "fields"), [(3, 6), (4, 3)])
def test_actor_critic_sees_fields_as_fine_as_its_convolutions_leave(
    convolutions: int, fields: int
) -> None:
    network = ActorCritic((4, 42, 42), 12, 256, convolutions=convolutions)
    names = {f"conv{number + 1}" for number in range(convolutions)} | {"linear1", "policy", "value"}
    assert {key.partition(".")[0] for key in network.state_dict()} == names
    assert network.linear1.in_features == fields * fields * 32
    logits, values = network(torch.randn(5, 4, 42, 42))
    assert logits.shape == (5, 12)
    assert values.shape == (5, 1)
    assert logits.detach().softmax(1).max() < 0.1  # nearly uniform before it has learned


def normalised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_qnetwork_in_numpy(layer_norm: bool) -> None:
    """Given 6x6 fields by three convolutions, and normalised before both layers or not at all."""
    network = Qnetwork((4, 42, 42), 12, 256, convolutions=3, layer_norm=layer_norm).double()
    assert network.linear1.in_features == 6 * 6 * 32
    x = torch.randn(5, 4, 42, 42, dtype=torch.float64)
    y = network.features(x).detach().numpy()
    for layer in (network.linear1, network.linear2):
        y = normalised(y) if layer_norm else y
        y = np.where(y > 0, y, np.expm1(y)) if layer is network.linear2 else y
        y = y @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    assert network(x).detach().numpy() == pytest.approx(y, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("agent", "norms"), [("dqn", 0), ("pqn", 2)])
def test_pqn_is_what_has_layer_normalisation(agent: str, norms: int) -> None:
    built: Any = build_agent(settings(f"agent={agent}"), (4, 42, 42), 12, torch.device("cpu"))
    assert len(built.qnetwork.norms) == norms
    assert built.qnetwork.linear1.in_features == 6 * 6 * 32 + 12  # and the action before


def test_actor_critic_in_numpy() -> None:
    network = ActorCritic((4, 42, 42), 12, 256, convolutions=3, heads=2).double()
    x = torch.randn(5, 4, 42, 42, dtype=torch.float64)

    def layer(of: torch.nn.Linear, y: np.ndarray) -> np.ndarray:
        return y @ of.weight.detach().numpy().T + of.bias.detach().numpy()

    hidden = layer(network.linear1, network.features(x).detach().numpy())
    hidden = np.where(hidden > 0, hidden, np.expm1(hidden))
    for found, of in zip(network(x), (network.policy, network.value), strict=True):
        assert found.detach().numpy() == pytest.approx(layer(of, hidden), rel=1e-6, abs=1e-8)


def assert_orthogonal(weight: torch.Tensor, gain: float) -> None:
    """Rows, or columns if these are fewer, are of length `gain` and at right angles."""
    w = weight.detach().flatten(1)
    products = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    found = products / gain**2
    torch.testing.assert_close(found, torch.eye(len(found)), rtol=0, atol=1e-4)


def test_weights_begin_orthogonal() -> None:
    network, phi = ActorCritic((4, 42, 42), 12, 256, heads=2), Phi((4, 42, 42))
    for layer in (*network.convs, *phi.convs, network.linear1):
        assert_orthogonal(layer.weight, math.sqrt(2))
        assert not layer.bias.any()
    assert_orthogonal(network.policy.weight, 0.01)
    assert_orthogonal(network.value.weight, 1.0)
