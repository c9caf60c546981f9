"""Learners from rollouts: returns, what is learned when, losses, state, and whether they learn."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings
from test_dqn import Game, interact, same, start, through_a_file, weights
from torch import Tensor

from icm.agents.base import BrokenDownError
from icm.agents.on_policy import Batch, OnPolicy, lambda_returns
from icm.agents.ppo import PPO
from icm.errors import UserError
from icm.factory import build_agent
from icm.models import NO_ACTION, contrast_normalised

ACTIONS, SIZE, STACK = 4, 16, 2
SMALL = (
    "precision=float32",
    "compile=off",
    "env.num_envs=3",
    f"env.frame_stack={STACK}",
    f"env.size={SIZE}",
    "agent.hidden=16",
    "agent.rollout_steps=8",
    "agent.sequence_length=4",
    "agent.batch_size=2",
    "agent.epochs=2",
    "agent.replay_capacity=300",
    "agent.input_norm=scale",
    "agent.warmup_steps=0",
    "agent.max_grad_norm=1e9",
    "curiosity.hidden=16",
)
UPDATES = 2 * (3 * 8 // 4) // 2


def make_agent(name: str, *overrides: str) -> Any:
    """An agent with small settings, as far as it has them, and overrides."""
    lacks = ("agent.rollout_steps", "agent.epochs") if name == "dqn" else ()
    lacks += ("curiosity.hidden",) if "curiosity=none" in overrides else ()
    small = [setting for setting in SMALL if not setting.startswith(lacks)]
    config = settings(f"agent={name}", *small, *overrides)
    return build_agent(config, (STACK, SIZE, SIZE), ACTIONS, torch.device("cpu"))


def live(agent: OnPolicy, steps: int, game: Game | None = None) -> Game:
    """Act, observe and learn as the trainer does, in a game that does as it likes."""
    game = game or Game(agent.num_envs, 3)
    for _ in range(steps):
        step = game.step()
        _, _, values = agent.act(step["states"], step["previous"], 10_000)
        agent.observe(**step | {"values": values})
        for _ in range(agent.due(10_000)):
            agent.update()
    return game


# --- returns --------------------------------------------------------------------------------------


def slow_returns(
    rewards: list[float],
    values: list[float],
    terminal: list[bool],
    truncated: list[bool],
    reset: list[bool],
    discount: float,
    trace: float,
) -> list[float]:
    """Mixture of n-step returns with weights (1 - trace) trace^(n - 1), each by its definition."""
    length = len(rewards)

    def skip(t: int) -> int:
        """The first step from t on that is a transition; `length` if there is none."""
        while t < length and reset[t]:
            t += 1
        return t

    def n_step(t: int, n: int) -> float:
        """n rewards, then the value of what follows."""
        t = skip(t)
        if t == length or n == 0:
            return values[t]
        if terminal[t]:
            return rewards[t]
        if truncated[t]:
            return rewards[t] + discount * values[t + 1]
        return rewards[t] + discount * n_step(t + 1, n - 1)

    def mixed(t: int) -> float:
        total = sum((1 - trace) * trace ** (n - 1) * n_step(t, n) for n in range(1, length))
        return total + trace ** (length - 1) * n_step(t, length)

    return [mixed(t) for t in range(length)]


@pytest.mark.parametrize("death_is_terminal", [True, False])
@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_targets_are_the_returns_of_what_was_observed(name: str, death_is_terminal: bool) -> None:
    """Of the game's reward alone, which nothing scales."""
    own = "agent.extrinsic_discount=0.9" if name == "ppo" else "agent.advantage_learning=0.0"
    agent = make_agent(
        *(name, "curiosity=none", "curiosity.extrinsic_coef=1.0", "agent.trace=0.7"),
        *("agent.discount=0.9", f"agent.death_is_terminal={death_is_terminal}", own),
    )
    game, generator = Game(3, 5, episodes=(2, 4)), torch.Generator().manual_seed(0)
    values = torch.rand(agent.values.shape, generator=generator)
    steps = [game.step() for _ in range(9)]
    for t, step in enumerate(steps):
        agent.observe(**step | {"values": values[t]})
    worth = values[..., -1] if name == "ppo" else values.amax(2)
    for env in range(3):
        rewards, terminated, truncated, reset = (
            [step[key][env].item() for step in steps[:8]]
            for key in ("rewards", "terminated", "truncated", "reset")
        )
        assert any(terminated)
        assert any(truncated)
        assert any(reset)
        terminal = [death and death_is_terminal for death in terminated]
        given = (rewards, worth[:, env].tolist(), terminal, truncated, reset)
        found = agent.targets["returns"][:, env, -1].tolist()
        assert found == pytest.approx(slow_returns(*given, 0.9, 0.7), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("death_is_terminal", [True, False])
def test_returns_are_the_mixture_of_n_step_returns(trace: float, death_is_terminal: bool) -> None:
    rng = np.random.default_rng(4)
    kinds = {"terminal": 0, "truncated": 0, "reset": 0, "reset at the end": 0}
    for _ in range(60):
        length = int(rng.integers(1, 9))
        rewards, values = rng.normal(size=length), rng.normal(size=length + 1)
        ends = rng.random(length) < 0.3
        ends[1:] &= ~ends[:-1]  # what follows an end is a reset
        reset = np.concatenate(([False], ends[:-1]))
        terminated = ends & (rng.random(length) < 0.5)
        truncated, terminal = ends & ~terminated, terminated & death_is_terminal
        for name, flag in (("terminal", terminal), ("truncated", truncated), ("reset", reset)):
            kinds[name] += int(flag.sum())
        kinds["reset at the end"] += int(reset[-1])
        given = (rewards, values, terminal, truncated, reset)
        found = lambda_returns(*(torch.from_numpy(x).unsqueeze(1) for x in given), 0.9, trace)
        wanted = slow_returns(*(x.tolist() for x in given), 0.9, trace)
        assert found.squeeze(1).tolist() == pytest.approx(wanted)
    assert min(n for kind, n in kinds.items() if death_is_terminal or kind != "terminal") > 5


def test_returns_by_hand() -> None:
    def returns(**flags: int) -> list[float]:
        marks = {
            name: torch.tensor([[t == flags.get(name)] for t in range(3)])
            for name in ("terminal", "truncated", "reset")
        }
        rewards = torch.tensor([[1.0], [2.0], [4.0]])
        values = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
        return lambda_returns(rewards, values, **marks, discount=0.5, trace=0.5)[:, 0].tolist()

    # 4 + 20 = 24; 2 + (30 + 24) / 4 = 15.5; 1 + (20 + 15.5) / 4
    assert returns() == [9.875, 15.5, 24.0]
    assert returns(terminal=1) == [1 + (20 + 2) / 4, 2.0, 24.0]
    assert returns(truncated=1) == [1 + (20 + 17) / 4, 17.0, 24.0]
    # the reset step is worth what comes after it
    assert returns(reset=1) == [1 + (30 + 24) / 4, 24.0, 24.0]


# --- what is learned when -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_a_rollout_is_learned_while_the_next_one_is_made(name: str) -> None:
    agent, game = make_agent(name), Game(3, 3)
    learned = []
    for _ in range(3 * 8 + 1):
        live(agent, 1, game)
        learned.append(agent.updates)
    assert learned[:8] == [0] * 8  # nothing before the state after the first rollout is known
    for t in range(8):
        # evenly: by then, so much of the rollout should be learned
        assert learned[8 + t] == UPDATES * (t + 1) // 8, t
        assert learned[16 + t] == UPDATES + learned[8 + t], t


def test_every_sequence_is_learned_once_per_epoch() -> None:
    agent = make_agent("ppo")
    game = live(agent, 8)
    agent.observe(**game.step())
    assert agent.order.shape == (UPDATES, 2)
    for epoch in agent.order.split(UPDATES // 2):
        assert sorted(epoch.flatten().tolist()) == list(range(6))
    assert not torch.equal(*agent.order.split(UPDATES // 2))


def test_batches_are_what_was_observed() -> None:
    agent, game = make_agent("ppo"), Game(3, 3)
    steps = [game.step() for _ in range(9)]
    for t, step in enumerate(steps):
        agent.observe(**step | {"values": torch.full((3, 1), float(t))})
    batch = agent.batch(torch.tensor([4, 2]))
    rollout = batch.rollout
    for row, (env, first) in enumerate(((1, 4), (2, 0))):
        for t in range(5):
            step = steps[first + t]
            assert torch.equal(rollout.states[row, t], step["states"][env])
            assert rollout.previous[row, t] == step["previous"][env]
            if t < 4:
                assert rollout.actions[row, t] == step["actions"][env]
                assert rollout.reset[row, t] == step["reset"][env]
                assert torch.equal(rollout.behaviour[row, t], step["probabilities"][env])
                assert torch.equal(
                    batch.targets["returns"][row, t], agent.targets["returns"][first + t, env]
                )
                assert (
                    batch.targets["advantages"][row, t]
                    == agent.targets["advantages"][first + t, env]
                )


@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_curiosity_learns_from_as_many_sequences_as_it_is_told(name: str) -> None:
    agent = make_agent(name, "agent.replayed=5")
    live(agent, 10)
    batch = agent.batch(agent.order[0])
    assert batch.rollout.actions.shape == (2, 4)
    assert batch.replayed.actions.shape == (5, 4)
    losses = agent.update()
    assert losses["loss/inverse"] > 0


def test_rewards_are_scaled_surprise_times_novelty_and_the_games() -> None:
    weights = ("curiosity.coef=2.0", "curiosity.extrinsic_coef=0.5", "agent.trace=0.0")
    discounts = "agent.discount=[[0,0.5],[1000000000,0.9]]", "agent.extrinsic_discount=0.25"
    agent = make_agent("ppo", *weights, *discounts)
    live(agent, 9)
    memory = agent.memory
    novelty, reset = agent.stored(memory.novelty), agent.stored(memory.reset)
    known = novelty[1:][
        ~reset[1:]
    ]  # not where a life opens: in the first step and after a last one
    assert 0 < known.min() < known.max() < 1
    plain = ~(reset | agent.stored(memory.terminated) | agent.stored(memory.truncated))
    plain[:-1] &= ~reset[1:]
    # a surprise counts 1 to 2 times the novelty
    assert (agent.raw[1:-1] >= novelty[1:]).all()
    assert (agent.raw[1:-1] <= 2 * novelty[1:]).all()
    assert (agent.raw[1:-1] > novelty[1:]).any()
    curious = 2 * agent.raw[:-1] / agent.scale.std + 0.5 * agent.values[1:, :, 0]
    game = 0.5 * agent.stored(memory.rewards) + 0.25 * agent.values[1:, :, 1]
    wanted = torch.stack((curious, game), dim=2)
    plain, wanted = plain[1:], wanted[1:]  # the first step is already that of the next rollout
    assert plain.sum() > 5
    torch.testing.assert_close(agent.targets["returns"][1:][plain], wanted[plain])
    # the advantages of both count alike
    gain = (agent.targets["returns"][1:] - agent.values[1:-1]).sum(2)[plain]
    found = agent.targets["advantages"][1:][plain]
    slopes = found.diff()[gain.diff() != 0] / gain.diff()[gain.diff() != 0]
    assert slopes.std() < 1e-3 * slopes.mean()


@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_the_discount_follows_its_schedule(name: str) -> None:
    """Updates begin after a warm-up."""
    agent = make_agent(name, "agent.discount=[[100,0.5],[200,0.75]]", "agent.warmup_steps=12")
    found = []
    for step in (12, 100, 150, 200, 1000):
        agent.learned_steps = step - 12
        found.append(agent.discount())
    assert found == pytest.approx([0.5, 0.5, 0.625, 0.75, 0.75], abs=0.01)
    assert make_agent(name, "agent.discount=0.5").discount() == 0.5


@pytest.mark.parametrize("name", ["dqn", "ppo"])
def test_a_new_life_surprises_nobody(name: str) -> None:
    """The state after a life was lost is neither rewarded nor learned by the signal."""
    more = ("agent.batch_size=64", "agent.n_step=1") if name == "dqn" else ()
    losses = []
    for respawned in (False, True):
        agent = make_agent(name, *more)
        game = Game(3, 3, episodes=(100, 100))
        for t in range(9):
            step = game.step() | {"values": torch.zeros(3, 1)}
            step["respawned"] = torch.tensor([respawned and t % 2 == 0] * 3)
            statistics, _ = agent.observe(**step)
            unlike = respawned and t % 2 == 0
            assert bool((statistics["reward/intrinsic"] == 0).all()) == unlike
            # the jump tells nothing of the action
            assert len(statistics["icm/inverse_gain"]) == (0 if unlike else 3)
            assert len(statistics["reward/extrinsic"]) == 3
        torch.manual_seed(0)
        losses.append(agent.update())
    assert losses[0]["loss/inverse"] != losses[1]["loss/inverse"]
    assert losses[1]["loss/inverse"] > 0
    assert (agent.memory.novelty[:8:2] == 0).all()


def test_a_new_life_has_seen_nothing() -> None:
    agent = make_agent("ppo")
    step = Game(3, 3, episodes=(100, 100)).step() | {"values": torch.zeros(3, 1)}
    for respawned in (False, False, True, False, False):
        agent.observe(**step | {"respawned": torch.tensor([respawned, False, False])})
    # the same state again and again, and in the first environment a new life in the midst
    assert agent.memory.novelty[:5, 1].tolist() == pytest.approx([1, 0, 0, 0, 0], abs=1e-6)
    other = step["next_states"].flip(2)
    agent.observe(**step | {"next_states": other})
    seen_in_the_old_life = agent.memory.novelty[5]
    assert (seen_in_the_old_life > 0.01).all()
    agent.observe(**step | {"respawned": torch.tensor([True, False, False])})
    agent.observe(**step | {"next_states": other})
    assert agent.memory.novelty[7, 0] == seen_in_the_old_life[0]
    assert agent.memory.novelty[7, 1] == pytest.approx(0, abs=1e-6)


def test_a_life_that_goes_on_before_its_death_knows_what_it_has_seen() -> None:
    agent = make_agent("ppo")
    no, second = torch.zeros(3, dtype=torch.bool), torch.tensor([False, True, False])
    step = Game(3, 3, episodes=(100, 100)).step() | {"values": torch.zeros(3, 1)}
    agent.observe(**step)
    # all but the first die, and of these the second practises: its episode ends with that
    dead = {"respawned": ~torch.tensor([True, False, False]), "truncated": second}
    agent.observe(**step | dead | {"next_states": step["next_states"].flip(2)})
    own, another = torch.tensor([-1, 1, -1]), torch.tensor([-1, 0, -1])
    agent.observe(**step | {"reset": second, "origin": own, "respawned": no})
    *known, new = agent.memory.novelty[2].tolist()  # the third has a new life
    assert known == pytest.approx([0, 0], abs=1e-6)
    assert new > 0.5
    agent.observe(**step | {"reset": second})
    assert agent.memory.novelty[3].tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    seen_by_the_first = {"next_states": step["next_states"][[0, 0, 0]]}
    agent.observe(**step | seen_by_the_first | {"reset": second})
    agent.observe(**step | seen_by_the_first | {"reset": second, "origin": another})
    assert agent.memory.novelty[4:6, 1].tolist() == pytest.approx([1, 0], abs=1e-6)


def test_advantages_are_normalised_over_real_transitions() -> None:
    agent = make_agent("ppo")
    live(agent, 9, Game(3, 5, episodes=(2, 4)))
    valid = ~agent.stored(agent.memory.reset)
    assert 0 < valid.sum() < valid.numel()
    found = agent.targets["advantages"][valid]
    assert found.mean().item() == pytest.approx(0, abs=1e-5)
    assert found.std().item() == pytest.approx(1, abs=1e-4)
    # but for the first, which is the next rollout's
    plain = (agent.targets["returns"] - agent.values[:-1]).squeeze(2)[1:]
    found = agent.targets["advantages"][1:]
    centred, wanted = found - found[0, 0], plain - plain[0, 0]
    ratio = centred[wanted != 0] / wanted[wanted != 0]
    assert ratio.std() < 1e-3 * ratio.mean()


def test_what_a_random_agent_did_in_the_warm_up_is_not_learned() -> None:
    agent = make_agent("ppo", "agent.input_norm=standard", "agent.warmup_steps=1")
    game = live(agent, 12)
    frames = agent.memory.recent_frames(10_000)
    assert frames.shape == (12 * 3, SIZE, SIZE)
    agent.measure_input()
    pixels = frames.double()
    torch.testing.assert_close(agent.input_norm.mean.double(), pixels.mean(0), rtol=1e-5, atol=0)
    done = agent.updates
    live(agent, 8, game)
    assert agent.updates == done
    live(agent, 2, game)
    assert agent.updates > done


def test_nothing_is_learned_in_the_warm_up() -> None:
    agent, game = make_agent("ppo", "agent.warmup_steps=100"), Game(3, 3)
    for _ in range(16):
        agent.observe(**game.step() | {"values": torch.zeros(3, 1)})
    assert len(agent.order) == UPDATES
    assert agent.due(99) == 0
    assert agent.due(100) > 0


@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_warm_up_is_uniform(name: str) -> None:
    agent = make_agent(name, "agent.warmup_steps=100")
    states = torch.randint(0, 256, (6, STACK, SIZE, SIZE), dtype=torch.uint8)
    assert agent.act(states, start(states), 99)[1].tolist() == [[0.25] * 4] * 6
    assert agent.act(states, start(states), 100)[1].tolist() != [[0.25] * 4] * 6
    greedy = agent.probabilities(states, start(states), 100, greedy=True)
    assert sorted(greedy.unique().tolist()) == [0.0, 1.0]
    assert greedy.sum(1).tolist() == [1.0] * 6


# --- losses ---------------------------------------------------------------------------------------


def slow_ppo(agent: PPO, batch: Batch) -> dict[str, float]:
    """Losses of PPO, one transition after the other."""
    gains, errors, entropies, clipped, kls = [], [], [], [], []
    agent.actor_critic.requires_grad_(False)
    low, high = 1 - agent.config.clip, 1 + agent.config.clip
    rollout = batch.rollout
    for b in range(len(rollout.actions)):
        for t in range(rollout.actions.shape[1]):
            if rollout.reset[b, t]:
                continue
            x = agent.input_norm(rollout.states[b, t].unsqueeze(0))
            logits, value = agent.actor_critic(x, rollout.previous[b, t].view(1))
            policy, action = logits.softmax(1)[0], rollout.actions[b, t]
            ratio = float(policy[action] / rollout.behaviour[b, t, action])
            advantage = float(batch.targets["advantages"][b, t])
            gains.append(min(ratio * advantage, min(max(ratio, low), high) * advantage))
            errors.append(float(value - batch.targets["returns"][b, t]) ** 2)
            entropies.append(float(-(policy * policy.log()).sum()))
            clipped.append(not low <= ratio <= high)
            kls.append(ratio - 1 - math.log(ratio))
    assert 0 < sum(clipped) < len(clipped)
    mean = {"gain": gains, "loss/value": errors, "entropy": entropies}
    mean |= {"policy/clipped": clipped, "policy/kl": kls}
    return {name: sum(x) / len(x) for name, x in mean.items()}


def test_ppo_computes_the_losses_it_should() -> None:
    coefficients = ("agent.entropy_coef=0.3", "agent.value_coef=0.7")
    agent = make_agent("ppo", "agent.clip=0.6", *coefficients, "curiosity=none")
    live(agent, 9, Game(3, 5, episodes=(2, 4)))
    batch = agent.batch(torch.tensor([0, 4]))
    assert 0 < batch.rollout.reset.sum() < batch.rollout.reset.numel()
    loss, parts = agent.losses(batch)
    wanted = slow_ppo(agent, batch)
    assert parts["loss/policy"].item() == pytest.approx(-wanted["gain"], rel=1e-4)
    assert parts["loss/value"].item() == pytest.approx(wanted["loss/value"], rel=1e-4)
    assert parts["policy/clipped"].item() == pytest.approx(wanted["policy/clipped"])
    assert parts["policy/kl"].item() == pytest.approx(wanted["policy/kl"], rel=1e-3)
    total = -wanted["gain"] + 0.7 * wanted["loss/value"] - 0.3 * wanted["entropy"]
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_before_it_has_learned_the_policy_is_the_one_that_acted() -> None:
    agent, game, acted = make_agent("ppo"), Game(3, 5, episodes=(2, 4)), []
    with torch.no_grad():
        agent.actor_critic.policy.weight.mul_(300)  # it begins nearly uniform
    for _ in range(9):
        step = game.step()
        actions, policy, values = agent.act(step["states"], step["previous"], 10_000)
        agent.observe(**step | {"actions": actions, "probabilities": policy, "values": values})
        game.previous = np.where(step["reset"].numpy(), NO_ACTION, actions.numpy())
        acted.append(values[:, 0])
    batch = agent.batch(torch.tensor([0, 4]))
    assert batch.rollout.reset.any()
    _, parts = agent.losses(batch)
    assert parts["policy/kl"].item() == pytest.approx(0, abs=1e-5)
    assert parts["policy/clipped"] == 0
    seen = torch.stack([torch.stack(acted[:4])[:, 0], torch.stack(acted[4:8])[:, 1]])
    wanted = seen[~batch.rollout.reset].mean().item()
    assert parts["value/mean"].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_previous_action_counts_where_the_networks_are_told_it(name: str, told: bool) -> None:
    agent = make_agent(name, f"agent.previous_action={told}")
    one = torch.randint(0, 256, (1, STACK, SIZE, SIZE), dtype=torch.uint8)
    previous = torch.arange(NO_ACTION, ACTIONS)
    found = agent.probabilities(one.expand(len(previous), -1, -1, -1), previous, 10_000)
    assert len(found.unique(dim=0)) == (len(previous) if told else 1)


def test_pqn_computes_the_loss_it_should() -> None:
    agent = make_agent("pqn", "agent.advantage_learning=0.5", "curiosity=none")
    live(agent, 9, Game(3, 5, episodes=(2, 4)))
    values = agent.values.clone()
    best = values.amax(2, keepdim=True)
    plain = agent.returns_of(sum(agent.rewards()), best.squeeze(2), agent.discount())
    batch = agent.batch(torch.tensor([0, 4]))
    squares, count = 0.0, 0
    for b, (env, first) in enumerate(((0, 0), (1, 4))):
        for t in range(4):
            if first + t == 0:
                continue  # its values are already those of the next rollout
            action = batch.rollout.actions[b, t]
            gap = float(values[first + t, env, action] - best[first + t, env])
            wanted = float(plain[first + t, env]) + 0.5 * gap
            assert float(batch.targets["returns"][b, t]) == pytest.approx(wanted, rel=1e-5)
    for b, t in itertools.product(range(2), range(4)):
        if batch.rollout.reset[b, t]:
            continue
        x = agent.input_norm(batch.rollout.states[b, t].unsqueeze(0))
        q = agent.qnetwork(x, batch.rollout.previous[b, t].view(1)).detach()
        error = float(q[0, batch.rollout.actions[b, t]] - batch.targets["returns"][b, t])
        squares, count = squares + error**2, count + 1
    loss, parts = agent.losses(batch)
    assert loss.item() == parts["loss/q"].item() == pytest.approx(0.5 * squares / count, rel=1e-4)


@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_the_signal_learns_what_is_replayed_and_nothing_else_teaches_it(name: str) -> None:
    agent = make_agent(name, "curiosity.inverse_dropout=0")
    live(agent, 9, Game(3, 5, episodes=(2, 4)))
    batch = agent.batch(torch.tensor([0, 4]))
    weights = [weight for weight in agent.signal.parameters() if weight.requires_grad]
    x = agent.input_norm(batch.replayed.states.flatten(0, 1))
    wanted = torch.autograd.grad(agent.signal_loss(x, batch.replayed)[1], weights)
    for found, expected in zip(
        torch.autograd.grad(agent.losses(batch)[0], weights), wanted, strict=True
    ):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("signal", ["icm", "random_features", "rnd", "disagreement", "none"])
@pytest.mark.parametrize("name", ["dqn", "ppo", "pqn"])
def test_every_learner_with_every_signal(name: str, signal: str) -> None:
    more = ("agent.steps_per_update=3",) if name == "dqn" else ()
    agent = make_agent(name, f"curiosity={signal}", *more)
    before = {k: weights(n) for k, n in agent.networks.items()}
    live(agent, 25)
    assert agent.updates > 10
    fixed = {"icm": set(), "none": set()}.get(signal, {"phi"}) | {"input_norm", "novelty_phi"}
    for key, network in agent.networks.items():
        assert same(weights(network), before[key]) == (key in fixed), key
    statistics, _ = agent.observe(**Game(3, 1).step())
    assert ("icm/inverse_accuracy" in statistics) == (signal == "icm")
    assert bool((statistics["reward/intrinsic"] > 0).any()) == (signal != "none")


def test_clipped_gains_have_no_gradient() -> None:
    agent = make_agent("ppo", "agent.clip=1e-6", "agent.entropy_coef=0", "agent.value_coef=0")
    live(agent, 9)
    batch = agent.batch(torch.tensor([0, 4]))
    policy = agent.actor_critic.policy.weight
    ratios = agent.losses(batch)[1]["policy/clipped"]
    assert ratios == 1  # a game that does as it likes: every ratio is far from 1
    loss, _ = agent.losses(batch)
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.abs().max() > 0  # those that move back towards the policy that acted
    rollout = batch.rollout
    batch.targets["advantages"] = torch.ones_like(batch.targets["advantages"])
    x = agent.input_norm(rollout.states[:, :-1].flatten(0, 1))
    logits, _ = agent.actor_critic(x, rollout.previous[:, :-1].flatten())
    chosen = logits.softmax(1).gather(1, rollout.actions.flatten().unsqueeze(1))
    higher = chosen > rollout.behaviour.flatten(0, 1).gather(1, rollout.actions.view(-1, 1))
    rollout.reset |= ~higher.view(rollout.reset.shape)
    assert not rollout.reset.all()
    loss, _ = agent.losses(batch)
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.abs().max() == 0


# --- novelty --------------------------------------------------------------------------------------


def places(agent: OnPolicy) -> tuple[Tensor, Tensor]:
    """States, and the features by which the agent knows them."""
    step = Game(3, 8).step()
    given = ("states", "previous", "actions", "next_states", "probabilities")
    _, features = agent.judge(*(step[name] for name in given))
    return step["next_states"], features


@pytest.mark.parametrize("curiosity", ["icm", "rnd", "random_features"])
def test_states_are_new_or_known_by_random_features_that_stand_still(curiosity: str) -> None:
    """Whatever the signal, and however much it learns."""
    agent = make_agent("ppo", f"curiosity={curiosity}")
    states, before = places(agent)
    features = agent.novelty_phi(contrast_normalised(states)).detach()
    centred = features - features.mean(1, keepdim=True)
    wanted = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(before, wanted, rtol=1e-4, atol=1e-5)
    live(agent, 20)
    assert agent.updates > 0
    assert torch.equal(places(agent)[1], before)


def test_without_an_episodic_scale_every_state_is_new() -> None:
    agent = make_agent("ppo", "curiosity.episodic_scale=null")
    assert "novelty_phi" not in agent.networks
    assert places(agent)[1].shape == (3, 0)
    live(agent, 20)
    assert agent.updates > 0
    assert agent.memory.novelty[:20].tolist() == [[1.0] * 3] * 20


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_loaded_agent_goes_on_to_the_bit(name: str) -> None:
    first, second = make_agent(name), make_agent(name, "seed=9")
    game = live(first, 21)
    live(second, 5, Game(3, 8))
    second.load_state_dict(through_a_file(first.state_dict()))
    second.load_memory(through_a_file(first.memory_dict()))
    assert 0 < len(first.order) < UPDATES
    for agent in (first, second):
        torch.manual_seed(0)
        live(agent, 20, copy.deepcopy(game))
    assert first.updates == second.updates
    for key, network in first.networks.items():
        assert same(weights(network), weights(second.networks[key])), key
    if name == "pqn":
        assert first.policy.temperature == second.policy.temperature != 1


def test_a_step_of_the_optimizer_has_the_mean_gradient_of_several_batches() -> None:
    given = "ppo", "agent.epochs=4", "curiosity.inverse_dropout=0.0"
    one, twin = make_agent(*given, "agent.accumulate=3"), make_agent(*given, "agent.accumulate=1")
    game = live(one, 12)
    while one.updates % 3:
        one.update()
    assert len(one.order) > 3
    twin.load_state_dict(through_a_file(one.state_dict()))
    twin.load_memory(through_a_file(one.memory_dict()))
    before = weights(one.actor_critic)
    for done in range(3):
        loss, _, _ = twin.loss_and_parts(twin.batch(twin.order[done]))
        loss.backward()
        assert same(weights(one.actor_critic), before)
        one.update()
    assert not same(weights(one.actor_critic), before)
    for ours, theirs in zip(one.learned, twin.learned, strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad / 3)
    # what waits for more batches is part of the state
    one.update()
    again = make_agent(*given, "agent.accumulate=3")
    again.load_state_dict(through_a_file(one.state_dict()))
    again.load_memory(through_a_file(one.memory_dict()))
    for agent in (one, again):
        torch.manual_seed(0)
        live(agent, 4, copy.deepcopy(game))
    assert one.updates == again.updates
    assert same(weights(one.actor_critic), weights(again.actor_critic))


@pytest.mark.parametrize(("accumulate", "kept"), [(4, 2), (2, 0), (1, 0)])
def test_a_run_goes_on_with_steps_of_another_number_of_batches(accumulate: int, kept: int) -> None:
    given = "ppo", "agent.epochs=8", "curiosity.inverse_dropout=0.0"
    first = make_agent(*given, "agent.accumulate=3")
    live(first, 12)
    while first.updates % 12 != 5:  # 2 batches wait, whatever its remainder of 4 or 2
        first.update()
    second = make_agent(*given, f"agent.accumulate={accumulate}")
    second.load_state_dict(through_a_file(first.state_dict()))
    second.load_memory(through_a_file(first.memory_dict()))
    before = weights(second.actor_critic)
    if not kept:
        first.optimizer.zero_grad()
    for done in range(accumulate - kept):
        assert same(weights(second.actor_critic), before)
        loss, _, _ = first.loss_and_parts(first.batch(first.order[done]))
        loss.backward()
        second.update()
    assert not same(weights(second.actor_critic), before)
    for ours, theirs in zip(second.learned, first.learned, strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad / accumulate)


def test_schedules_go_on_with_other_settings_of_the_updates() -> None:
    schedule = ("agent.discount=[[0,0.5],[200,0.75]]", "total_steps=200", "agent.lr_final=0.1")
    first = make_agent("ppo", *schedule)
    live(first, 30)
    second = make_agent("ppo", *schedule, "agent.epochs=4", "agent.batch_size=3")
    second.load_state_dict(through_a_file(first.state_dict()))
    assert 0.55 < second.discount() == first.discount() < 0.7
    assert second.learning_rate() == first.learning_rate() < 0.8 * first.config.lr
    done, learned = second.updates, second.learned_steps
    live(second, 20)
    assert second.updates > done
    # an update: 3 sequences of 4 agent steps, each learned 4 times
    assert second.learned_steps == learned + (second.updates - done) * 3.0


def test_without_its_memory_a_resumed_agent_begins_a_new_rollout() -> None:
    first, second = make_agent("ppo"), make_agent("ppo")
    game = live(first, 20)
    assert len(first.order)
    second.load_state_dict(through_a_file(first.state_dict()))
    second.forget(20)
    done = second.updates
    live(second, 8, game)
    assert second.updates == done
    live(second, 8, game)
    assert second.updates > done


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("agent.rollout_steps=9",), r"rollout_steps=9: must be a multiple of .*length=4"),
        (("agent.batch_size=4",), r"batch_size=4: must divide the 6 sequences of a rollout"),
        (("agent.replay_capacity=20",), r"replay_capacity=20: must be at least 57, env.num_envs"),
        (("agent.epochs=0",), r"epochs=0: must be at least 1"),
        (("agent.trace=1.5",), r"trace=1.5: must be between 0 and 1"),
        (("agent.clip=0",), r"clip=0.0: must be a positive number"),
        (("agent.name=sarsa",), r"agent.name=sarsa: must be one of dqn, ppo, pqn"),
        (("curiosity.name=boredom",), r"curiosity.name=boredom: must be one of icm, random_f"),
        (("curiosity=disagreement", "curiosity.ensemble=0"), r"ensemble=0: must be at least 1"),
    ],
)
def test_settings_are_checked(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings("agent=ppo", *SMALL, *overrides)


@pytest.mark.parametrize("preset", ["tutorial", "pathak", "large_scale", "whole_game", "practice"])
def test_presets_choose_their_learner(preset: str) -> None:
    config = settings(f"preset={preset}")
    assert config.preset == preset
    assert config.agent.name == ("dqn" if preset == "tutorial" else "ppo")
    assert config.curiosity.name == ("random_features" if preset == "large_scale" else "icm")


# --- learning -------------------------------------------------------------------------------------


class Lamp:
    """States are dark or bright; in a bright one action 2 is rewarded, in a dark one action 1."""

    def __init__(self, num_envs: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.num_envs = num_envs
        self.states = self.look()
        self.ended = torch.zeros(num_envs, dtype=torch.bool)  # never

    def look(self) -> Tensor:
        self.bright = torch.randint(0, 2, (self.num_envs,), generator=self.generator)
        grey = (self.bright * 200 + 20).to(torch.uint8).view(-1, 1, 1, 1)
        return grey.expand(-1, STACK, SIZE, SIZE)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rewards = (actions == self.bright + 1).float()
        self.states = self.look()
        return rewards, self.ended, self.ended


@pytest.mark.parametrize(("name", "steps"), [("ppo", 6400), ("pqn", 800)])
def test_reward_of_the_game_is_learned(name: str, steps: int) -> None:
    agent = make_agent(
        name,
        "env.num_envs=8",
        "agent.rollout_steps=16",
        "agent.batch_size=8",
        "agent.replay_capacity=1000",
        "agent.lr=1e-3",
        "agent.discount=0.5",
        "agent.input_norm=scale",
        "curiosity=none",
        "curiosity.extrinsic_coef=1.0",
    )
    world = Lamp(8, 1)
    earned = [rewards.mean().item() for rewards in interact(agent, world, steps)]
    assert np.mean(earned[:20]) < 0.5
    states = world.states
    best = agent.probabilities(states, start(states), steps, greedy=True).argmax(1)
    assert torch.equal(best, world.bright + 1)


def test_a_rollout_of_one_transition_has_advantages() -> None:
    one = ("env.num_envs=1", "agent.rollout_steps=1", "agent.sequence_length=1")
    agent = make_agent("ppo", *one, "agent.batch_size=1")
    live(agent, 40)
    assert agent.targets_of_rollout()["advantages"].isfinite().all()
    assert agent.skipped == 0


@pytest.mark.parametrize("name", ["dqn", "ppo", "pqn"])
def test_a_policy_that_is_not_finite_is_no_policy(name: str) -> None:
    agent = make_agent(name)
    states = torch.randint(0, 256, (3, STACK, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        for parameter in agent.learning[0].parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(BrokenDownError, match="the policy is not finite"):
        agent.act(states, start(states), 10_000)
    with pytest.raises(BrokenDownError, match="the policy is not finite"):
        agent.probabilities(states, start(states), 10_000)


def test_an_ensemble_has_as_many_models_as_it_is_told() -> None:
    agent = make_agent("ppo", "curiosity=disagreement", "curiosity.ensemble=2")
    assert len(agent.signal.ensemble) == 2


def test_pqn_learns_from_scaled_surprise_times_novelty_and_the_games_reward() -> None:
    weights = ("curiosity.coef=2.0", "curiosity.extrinsic_coef=0.5", "agent.trace=0.0")
    agent = make_agent("pqn", *weights, "agent.advantage_learning=0.0", "agent.discount=0.5")
    live(agent, 9)
    memory = agent.memory
    ended = agent.stored(memory.terminated) | agent.stored(memory.truncated)
    plain = ~(agent.stored(memory.reset) | ended)
    plain[0] = False  # the first step is already that of the next rollout
    assert plain.sum() > 5
    assert (agent.raw[:-1][plain] > 0.1).any()
    rewards = 2 * agent.raw[:-1] / agent.scale.std + 0.5 * agent.stored(memory.rewards)
    wanted = rewards + 0.5 * agent.values[1:].amax(2)
    torch.testing.assert_close(agent.targets["returns"].squeeze(2)[plain], wanted[plain])


def test_the_errors_of_both_values_count() -> None:
    agent = make_agent("ppo", "curiosity.extrinsic_coef=1.0")
    live(agent, 9)
    batch = agent.batch(torch.tensor([0, 4]))
    rollout = batch.rollout
    x = agent.input_norm(rollout.states[:, :-1].flatten(0, 1))
    _, values = agent.actor_critic(x, rollout.previous[:, :-1].flatten())
    values = values.detach().unflatten(0, rollout.actions.shape)
    errors = (values - batch.targets["returns"])[~rollout.reset].square().mean(0)
    assert errors.shape == (2,)
    assert errors.min() > 0
    _, parts = agent.losses(batch)
    assert parts["loss/value"].item() == pytest.approx(errors.sum().item(), rel=1e-4)
    wanted = values[~rollout.reset].sum(1).mean().item()
    assert parts["value/mean"].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_where_a_new_life_begins_tells_nothing_of_what_is_usual() -> None:
    agent, game = make_agent("ppo", "curiosity.reward_half_life=1e9"), Game(3, 3, episodes=(99, 99))
    means = []
    for t in range(6):
        respawned = torch.tensor([t % 2 == 1, False, t == 3])
        step = game.step() | {"values": torch.zeros(3, 1), "respawned": respawned}
        statistics, surprise = agent.observe(**step)
        assert torch.equal(surprise.isnan(), respawned)
        for name in ("accuracy", "heldout", "gain"):
            assert len(statistics[f"icm/inverse_{name}"]) == (~respawned).sum()
        means.append(surprise[~respawned].double().mean().item())
    assert agent.interest.moments.mean == pytest.approx(np.mean(means), rel=1e-6)


def test_an_agent_that_fills_a_new_memory_goes_on_filling_it() -> None:
    """If it is stopped and resumed meanwhile."""
    first, second = (make_agent("ppo", "agent.warmup_steps=100") for _ in range(2))
    live(first, 20)
    first.forget(500)
    live(first, 10)
    second.load_state_dict(through_a_file(first.state_dict()))
    second.load_memory(through_a_file(first.memory_dict()))
    for agent in (first, second):
        assert [agent.can_learn(step) for step in (100, 599, 600)] == [False, False, True]


def test_the_icm_has_its_settings() -> None:
    given = {
        **{"beta": 0.3, "eta": 2.0, "reduction": "sum", "forward_scale": 3.0, "inverse_scale": 5.0},
        **{"target_tau": 0.25, "normalize_features": False, "policy_prior": False},
    }
    signal = make_agent("ppo", *(f"curiosity.{k}={v}" for k, v in given.items())).signal
    assert {name: getattr(signal, name) for name in given} == given
