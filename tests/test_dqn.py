"""The learner: targets, updates, policies, state, and whether it learns at all."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings, through_a_file
from torch import Tensor, nn

from icm.agents.base import Agent, BrokenDownError
from icm.agents.dqn import DQN, n_step_targets
from icm.agents.policy import TEMPERATURE_LR, action_probabilities, entropy, scheduled
from icm.config import Config
from icm.errors import UserError
from icm.factory import build_agent
from icm.models import NO_ACTION
from icm.replay import Sequences

ACTIONS = 4
SIZE = 16
SMALL = {
    "precision": "float32",
    "compile": "off",
    "env__num_envs": 3,
    "env__frame_stack": 2,
    "env__size": SIZE,
    "agent__hidden": 16,
    "agent__lr_final": 1.0,
    "agent__n_step": 3,
    "agent__batch_size": 12,
    "agent__sequence_length": 6,
    "agent__replay_capacity": 300,
    "agent__warmup_steps": 1,
    "agent__target_tau": 0.01,
    "agent__max_grad_norm": 1e9,
    "curiosity__hidden": 16,
    "curiosity__inverse_dropout": 0.0,
}
FIXED_POLICY = {"temperature": [[0, 0.1]], "epsilon": [[0, 0.05]]}


def configure(curiosity: str = "icm", **changes: Any) -> Config:
    """Small settings with changes; `agent__n_step=5` changes `agent.n_step`."""
    small = {k: v for k, v in SMALL.items() if curiosity != "none" or not k.startswith("curiosity")}
    return settings("agent=dqn", f"curiosity={curiosity}", **small | changes)


def make_agent(num_actions: int = ACTIONS, **changes: Any) -> DQN:
    """An agent with the settings of `configure`."""
    config = configure(**changes)
    shape = (config.env.frame_stack, SIZE, SIZE)
    return build_agent(config, shape, num_actions, torch.device("cpu"))


class Game:
    """Random images in episodes of random length that reset on the step after their end."""

    def __init__(
        self, num_envs: int, seed: int, episodes: tuple[int, int] = (8, 14), stack: int = 2
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.num_envs, self.episodes, self.frame_stack = num_envs, episodes, stack
        self.left = np.full(num_envs, -1)
        self.previous = np.full(num_envs, NO_ACTION)
        self.states = np.zeros((num_envs, stack, SIZE, SIZE), dtype=np.uint8)
        for env in range(num_envs):
            self._advance(env)

    def _advance(self, env: int) -> None:
        image = self.rng.integers(0, 256, (SIZE, SIZE))
        if self.left[env] < 0:
            low, high = self.episodes
            self.left[env] = self.rng.integers(low, high + 1)
            self.states[env] = image
        else:
            self.states[env] = np.concatenate((self.states[env, 1:], image[None]))

    def step(self) -> dict[str, Tensor]:
        """What `DQN.observe` wants to know."""
        states, previous = self.states.copy(), self.previous
        actions = self.rng.integers(0, ACTIONS, self.num_envs)
        reset, last = self.left == 0, self.left == 1
        terminated = last & (self.rng.random(self.num_envs) < 0.5)
        self.left -= 1
        for env in range(self.num_envs):
            self._advance(env)
        probabilities = self.rng.dirichlet(np.ones(ACTIONS), self.num_envs)
        self.previous = np.where(reset, NO_ACTION, actions)
        given = {
            "states": states,
            "previous": previous,
            "probabilities": probabilities.astype(np.float32),
            "values": np.zeros((self.num_envs, 1), dtype=np.float32),
            "actions": actions,
            "next_states": self.states.copy(),
            "rewards": self.rng.normal(size=self.num_envs).astype(np.float32),
            "terminated": terminated,
            "truncated": last & ~terminated,
            "reset": reset,
            "respawned": np.zeros(self.num_envs, dtype=bool),
            "origin": np.full(self.num_envs, -1),
            "undone": np.zeros(self.num_envs, dtype=np.int64),
        }
        return {name: torch.from_numpy(value) for name, value in given.items()}


def start(states: Tensor) -> Tensor:
    """The previous actions of states that open episodes."""
    return torch.full((len(states),), NO_ACTION)


def play(agent: DQN, steps: int = 30, seed: int = 3, **game: Any) -> None:
    played = Game(agent.memory.num_envs, seed, **game)
    for _ in range(steps):
        agent.observe(**played.step())


def next_batch(agent: DQN) -> Sequences:
    """What the next update will sample."""
    generator = torch.Generator()
    generator.set_state(agent.generator.get_state())
    config = agent.config
    return agent.memory.sample(config.batch_size, config.sequence_length, generator)


def disturb(network: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Change weights by a share of their spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std().nan_to_num(0.1) * scale)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


# --- n-step targets -------------------------------------------------------------------------------


def slow_return(
    t: int,
    k: int,
    rewards: list[float],
    values: list[float],
    terminal: list[bool],
    truncated: list[bool],
    reset: list[bool],
    discount: float,
) -> float:
    """What `k` more rewards from slot `t` on, and then a value, are worth."""
    rest = (rewards, values, terminal, truncated, reset, discount)
    if t == len(rewards):
        return values[t]  # the sequence is over
    if reset[t]:
        return slow_return(t + 1, k, *rest)  # nothing happens here but a new episode
    if k == 0:
        return values[t]
    if terminal[t]:
        return rewards[t]
    if truncated[t]:
        return rewards[t] + discount * values[t + 1]
    return rewards[t] + discount * slow_return(t + 1, k - 1, *rest)


def random_flags(rng: np.random.Generator, length: int) -> tuple[list[bool], ...]:
    """terminated, truncated, reset of a stretch out of a longer history."""
    terminated, truncated, reset = [], [], []
    left = int(rng.integers(0, 7))
    while len(reset) < length:
        dies = left == 1 and bool(rng.random() < 0.5)
        terminated.append(dies)
        truncated.append(left == 1 and not dies)
        reset.append(left == 0)
        left = left - 1 if left else int(rng.integers(1, 7))
    return terminated, truncated, reset


@pytest.mark.parametrize("death_is_terminal", [False, True])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_targets_are_those_of_a_slow_recursion(n: int, death_is_terminal: bool) -> None:
    rng = np.random.default_rng(n)
    batch, length, discount = 60, 13, 0.9
    rewards, values = rng.normal(size=(batch, length)), rng.normal(size=(batch, length + 1))
    flags = [random_flags(rng, length) for _ in range(batch)]
    terminated, truncated, reset = (np.array(flag) for flag in zip(*flags, strict=True))
    assert (terminated | truncated)[:, :-1][reset[:, 1:]].all()  # as the memory has it
    assert min(terminated.sum(), truncated.sum(), reset.sum()) > 50
    terminal = terminated & death_is_terminal
    given = [torch.from_numpy(x) for x in (rewards, values, terminal, truncated, reset)]
    found = n_step_targets(*given, discount, n)
    assert found.shape == (batch, length)
    lists = [x.tolist() for x in given]
    for b in range(batch):
        row = [values_of_row[b] for values_of_row in lists]
        for t in range(length):
            assert found[b, t].item() == pytest.approx(slow_return(t, n, *row, discount)), (b, t)


def targets(rewards: list[float], values: list[float], n: int, **flags: int) -> list[float]:
    """Targets of one sequence with discount 1/2; `reset=2` sets the flag of slot 2 alone."""
    given = [torch.tensor([rewards]), torch.tensor([values])]
    for name in ("terminal", "truncated", "reset"):
        flag = torch.zeros(1, len(rewards), dtype=torch.bool)
        if name in flags:
            flag[0, flags[name]] = True
        given.append(flag)
    return n_step_targets(*given, 0.5, n)[0].tolist()


def test_targets_by_hand() -> None:
    rewards, values = [1.0, 2.0, 4.0, 8.0], [10.0, 20.0, 30.0, 40.0, 50.0]
    assert targets(rewards, values, 1) == [11, 17, 24, 33]
    assert targets(rewards, values, 2) == [1 + 1 + 7.5, 2 + 2 + 10, 4 + 4 + 12.5, 33]
    # more rewards than there are
    assert targets(rewards, values, 9) == [1 + 1 + 1 + 1 + 50 / 16, 2 + 2 + 2 + 6.25, 20.5, 33]
    # the end of an episode, for good
    assert targets(rewards, values, 2, terminal=1, reset=2)[:2] == [2, 2]
    # cut short: the value of the state it was cut in
    assert targets(rewards, values, 2, truncated=1, reset=2)[:2] == [1 + 1 + 7.5, 17]
    assert targets(rewards, values, 3, truncated=1, reset=2)[:2] == [1 + 1 + 7.5, 17]
    # death that is not terminal: on from slot 3, where the next episode begins
    assert targets(rewards, values, 1, reset=2)[:2] == [11, 2 + 20]
    assert targets(rewards, values, 2, reset=2)[:2] == [1 + 1 + 10, 2 + 4 + 50 / 4]


def test_no_reward_of_a_reset_slot_gets_into_a_target() -> None:
    """A cut right after an episode's first state leaves two reset slots in a row.

    What stands in the second is no transition: the state after it was never reached from it.
    """
    agent = make_agent(env__num_envs=1)
    blank = torch.zeros(1, 2, SIZE, SIZE, dtype=torch.uint8)
    no, yes = torch.tensor([False]), torch.tensor([True])

    def add(terminated: Tensor, reset: Tensor) -> None:
        zero, one = torch.tensor([0]), torch.tensor([1.0])
        agent.memory.add(blank, zero, torch.full((1, 4), 0.25), one, terminated, no, reset, one)

    for _ in range(3):
        add(no, no)
    add(yes, no)
    add(no, yes)  # the dead state
    add(no, no)  # a new episode opens, and the run is stopped
    agent.memory.cut()
    for _ in range(4):
        add(no, no)
    found = agent.memory.sample(50, 6, torch.Generator().manual_seed(0))
    row = int(found.reset.sum(1).argmax())
    assert found.reset[row].sum() == 2
    sequence = {k: v[row : row + 1] for k, v in vars(found).items()}
    values = torch.arange(7.0).view(1, 7)

    def learn(rewards: Tensor) -> Tensor:
        never = torch.zeros_like(sequence["reset"])  # death is not terminal
        returns = n_step_targets(
            rewards, values, never, sequence["truncated"], sequence["reset"], 0.9, 3
        )
        return returns[~sequence["reset"]]

    changed = torch.where(sequence["reset"], 1e6, sequence["rewards"])
    assert torch.equal(learn(changed), learn(sequence["rewards"]))


# --- one update, computed twice -------------------------------------------------------------------


def told(previous: Tensor) -> Tensor:
    """One-hot of one previous action; zeros at the start of an episode."""
    return torch.tensor([float(action == previous) for action in range(ACTIONS)])


def guess(
    agent: DQN, features: Tensor, next_features: Tensor, policy: Tensor, previous: Tensor
) -> list[float]:
    """The inverse model's logits for one transition, with nothing dropped out."""
    inverse = agent.signal.inverse
    both = torch.cat((features[0, 0], next_features[0, 0]))
    if agent.config.previous_action:
        both = torch.cat((both, told(previous)))
    given = inverse.linear1(both)
    given = (given - given.mean()) / (given.var(correction=0) + 1e-5).sqrt()
    logits = inverse.linear2(torch.relu(given)).tolist()
    if agent.curiosity.policy_prior:
        logits = [x + math.log(p) for x, p in zip(logits, policy.tolist(), strict=True)]
    return logits


