"""The curiosity signals beside the ICM, each against its formula."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from icm.curiosity import RND, Disagreement, Errors, NoCuriosity, RandomFeatures, Signal
from icm.models import Fnet, Phi

ACTIONS, SHAPE, BATCH = 3, (2, 16, 16), 6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def build(kind: type[Signal]) -> Any:
    phi = Phi(SHAPE)

    def fnet() -> Fnet:
        return Fnet(phi.num_features, ACTIONS, 8)

    if kind is RND:
        return RND(phi, Phi(SHAPE), 8)
    if kind is RandomFeatures:
        return RandomFeatures(phi, fnet())
    return Disagreement(phi, [fnet() for _ in range(4)])


def transitions() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, *SHAPE),
        torch.randint(0, ACTIONS, (BATCH,)),
        torch.randn(BATCH, *SHAPE),
    )


def judge(signal: Signal, x: Tensor, actions: Tensor, after: Tensor) -> Errors:
    policy = torch.full((len(x), ACTIONS), 1 / ACTIONS)
    return signal(signal.encode(x), actions, signal.encode(after), policy)


def normalised(phi: Phi, x: Tensor) -> Tensor:
    """Random features of mean 0 and variance 1, one state after the other."""
    rows = [phi(one.unsqueeze(0))[0].detach() for one in x]
    return torch.stack([(f - f.mean()) / (f.var(correction=0) + 1e-5).sqrt() for f in rows])


def test_random_features_formula() -> None:
    signal = build(RandomFeatures)
    x, actions, after = transitions()
    predicted = signal.fnet(normalised(signal.phi, x), actions)
    wanted = (predicted - normalised(signal.phi, after)).square().mean(1)
    errors = judge(signal, x, actions, after)
    torch.testing.assert_close(errors.surprise, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors.forward, wanted, rtol=1e-4, atol=1e-5)


def test_rnd_formula() -> None:
    signal = build(RND)
    x, actions, after = transitions()
    wanted = (signal.predictor(after) - normalised(signal.phi, after)).square().mean(1)
    errors = judge(signal, x, actions, after)
    torch.testing.assert_close(errors.surprise, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors.forward, wanted, rtol=1e-4, atol=1e-5)
    # neither the state before nor the action matters
    other = judge(signal, torch.randn(BATCH, *SHAPE), (actions + 1) % ACTIONS, after)
    torch.testing.assert_close(other.surprise, errors.surprise)


def test_disagreement_formula() -> None:
    signal = build(Disagreement).eval()
    x, actions, after = transitions()
    now, then = normalised(signal.phi, x), normalised(signal.phi, after)
    predicted = [fnet(now, actions).detach() for fnet in signal.ensemble]
    mean = sum(predicted) / 4
    variance = sum((p - mean).square() for p in predicted) / 4
    errors = judge(signal, x, actions, after)
    torch.testing.assert_close(errors.surprise, variance.mean(1), rtol=1e-4, atol=1e-6)
    wanted = sum((p - then).square().mean(1) for p in predicted) / 4
    torch.testing.assert_close(errors.forward.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_models_of_an_ensemble_learn_from_different_transitions() -> None:
    signal = build(Disagreement).train()
    x, actions, after = transitions()
    seen = set()
    for _ in range(20):
        errors = judge(signal, x[:1], actions[:1], after[:1])
        signal.zero_grad()
        errors.forward.sum().backward()
        seen.add(tuple(bool(f.linear2.weight.grad.any()) for f in signal.ensemble))
    assert len(seen) > 5


def test_models_of_an_ensemble_agree_on_what_they_have_learned() -> None:
    signal = build(Disagreement)
    known, new, after = torch.randn(3, 8, *SHAPE)
    actions = torch.randint(0, ACTIONS, (8,))
    optimizer = torch.optim.Adam(signal.ensemble.parameters(), lr=3e-3)
    for _ in range(300):
        loss, _ = signal.loss(judge(signal, known, actions, after), torch.ones(8).bool())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    signal.eval()
    learned, unknown = (judge(signal, x, actions, after).surprise.mean() for x in (known, new))
    assert learned < 0.5 * unknown


@pytest.mark.parametrize("kind", [RandomFeatures, RND, Disagreement])
def test_only_predictors_learn_and_only_from_valid_transitions(kind: type[Signal]) -> None:
    signal = build(kind)
    x, actions, after = transitions()
    valid = torch.tensor([True, False, True, True, False, True])
    errors = judge(signal, x, actions, after)
    assert not errors.surprise.requires_grad
    assert errors.inverse is None
    loss, parts = signal.loss(errors, valid)
    assert errors.forward is not None
    assert loss.item() == pytest.approx(errors.forward[valid].mean().item(), rel=1e-5)
    assert parts.keys() == {"loss/forward"}
    loss.backward()
    predictors: dict[str, nn.Module] = dict(signal.networks)
    assert all(p.grad is None for p in predictors.pop("phi").parameters())
    for predictor in predictors.values():
        assert any(p.grad is not None and p.grad.any() for p in predictor.parameters())
    features = signal.encode(x)[:, -1]
    torch.testing.assert_close(features, normalised(signal.phi, x), rtol=1e-4, atol=1e-5)


def test_no_curiosity_is_never_surprised() -> None:
    signal = NoCuriosity()
    errors = judge(signal, *transitions())
    assert errors.surprise.tolist() == [0.0] * BATCH
    loss, parts = signal.loss(errors, torch.ones(BATCH, dtype=torch.bool))
    assert loss.item() == 0
    assert parts == {}
