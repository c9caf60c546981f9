"""The losses, gradients and rewards of the ICM, and the running scale of the rewards."""

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from icm.curiosity import ICM, EpisodicNovelty, Interest, MaskedMean, RewardScale
from icm.curiosity.novelty import CAPACITY
from icm.models import Fnet, InverseNet, Phi

FEATURES, ACTIONS, HIDDEN = 2, 3, 4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


def set_linear(layer: nn.Linear, weight: list[list[float]], bias: list[float]) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))


def hand_made(**settings: float | str | bool) -> ICM:
    """Modules of two features and three actions whose weights are written down.

    fnet: hidden = relu(f1, f2, a == 0, a == 2), out = (h1 + h3, h2 - 2 h4 + 1).
    inverse: hidden = relu(f1' - f1, f2' - f2), logits = (h1, h2, 0.5).
    """
    fnet, inverse = Fnet(FEATURES, ACTIONS, HIDDEN), InverseNet(FEATURES, ACTIONS, 2)
    set_linear(
        fnet.linear1,
        [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]],
        [0, 0, 0, 0],
    )
    set_linear(fnet.linear2, [[1, 0, 1, 0], [0, 1, 0, -2]], [0, 1])
    set_linear(inverse.linear1, [[-1, 0, 1, 0], [0, -1, 0, 1]], [0, 0])
    set_linear(inverse.linear2, [[1, 0], [0, 1], [0, 0]], [0, 0, 0.5])
    return ICM(Phi((1, 2, 2)), fnet, inverse, **({"beta": 0.2, "eta": 1.0} | settings))


def twice(features: list[list[float]]) -> Tensor:
    """The same features from phi and from the target phi, (batch, 2, F)."""
    return torch.tensor(features).unsqueeze(1).expand(-1, 2, -1)


BEFORE = twice([[1.0, 2.0], [0.0, 3.0], [-1.0, 1.0]])
CHOSEN = torch.tensor([0, 2, 1])
AFTER = twice([[2.0, 3.0], [1.0, 0.0], [0.5, 1.0]])
POLICY = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.1, 0.9], [0.2, 0.8, 0.0]])
# by hand: predictions (2, 3), (0, 2), (0, 2); differences (0, 0), (-1, 2), (-0.5, 1)
SQUARES = [0.0, 5.0, 1.25]
# logits (1, 1, 0.5), (1, 0, 0.5), (1.5, 0, 0.5)
SURPRISES = [
    math.log(2 * math.e + math.exp(0.5)) - 1,
    math.log(math.e + 1 + math.exp(0.5)) - 0.5,
    math.log(math.exp(1.5) + 1 + math.exp(0.5)) - 0,
]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("mean", FEATURES)])
def test_errors_by_hand(reduction: str, divisor: int) -> None:
    errors = hand_made(reduction=reduction)(BEFORE, CHOSEN, AFTER, POLICY)
    assert errors.forward.tolist() == pytest.approx([s / divisor for s in SQUARES])
    assert errors.inverse.tolist() == pytest.approx(SURPRISES)
    assert errors.logits.tolist() == [[1, 1, 0.5], [1, 0, 0.5], [1.5, 0, 0.5]]
    assert errors.forward.shape == errors.inverse.shape == (3,)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_errors_in_numpy(reduction: str) -> None:
    """The inverse model sees phi, the forward model sees and predicts the target phi."""
    fnet, inverse = Fnet(6, 4, 8), InverseNet(6, 4, 8)
    icm = ICM(Phi((1, 2, 2)), fnet, inverse, beta=0.5, eta=1.0, reduction=reduction)
    rng = np.random.default_rng(5)
    before, after = rng.normal(size=(2, 7, 2, 6)).astype(np.float32)
    actions = rng.integers(0, 4, 7)
    errors = icm(*map(torch.from_numpy, (before, actions, after)), torch.full((7, 4), 0.25))

    def layers(network: Fnet | InverseNet, x: np.ndarray) -> np.ndarray:
        w1, b1, w2, b2 = (p.detach().double().numpy() for p in network.parameters())
        return w2 @ np.maximum(w1 @ x + b1, 0) + b2

    for row in range(7):
        predicted = layers(fnet, np.concatenate((before[row, 1], np.eye(4)[actions[row]])))
        squared = (predicted - after[row, 1]) ** 2
        expected = squared.sum() if reduction == "sum" else squared.sum() / 6
        assert errors.forward[row].item() == pytest.approx(expected, rel=1e-4)
        logits = layers(inverse, np.concatenate((before[row, 0], after[row, 0])))
        probability = np.exp(logits[actions[row]]) / np.exp(logits).sum()
        assert errors.inverse[row].item() == pytest.approx(-np.log(probability), rel=1e-4)