def surprise(
    agent: DQN, features: Tensor, action: Tensor, next_features: Tensor, previous: Tensor
) -> float:
    """Mean squared error of the forward model for one transition."""
    predicted = agent.signal.fnet(features[:, 1], action, previous)
    return (predicted - next_features[:, 1]).square().mean().item()


def scaled(agent: DQN, raw: float) -> float:
    """The reward of a raw one."""
    return raw / agent.scale.std


def interest(agent: DQN, surprise: float) -> float:
    """What a surprise counts."""
    limit, usual = agent.curiosity.surprise_limit, agent.interest.moments
    if limit is None:
        return surprise
    return min(max(1 + (surprise - usual.mean) / usual.std, 1.0), limit)


class SlowNovelty:
    """Novelty in a life, from all features seen in it."""

    def __init__(self, agent: DQN) -> None:
        assert agent.curiosity.episodic_scale is not None
        self.scale = agent.curiosity.episodic_scale
        self.seen: list[list[np.ndarray]] = [[] for _ in range(agent.memory.num_envs)]

    def __call__(self, env: int, features: Tensor, opens: bool) -> float:
        if opens:
            self.seen[env].clear()
        f = features.detach().double().numpy()
        nearest = min((np.mean((f - x) ** 2) for x in self.seen[env]), default=np.inf)
        self.seen[env].append(f)
        return float(1 - self.scale / (nearest + self.scale))


