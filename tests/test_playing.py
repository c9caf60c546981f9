"""A checkpoint at play."""

import math
from typing import Any

import pytest
import torch
from conftest import ROOT

from icm.config import GameConfig
from icm.models import NO_ACTION
from icm.playing import Player, load_agent

# that of the training, on the faster emulator
GAME = GameConfig(None, None, None, emulator="libretro", core=None)


def test_where_an_episode_begins_is_nothing_new() -> None:
    path = ROOT / "checkpoints" / "1-1.pt"
    agent, config, step = load_agent(path, torch.device("cpu"), GAME)
    with Player(agent, config, step, greedy=True, seed=3, is_watched=False) as player:
        for number in range(2):
            player.begin(number)
            standing = [player.move(0) for _ in range(3)]
            assert {moment.where for moment in standing} == {"1-1, 32 pixels"}
            assert 0 < max(moment.reward for moment in standing) < 0.001
            assert max(player.move(3).reward for _ in range(8)) > 0.01


def test_a_greedy_agent_is_not_told_to_its_inverse_model() -> None:
    """Which knows the policy from training, not which action is certain."""
    path = ROOT / "checkpoints" / "1-1.pt"
    agent, config, step = load_agent(path, torch.device("cpu"), GAME)
    with Player(agent, config, step, greedy=True, seed=3, is_watched=False) as player:
        player.begin(0)
        moments = [player.move() for _ in range(20)]
    assert all(moment.probabilities[moment.action] == 1 for moment in moments)
    guesses = [moment.guess[moment.action] for moment in moments if moment.guess is not None]
    assert len(guesses) == 20
    assert min(guesses) < 0.9


@pytest.mark.parametrize(
    ("name", "env_id", "step"),
    [("1-1", "SuperMarioBros-1-1-v0", 240_000), ("whole_game", "SuperMarioBros-v0", 750_016)],
)
def test_the_agents_to_watch_play(name: str, env_id: str, step: int) -> None:
    path = ROOT / "checkpoints" / f"{name}.pt"
    agent, config, found = load_agent(path, torch.device("cpu"), GAME)
    assert (config.env.id, found) == (env_id, step)
    with Player(agent, config, found, greedy=False, seed=13, is_watched=False) as player:
        player.begin(0)
        assert all(math.isfinite(player.move().reward) for _ in range(3))


def test_a_new_life_is_no_reward_and_has_seen_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, config, step = load_agent(ROOT / "checkpoints" / "1-1.pt", torch.device("cpu"), GAME)
    with Player(agent, config, step, greedy=True, seed=3, is_watched=False) as player:
        player.begin(0)
        env_step = player.env.step

        def dying(action: int) -> Any:
            *found, info = env_step(action)
            return *found, info | {"respawned": True}

        assert all(player.move(3).reward > 0 for _ in range(3))
        assert player.novelty.count.tolist() == [4]
        monkeypatch.setattr(player.env, "step", dying)
        assert player.move(3).reward == 0
        assert player.novelty.count.tolist() == [1]


def test_a_player_tells_the_action_before(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, config, step = load_agent(ROOT / "checkpoints" / "1-1.pt", torch.device("cpu"), GAME)
    told, probabilities, judge = [], agent.probabilities, agent.judge

    def watch(states: Any, previous: Any, *rest: Any) -> Any:
        told.append(int(previous))
        return probabilities(states, previous, *rest)

    def watch_judge(states: Any, previous: Any, *rest: Any) -> Any:
        told.append(int(previous))
        return judge(states, previous, *rest)

    monkeypatch.setattr(agent, "probabilities", watch)
    monkeypatch.setattr(agent, "judge", watch_judge)
    with Player(agent, config, step, greedy=False, seed=3, is_watched=False) as player:
        for number in range(2):
            player.begin(number)
            taken = [NO_ACTION, *(player.move(action).action for action in (3, None, 5))]
            assert told == [action for action in taken[:3] for _ in range(2)]
            told.clear()
