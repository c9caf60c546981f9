"""What the training loop and rollouts tell the agent, on the real game."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, settings
from torch import Tensor

from icm.agents.dqn import DQN
from icm.envs import make_vector_env
from icm.envs.vector import WorkerVectorEnv
from icm.evaluation import rollouts
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


def test_an_episode_that_was_cut_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = 0, WorkerVectorEnv.step

    def failing(envs: WorkerVectorEnv, actions: np.ndarray) -> Any:
        nonlocal steps
        steps += 1
        return step(envs, np.full_like(actions, 99) if steps == 5 else actions)  # no such action

    monkeypatch.setattr(WorkerVectorEnv, "step", failing)
    first, second = rollouts(None, CONFIG, 0, 2, False, 0)
    assert steps == 5 + 1 + first["length"] + 1 + second["length"]