def slow_losses(agent: DQN, batch: Sequences) -> dict[str, float]:
    """The losses of one update, transition by transition.

    Where a sequence ends with a death that is not terminal, the last n slots are not learned from.
    """
    config, curiosity = agent.config, agent.curiosity
    size, length = batch.actions.shape
    td_errors, forward, inverse, chosen = [], [], [], []
    for b in range(size):
        x = [agent.input_norm(state[None]) for state in batch.states[b]]
        with torch.no_grad():
            before = batch.previous[b].unsqueeze(1)
            online = [agent.qnetwork(s, p)[0].tolist() for s, p in zip(x, before, strict=True)]
            judged = [agent.target(s, p)[0].tolist() for s, p in zip(x, before, strict=True)]
            features = [agent.signal.encode(s) for s in x]
        values = [
            theirs[max(range(ACTIONS), key=ours.__getitem__)]
            for ours, theirs in zip(online, judged, strict=True)
        ]
        terminated, truncated, reset = (
            getattr(batch, name)[b].tolist() for name in ("terminated", "truncated", "reset")
        )
        terminal = [t and config.death_is_terminal for t in terminated]
        rewards = []
        for t in range(length):
            action = int(batch.actions[b, t])
            with torch.no_grad():
                logits = guess(
                    agent,
                    features[t],
                    features[t + 1],
                    batch.behaviour[b, t],
                    batch.previous[b, t],
                )
                surprising = surprise(
                    agent,
                    features[t],
                    batch.actions[b, t : t + 1],
                    features[t + 1],
                    batch.previous[b, t : t + 1],
                )
            rewards.append(
                curiosity.coef
                * scaled(
                    agent, interest(agent, curiosity.eta * surprising) * batch.novelty[b, t].item()
                )
                + curiosity.extrinsic_coef * batch.rewards[b, t].item()
            )
            if not reset[t]:
                forward.append(surprising)
                total = sum(math.exp(x) for x in logits)
                inverse.append(-math.log(math.exp(logits[action]) / total))
                chosen.append(online[t][action])
        dies_at_the_end = terminated[-1] and not config.death_is_terminal
        for t in range(length):
            if reset[t] or (dies_at_the_end and t + config.n_step >= length):
                continue
            target = slow_return(
                t, config.n_step, rewards, values, terminal, truncated, reset, config.discount
            )
            action = int(batch.actions[b, t])
            target += config.advantage_learning * (judged[t][action] - values[t])
            distance = abs(online[t][action] - target)
            td_errors.append(0.5 * distance**2 if distance < 1 else distance - 0.5)
    lists = {
        "loss/q": td_errors,
        "loss/forward": forward,
        "loss/inverse": inverse,
        "q/mean": chosen,
    }
    return {name: sum(values) / len(values) for name, values in lists.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"agent__n_step": 1, "curiosity__extrinsic_coef": 0.7, "curiosity__policy_prior": False},
        {"agent__n_step": 10, "curiosity__eta": 3.0, "curiosity__coef": 0.5},
        {"agent__death_is_terminal": False, "curiosity__extrinsic_coef": 1.0},
        {"agent__input_norm": "stack", "agent__discount": 0.2, "curiosity__coef": 0.0},
        {"agent__previous_action": False, "agent__advantage_learning": 0.0},
        {"curiosity__surprise_limit": None},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_update_computes_the_losses_it_should(changes: dict[str, Any]) -> None:
    agent = make_agent(**changes, agent__batch_size=32)
    play(agent)
    agent.measure_input()
    disturb(agent.qnetwork, 1)
    disturb(agent.target, 2)
    batch = next_batch(agent)
    assert batch.reset.any()
    assert batch.terminated[:, :-1].any()
    assert batch.terminated[:, -1].any()
    assert batch.truncated.any()
    expected = slow_losses(agent, batch)
    found = agent.update()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_online_network_chooses_and_target_network_judges() -> None:
    """Either network alone gives another loss."""
    changes = {
        "curiosity__coef": 0.0,
        "curiosity__extrinsic_coef": 1.0,
        "agent__n_step": 1,
        "agent__advantage_learning": 0.0,
    }
    agent = make_agent(**changes)
    play(agent)
    disturb(agent.qnetwork, 1, scale=1.0)
    disturb(agent.target, 2, scale=1.0)
    batch = next_batch(agent)
    double = slow_losses(agent, batch)["loss/q"]

    alone = make_agent(**changes)
    alone.scale = agent.scale
    alone.qnetwork.load_state_dict(agent.qnetwork.state_dict())
    alone.target.load_state_dict(agent.qnetwork.state_dict())
    only_online = slow_losses(alone, batch)["loss/q"]
    found = agent.update()["loss/q"].item()
    assert found == pytest.approx(double, rel=1e-4)
    assert found != pytest.approx(only_online, rel=1e-3)

    # a target network whose best action is another one than the online network's
    states = agent.input_norm(batch.states[:, 0])
    best = agent.qnetwork(states, batch.previous[:, 0]).argmax(1)
    judged = agent.target(states, batch.previous[:, 0])
    assert (judged.argmax(1) != best).any()


def test_death_is_terminal_or_not() -> None:
    losses = {}
    for terminal in (False, True):
        agent = make_agent(agent__death_is_terminal=terminal)
        play(agent)
        disturb(agent.target, 2, scale=3.0)
        expected = slow_losses(agent, next_batch(agent))["loss/q"]
        losses[terminal] = agent.update()["loss/q"].item()
        assert losses[terminal] == pytest.approx(expected, rel=1e-3)
    assert losses[True] != pytest.approx(losses[False], rel=1e-2)


def test_of_single_steps_deaths_are_learned_too() -> None:
    agent = make_agent(
        env__num_envs=1,
        env__frame_stack=1,
        agent__n_step=1,
        agent__sequence_length=1,
        agent__batch_size=8,
        agent__death_is_terminal=False,
        agent__replay_capacity=8,
        curiosity__coef=0.0,
        curiosity__extrinsic_coef=1.0,
    )
    for slot in range(8):  # episodes of one step, which ends with a death
        agent.memory.add(
            torch.full((1, 1, SIZE, SIZE), slot, dtype=torch.uint8),
            torch.tensor([slot % ACTIONS]),
            torch.full((1, ACTIONS), 1 / ACTIONS),
            torch.tensor([5.0]),
            torch.tensor([slot % 2 == 0]),
            torch.tensor([False]),
            torch.tensor([slot % 2 == 1]),
            torch.ones(1),
        )
    assert agent.update()["loss/q"].item() > 1.0


def ending_with_a_death(ends: set[int], brightness: int) -> tuple[float, Tensor]:
    """Q's loss on a sequence that ends with a death, and the values of the state it leads to.

    Of eight slots, those from 1 to 6 are learned from. Deaths are in `ends`, the last in slot 6; it
    leads to a picture of one brightness.
    """
    agent = make_agent(
        env__num_envs=1,
        env__frame_stack=1,
        agent__n_step=3,
        agent__replay_capacity=8,
        agent__batch_size=1,
        agent__death_is_terminal=False,
        curiosity__coef=0.0,
        curiosity__extrinsic_coef=1.0,
    )
    disturb(agent.qnetwork, 4, scale=2.0)
    disturb(agent.target, 5, scale=2.0)
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 1, SIZE, SIZE)).astype(np.uint8)
    images[7] = brightness
    for slot in range(8):
        agent.memory.add(
            torch.from_numpy(images[slot]),
            torch.tensor([slot % ACTIONS]),
            torch.full((1, ACTIONS), 1 / ACTIONS),
            torch.tensor([float(slot)]),
            torch.tensor([slot in ends]),
            torch.tensor([False]),
            torch.tensor([slot - 1 in ends]),
            torch.ones(1),
        )
    last = torch.from_numpy(images[7])
    values = agent.target(agent.input_norm(last), start(last))
    return agent.update()["loss/q"].item(), values


@pytest.mark.parametrize("ends", [{6}, {3, 6}, {2, 4, 6}], ids=["one", "two", "three"])
def test_dead_state_at_the_end_of_a_sequence_teaches_nothing(ends: set[int]) -> None:
    """Nothing is chosen in it, so its value is never learned; the start it leads to is not there.

    How the dead state looks must not matter, neither at the end of the only episode nor at the end
    of the last of several short ones.
    """
    dark, dark_values = ending_with_a_death(ends, 0)
    bright, bright_values = ending_with_a_death(ends, 255)
    assert (dark_values - bright_values).abs().min() > 1e-3
    assert dark > 0
    assert dark == bright


