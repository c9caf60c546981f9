"""Environments that practise: after a death they go back in the same episode."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import settings
from test_lean import EMULATORS, RUNNING
from test_libretro import FROZEN, FROZEN_SEED

from icm.envs import make_env, make_vector_env
from icm.envs.snapshots import EVERY, MOST, Snapshots
from icm.envs.wrappers import Env

GAME = replace(
    settings("env.id=SuperMarioBros-v0", "env.noisy_tv=always").env, sticky_probability=0.25
)


def replayed(env: Env, seed: int, actions: list[int]) -> tuple[np.ndarray, dict[str, Any]]:
    state, info = env.reset(seed=seed)
    for action in actions:
        state, *_, info = env.step(action)
    return state, info


def step(env: Env, action: int) -> list[Any]:
    state, reward, terminated, truncated, info = env.step(action)
    cell, lost = info["cell"].tolist(), info["life_lost"]
    return [state.tobytes(), reward, terminated, truncated, cell, lost, info.get("episode")]


@pytest.mark.parametrize("emulator", EMULATORS)
def test_going_back_is_playing_again(emulator: str) -> None:
    config = replace(GAME, emulator=emulator)
    actions = np.random.default_rng(0).choice(12, 120, p=RUNNING).tolist()
    env, plain = make_env(config), make_env(config)
    snapshots = Snapshots(env)
    env.reset(seed=7)
    snapshots.begin(7)
    for action in actions:
        state, *_, info = env.step(action)
        snapshots.add(action, state, info)
    for length in (70, 69, 2 * EVERY):  # ever further back
        found = snapshots.go_back(7, actions[:length])
        assert found is not None
        assert found.done == length // EVERY * EVERY
        state, _ = replayed(plain, 7, actions[: found.done])
        assert (found.state == state).all()
        for action in actions[found.done :][:40]:
            assert step(env, action) == step(plain, action)
    assert snapshots.go_back(7, actions[:EVERY]) is not None
    assert snapshots.go_back(7, [*actions[:5], 11 - actions[5]]) is None  # another way
    assert snapshots.go_back(8, actions[:EVERY]) is None  # another episode
    assert snapshots.go_back(7, actions[: EVERY - 1]) is None  # before the first one
    env.close()
    plain.close()


@pytest.mark.parametrize("emulator", EMULATORS)
def test_another_environment_goes_on_from_a_snapshot(emulator: str) -> None:
    config = replace(GAME, emulator=emulator)
    actions = np.random.default_rng(0).choice(12, 60, p=RUNNING).tolist()
    env, other, plain = make_env(config), make_env(config), make_env(config)
    snapshots, others = Snapshots(env), Snapshots(other)
    env.reset(seed=7)
    snapshots.begin(7)
    for action in actions:
        state, *_, info = env.step(action)
        snapshots.add(action, state, info)
    other.reset(seed=8)
    others.begin(8)
    assert snapshots.reach(7, actions[:EVERY]) == EVERY
    assert snapshots.reach(7, actions[: EVERY - 1]) == 0
    assert snapshots.reach(8, actions[:EVERY]) == 0
    assert others.reach(7, actions[:EVERY]) == 0
    others.take_over(snapshots)
    found = others.go_back(7, actions[: 3 * EVERY - 1])
    assert found is not None
    assert found.done == 2 * EVERY
    replayed(plain, 7, actions[: found.done])
    state, *_, info = env.step(0)
    snapshots.add(0, state, info)  # both go on for themselves
    for number, action in enumerate(actions[found.done :]):
        assert step(other, action) == step(plain, action)
        if number == 10:
            env.close()  # nothing of it is used any more
    assert snapshots.reach(7, actions[: 3 * EVERY]) == 3 * EVERY
    assert snapshots.reach(7, [11 - actions[0], *actions[1:EVERY]]) == 0
    other.close()
    plain.close()


def test_snapshots_are_not_kept_for_ever() -> None:
    env = make_env(replace(GAME, emulator=EMULATORS[-1]))
    snapshots = Snapshots(env)
    state, info = env.reset(seed=0)
    snapshots.begin(0)
    for _ in range((MOST + 2) * EVERY):
        snapshots.add(0, state, info)
    assert len(snapshots._kept) == MOST
    assert snapshots.go_back(0, [0] * 2 * EVERY) is None
    env.close()


def test_after_a_death_an_episode_begins_in_the_one_before() -> None:
    config = replace(GAME, emulator=EMULATORS[-1], num_envs=4, num_workers=2)
    alone = make_env(config)
    rng = np.random.default_rng(0)
    given = [rng.choice(12, 4, p=RUNNING) for _ in range(200)]

    envs = make_vector_env(config, practice=0.75)
    assert envs._arrays["practises"].tolist() == [False, True, True, True]
    envs.reset(seed=3)
    returned = 0
    before = envs.state_dict()
    ended = np.zeros(4, bool)
    results = []
    for number, actions in enumerate(given):
        results.append(envs.step(actions))
        observations, rewards, terminated, truncated, infos = results[-1]
        state = envs.state_dict()
        for row in np.flatnonzero(ended).tolist():
            begins = state["actions"][row]
            if row == 0 or state["seeds"][row] != before["seeds"][row]:
                assert begins == []
                continue
            assert len(begins) % EVERY == 0  # where there is a snapshot
            assert not begins or 4 <= len(before["actions"][row]) - len(begins) < 40 + EVERY
            assert begins == before["actions"][row][: len(begins)]
            expected, info = replayed(alone, state["seeds"][row], begins)
            assert (observations[row] == expected).all()
            assert (infos["cell"][row] == info["cell"]).all()
            assert not infos["life_lost"][row]
            assert rewards[row] == 0
            returned += 1
        ended = terminated | truncated
        assert ended[1:][infos["life_lost"][1:]].all()
        assert infos.get("_episode", np.zeros(4, bool)).tolist() == [ended[0], False, False, False]
        before = state
        if number == 149:
            saved = json.loads(json.dumps(state))
    assert returned > 5
    envs.close()
    alone.close()

    envs = make_vector_env(replace(config, num_workers=1), practice=0.75)
    envs.restore(saved)
    again = [envs.step(actions) for actions in given[150:]]
    envs.close()
    for one, other in zip(again, results[150:], strict=True):
        for found, expected in zip(one[:4], other[:4], strict=True):
            assert (found == expected).all()


@pytest.mark.parametrize("workers", [1, 3])  # where the snapshots of the other are, and are not
@pytest.mark.parametrize("played", [0, 140])  # less than the other, and more
def test_after_a_practised_episode_is_cut_another_goes_on(workers: int, played: int) -> None:
    level = settings(f"env.emulator={EMULATORS[-1]}", "env.stuck_steps=40").env
    way = [int(action, 16) for action in FROZEN]
    alone = make_env(level)
    envs = make_vector_env(replace(level, num_envs=3, num_workers=workers), practice=0.67)
    running = {"seeds": [0, FROZEN_SEED, FROZEN_SEED], "actions": [[], way[:played], way[:100]]}
    envs.restore({"entropy": 0, "begun": [1, 1, 1], **running})
    done, truncated = 100, np.zeros(3, bool)
    while not truncated[1]:
        *_, truncated, infos = envs.step(np.array([0, 0, way[done]]))
        done += 1
    assert not infos["life_lost"].any()
    assert not truncated[2]
    assert done < len(way)
    observations, rewards, _, _, infos = envs.step(np.array([0, 0, way[done]]))
    assert infos["origin"].tolist() == [-1, 2, -1]
    assert rewards[1] == 0
    state = envs.state_dict()
    begins = state["actions"][1]
    assert state["seeds"][1] == FROZEN_SEED
    assert begins == way[: len(begins)]
    assert len(begins) % EVERY == 0
    assert 4 <= done - len(begins) < 40 + EVERY
    for action in (1, 1, 2):  # and is from there on an episode of its own
        expected, info = replayed(alone, FROZEN_SEED, begins)
        assert (observations[1] == expected).all()
        assert (infos["cell"][1] == info["cell"]).all()
        begins = [*begins, action]
        observations, *_, infos = envs.step(np.array([0, action, way[done + 1]]))
    envs.close()
    alone.close()


def test_a_practised_episode_that_is_cut_begins_anew_where_no_other_is_practised() -> None:
    level = settings(f"env.emulator={EMULATORS[-1]}", "env.stuck_steps=20").env
    envs = make_vector_env(replace(level, num_envs=2, num_workers=1), practice=0.5)
    envs.reset(seed=0)
    truncated = np.zeros(2, bool)
    while not truncated.any():
        *_, truncated, _ = envs.step(np.zeros(2, int))
    assert truncated.tolist() == [True, True]
    *_, infos = envs.step(np.zeros(2, int))
    assert "origin" not in infos
    assert envs.state_dict()["actions"] == [[], []]
    envs.close()


def test_after_a_flag_an_episode_begins_at_the_start() -> None:
    level = replace(settings(f"env.emulator={EMULATORS[-1]}").env, num_envs=2, num_workers=1)
    *before, last = (int(action, 16) for action in FROZEN)  # they lead to the flag of 1-1
    envs = make_vector_env(level, practice=0.5)
    running = {"seeds": [0, FROZEN_SEED], "actions": [[], before]}
    envs.restore({"entropy": 0, "begun": [1, 1], **running})
    _, _, terminated, truncated, infos = envs.step(np.array([0, last]))
    assert terminated.tolist() == [False, True]
    assert not truncated.any()
    assert not infos["life_lost"].any()
    envs.step(np.array([0, 0]))
    assert envs.state_dict()["actions"] == [[0, 0], []]
    envs.close()