def test_ignorant_inverse_model_costs_log_of_the_actions() -> None:
    inverse = InverseNet(FEATURES, 12, 3)
    for parameter in inverse.parameters():
        nn.init.zeros_(parameter)
    icm = ICM(Phi((1, 2, 2)), Fnet(FEATURES, 12, 3), inverse, beta=0.2, eta=1.0)
    errors = icm(BEFORE, CHOSEN, AFTER, torch.full((3, 12), 1 / 12))
    assert errors.inverse.tolist() == pytest.approx([math.log(12)] * 3)


def test_policy_prior_by_hand() -> None:
    """Bayes: the policy's probabilities times what the inverse model makes of the two states."""
    with torch.no_grad():
        without = hand_made()(BEFORE, CHOSEN, AFTER, POLICY)
        errors = hand_made(policy_prior=True)(BEFORE, CHOSEN, AFTER, POLICY)
    for row, action in enumerate(CHOSEN.tolist()):
        posterior = POLICY[row].double().numpy() * np.exp(without.logits[row].double().numpy())
        posterior /= posterior.sum()
        assert errors.inverse[row].item() == pytest.approx(-np.log(posterior[action]), abs=1e-5)
        np.testing.assert_allclose(errors.logits[row].softmax(0).numpy(), posterior, atol=1e-6)
    assert errors.logits.isfinite().all()
    assert torch.equal(errors.forward, without.forward)


def test_ignorant_inverse_model_with_prior_costs_the_policys_surprise() -> None:
    inverse = InverseNet(FEATURES, ACTIONS, 3)
    for parameter in inverse.parameters():
        nn.init.zeros_(parameter)
    fnet = Fnet(FEATURES, ACTIONS, 3)
    icm = ICM(Phi((1, 2, 2)), fnet, inverse, beta=0.2, eta=1.0, policy_prior=True)
    errors = icm(BEFORE, CHOSEN, AFTER, POLICY)
    assert errors.inverse.tolist() == pytest.approx([-math.log(p) for p in (0.5, 0.9, 0.8)])


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="not one of mean, sum"):
        hand_made(reduction="max")


# --- loss -----------------------------------------------------------------------------------------

ALL = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.75, 1.0])
def test_beta_weighs_forward_against_inverse(beta: float) -> None:
    icm = hand_made(beta=beta, reduction="sum")
    loss = icm.loss(icm(BEFORE, CHOSEN, AFTER, POLICY), ALL)[0].item()
    assert loss == pytest.approx((1 - beta) * sum(SURPRISES) / 3 + beta * sum(SQUARES) / 3)


def test_scales_of_the_losses() -> None:
    icm = hand_made(beta=0.3, reduction="sum", forward_scale=2.0, inverse_scale=5.0)
    errors = icm(BEFORE, CHOSEN, AFTER, POLICY)
    expected = 0.7 * 5 * sum(SURPRISES) / 3 + 0.3 * 2 * sum(SQUARES) / 3
    assert icm.loss(errors, ALL)[0].item() == pytest.approx(expected)
    # they are of the loss alone
    assert errors.forward.tolist() == pytest.approx(SQUARES)
    assert errors.surprise.tolist() == pytest.approx(SQUARES)


def test_masked_transitions_are_not_averaged() -> None:
    icm = hand_made(beta=0.2, reduction="sum")
    valid = torch.tensor([True, False, True])
    loss = icm.loss(icm(BEFORE, CHOSEN, AFTER, POLICY), valid)[0].item()
    expected = 0.8 * (SURPRISES[0] + SURPRISES[2]) / 2 + 0.2 * (SQUARES[0] + SQUARES[2]) / 2
    assert loss == pytest.approx(expected)


def test_masked_mean() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 10.0]])
    assert MaskedMean(torch.tensor([[True, False], [True, True]]))(values).item() == (
        pytest.approx(14 / 3)
    )
    assert MaskedMean(torch.zeros(2, 2, dtype=torch.bool))(values).item() == 0


# --- gradients ------------------------------------------------------------------------------------