def test_no_gradient_through_targets_and_rewards() -> None:
    found = {}
    for weight in (0.0, 0.1, 1.0):
        agent = make_agent(
            agent__q_weight=weight,
            agent__n_step=1,
            agent__target_tau=1e-30,
            agent__death_is_terminal=False,
        )
        play(agent)
        disturb(agent.target, 2)
        before = weights(agent.target)
        batch = next_batch(agent)
        agent.update()
        assert same(weights(agent.target), before)
        assert all(p.grad is None and not p.requires_grad for p in agent.target.parameters())
        found[weight] = gradients(agent.qnetwork), gradients(agent.signal)
    # the rewards come from the ICM, but no Q loss reaches it
    assert found[0.0][1]
    for without, with_q in zip(found[0.0][1], found[1.0][1], strict=True):
        assert torch.equal(without, with_q)
    assert all(not g.any() for g in found[0.0][0])
    for tenth, whole in zip(found[0.1][0], found[1.0][0], strict=True):
        torch.testing.assert_close(tenth, 0.1 * whole, rtol=1e-3, atol=1e-7)

    # the gradient of the Q network is that of a regression onto constants
    agent = make_agent(agent__n_step=1)
    play(agent)
    disturb(agent.target, 2)
    loss, count = torch.zeros(()), 0
    for b in range(batch.actions.shape[0]):
        for t in range(batch.actions.shape[1]):
            at_the_end = t == batch.actions.shape[1] - 1
            if batch.reset[b, t] or (at_the_end and batch.terminated[b, t]):
                continue
            now, after = (agent.input_norm(batch.states[b, i][None]) for i in (t, t + 1))
            # a death leads on to the start of the next episode
            on = t + 2 if batch.terminated[b, t] else t + 1
            following, action_before = (
                agent.input_norm(batch.states[b, on][None]),
                batch.previous[b],
            )
            with torch.no_grad():
                action = batch.actions[b, t : t + 1]
                raw = surprise(
                    agent,
                    agent.signal.encode(now),
                    action,
                    agent.signal.encode(after),
                    action_before[t : t + 1],
                )
                best = agent.qnetwork(following, action_before[on : on + 1]).argmax()
                judged = agent.target(following, action_before[on : on + 1])
                reward = scaled(agent, interest(agent, raw) * batch.novelty[b, t].item())
                goal = reward + agent.config.discount * judged[0, best]
                best = agent.qnetwork(now, action_before[t : t + 1]).argmax()
                judged = agent.target(now, action_before[t : t + 1])
                goal = goal + 0.9 * (judged[0, action[0]] - judged[0, best])
            distance = (agent.qnetwork(now, action_before[t : t + 1])[0, action[0]] - goal).abs()
            loss = loss + torch.where(distance < 1, 0.5 * distance**2, distance - 0.5)
            count += 1
    (loss / count).backward()
    for ours, reference in zip(found[1.0][0], gradients(agent.qnetwork), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-6)


def test_reset_slots_teach_the_icm_nothing() -> None:
    """What follows the last state of an episode may be anything."""
    found = []
    for action in (0, 1):
        agent = make_agent()
        played = Game(3, 3)
        for _ in range(60):
            step = played.step()
            step["actions"] = torch.where(step["reset"], action, step["actions"])
            step["rewards"] = torch.where(step["reset"], action * 100.0, step["rewards"])
            agent.observe(**step)
        assert next_batch(agent).reset.any()
        results = agent.update()
        found.append(([*results.values()], gradients(agent.signal), gradients(agent.qnetwork)))
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_target_network_is_a_moving_average() -> None:
    agent = make_agent(agent__target_tau=0.25)
    play(agent)
    expected = weights(agent.qnetwork)
    assert same(weights(agent.target), expected)
    for update in range(1, 8):
        agent.update()
        assert agent.updates == update
        newest = weights(agent.qnetwork)
        expected = {k: 0.75 * w + 0.25 * newest[k] for k, w in expected.items()}
        torch.testing.assert_close(weights(agent.target), expected)
    assert not same(weights(agent.target), newest)


def test_target_is_a_copy_of_its_own() -> None:
    agent = make_agent(agent__target_tau=1.0)
    play(agent)
    for _ in range(2):
        agent.update()
        assert same(weights(agent.target), weights(agent.qnetwork))
        held = weights(agent.target)
        disturb(agent.qnetwork)
        assert same(weights(agent.target), held)


@pytest.mark.parametrize("greedy", [False, True])
def test_target_network_acts(greedy: bool) -> None:
    agent = make_agent(agent__policy=FIXED_POLICY)
    states = random_states(30)
    before = agent.probabilities(states, start(states), 1, greedy)
    disturb(agent.qnetwork, 3, scale=5.0)
    assert torch.equal(agent.probabilities(states, start(states), 1, greedy), before)
    agent.target.load_state_dict(agent.qnetwork.state_dict())
    assert not torch.equal(agent.probabilities(states, start(states), 1, greedy), before)


def test_previous_action_counts_where_the_networks_are_told_it() -> None:
    states = random_states(1).expand(ACTIONS + 1, -1, -1, -1)
    previous = torch.arange(NO_ACTION, ACTIONS)
    given = (previous, torch.zeros_like(previous), states, torch.full((ACTIONS + 1, ACTIONS), 0.25))
    for told_it, different in ((True, ACTIONS + 1), (False, 1)):
        agent = make_agent(agent__policy=FIXED_POLICY, agent__previous_action=told_it)
        errors, _ = agent.judge(states, *given)
        found = (agent.probabilities(states, previous, 1), errors.logits, errors.surprise[:, None])
        for rows in found:
            assert len(rows.unique(dim=0)) == different


def total_norm(grads: list[Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in grads))


def test_gradients_are_clipped_per_group() -> None:
    free, clipped, loose = (
        make_agent(agent__max_grad_norm=limit, agent__q_weight=100.0) for limit in (1e9, 0.05, 0.2)
    )
    for agent in (free, clipped, loose):
        play(agent)
        agent.update()
    for network in ("qnetwork", "signal"):
        whole = gradients(getattr(free, network))
        length = total_norm(whole)
        assert length > 0.06
        for agent, limit in ((clipped, 0.05), (loose, 0.2)):
            found = gradients(getattr(agent, network))
            assert total_norm(found) <= limit * 1.0001
            for a, b in zip(found, whole, strict=True):
                torch.testing.assert_close(a, b * min(1, limit / length), rtol=1e-3, atol=1e-7)


def test_all_networks_learn_at_their_own_rate() -> None:
    agent = make_agent(agent__lr=1e-3, curiosity__lr=3e-3)
    play(agent)
    before = {name: weights(network) for name, network in agent.networks.items()}
    agent.update()
    for name, rate in (("phi", 3e-3), ("fnet", 3e-3), ("inverse", 3e-3), ("qnetwork", 1e-3)):
        after = weights(agent.networks[name])
        moved = max((after[k] - before[name][k]).abs().max().item() for k in after)
        assert moved == pytest.approx(rate, rel=0.01), name  # the first step of Adam
    assert same(weights(agent.input_norm), before["input_norm"])


def test_reward_is_that_of_the_icm_at_the_time_of_sampling() -> None:
    fresh, changed = make_agent(), make_agent()
    for agent in (fresh, changed):
        play(agent)
    stored = {k: v.clone() for k, v in changed.memory.state_dict().items() if torch.is_tensor(v)}
    disturb(changed.signal.fnet, 6, scale=3.0)
    now = slow_losses(changed, next_batch(changed))["loss/q"]
    at_storing = slow_losses(fresh, next_batch(fresh))["loss/q"]
    found = changed.update()["loss/q"].item()
    assert found == pytest.approx(now, rel=1e-3)
    assert found != pytest.approx(at_storing, rel=0.05)
    assert fresh.update()["loss/q"].item() == pytest.approx(at_storing, rel=1e-3)
    # stored is the game's reward, and the update leaves the memory alone
    state = changed.memory.state_dict()
    assert all(torch.equal(state[k], v) for k, v in stored.items())


# --- acting ---------------------------------------------------------------------------------------


def test_schedule_goes_through_its_knots() -> None:
    knots = [[0, 1.0], [100, 0.5], [300, 0.1]]
    expected = {-5: 1.0, 0: 1.0, 50: 0.75, 100: 0.5, 200: 0.3, 250: 0.2, 300: 0.1, 10**9: 0.1}
    for step, value in expected.items():
        assert scheduled(knots, step) == pytest.approx(value)
    assert scheduled([[500, 0.3]], 0) == scheduled([[500, 0.3]], 10_000) == 0.3
    jump = [[0, 1.0], [1_000, 1.0], [1_001, 0.0]]
    assert [scheduled(jump, step) for step in (0, 999, 1_000, 1_001, 5_000)] == [1, 1, 1, 0, 0]


