"""What the training loop and rollouts tell the agent, on the real game."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, settings
from torch import Tensor

from icm.agents.dqn import DQN
from icm.envs import episodes_in, make_env, make_vector_env
from icm.envs.vector import WorkerVectorEnv
from icm.evaluation import rollouts, summary
from icm.factory import build_agent
from icm.models import NO_ACTION
from icm.trainer import Trainer

CONFIG = settings(*SMALL, "total_steps=80", "env.stuck_steps=6")


def make_agent() -> DQN:
    return build_agent(CONFIG, (4, 42, 42), 12, torch.device("cpu"))


def test_trainer_tells_the_action_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, seen = make_agent(), []
    observe = agent.observe

    def watch(**step: Tensor) -> Any:
        seen.append((int(step["previous"]), int(step["actions"]), bool(step["reset"])))
        return observe(**step)

    monkeypatch.setattr(agent, "observe", watch)
    envs = make_vector_env(CONFIG.env)
    try:
        Trainer(agent, envs, tmp_path, CONFIG).run()
    finally:
        envs.close()
    assert len(seen) == 80
    assert sum(reset for *_, reset in seen) > 2
    assert len({action for _, action, _ in seen}) > 6
    expected = [NO_ACTION, *(NO_ACTION if reset else action for _, action, reset in seen[:-1])]
    assert [previous for previous, *_ in seen] == expected
    # the memory, which rebuilds it, says the same of all states but those a first stack reaches to
    found = agent.memory.sample(1, 76, torch.Generator())
    assert found.previous[0].tolist() == expected[3:]


def test_trainer_keeps_the_way_to_a_new_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, seen = make_agent(), []
    observe, step_wait = agent.observe, WorkerVectorEnv.step_wait

    def watch(**step: Tensor) -> Any:
        seen.append(step["next_states"][0].numpy())
        return observe(**step)

    def elsewhere(envs: WorkerVectorEnv) -> Any:
        *found, infos = step_wait(envs)
        if len(seen) >= 9:
            infos["cell"][0, 1] = 2  # as if the tenth step led to 1-2
        return *found, infos

    monkeypatch.setattr(agent, "observe", watch)
    monkeypatch.setattr(WorkerVectorEnv, "step_wait", elsewhere)
    envs = make_vector_env(CONFIG.env)
    try:
        trainer = Trainer(agent, envs, tmp_path, CONFIG)
        trainer.run()
    finally:
        envs.close()
    way = trainer.exploration.way
    assert way is not None
    assert (way.step, way.score) == (10, 2.0)
    env = make_env(CONFIG.env)
    env.reset(seed=way.seed)
    states = [env.step(action)[0] for action in way.actions]
    env.close()
    assert np.array_equal(states[-1], seen[9])


def test_rollouts_tell_the_action_before(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, seen = make_agent(), []
    probabilities = agent.probabilities

    def watch(states: Tensor, previous: Tensor, step: int, greedy: bool) -> Tensor:
        seen.append(int(previous))
        sure = torch.zeros_like(probabilities(states, previous, step, greedy))
        sure[:, len(seen) % 12] = 1.0  # the next call is to be told this one
        return sure

    monkeypatch.setattr(agent, "probabilities", watch)
    first, second = rollouts(agent, CONFIG, 80, 2, False, 0)
    assert len(seen) == first["length"] + 1 + second["length"]
    expected = [call % 12 for call in range(len(seen))]
    expected[0] = expected[first["length"] + 1] = NO_ACTION
    assert seen == expected


def test_every_environment_plays_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, step = [], WorkerVectorEnv.step

    def watch(envs: WorkerVectorEnv, actions: np.ndarray) -> Any:
        *found, infos = step(envs, actions)
        ended.extend(episodes_in(infos))
        return *found, infos

    monkeypatch.setattr(WorkerVectorEnv, "step", watch)
    config = settings(*SMALL, "env.num_envs=3", "env.stuck_steps=6")
    assert len(rollouts(None, config, 0, 5, False, 0)) == 5
    assert sorted(ended) == [0, 0, 1, 1, 2]


def test_statistics_of_episodes() -> None:
    flags = {"levels": "1-1 1-2", "flag": True}, {"levels": "1-1", "flag": False}
    episodes = [
        {"distance": distance, "length": length, "reward": -length, **flag}
        for distance, length, flag in (
            (3400, 40, flags[0]),
            (948, 10, flags[1]),
            (300, 10, flags[1]),
        )
    ]
    found = summary(episodes, "sampled")
    assert found.pop("distance_mean") == pytest.approx(1549.333, abs=1e-3)
    assert found.pop("distance_stderr") == pytest.approx(944.052, abs=1e-3)
    assert found == {
        "policy": "sampled",
        "episodes": 3,
        "length_mean": 20.0,
        "length_stderr": pytest.approx(10.0),
        "reward_mean": -20.0,
        "reward_stderr": pytest.approx(10.0),
        "past_200": 1.0,
        "past_400": pytest.approx(2 / 3),
        "past_600": pytest.approx(2 / 3),
        "past_948": pytest.approx(1 / 3),
        "flag_rate": pytest.approx(1 / 3),
        "levels": ["1-1", "1-2"],
    }


def test_an_episode_that_was_cut_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = 0, WorkerVectorEnv.step

    def failing(envs: WorkerVectorEnv, actions: np.ndarray) -> Any:
        nonlocal steps
        steps += 1
        return step(envs, np.full_like(actions, 99) if steps == 5 else actions)  # no such action

    monkeypatch.setattr(WorkerVectorEnv, "step", failing)
    first, second = rollouts(None, CONFIG, 0, 2, False, 0)
    assert steps == 5 + 1 + first["length"] + 1 + second["length"]