def image_icm(**settings: float | str | bool) -> tuple[ICM, Tensor, Tensor, Tensor]:
    """An ICM of 8x8 images with six transitions: states, actions, next states."""
    phi = Phi((2, 8, 8))
    icm = ICM(
        phi,
        Fnet(phi.num_features, 4, 16),
        InverseNet(phi.num_features, 4, 16),
        **({"beta": 0.3, "eta": 1.0} | settings),
    )
    return icm, torch.rand(6, 2, 8, 8), torch.randint(4, (6,)), torch.rand(6, 2, 8, 8)


def gradients(loss: Tensor, network: nn.Module) -> list[Tensor]:
    learning = [p for p in network.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, learning, strict=True)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_who_trains_what(normalize: bool) -> None:
    icm, states, actions, after = image_icm(
        reduction="sum", forward_scale=2.0, inverse_scale=3.0, normalize_features=normalize
    )
    with torch.no_grad():
        for parameter in icm.target_phi.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    errors = icm(icm.encode(states), actions, icm.encode(after), torch.full((6, 4), 0.25))
    loss, _ = icm.loss(errors, torch.ones(6, dtype=torch.bool))

    hidden = torch.relu(icm.inverse.linear1(torch.cat((icm.phi(states), icm.phi(after)), 1)))
    log_p = torch.log_softmax(icm.inverse.linear2(hidden), 1)
    inverse = -log_p[torch.arange(6), actions].mean()
    slow, next_slow = icm.target_phi(states), icm.target_phi(after)
    if normalize:
        slow, next_slow = (
            (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
            for x in (slow, next_slow)
        )
    hidden = torch.relu(icm.fnet.linear1(torch.cat((slow, torch.eye(4)[actions]), 1)))
    forward = (icm.fnet.linear2(hidden) - next_slow).pow(2).sum(1).mean()
    assert loss.item() == pytest.approx((0.3 * 2 * forward + 0.7 * 3 * inverse).item(), rel=1e-5)

    # phi learns from the inverse loss alone, each model from its own
    of_inverse = [2.1 * g for g in gradients(inverse, icm.phi)]
    assert max(g.abs().max() for g in of_inverse) > 1e-3
    assert_same(gradients(loss, icm.phi), of_inverse)
    assert_same(gradients(loss, icm.inverse), [2.1 * g for g in gradients(inverse, icm.inverse)])
    assert_same(gradients(loss, icm.fnet), [0.6 * g for g in gradients(forward, icm.fnet)])
    assert not any(p.requires_grad for p in icm.target_phi.parameters())


def test_target_phi_is_a_moving_average() -> None:
    icm, states, *_ = image_icm(target_tau=0.1)
    assert torch.equal(icm.encode(states)[:, 0], icm.encode(states)[:, 1])
    expected = [p.clone() for p in icm.target_phi.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for parameter in icm.phi.parameters():
                parameter.add_(torch.randn_like(parameter))
        icm.update_target()
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, icm.phi.parameters(), strict=True)]
        assert_same(list(icm.target_phi.parameters()), expected)
    assert not torch.allclose(icm.encode(states)[:, 0], icm.encode(states)[:, 1])


def test_target_phi_may_be_phi() -> None:
    icm, states, *_ = image_icm(target_tau=1.0)
    with torch.no_grad():
        icm.phi.conv1.weight.mul_(2)
    icm.update_target()
    assert torch.equal(icm.encode(states)[:, 0], icm.encode(states)[:, 1])