def test_epsilon_greedy_formula() -> None:
    q = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, -5.0, -1.0, 0.5]])
    found = action_probabilities(q, temperature=0.0, epsilon=0.2)
    assert found.tolist() == [
        pytest.approx([0.05, 0.85, 0.05, 0.05]),
        pytest.approx([0.05, 0.05, 0.05, 0.85]),
    ]
    assert action_probabilities(q, 0.0, 0.0).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert action_probabilities(q, 0.0, 1.0).tolist() == [[0.25] * 4] * 2
    ties = action_probabilities(torch.zeros(1, 4), 0.0, 0.0)
    assert sorted(ties[0].tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize(("temperature", "epsilon"), [(1.0, 0.0), (0.3, 0.0), (2.0, 0.4), (0.1, 1)])
def test_softmax_formula(temperature: float, epsilon: float) -> None:
    q = np.random.default_rng(0).normal(size=(5, 3))
    found = action_probabilities(torch.from_numpy(q), temperature, epsilon).numpy()
    power = np.exp(q / temperature)
    expected = (1 - epsilon) * power / power.sum(1, keepdims=True) + epsilon / 3
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(found.sum(1), 1)


@pytest.mark.parametrize("temperature", [0.1, 1e-10, 1e-50, 1e-300])
def test_softmax_of_great_values_and_small_temperatures(temperature: float) -> None:
    q = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.01, 0.02]])
    assert action_probabilities(q[:1], temperature, 0.0).tolist() == [[1, 0, 0]]
    if temperature < 1e-3:
        assert action_probabilities(q, temperature, 0.0).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_entropy_in_nats() -> None:
    rows = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.7, 0.1, 0.1, 0.1]])
    mixed = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1))
    assert entropy(rows).tolist() == pytest.approx([math.log(4), 0, math.log(2), mixed])


def random_states(batch: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (batch, 2, SIZE, SIZE)).astype(np.uint8))


def test_policy_follows_warm_up_and_schedules() -> None:
    agent = make_agent(
        agent__warmup_steps=100,
        agent__policy={
            "temperature": [[0, 1.0], [1_000, 0.5], [1_001, 0.0]],
            "epsilon": [[0, 1.0], [1_000, 0.2]],
        },
    )
    disturb(agent.target, scale=2.0)
    states = random_states(6)
    with torch.no_grad():
        q = agent.target(agent.input_norm(states), start(states))
    for step in (0, 99):
        assert agent.probabilities(states, start(states), step).tolist() == [[0.25] * 4] * 6
        assert agent.policy.settings(step)[1] == 1
    for step, temperature, epsilon in ((100, 0.95, 0.92), (500, 0.75, 0.6), (1_000, 0.5, 0.2)):
        expected = (1 - epsilon) * torch.softmax(q / temperature, 1) + epsilon / 4
        torch.testing.assert_close(agent.probabilities(states, start(states), step), expected)
        assert agent.policy.settings(step) == pytest.approx((temperature, epsilon))
    best = torch.eye(4)[q.argmax(1)]
    torch.testing.assert_close(agent.probabilities(states, start(states), 5_000), 0.8 * best + 0.05)
    for step in (0, 5_000):
        greedy = agent.probabilities(states, start(states), step, greedy=True)
        assert torch.equal(greedy, best)
        torch.testing.assert_close(greedy.sum(1), torch.ones(6))


def test_actions_are_drawn_from_the_probabilities() -> None:
    changes = {"agent__policy": FIXED_POLICY}
    agent, twin, other = (make_agent(**changes, seed=seed) for seed in (1, 1, 2))
    other.load_networks(agent.state_dict()["models"])
    states = random_states(1).expand(4_000, -1, -1, -1)
    actions, probabilities, _ = agent.act(states, start(states), 10)
    assert actions.shape == (4_000,)
    assert actions.dtype == torch.int64
    torch.testing.assert_close(probabilities, agent.probabilities(states, start(states), 10))
    assert probabilities[0].max() - probabilities[0].min() > 0.05
    shares = torch.bincount(actions, minlength=4) / 4_000
    torch.testing.assert_close(shares, probabilities[0], rtol=0, atol=0.03)
    assert torch.equal(twin.act(states, start(states), 10)[0], actions)
    assert not torch.equal(other.act(states, start(states), 10)[0], actions)
    # softmax of a temperature that is next to nothing leaves no choice
    sure = make_agent(agent__policy={"temperature": [[0, 1e-6]], "epsilon": [[0, 0.0]]})
    states = random_states(30)
    best = sure.probabilities(states, start(states), 0, greedy=True).argmax(1)
    assert torch.equal(sure.act(states, start(states), 10)[0], best)


def test_temperature_follows_the_entropy() -> None:
    agent = make_agent(
        agent__warmup_steps=50,
        agent__policy={
            "temperature": None,
            "entropy": [[0, 0.9], [100, 0.9], [200, 0.5]],
            "epsilon": [[0, 0.1]],
        },
    )
    states = random_states(6)
    with torch.no_grad():
        agent.target.linear2.weight.mul_(30)
        q = agent.target(agent.input_norm(states), start(states))
    assert agent.act(states, start(states), 49)[1].tolist() == [[0.25] * 4] * 6
    assert agent.policy.temperature == 1  # as it was: that was the warm-up
    for step, share in ((50, 0.9), (150, 0.7), (200, 0.5)):
        before = agent.policy.temperature
        _, probabilities, _ = agent.act(states, start(states), step)
        expected = 0.9 * torch.softmax(q / before, 1) + 0.1 / 4
        torch.testing.assert_close(probabilities, expected)
        missing = share * math.log(4) + (expected * expected.log()).sum(1).mean().item()
        wanted = before * math.exp(TEMPERATURE_LR * missing)
        assert agent.policy.temperature == pytest.approx(wanted, rel=1e-5)
        assert agent.policy.temperature != before
    for share, step in ((0.9, 100), (0.5, 200)):
        for _ in range(300):
            agent.act(states, start(states), step)
        found = entropy(agent.probabilities(states, start(states), step)).mean().item()
        assert found == pytest.approx(share * math.log(4), abs=0.03)


def test_temperature_of_a_schedule_stays() -> None:
    agent = make_agent(agent__policy=FIXED_POLICY)
    for _ in range(3):
        agent.act(random_states(6), start(random_states(6)), 100)
    assert agent.policy.temperature == 1
    states = random_states(6)
    torch.testing.assert_close(
        agent.probabilities(states, start(states), 1),
        agent.probabilities(states, start(states), 100),
    )


# --- observing ------------------------------------------------------------------------------------


