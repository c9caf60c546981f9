"""What the training loop and rollouts tell the agent, on the real game."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FULL, ROOT, SMALL, composed, metrics_of, settings
from torch import Tensor

from icm import checkpoint
from icm.agents.dqn import DQN
from icm.config import Config
from icm.envs import episodes_in, make_env, make_vector_env
from icm.envs.vector import WorkerVectorEnv
from icm.errors import WriteError
from icm.evaluation import rollouts, summary, table
from icm.factory import build_agent
from icm.files import latest
from icm.models import NO_ACTION
from icm.tracking import Tracker
from icm.trainer import Trainer

CONFIG = settings(*SMALL, *FULL, "total_steps=80", "env.stuck_steps=6")


def make_agent(config: Config = CONFIG) -> DQN:
    return build_agent(config, (4, 42, 42), 12, torch.device("cpu"))


def run(agent: DQN, config: Config, folder: Path) -> Trainer:
    """A training of the agent in environments of its own, to its end."""
    envs = make_vector_env(config.env)
    try:
        trainer = Trainer(agent, envs, folder, config)
        trainer.run()
    finally:
        envs.close()
    return trainer


def test_trainer_tells_the_action_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, seen = make_agent(), []
    observe = agent.observe

    def watch(**step: Tensor) -> Any:
        seen.append((int(step["previous"]), int(step["actions"]), bool(step["reset"])))
        return observe(**step)

    monkeypatch.setattr(agent, "observe", watch)
    run(agent, CONFIG, tmp_path)
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
    way = run(agent, CONFIG, tmp_path).exploration.way
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
        assert (step, greedy) == (80, True)
        seen.append(int(previous))
        sure = torch.zeros_like(probabilities(states, previous, step, greedy))
        sure[:, len(seen) % 12] = 1.0  # the next call is to be told this one
        return sure

    monkeypatch.setattr(agent, "probabilities", watch)
    first, second = rollouts(agent, CONFIG, 80, 2, True, 0)
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
    config = settings(*SMALL, *FULL, "env.num_envs=3", "env.stuck_steps=6")
    assert len([*rollouts(None, config, 0, 5, False, 0)]) == 5
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
    assert "± " not in table([summary(episodes[:1], "sampled")])  # of one, it is unknown
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


def test_trainer_tells_what_became_of_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    config, steps = settings(*SMALL, *FULL, "total_steps=6"), 0
    agent = make_agent(config)
    observe, step_wait = agent.observe, WorkerVectorEnv.step_wait

    def watch(**step: Tensor) -> Any:
        names = ("terminated", "respawned", "reset", "origin", "undone")
        seen.append(tuple(step[name].item() for name in names))
        return observe(**step)

    def told(envs: WorkerVectorEnv) -> Any:
        nonlocal steps
        steps += 1
        *found, infos = step_wait(envs)
        infos["life_lost"][:] = steps in (2, 4)
        infos["respawned"][:] = steps == 2
        found[2][:] = steps == 4  # with the second one the episode is over
        if steps == 5:
            infos["origin"][:], infos["undone"][:] = 0, 3
        return *found, infos

    monkeypatch.setattr(agent, "observe", watch)
    monkeypatch.setattr(WorkerVectorEnv, "step_wait", told)
    run(agent, config, tmp_path)
    nothing = (False, False, False, -1, 0)
    assert seen == [
        nothing,
        (True, True, False, -1, 0),
        nothing,
        (True, False, False, -1, 0),
        (False, False, True, 0, 3),
        nothing,
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk")
def test_a_log_that_cannot_be_written_ends_the_run_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Tracker.write

    def full(tracker: Tracker, step: int, metrics: dict[str, float]) -> None:
        if step == 64:
            tracker.file.close()
            tracker.file = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115
        write(tracker, step, metrics)

    monkeypatch.setattr(Tracker, "write", full)
    with pytest.raises(WriteError, match=r"cannot write to .*: No space left on device"):
        run(make_agent(), CONFIG, tmp_path)
    content = checkpoint.load(latest(tmp_path))
    assert content["step"] == 64
    assert content["interval"]["counts"]["policy/entropy"] > 0  # the next line has it
    assert [line["step"] for line in metrics_of(tmp_path)] == [32]


def test_the_log_has_the_means_of_its_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, steps = settings(*SMALL, *FULL, "total_steps=64", "env.stuck_steps=6"), 0
    ended: dict[int, list[dict[str, Any]]] = {32: [], 64: []}
    step_wait = WorkerVectorEnv.step_wait

    def watch(envs: WorkerVectorEnv) -> Any:
        nonlocal steps
        steps += 1
        *found, infos = step_wait(envs)
        ended[32 if steps <= 32 else 64] += episodes_in(infos).values()
        return *found, infos

    monkeypatch.setattr(WorkerVectorEnv, "step_wait", watch)
    agent = make_agent(config)
    run(agent, config, tmp_path)
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [32, 64]
    for line in lines:
        episodes = ended[int(line["step"])]
        for name in ("distance", "length", "reward", "flag", "levels_passed"):
            wanted = np.mean([float(each[name]) for each in episodes])
            assert line[f"episode/{name}"] == pytest.approx(wanted), name
        assert line["learner/skipped"] == line["workers/failures"] == 0
        assert line["speed/frames_per_s"] == pytest.approx(6 * line["speed/agent_steps_per_s"])
    of_warm_up = agent.memory.frames[:32].flatten(0, 1).float()
    torch.testing.assert_close(agent.input_norm.mean, of_warm_up.mean(0))


def test_evaluate_plays_sampled_greedy_and_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def played(
        agent: Any, config: Any, step: int, episodes: int, greedy: bool, seed: int
    ) -> list[dict[str, float]]:
        asked.append((agent is not None, step, episodes, greedy, seed))
        return [{"length": 3, "reward": 1.0}]

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or it would change the number of threads here
    monkeypatch.setattr("icm.evaluation.rollouts", played)
    given = (f"ckpt={ROOT / 'checkpoints' / '1-1.pt'}", "episodes=4", "seed=9", "device=cpu")
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"](composed("evaluate", *given))
    assert [(agent, greedy) for agent, _, _, greedy, _ in asked] == [
        (True, False),
        (True, True),
        (False, False),
    ]
    assert {each[1:3] + each[4:] for each in asked} == {(240_000, 4, 9)}