@pytest.mark.parametrize("normalize", [False, True])
def test_without_a_target_both_losses_train_phi(normalize: bool) -> None:
    icm, states, actions, after = image_icm(target_tau=None, normalize_features=normalize)
    assert set(icm.networks) == {"phi", "fnet", "inverse"}
    icm.update_target()
    valid = torch.tensor([True, False, True, True, True, True])
    errors = icm(icm.encode(states), actions, icm.encode(after), torch.full((6, 4), 0.25))
    loss, parts = icm.loss(errors, valid)

    seen, next_seen = icm.phi(states), icm.phi(after)
    hidden = torch.relu(icm.inverse.linear1(torch.cat((seen, next_seen), 1)))
    log_p = torch.log_softmax(icm.inverse.linear2(hidden), 1)
    inverse = -log_p[torch.arange(6), actions][valid].mean()
    if normalize:
        seen, next_seen = (
            (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
            for x in (seen, next_seen)
        )
    hidden = torch.relu(icm.fnet.linear1(torch.cat((seen, torch.eye(4)[actions]), 1)))
    squares = (icm.fnet.linear2(hidden) - next_seen).pow(2).mean(1)
    assert_same([errors.surprise], [squares.detach()])
    forward = squares[valid].mean()
    if normalize:
        forward = forward / next_seen[valid].var(0, correction=0).mean()
    assert parts["loss/forward"].item() == pytest.approx(forward.item(), rel=1e-5)
    both = zip(gradients(inverse, icm.phi), gradients(forward, icm.phi), strict=True)
    expected = [0.7 * of_inverse + 0.3 * of_forward for of_inverse, of_forward in both]
    assert max(g.abs().max() for g in gradients(forward, icm.phi)) > 1e-3
    assert_same(gradients(loss, icm.phi), expected)


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_small_features_do_not_help_the_forward_model(size: float) -> None:
    icm, states, actions, after = image_icm(target_tau=None, normalize_features=True)
    encoded, next_encoded = size * icm.encode(states), size * icm.encode(after)
    with torch.no_grad():
        icm.fnet.linear2.weight.zero_()
        icm.fnet.linear2.bias.copy_(next_encoded[:, 1].mean(0))
    errors = icm(encoded, actions, next_encoded, torch.full((6, 4), 0.25))
    _, parts = icm.loss(errors, torch.ones(6, dtype=torch.bool))
    # their mean is predicted, and nothing of what differs
    assert parts["loss/forward"].item() == pytest.approx(1.0, rel=1e-4)


def test_scale_of_normalised_features_does_not_matter() -> None:
    icm, states, actions, after = image_icm(normalize_features=True)
    policy = torch.full((6, 4), 0.25)
    before = icm(icm.encode(states), actions, icm.encode(after), policy).forward
    features = icm.encode(states)[:, 1]
    torch.testing.assert_close(features.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(1, correction=0), torch.ones(6), atol=1e-3, rtol=0)
    icm.target_phi.features = lambda x: 5 * Phi.features(icm.target_phi, x)
    torch.testing.assert_close(
        icm(icm.encode(states), actions, icm.encode(after), policy).forward,
        before,
        rtol=1e-3,
        atol=1e-4,
    )


def test_masked_transitions_have_no_gradient() -> None:
    icm, states, actions, after = image_icm()
    valid = torch.tensor([True, False, True, True, False, False])

    def learn(*transitions: Tensor, mask: Tensor) -> tuple[float, list[Tensor]]:
        before, chosen, following = transitions
        policy = torch.full((len(chosen), 4), 0.25)
        loss, _ = icm.loss(icm(icm.encode(before), chosen, icm.encode(following), policy), mask)
        return loss.item(), gradients(loss, icm)

    loss, grads = learn(states, actions, after, mask=valid)
    alone, expected = learn(
        states[valid], actions[valid], after[valid], mask=torch.ones(3, dtype=torch.bool)
    )
    assert loss == pytest.approx(alone, rel=1e-5)
    assert_same(grads, expected)

    other_states = torch.where(valid.view(6, 1, 1, 1), states, 1 - states)
    other_actions = torch.where(valid, actions, 3 - actions)
    changed, found = learn(other_states, other_actions, after, mask=valid)
    assert changed == pytest.approx(loss, rel=1e-5)
    assert_same(found, grads)

    nothing, none = learn(states, actions, after, mask=torch.zeros(6, dtype=torch.bool))
    assert nothing == 0
    assert all(not g.any() for g in none)


def test_reward_is_scaled_and_detached() -> None:
    icm, states, actions, after = image_icm(eta=0.25)
    errors = icm(icm.encode(states), actions, icm.encode(after), torch.full((6, 4), 0.25))
    reward = errors.surprise
    assert errors.forward.requires_grad
    assert not reward.requires_grad
    assert reward.shape == (6,)
    torch.testing.assert_close(reward, 0.25 * errors.forward.detach())
    assert (reward > 0).all()


# --- running scale --------------------------------------------------------------------------------


def slow_std(rewards: np.ndarray, valid: np.ndarray, discount: float, half_life: float) -> float:
    """Weighted std of every discounted sum ever seen, a value k steps old having weight 2^-k/h."""
    steps, envs = rewards.shape
    total = np.zeros(envs)
    history = []
    for t in range(steps):
        for e in range(envs):
            if valid[t, e]:
                total[e] = discount * total[e] + rewards[t, e]
        history.append(total.copy())
    values = np.array(history)
    weights = np.repeat(0.5 ** (np.arange(steps)[::-1] / half_life), envs).reshape(steps, envs)
    mean = (weights * values).sum() / weights.sum()
    return float(np.sqrt((weights * (values - mean) ** 2).sum() / weights.sum()))


def feed(
    scale: RewardScale, rewards: np.ndarray, discount: float, valid: np.ndarray | None = None
) -> None:
    valid = np.ones(rewards.shape, dtype=bool) if valid is None else valid
    for r, v in zip(rewards, valid, strict=True):
        scale.update(torch.from_numpy(r).float(), torch.from_numpy(v), discount)


@pytest.mark.parametrize(("discount", "half_life"), [(0.0, 5.0), (0.9, 20.0), (0.99, 7.5)])
def test_std_is_that_of_decaying_discounted_sums(discount: float, half_life: float) -> None:
    rng = np.random.default_rng(2)
    rewards = rng.gamma(0.5, 3.0, (120, 3)).astype(np.float32)
    valid = rng.random((120, 3)) > 0.15
    scale = RewardScale(3, half_life)
    for t in range(120):
        feed(scale, rewards[t : t + 1], discount, valid[t : t + 1])
        if t > 0:
            expected = slow_std(rewards[: t + 1], valid[: t + 1], discount, half_life)
            assert scale.std == pytest.approx(expected, rel=1e-6)


def test_std_is_one_before_the_first_update() -> None:
    assert RewardScale(4, 100).std == 1


def test_first_reward_of_a_single_environment_is_not_blown_up() -> None:
    """One value has no spread; dividing by (almost) nothing makes the reward astronomical."""
    scale = RewardScale(1, 10_000)
    scale.update(torch.tensor([0.02]), torch.tensor([True]), 0.99)
    assert 0.02 / scale.std < 1_000


def test_rewards_that_are_all_alike_are_not_blown_up() -> None:
    """What is left of the variance of their sums is rounding."""
    scale = RewardScale(4, 60)
    feed(scale, np.ones((2_000, 4), np.float32), 0.95)
    assert scale.std == 1


@pytest.mark.parametrize("eta", [1.0, 1e-12])
def test_surprises_that_differ_little_are_weighed_all_the_same(eta: float) -> None:
    """Those of a forward model that knows nothing yet differ by less than a hundredth."""
    interest = Interest(limit=2.0, half_life=60)
    surprise = eta * torch.tensor([1.0, 1.001, 1.002])
    interest.update(surprise)
    factors = interest(surprise, interest.usual()).tolist()
    assert factors == pytest.approx([1.0, 1.0, 2.0], abs=1e-2)


def test_sums_run_over_the_time_of_each_environment() -> None:
    """One environment always gets 1, the other 0: a sum over environments would be the same."""
    scale = RewardScale(2, 1e9)
    for _ in range(3):
        scale.update(torch.tensor([1.0, 0.0]), torch.tensor([True, True]), 0.5)
    assert scale.sums.tolist() == [1.75, 0.0]
    assert scale.std == pytest.approx(np.std([1.0, 0.0, 1.5, 0.0, 1.75, 0.0]), rel=1e-6)


def test_order_of_environments_does_not_matter() -> None:
    rewards = np.random.default_rng(4).random((50, 3)).astype(np.float32)
    one, other = RewardScale(3, 30), RewardScale(3, 30)
    feed(one, rewards, 0.9)
    feed(other, rewards[:, ::-1].copy(), 0.9)
    assert one.std == pytest.approx(other.std, rel=1e-9)
    mixed = RewardScale(3, 30)
    shuffled = rewards.copy()
    shuffled[::2] = shuffled[::2, ::-1]  # the same step sums, other rewards per environment
    feed(mixed, shuffled, 0.9)
    assert mixed.std != pytest.approx(one.std, rel=1e-4)


def test_huge_early_reward_fades_with_the_half_life() -> None:
    rewards = np.random.default_rng(6).random((2_001, 2)).astype(np.float32)
    rewards[0] = 10_000
    scale = RewardScale(2, 100)
    std = []
    for row in rewards:
        feed(scale, row[None], 0.0)
        std.append(scale.std)
    assert std[50] > 1_000
    # while the outlier rules, the variance halves every 100 steps
    for t in (600, 800, 1_000):
        assert std[t + 100] / std[t] == pytest.approx(math.sqrt(0.5), rel=0.03)
    # at last the rest shows: uniform in 0..1 has std 1 / sqrt(12)
    calm = RewardScale(2, 100)
    feed(calm, rewards[1:], 0.0)
    assert calm.std == pytest.approx(1 / math.sqrt(12), rel=0.2)
    without_decay = 10_000 / math.sqrt(2_000)
    assert std[2_000] < without_decay / 100
    assert std[2_000] == pytest.approx(math.hypot(calm.std, 10_000 * 2**-10 / 12.0), rel=0.05)


def test_reset_leaves_the_sum_as_it_stands() -> None:
    scale = RewardScale(2, 1e9)
    scale.update(torch.tensor([4.0, 2.0]), torch.tensor([True, True]), 0.5)
    scale.update(torch.tensor([1e9, 3.0]), torch.tensor([False, True]), 0.5)
    assert scale.sums.tolist() == [4.0, 4.0]
    assert scale.std == pytest.approx(np.std([4.0, 2.0, 4.0, 4.0]), rel=1e-6)
    scale.update(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.5)
    assert scale.sums.tolist() == [3.0, 4.0]


def test_scale_continues_from_a_file() -> None:
    rewards = np.random.default_rng(8).random((60, 3)).astype(np.float32)
    whole, before, after = (RewardScale(3, 12) for _ in range(3))
    feed(whole, rewards, 0.95)
    feed(before, rewards[:25], 0.95)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert after.std == before.std
    feed(after, rewards[25:], 0.95)
    assert after.std == whole.std
    assert torch.equal(after.sums, whole.sums)
    assert torch.equal(after(torch.arange(3.0)), whole(torch.arange(3.0)))


def test_reward_is_divided_by_the_std() -> None:
    scale = RewardScale(3, 50)
    feed(scale, np.random.default_rng(12).random((40, 3)), 0.9)
    raw = torch.tensor([[0.0, 0.25], [0.5, 4.0]])
    torch.testing.assert_close(scale(raw), raw / scale.std)


def test_loading_does_not_tie_two_scales_together() -> None:
    one, other = RewardScale(2, 10), RewardScale(2, 10)
    feed(one, np.array([[1.0, 2.0], [3.0, 4.0]]), 0.9)
    other.load_state_dict(one.state_dict())
    before = other.sums.clone()
    feed(one, np.array([[5.0, 6.0]]), 0.9)
    assert torch.equal(other.sums, before)


def test_scale_of_another_number_of_environments() -> None:
    """The statistics are kept; only the running sums start anew."""
    old, new = RewardScale(3, 50), RewardScale(5, 50)
    feed(old, np.random.default_rng(9).random((40, 3)), 0.9)
    new.load_state_dict(old.state_dict())
    assert new.std == old.std
    assert new.sums.tolist() == [0.0] * 5
    feed(new, np.random.default_rng(10).random((1, 5)), 0.9)
    assert new.std == pytest.approx(old.std, rel=0.5)


# --- what a surprise counts -----------------------------------------------------------------------


def test_a_surprise_counts_by_how_unusual_it_is() -> None:
    """By hand: mean 3, std 2."""
    interest = Interest(4.0, half_life=1e9)
    interest.update(torch.tensor([1.0, 5.0]))
    surprise = torch.tensor([[0.0, 3.0, 4.0], [5.0, 9.0, 10.0]])
    found = interest(surprise, interest.usual())
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 1.5], [2.0, 4.0, 4.0]]))