def test_observed_statistics() -> None:
    agent = make_agent(curiosity__eta=2.0, curiosity__inverse_dropout=0.5)
    play(agent, 10)
    agent.update()  # with dropout, which must not go on in what is held out
    played, agent.novelty, novelty = (
        Game(3, 8, episodes=(2, 4)),
        agent.new_novelty(3),
        SlowNovelty(agent),
    )
    seen = {0: 0, 3: 0}
    for _ in range(25):
        step = played.step()
        surprises, new, losses, hits, entropies, gains = [], [], [], [], [], []
        for env in range(3):
            now, after = (
                agent.signal.encode(agent.input_norm(step[name][env : env + 1]))
                for name in ("states", "next_states")
            )
            action = step["actions"][env : env + 1]
            previous = step["previous"][env : env + 1]
            place = agent.novelty_features(step["next_states"][env : env + 1])[0]
            new.append(novelty(env, place, bool(step["reset"][env])))
            surprises.append(2 * surprise(agent, now, action, after, previous))
            logits = guess(agent, now, after, step["probabilities"][env], previous)
            total = sum(math.exp(x) for x in logits)
            losses.append(-math.log(math.exp(logits[int(action)]) / total))
            hits.append(float(logits.index(max(logits)) == int(action)))
            p = step["probabilities"][env].tolist()
            entropies.append(-sum(x * math.log(x) for x in p))
            gains.append(-math.log(p[int(action)]) - losses[-1])
        found, surprised = agent.observe(**step)
        valid = [not r for r in step["reset"].tolist()]
        real = [v and not r for v, r in zip(valid, step["respawned"].tolist(), strict=True)]
        assert surprised.tolist() == pytest.approx(
            [s if is_real else math.nan for s, is_real in zip(surprises, real, strict=True)],
            rel=1e-4,
            nan_ok=True,
        )
        seen[sum(valid)] = seen.get(sum(valid), 0) + 1
        expected = {
            "reward/intrinsic": [
                scaled(agent, interest(agent, s) * n) for s, n in zip(surprises, new, strict=True)
            ],
            "reward/extrinsic": step["rewards"].tolist(),
            "icm/inverse_accuracy": hits,
            "icm/inverse_heldout": losses,
            "icm/inverse_gain": gains,
            "policy/entropy": entropies,
        }
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            kept = [x for x, v in zip(values, valid, strict=True) if v]
            assert found[name].tolist() == pytest.approx(kept, rel=1e-3, abs=1e-5), name
    assert seen[3] > 3
    assert seen[2] > 3  # there were resets among them


def test_dropout_is_for_the_inverse_model_while_it_learns() -> None:
    results = []
    for seed in (0, 0, 1):
        agent = make_agent(curiosity__inverse_dropout=0.5)
        play(agent)
        torch.manual_seed(seed)
        losses = agent.update()
        step = Game(3, 8).step()
        agent.load_networks(make_agent().state_dict()["models"])
        results.append((losses, agent.observe(**step)[0], agent.observe(**step)[0]))
    (first, seen, again), (twin, *_), (other, seen_by_other, _) = results
    assert same(first, twin)
    assert first["loss/inverse"] != other["loss/inverse"]
    for name in ("loss/q", "loss/forward", "q/mean"):
        assert first[name] == other[name]
    for name in ("icm/inverse_heldout", "icm/inverse_accuracy"):
        assert seen[name].tolist() == again[name].tolist() == seen_by_other[name].tolist()


def test_reward_scale_is_fed_with_raw_rewards_of_real_transitions() -> None:
    agent = make_agent(agent__discount=0.9, curiosity__reward_half_life=30)
    for moments in (agent.scale.moments, agent.interest.moments):
        assert moments.decay == pytest.approx(0.5 ** (3 / 30))  # steps of all three environments
    assert agent.discount() == 0.9
    played, sums, novelty = Game(3, 8, episodes=(2, 4)), [0.0] * 3, SlowNovelty(agent)
    surprises, weights = [], []
    for _ in range(20):
        step = played.step()
        errors, places = agent.judge(
            *(
                step[name]
                for name in ("states", "previous", "actions", "next_states", "probabilities")
            )
        )
        agent.observe(**step)
        real = [env for env in range(3) if not step["reset"][env]]
        if real:
            surprises.append([errors.surprise[env].item() for env in real])
            weights = [0.9330329915368074 * w for w in weights] + [1.0]
        of_each = [w / len(s) for w, s in zip(weights, surprises, strict=True) for _ in s]
        flat = [x for s in surprises for x in s]
        mean = np.average(flat, weights=of_each)
        std = np.average((np.array(flat) - mean) ** 2, weights=of_each) ** 0.5
        assert agent.interest.moments.mean == pytest.approx(mean)
        assert agent.interest.moments.std == pytest.approx(std, rel=1e-4)
        for env in range(3):
            new = novelty(env, places[env], bool(step["reset"][env]))
            if env in real:
                sums[env] = 0.9 * sums[env] + interest(agent, errors.surprise[env].item()) * new
        assert agent.scale.sums.tolist() == pytest.approx(sums, rel=1e-4, abs=1e-7)
    assert max(sums) > 0


def test_observing_stores_but_does_not_learn() -> None:
    agent = make_agent()
    before = {name: weights(network) for name, network in agent.networks.items()}
    play(agent, 12)
    assert agent.memory.size == 12
    assert all(same(weights(network), before[name]) for name, network in agent.networks.items())
    assert agent.updates == 0