def test_what_is_usual_follows_the_surprises() -> None:
    interest = Interest(5.0, half_life=2.0)
    for _ in range(40):
        interest.update(torch.tensor([0.0, 8.0]))
    for _ in range(2):
        interest.update(torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(interest.usual()[0], torch.tensor(2.5))
    interest.update(torch.tensor([]))  # a step in which all environments were reset
    torch.testing.assert_close(interest.usual()[0], torch.tensor(2.5))


def test_without_a_limit_a_surprise_counts_as_it_is() -> None:
    interest = Interest(None, half_life=10.0)
    interest.update(torch.tensor([1.0, 5.0]))
    assert interest(torch.tensor([0.25, 70.0]), interest.usual()).tolist() == [0.25, 70.0]


# --- novelty in a life ----------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_novelty_is_the_distance_from_all_that_was_seen(scale: float) -> None:
    rng = np.random.default_rng(3)
    novelty, seen = EpisodicNovelty(3, 6, scale, CPU), [np.zeros((0, 6))] * 3
    for step in range(60):
        features = rng.normal(size=(3, 6)).astype(np.float32)
        opens = rng.random(3) < 0.1 if step else np.ones(3, dtype=bool)
        found = novelty(
            torch.from_numpy(features), torch.from_numpy(opens), torch.zeros(3, dtype=torch.bool)
        ).tolist()
        for env in range(3):
            before = np.zeros((0, 6)) if opens[env] else seen[env]
            squared = ((before - features[env]) ** 2).mean(1)
            expected = 1.0 if opens[env] else squared.min() / (squared.min() + scale)
            assert found[env] == pytest.approx(expected, rel=1e-4)
            seen[env] = np.vstack((before, features[env]))


def test_what_was_seen_before_is_not_new() -> None:
    novelty, no = EpisodicNovelty(1, 3, 0.5, CPU), torch.tensor([False])
    one, other = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 5.0]])
    assert novelty(one, no, no).item() == 1
    assert 0 < novelty(one, no, no).item() < 1e-30  # it can be learned from
    assert novelty(other, no, no).item() == pytest.approx(50 / 3 / (50 / 3 + 0.5))
    for _ in range(CAPACITY - 2):
        assert 0 < novelty(other, no, no).item() < 1e-30
    assert 0 < novelty(one, no, no).item() < 1e-30  # the first of as many as are remembered
    assert novelty(other, torch.tensor([True]), no).item() == 1


@pytest.mark.parametrize("scale", [0.5, None])
def test_where_a_new_life_begins_is_worth_nothing(scale: float | None) -> None:
    novelty, no = EpisodicNovelty(2, 3, scale, CPU), torch.zeros(2, dtype=torch.bool)
    respawned = torch.tensor([True, False])
    assert novelty(torch.ones(2, 3), respawned, respawned).tolist() == [0, 1]
    again = 1.0 if scale is None else torch.finfo(torch.float32).tiny
    assert novelty(torch.ones(2, 3), no, no).tolist() == [again, again]


def test_the_oldest_are_forgotten() -> None:
    novelty, no = EpisodicNovelty(1, 3, 0.5, CPU), torch.tensor([False])
    one, other = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 5.0]])
    novelty(one, no, no)
    for _ in range(CAPACITY):
        novelty(other, no, no)
    assert novelty(one, no, no).item() > 0.9


@pytest.mark.parametrize("before", [0, CAPACITY - 2])  # the latter go round its memory
def test_who_goes_on_knows_the_way_there_and_nothing_else(before: int) -> None:
    novelty, no = EpisodicNovelty(2, 4, 0.5, CPU), torch.zeros(2, dtype=torch.bool)
    zero, first, second, third, fourth = torch.cat((torch.zeros(1, 4), 5 * torch.eye(4))).unbind()
    for one, other in [(zero, zero)] * before + [(first, third), (second, zero), (third, fourth)]:
        novelty(torch.stack((one, other)), no, no)
    novelty.inherit(torch.tensor([-1, 0]), torch.tensor([0, 1]))  # the second begins in `second`
    novelty(torch.stack((zero, second)), no, no)
    assert novelty.count.tolist() == [before + 4, before + 2]
    for known in (first, second):
        assert novelty(torch.stack((known, known)), no, no)[1].item() < 1e-30
    for new in (third, fourth):
        assert novelty(torch.stack((new, new)), no, no)[1].item() > 0.9


def test_without_a_scale_every_state_is_new() -> None:
    novelty, no = EpisodicNovelty(2, 3, None, CPU), torch.zeros(2, dtype=torch.bool)
    for _ in range(3):
        assert novelty(torch.ones(2, 3), no, no).tolist() == [1.0, 1.0]


def test_rounding_makes_nothing_negative() -> None:
    generator = torch.Generator().manual_seed(5)
    novelty, no = EpisodicNovelty(2, 16, 0.01, CPU), torch.zeros(2, dtype=torch.bool)
    near = 1000 + torch.randn(2, 16, generator=generator)
    for _ in range(200):
        found = novelty(near, no, no)
        assert ((found >= 0) & (found <= 1)).all()