def test_features_of_a_state_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of what a transition leads to: the next one knows them, so does a new process."""
    agent, other = make_agent(), make_agent()
    encode, rows = agent.signal.encode, []

    def watch(x: Tensor) -> Tensor:
        rows.append(len(x))
        return encode(x)

    monkeypatch.setattr(agent.signal, "encode", watch)
    played = Game(3, 8)
    for _ in range(40):
        step = played.step()
        other.encoded = []
        assert same(agent.observe(**step)[0], other.observe(**step)[0])
    assert rows == [3] * 41  # nothing was known before the first step

    known = agent.encode(step["next_states"])
    for _ in range(20):
        agent.update()
    step = played.step()
    previous, actions, policy = step["previous"], step["actions"], step["probabilities"]
    with torch.no_grad():
        led_to = agent.encode(step["next_states"])
        wanted = agent.signal(known, actions, led_to, policy, previous).inverse
        learned = agent.encode(step["states"])
        as_learned = agent.signal(learned, actions, led_to, policy, previous).inverse
    assert not torch.allclose(wanted, as_learned, rtol=1e-3)
    resumed = make_agent()
    resumed.load_state_dict(through_a_file(agent.state_dict()))
    for one in (agent, resumed):
        found, _ = one.judge(step["states"], previous, actions, step["next_states"], policy)
        torch.testing.assert_close(found.inverse, wanted)

    agent.measure_input()
    rows.clear()
    agent.observe(**played.step())
    assert rows == [3, 3]  # to networks that see all else, states are others


def test_terminated_and_truncated_is_terminated() -> None:
    agent = make_agent(env__num_envs=3)
    step = Game(3, 0).step()
    step["terminated"] = torch.tensor([True, True, False])
    step["truncated"] = torch.tensor([True, False, True])
    agent.observe(**step)
    assert agent.memory.terminated[0].tolist() == [True, True, False]
    assert agent.memory.truncated[0].tolist() == [False, False, True]


def test_ready_and_input_statistics() -> None:
    agent = make_agent()
    played, images = Game(3, 5), []
    for _ in range(6 + 2):
        assert not agent.due(10_016)
        step = played.step()
        images.append(step["states"][:, -1])
        agent.observe(**step)
    assert agent.due(10_016)
    agent.measure_input()
    pixels = torch.cat(images).double()
    torch.testing.assert_close(agent.input_norm.mean.double(), pixels.mean(0), rtol=1e-5, atol=0)
    assert agent.input_norm.std.item() == pytest.approx(
        pixels.std(0, correction=0).mean().item(), rel=1e-4
    )


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loaded_agent_goes_on_to_the_bit(dropout: float) -> None:
    changes = {"agent__target_tau": 0.3, "curiosity__inverse_dropout": dropout}
    first, second = make_agent(**changes), make_agent(**changes, seed=9)
    play(first)
    first.measure_input()
    for _ in range(4):
        first.update()
    play(second, 20, seed=77)
    second.update()
    assert not same(weights(first.qnetwork), weights(second.qnetwork))

    second.load_state_dict(through_a_file(first.state_dict()))
    second.load_memory(through_a_file(first.memory_dict()))
    assert second.updates == 4
    state_of_dropout = torch.get_rng_state()
    histories = []
    for agent in (first, second):
        torch.set_rng_state(state_of_dropout)
        game, history = Game(3, 21), []
        for _ in range(5):
            history.append(agent.update())
            history.extend(weights(network) for network in agent.networks.values())
            step = game.step()
            actions, probabilities, _ = agent.act(step["states"], step["previous"], 15_000)
            step |= {"probabilities": probabilities, "actions": actions}
            history.append(agent.observe(**step)[0] | {"actions": step["actions"]})
        histories.append(history)
    for place, (one, other) in enumerate(zip(*histories, strict=True)):
        assert same(one, other), place
    assert first.scale.std == second.scale.std
    assert first.policy.temperature == second.policy.temperature != 1


def test_loaded_agent_learns_at_its_own_rates() -> None:
    """Settings given to a resumed run count, not those its optimizer was saved with."""
    first = make_agent()
    second = make_agent(agent__lr=3e-5, curiosity__lr=7e-5)
    play(first)
    first.update()
    second.load_state_dict(through_a_file(first.state_dict()))
    play(second)
    second.update()
    assert [group["lr"].item() for group in second.optimizer.param_groups] == pytest.approx(
        [3e-5, 7e-5]
    )


def test_what_is_not_finite_changes_no_weights_and_is_counted() -> None:
    agent = make_agent(agent__target_tau=1.0)
    play(agent)
    agent.update()
    before = copy.deepcopy(agent.state_dict())
    mean, agent.interest.moments.mean = agent.interest.moments.mean, math.nan
    for count in (1, 2):
        assert agent.update()["loss/q"].isnan()
        assert agent.skipped.item() == agent.skipped_running.item() == count
    after = agent.state_dict()
    torch.testing.assert_close(after["optimizers"], before["optimizers"], rtol=0, atol=0)
    learning = [name for name in after["models"] if "target" not in name]  # those are averages
    for name in learning:
        assert same(after["models"][name], before["models"][name])
    agent.interest.moments.mean = mean
    agent.update()
    assert (agent.skipped.item(), agent.skipped_running.item()) == (2, 0)
    for name in ("qnetwork", "phi"):
        assert not same(agent.state_dict()["models"][name], before["models"][name])
    second = make_agent()
    second.load_state_dict(through_a_file(agent.state_dict()))
    assert second.skipped.item() == 2


def test_learning_rate_falls_to_its_final_share() -> None:
    """That of the curiosity does not: it has to follow what the agent finds, to the end."""
    agent = make_agent(
        total_steps=48,
        agent__steps_per_update=12,
        agent__lr=1e-3,
        agent__lr_final=0.2,
        curiosity__lr=2e-3,
    )
    play(agent)
    rates = []
    for _ in range(6):
        agent.update()
        rates.append([group["lr"].item() for group in agent.optimizer.param_groups])
    assert [learner for learner, _ in rates] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4, 2e-4])
    assert [signal for _, signal in rates] == pytest.approx([2e-3] * 6)


def test_every_part_of_the_state_matters() -> None:
    """Loading the networks alone, as playing does, does not continue the training."""
    first, second = make_agent(), make_agent()
    play(first)
    for _ in range(3):
        first.update()
    second.load_networks(through_a_file(first.state_dict())["models"])
    for name, network in first.networks.items():
        assert same(weights(network), weights(second.networks[name])), name
    assert second.updates == 0
    second.memory.load_state_dict(through_a_file(first.memory.state_dict()))
    first.update()
    second.update()
    assert not same(weights(first.qnetwork), weights(second.qnetwork))


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        (
            {"agent__hidden": 17},
            (2, 16),
            r"qnetwork\.linear1\.weight has size \(17, 132\) .* needs \(16, 132\)",
        ),
        (
            {"curiosity__hidden": 24},
            (2, 16),
            r"fnet\.linear1\.weight has size \(24, 40\) .* needs \(16, 40\)",
        ),
        (
            {"env__frame_stack": 3},
            (3, 16),
            r"phi\.conv1\.weight has size \(32, 3, 3, 3\) .* needs \(32, 2, 3, 3\)",
        ),
        (
            {"agent__input_norm": "scale"},
            (2, 16),
            r"input_norm\.mean has size none .* needs \(16, 16\)",
        ),
    ],
    ids=["hidden", "curiosity", "frame_stack", "input_norm"],
)
def test_networks_of_another_size(
    changes: dict[str, Any], shape: tuple[int, int], message: str
) -> None:
    other = make_agent(**changes, seed=5)
    assert other.signal.phi.conv1.in_channels == shape[0]
    check_refused(make_agent(), other.state_dict()["models"], message)


def test_networks_of_another_number_of_actions() -> None:
    models = make_agent(num_actions=7, seed=5).state_dict()["models"]
    check_refused(
        make_agent(), models, r"fnet\.linear1\.weight has size \(16, 46\) .* needs \(16, 40\)"
    )


def test_networks_that_are_missing_or_have_more() -> None:
    models = make_agent(seed=5).state_dict()["models"]
    without = {name: model for name, model in models.items() if name != "target"}
    check_refused(
        make_agent(), without, r"target\.conv1\.weight has size none .* needs \(32, 2, 3, 3\)"
    )
    more = models | {"qnetwork": {**models["qnetwork"], "linear3.bias": torch.zeros(2)}}
    check_refused(make_agent(), more, r"qnetwork\.linear3\.bias has size \(2,\) .* needs none")
    check_refused(make_agent(), {}, r"phi\.conv1\.weight has size none")
    measured = make_agent(agent__input_norm="scale")
    check_refused(measured, models, r"input_norm\.mean has size \(16, 16\) .* needs none")


def check_refused(agent: DQN, models: dict[str, Any], message: str) -> None:
    before = {name: weights(network) for name, network in agent.networks.items()}
    with pytest.raises(UserError, match=message):
        agent.load_networks(models)
    for name, network in agent.networks.items():
        assert same(weights(network), before[name]), name


def test_same_seed_same_agent() -> None:
    one, twin, other = make_agent(), make_agent(), make_agent(seed=43)
    assert same(weights(one.qnetwork), weights(twin.qnetwork))
    assert same(weights(one.signal), weights(twin.signal))
    assert not same(weights(one.qnetwork), weights(other.qnetwork))
    for agent in (one, twin):
        play(agent)
        for _ in range(3):
            agent.update()
    assert same(weights(one.qnetwork), weights(twin.qnetwork))


def test_agent_that_only_plays_has_no_memory() -> None:
    config = configure()
    agent = build_agent(config, (2, SIZE, SIZE), ACTIONS, torch.device("cpu"), remember=False)
    assert agent.memory.size == agent.memory.frames.numel() == 0
    assert not agent.due(10_016)
    states = random_states(2)
    assert agent.probabilities(states, start(states), 0).shape == (2, ACTIONS)


# --- learning -------------------------------------------------------------------------------------


class Chain:
    """Cells in a row, one lit in the image; resets on the step after an episode's end (NEXT_STEP).

    Args:
        num_envs: how many run side by side.
        cells: number of cells; the agent starts in the first.
        moves: what each action adds to the cell's number.
        goal: whether reaching the last cell is rewarded with 1 and terminates the episode.
        limit: steps after which an episode is truncated.
    """

    def __init__(
        self, num_envs: int, cells: int, moves: tuple[int, ...], goal: bool, limit: int
    ) -> None:
        self.num_envs, self.cells, self.goal, self.limit = num_envs, cells, goal, limit
        self.moves = torch.tensor(moves)
        self.at = torch.zeros(num_envs, dtype=torch.int64)
        self.age = torch.zeros(num_envs, dtype=torch.int64)
        self.ended = torch.zeros(num_envs, dtype=torch.bool)
        self.states = self.images().repeat(1, 2, 1, 1)

    def images(self) -> Tensor:
        """Cells are squares of 3x3 pixels, five to a line."""
        images = torch.zeros(self.num_envs, 1, SIZE, SIZE, dtype=torch.uint8)
        for env, cell in enumerate(self.at.tolist()):
            row, column = 3 * (cell // 5), 3 * (cell % 5)
            images[env, 0, row : row + 3, column : column + 3] = 255
        return images

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, terminated and truncated; `states` has what is seen then."""
        reset = self.ended
        self.at = (self.at + self.moves[actions]).clamp(0, self.cells - 1)
        self.at[reset] = 0
        self.age = torch.where(reset, 0, self.age + 1)
        arrived = (self.at == self.cells - 1) & ~reset & self.goal
        truncated = (self.age >= self.limit) & ~arrived
        images = self.images()
        self.states = torch.where(
            reset.view(-1, 1, 1, 1), images, torch.cat((self.states[:, 1:], images), 1)
        )
        self.ended = arrived | truncated
        return arrived.float(), arrived, truncated


def interact(agent: Agent, world: Any, steps: int) -> Iterator[Tensor]:
    """Act, observe and learn as the trainer does; the rewards of every vector step."""
    n = world.num_envs
    previous = torch.full((n,), NO_ACTION)
    reset = torch.zeros(n, dtype=torch.bool)
    for step in range(0, steps, n):
        states = world.states
        actions, probabilities, values = agent.act(states, previous, step)
        for _ in range(agent.due(step)):
            agent.update()
        rewards, terminated, truncated = world.step(actions)
        agent.observe(
            states,
            previous,
            probabilities,
            values,
            actions,
            world.states,
            rewards,
            terminated,
            truncated,
            reset,
            torch.zeros(n, dtype=torch.bool),
            torch.full((n,), -1),
            torch.zeros(n, dtype=torch.int64),
        )
        previous = actions.masked_fill(reset, NO_ACTION)
        reset = world.ended
        if step < agent.config.warmup_steps <= step + n:
            agent.measure_input()
        yield rewards


def live(agent: DQN, world: Chain, steps: int) -> dict[int, int]:
    """How often each cell was entered while the agent lived in the world."""
    visits = dict.fromkeys(range(world.cells), 0)
    for _ in interact(agent, world, steps):
        for cell in world.at.tolist():
            visits[cell] += 1
    return visits


LEARNING = {
    "env__num_envs": 8,
    "agent__hidden": 32,
    "agent__lr": 1e-3,
    "agent__discount": 0.9,
    "agent__batch_size": 8,
    "agent__sequence_length": 8,
    "agent__steps_per_update": 16,
    "agent__replay_capacity": 4_000,
    "agent__target_tau": 0.25,
}


def least_liked(agent: DQN) -> int:
    """The action that an untrained agent values least at the start, so that luck cannot help."""
    states = Chain(1, 2, (0,), goal=False, limit=1).states
    return int(agent.qnetwork(agent.input_norm(states), start(states)).argmin())


def test_reward_of_the_game_is_learned() -> None:
    """75 updates in a corridor of ten cells find the shortest way to the goal."""
    agent = make_agent(
        num_actions=3,
        **LEARNING,
        agent__warmup_steps=800,
        agent__death_is_terminal=True,
        agent__policy={"temperature": [[0, 0.0]], "epsilon": [[0, 0.5]]},
        curiosity="none",
        curiosity__extrinsic_coef=1.0,
    )
    moves = [-1, 0]
    moves.insert(least_liked(agent), 1)

    def greedy_path() -> list[int]:
        world, path = Chain(1, 10, tuple(moves), goal=True, limit=40), []
        previous = start(world.states)
        while not world.ended.any():
            path.append(int(world.at))
            previous = agent.probabilities(world.states, previous, 0, greedy=True).argmax(1)
            world.step(previous)
        return [*path, int(world.at)]

    assert len(greedy_path()) == 41
    live(agent, Chain(8, 10, tuple(moves), goal=True, limit=40), 2_000)
    assert agent.updates == 75
    assert greedy_path() == list(range(10))


def test_after_fifty_steps_that_failed_one_after_the_other_it_has_broken_down() -> None:
    agent = make_agent()
    agent.skipped_running.fill_(49)
    agent.check_updates()
    agent.skipped_running.fill_(50)
    with pytest.raises(BrokenDownError, match="the last 50 steps of the optimizer"):
        agent.check_updates()


def test_curiosity_alone_explores() -> None:
    """A chain of 24 cells without any reward: one action leads on, three lead back to the start.

    By chance one gets through d cells in one of 4^d attempts.
    """
    agent = make_agent(
        num_actions=4,
        **LEARNING,
        agent__warmup_steps=640,
        agent__policy=FIXED_POLICY,
        curiosity__hidden=64,
    )
    assert (agent.curiosity.coef, agent.curiosity.extrinsic_coef) == (1, 0)
    moves = [-24] * 3
    moves.insert(least_liked(agent), 1)
    curious, random = (Chain(8, 24, tuple(moves), goal=False, limit=40) for _ in range(2))
    visits = live(agent, curious, 2_000)
    assert sum(visits.values()) == 2_000
    generator, by_chance = torch.Generator().manual_seed(0), 0
    for _ in range(250):
        random.step(torch.randint(0, 4, (8,), generator=generator))
        by_chance = max(by_chance, int(random.at.max()))
    assert by_chance < 10
    assert max(cell for cell, n in visits.items() if n) > 16
    assert sum(visits[cell] for cell in range(5, 24)) > 100


def test_gradients_that_are_not_finite_change_no_weights_and_are_counted() -> None:
    """Though the loss is: in the backward pass, numbers may overflow that do not in the forward."""
    agent = make_agent(agent__target_tau=1.0)
    play(agent)
    agent.update()
    hook = agent.signal.phi.conv1.weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: weights(network) for name, network in agent.networks.items()}
    losses = agent.update()
    assert all(loss.isfinite() for loss in losses.values())
    assert agent.skipped.item() == agent.skipped_running.item() == 1
    for name in ("phi", "fnet", "inverse", "qnetwork"):
        assert same(weights(agent.networks[name]), before[name]), name
    hook.remove()
    agent.update()
    assert (agent.skipped.item(), agent.skipped_running.item()) == (1, 0)
    assert not same(weights(agent.networks["phi"]), before["phi"])


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_networks_that_are_not_finite_are_refused(wrong: float) -> None:
    models = make_agent(seed=5).state_dict()["models"]
    models["target"]["conv1.weight"][0, 0, 0, 0] = wrong
    check_refused(make_agent(), models, r"^target\.conv1\.weight is not finite; take an older")


def test_more_environments_than_steps_between_updates_have_several_due() -> None:
    agent = make_agent(env__num_envs=3, agent__steps_per_update=2)
    play(agent)
    due = [agent.due(step) for step in range(999, 999 + 8 * 3, 3)]
    assert due == [2, 1, 2, 1, 2, 1, 2, 1] or due == [1, 2, 1, 2, 1, 2, 1, 2]
    fewer = make_agent(env__num_envs=3, agent__steps_per_update=12)
    play(fewer)
    assert sorted(fewer.due(step) for step in range(999, 999 + 8 * 3, 3)) == [0] * 6 + [1] * 2
