"""Environments that practise: after a death they go back in the same episode."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import settings
from gymnasium.wrappers import TimeLimit
from test_lean import EMULATORS, RUNNING
from test_libretro import FROZEN, FROZEN_SEED

from icm.envs import make_env, make_vector_env
from icm.envs.practice import Middle, Practice
from icm.envs.snapshots import EVERY, RECENT, SELDOM, Snapshots
from icm.envs.vector import WorkerVectorEnv
from icm.envs.wrappers import Env

GAME = replace(
    settings("env.id=SuperMarioBros-v0", "env.noisy_tv=always").env, sticky_probability=0.25
)


ACTIONS = np.random.default_rng(0).choice(12, 44, p=RUNNING).tolist()


def replayed(env: Env, seed: int, actions: list[int]) -> tuple[np.ndarray, dict[str, Any]]:
    state, info = env.reset(seed=seed)
    for action in actions:
        state, *_, info = env.step(action)
    return state, info


def outcome(state: np.ndarray, *ends: Any) -> list[Any]:
    """What a step has given, so that it can be compared."""
    *others, info = ends
    return [state.tobytes(), *others, info["cell"].tolist(), info["life_lost"], info.get("episode")]


@cache
def plainly(emulator: str) -> list[list[Any]]:
    """What the actions give in an episode with seed 7 of which nobody takes snapshots."""
    env = make_env(replace(GAME, emulator=emulator))
    env.reset(seed=7)
    outcomes = [outcome(*env.step(action)) for action in ACTIONS]
    env.close()
    return outcomes


def played(emulator: str, number: int) -> tuple[Env, Snapshots]:
    """An environment that has gone through so many steps of that, and its snapshots."""
    env = make_env(replace(GAME, emulator=emulator))
    snapshots = Snapshots(env)
    env.reset(seed=7)
    snapshots.begin(7)
    for action, expected in zip(ACTIONS[:number], plainly(emulator)[:number], strict=True):
        state, *ends, info = env.step(action)
        assert outcome(state, *ends, info) == expected
        snapshots.add(action, state, info)
    return env, snapshots


@pytest.mark.parametrize("emulator", EMULATORS)
def test_going_back_is_playing_again(emulator: str) -> None:
    plain = plainly(emulator)
    env, snapshots = played(emulator, len(ACTIONS))
    for length in (38, 37, 2 * EVERY):  # ever further back
        found = snapshots.go_back(7, ACTIONS[:length])
        assert found is not None
        assert found.done == length // EVERY * EVERY
        assert found.state.tobytes() == plain[found.done - 1][0]
        for number in range(found.done, found.done + 12):
            assert outcome(*env.step(ACTIONS[number])) == plain[number]
    assert snapshots.go_back(7, ACTIONS[:EVERY]) is not None
    assert snapshots.go_back(7, [*ACTIONS[:5], 11 - ACTIONS[5]]) is None  # another way
    assert snapshots.go_back(8, ACTIONS[:EVERY]) is None  # another episode
    assert snapshots.go_back(7, ACTIONS[: EVERY - 1]) is None  # before the first one
    env.close()


def test_a_time_limit_goes_back_too() -> None:
    env, snapshots = played(EMULATORS[-1], 2 * EVERY)
    limit: Any = env
    while not isinstance(limit, TimeLimit):
        limit = limit.env
    frames = limit._elapsed_steps
    assert snapshots.go_back(7, ACTIONS[:EVERY])
    assert limit._elapsed_steps < frames
    for action in ACTIONS[EVERY : 2 * EVERY]:
        env.step(action)
    assert limit._elapsed_steps == frames > 0
    env.close()


@pytest.mark.parametrize("emulator", EMULATORS)
def test_another_environment_goes_on_from_a_snapshot(emulator: str) -> None:
    env, snapshots = played(emulator, 3 * EVERY)
    other = make_env(replace(GAME, emulator=emulator))
    others = Snapshots(other)
    other.reset(seed=8)
    others.begin(8)
    assert snapshots.trail.reach(7, ACTIONS[:EVERY]) == EVERY
    assert snapshots.trail.reach(7, ACTIONS[: EVERY - 1]) == 0
    assert snapshots.trail.reach(8, ACTIONS[:EVERY]) == 0
    assert others.trail.reach(7, ACTIONS[:EVERY]) == 0
    others.take_over(snapshots.trail)
    found = others.go_back(7, ACTIONS[: 3 * EVERY - 1])
    assert found is not None
    assert found.done == 2 * EVERY
    state, *_, info = env.step(0)
    snapshots.add(0, state, info)  # both go on for themselves
    for number in range(found.done, found.done + 24):
        assert outcome(*other.step(ACTIONS[number])) == plainly(emulator)[number]
        if number == found.done + 8:
            env.close()  # nothing of it is used any more
    assert snapshots.trail.reach(7, ACTIONS[: 3 * EVERY]) == 3 * EVERY
    assert snapshots.trail.reach(7, [11 - ACTIONS[0], *ACTIONS[1:EVERY]]) == 0
    other.close()


def test_of_long_ago_few_snapshots_are_kept() -> None:
    env = make_env(replace(GAME, emulator=EMULATORS[-1]))
    snapshots = Snapshots(env)
    state, info = env.reset(seed=0)
    snapshots.begin(0)
    length = 2 * SELDOM + RECENT + EVERY
    for _ in range(length):
        snapshots.add(0, state, info)
    recent = [*range(length - RECENT + EVERY, length + 1, EVERY)]
    assert [each.done for each in snapshots.trail.kept] == [SELDOM, 2 * SELDOM, *recent]
    found = snapshots.go_back(0, [0] * (2 * SELDOM - 1))
    assert found is not None
    assert found.done == SELDOM
    env.close()


def test_after_a_death_an_episode_begins_in_the_one_before() -> None:
    config = replace(GAME, emulator=EMULATORS[-1], num_envs=4, num_workers=2)
    rng = np.random.default_rng(0)
    given = [rng.choice(12, 4, p=RUNNING) for _ in range(100)]

    envs = make_vector_env(config, practice=0.75)
    assert envs._arrays["practises"].tolist() == [False, True, True, True]
    observations, infos = envs.reset(seed=11)  # in which each of the three dies
    returned = 0
    before = envs.state_dict()
    # what has been seen after which actions of which episode: the same whenever it is seen again
    seen: dict[tuple[int, ...], tuple[bytes, bytes]] = {}

    def see(row: int, state: dict[str, Any]) -> None:
        way = (state["seeds"][row], *state["actions"][row])
        here = observations[row].tobytes(), infos["cell"][row].tobytes()
        assert seen.setdefault(way, here) == here

    for row in range(4):
        see(row, before)
    ended = np.zeros(4, bool)
    results = []
    for number, actions in enumerate(given):
        results.append(envs.step(actions))
        observations, rewards, terminated, truncated, infos = results[-1]
        state = envs.state_dict()
        assert envs.way(2) == (state["seeds"][2], state["actions"][2])
        for row in np.flatnonzero(ended).tolist():
            begins, seed = state["actions"][row], state["seeds"][row]
            if row == 3:  # repeats the way of one of the others
                ways = zip(state["seeds"][1:3], state["actions"][1:3], strict=True)
                assert (seed, begins) in [(each, way[: len(begins)]) for each, way in ways]
                assert len(begins) % SELDOM == 0
            elif row == 0 or seed != before["seeds"][row]:
                assert begins == []
                continue
            else:
                if begins and before["resumed"][row] - len(begins) not in (0, EVERY):
                    assert 4 <= len(before["actions"][row]) - len(begins) < 40 + EVERY
                assert begins == before["actions"][row][: len(begins)]
            assert len(begins) % EVERY == 0  # where there is a snapshot
            assert state["resumed"][row] == len(begins)
            assert (seed, *begins) in seen
            assert not infos["life_lost"][row]
            assert rewards[row] == 0
            returned += 1
        for row in range(4):
            see(row, state)
        ended = terminated | truncated
        assert ended[1:][infos["life_lost"][1:]].all()
        assert infos.get("_episode", np.zeros(4, bool)).tolist() == [ended[0], False, False, False]
        before = state
        if number == 74:
            saved = json.loads(json.dumps(state))
    assert returned > 3
    envs.close()

    # and it is what playing all of it again gives
    envs = make_vector_env(replace(config, num_workers=1), practice=0.75)
    envs.restore(saved)
    again = [envs.step(actions) for actions in given[75:]]
    envs.close()
    for one, other in zip(again, results[75:], strict=True):
        for found, expected in zip(one[:4], other[:4], strict=True):
            assert (found == expected).all()


WAY = [int(action, 16) for action in FROZEN]  # leads to the flag of 1-1
THEN = (1, 1, 2)  # actions that are none of it


def test_short_lives_do_not_lead_ever_further_back() -> None:
    practice, rng = Practice(2, 1, idle=100), np.random.default_rng(0)
    played = [[0], [0] * (50 * EVERY + 10)]
    ways = Counter[Middle | None]()
    for _ in range(200):
        practice.began_at[1] = 50 * EVERY  # and died ten steps later
        ways[practice.begin(1, True, True, played, rng)] += 1
    anew = ways.pop(None)  # for there is no other one that practises
    assert 0 < anew < 20
    assert set(ways) == {Middle(1, number * EVERY, knows=True) for number in (49, 50)}
    assert 70 < ways[Middle(1, 49 * EVERY, knows=True)] < 100


TOGETHER, APART = [[0, 1, 2], []], [[0, 1], [2]]
LEVEL = settings(f"env.emulator={EMULATORS[-1]}", "env.stuck_steps=16").env


def three_of_which_two_practise(collector: str = "local") -> WorkerVectorEnv:
    config = replace(LEVEL, num_envs=3, num_workers=2)
    return make_vector_env(config, collector=collector, practice=0.67)


@pytest.fixture(scope="module")
def three() -> Iterator[WorkerVectorEnv]:
    """Such environments for many tests, each of which begins new episodes in them."""
    envs = three_of_which_two_practise()
    yield envs
    envs.close()


def until_one_is_cut(
    parts: list[list[int]],
    played: int = 0,
    cut: int = 1,
    collector: str = "local",
    envs: WorkerVectorEnv | None = None,
) -> tuple[WorkerVectorEnv, int]:
    """Three environments, these in each worker, of which 1 and 2 practise; and a number on WAY.

    `cut` is one of these. It has gone so far on it, and then stood until it was cut; the next
    action of the other one is that of the number. `envs`: which; new ones by default.
    """
    envs = envs or three_of_which_two_practise(collector)
    envs.reset(seed=0)  # forgets the snapshots of tests before
    envs._balance.rows = [part.copy() for part in parts]
    actions = [[], WAY[:100], WAY[:100]]
    actions[cut] = WAY[:played]
    seeds = [0, FROZEN_SEED, FROZEN_SEED]
    running = {"seeds": seeds, "actions": actions, "resumed": [0, 0, 0]}
    envs.restore({"entropy": 0, "begun": [1, 1, 1], **running})
    done, truncated = 100, np.zeros(3, bool)
    while not truncated[cut]:
        *_, truncated, infos = envs.step(given(cut, WAY[done]))
        done += 1
    assert not infos["life_lost"].any()
    assert not truncated[3 - cut]
    assert done < len(WAY)
    return envs, done


def given(cut: int, action: int, other: int = 0) -> np.ndarray:
    """Actions of three environments, of which `cut` stands, or does what another action is."""
    actions = np.zeros(3, int)
    actions[3 - cut], actions[cut] = action, other
    return actions


@cache
def on_the_way(length: int) -> list[tuple[bytes, list[int]]]:
    """State and cell of an environment by itself after so many actions of `WAY`, and of `THEN`."""
    env = make_env(LEVEL)
    state, info = replayed(env, FROZEN_SEED, WAY[:length])
    found = []
    for action in THEN:
        found.append((state.tobytes(), info["cell"].tolist()))
        state, *_, info = env.step(action)
    env.close()
    return found


def trail_of(envs: WorkerVectorEnv, row: int, done: int) -> list[int]:
    """How many actions were done at the snapshots that its worker has for others."""
    trail = envs._workers.trail(envs._balance.home(row), row, done, 20.0)
    assert trail is not None
    return [each.done for each in trail.kept]


@pytest.mark.parametrize("parts", [TOGETHER, APART])
@pytest.mark.parametrize("played", [0, 110])
@pytest.mark.parametrize("cut", [1, 2])
def test_after_a_practised_episode_is_cut_the_next_one_begins_in_the_longest(
    parts: list[list[int]], played: int, cut: int, three: WorkerVectorEnv
) -> None:
    envs, done = until_one_is_cut(parts, played, cut, envs=three)
    assert LEVEL.stuck_steps is not None
    length, whose = max((len(way), row) for row, way in enumerate(envs.state_dict()["actions"]))
    observations, rewards, _, _, infos = envs.step(given(cut, WAY[done]))
    assert infos["origin"].tolist() == [-1, whose if cut == 1 else -1, -1]
    assert rewards[cut] == 0
    state = envs.state_dict()
    begins = state["actions"][cut]
    assert infos["undone"][cut] == (length - len(begins) if cut == 1 else 0)
    # at the start, it begins as others do
    assert np.flatnonzero(infos["returned"]).tolist() == ([cut] if begins else [])
    assert state["seeds"][cut] == FROZEN_SEED
    assert begins == WAY[: len(begins)]
    if cut == 1:  # a little before where that was when it may not have stood yet
        assert len(begins) % EVERY == 0
        assert 4 <= length - LEVEL.stuck_steps - len(begins) < 40 + EVERY
    else:  # it repeats the way: anywhere on it
        assert len(begins) in range(0, done, SELDOM)
    # and is from there on an episode of its own
    for action, expected in zip(THEN, on_the_way(len(begins)), strict=True):
        assert (observations[cut].tobytes(), infos["cell"][cut].tolist()) == expected
        observations, *_, infos = envs.step(given(cut, WAY[done + 1], action))


@pytest.mark.parametrize(
    ("lengths", "others"), [([9, 5, 4, 6, 5, 5], {3}), ([9, 5, 4, 6, 5, 7], {3, 5})]
)
def test_who_is_cut_goes_on_where_another_has_played_for_longer(
    lengths: list[int], others: set[int]
) -> None:
    """Environments 1 to 5 practise, of which 4 and 5 repeat the way, and 1 is cut."""
    practice, rng = Practice(6, 5, idle=0), np.random.default_rng(0)
    played = [[0] * length for length in lengths]
    begun = [practice.begin(1, False, True, played, rng) for _ in range(50)]
    assert {middle.other for middle in begun if middle is not None} == others


def test_it_begins_where_the_try_of_the_other_has_begun_or_later() -> None:
    practice, rng = Practice(3, 2, idle=100), np.random.default_rng(0)
    played = [[], [0] * 30, [0] * (20 * EVERY + 100)]
    for resumed, earliest, latest in ((0, 15, 19), (18, 18, 19), (25, 25, 25)):
        practice.began_at[2] = resumed * EVERY
        begun = {practice.begin(1, False, True, played, rng) for _ in range(100)}
        places = range(earliest, latest + 1)
        assert begun == {Middle(2, place * EVERY, knows=True) for place in places}


def test_who_is_cut_and_farthest_tries_again_there() -> None:
    practice, rng = Practice(4, 3, idle=100), np.random.default_rng(0)
    played = [[], [0] * (20 * EVERY + 100), [0] * 30, [0] * 40]
    begun = []
    for _ in range(200):
        practice.began_at[:] = 0, 19 * EVERY, 0, 0
        begun.append(practice.begin(1, False, True, played, rng))
    there = [middle for middle in begun if middle is not None and middle.other == 1]
    assert 180 < len(there) < 200
    assert {middle.done for middle in there} == {18 * EVERY, 19 * EVERY}
    assert {middle.other for middle in begun if middle} == {1, 2, 3}


def test_who_is_cut_tries_again_or_begins_anew_where_no_other_practises() -> None:
    practice, rng = Practice(2, 1, idle=100), np.random.default_rng(0)
    begun = [practice.begin(1, False, True, [[], [0] * 150], rng) for _ in range(200)]
    assert 0 < begun.count(None) < 20
    assert {middle.other for middle in begun if middle is not None} == {1}


def test_the_way_is_repeated_from_ever_other_places() -> None:
    practice, rng = Practice(3, 2, idle=0), np.random.default_rng(0)
    played = [[], [0] * (3 * SELDOM - 1), [0] * 10]
    begun = [practice.begin(2, True, True, played, rng) for _ in range(50)]
    assert set(begun) == {(1, done, False) for done in (0, SELDOM, 2 * SELDOM)}


@pytest.mark.skipif(EMULATORS[-1] != "libretro", reason="states of nes-py stay in their process")
def test_a_worker_lends_snapshots_to_another(three: WorkerVectorEnv) -> None:
    envs, done = until_one_is_cut(APART, envs=three)
    envs.step(np.array([0, 0, WAY[done]]))
    begins = len(envs.state_dict()["actions"][1])
    assert begins > SELDOM
    assert trail_of(envs, 1, begins) == [SELDOM, begins - EVERY, begins]  # one for the next death
    assert trail_of(envs, 1, EVERY) == []  # it did not play there again
    assert trail_of(envs, 2, EVERY) == [EVERY]
    assert trail_of(envs, 0, EVERY) == []  # does not practise


@pytest.mark.skipif(EMULATORS[-1] != "libretro", reason="states of nes-py stay in their process")
def test_an_episode_may_begin_in_one_that_begins_in_another_in_the_same_step() -> None:
    """1 goes on where 3 is, 2 where 1 is, and 4, in the other worker, repeats the way of 1 or 2."""
    config = replace(LEVEL, num_envs=5, num_workers=2)
    envs = make_vector_env(config, practice=0.8)
    envs._balance.rows = [[0, 1, 2, 3], [4]]
    actions = [[], [], [], WAY[:112], []]
    seeds = [0, 5, 7, FROZEN_SEED, 6]
    running = {"seeds": seeds, "actions": actions, "resumed": [0] * 5}
    envs.restore({"entropy": 0, "begun": [1] * 5, **running})
    done, truncated = 112, np.zeros(5, bool)
    while not truncated.any():
        *_, truncated, _ = envs.step(np.array([0, 0, 0, WAY[done], 0]))
        done += 1
    assert truncated.tolist() == [True, True, True, False, True]

    def chosen(entropy: int) -> bool:
        second, fourth = (
            np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(row, 1)))
            for row in (2, 4)
        )
        fourth.choice([1, 2])
        return bool(second.choice([1, 3]) == 1 and fourth.integers(done // SELDOM) > 0)

    envs._entropy = next(filter(chosen, range(100)))
    observations, *_, infos = envs.step(np.array([0, 0, 0, WAY[done], 0]))
    assert np.flatnonzero(infos["returned"]).tolist() == [1, 2, 4]
    assert infos["origin"].tolist() == [-1, 3, 3, -1, -1]
    _, first, second, _, begins = envs.state_dict()["actions"]
    assert second == first  # where its try begins
    assert len(first) < done
    assert infos["undone"].tolist() == [0, done - len(first), done - len(second), 0, 0]
    assert len(begins) >= SELDOM
    assert envs._lent[4].reach(FROZEN_SEED, begins) == len(begins)
    alone = make_env(LEVEL)
    assert (observations[4] == replayed(alone, FROZEN_SEED, begins)[0]).all()
    alone.close()
    envs.close()


@pytest.fixture(scope="module")
def uninterrupted(three: WorkerVectorEnv) -> tuple[int, list[Any]]:
    """What `until_one_is_cut` says of one worker, and what the next three steps give there."""
    envs, done = until_one_is_cut(TOGETHER, envs=three)
    return done, [envs.step(np.array([0, 1, action])) for action in WAY[done : done + 3]]


@pytest.mark.parametrize("fate", ["is gone", "hangs"])
def test_without_a_snapshot_of_a_worker_that_failed_the_way_is_played_again(
    fate: str,
    three: WorkerVectorEnv,
    uninterrupted: tuple[int, list[Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected_done, expected = uninterrupted
    envs, done = until_one_is_cut(APART, envs=three)
    assert done == expected_done
    failures = envs.failures
    workers: Any = envs._workers
    process = psutil.Process(workers.processes[envs._balance.home(2)].pid)
    if fate == "is gone":
        process.kill()
    else:
        monkeypatch.setattr(envs, "_patience", 3.0)
        process.suspend()
    for action, wanted in zip(WAY[done : done + 3], expected, strict=True):
        found = envs.step(np.array([0, 1, action]))
        for one, other in zip(found[:4], wanted[:4], strict=True):
            assert (one == other).all()
    assert envs.failures == failures + 1
    assert capsys.readouterr().err.count("begins anew") == 1


def test_after_a_flag_an_episode_begins_at_the_start(three: WorkerVectorEnv) -> None:
    *before, last = WAY
    three.reset(seed=0)
    actions = [[], before, []]
    running = {"seeds": [0, FROZEN_SEED, 0], "actions": actions, "resumed": [0, 0, 0]}
    three.restore({"entropy": 0, "begun": [1, 1, 1], **running})
    _, _, terminated, truncated, infos = three.step(np.array([0, last, 0]))
    assert terminated.tolist() == [False, True, False]
    assert not truncated.any()
    assert not infos["life_lost"].any()
    three.step(np.array([0, 0, 0]))
    assert three.state_dict()["actions"] == [[0, 0], [], [0, 0]]


@pytest.mark.parametrize(("rank", "practises"), [(0, [False, False, True]), (1, [True] * 3)])
def test_of_all_ranks_environments_the_last_ones_practise(
    rank: int, practises: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icm.envs.RANK", rank)
    monkeypatch.setattr("icm.envs.WORLD_SIZE", 2)
    config = replace(GAME, emulator=EMULATORS[-1], num_envs=6, num_workers=1)
    envs = make_vector_env(config, practice=0.67)
    try:
        envs.reset(seed=3)
        assert envs._arrays["practises"].tolist() == practises
        keys = [(3 * rank + row, 0) for row in range(3)]
        seeds = [int(np.random.SeedSequence(3, spawn_key=key).generate_state(1)[0]) for key in keys]
        assert envs.state_dict()["seeds"] == seeds
    finally:
        envs.close()


@pytest.mark.parametrize("emulator", EMULATORS)
def test_no_state_of_nes_py_is_lent(emulator: str) -> None:
    env, snapshots = played(emulator, 3 * EVERY)
    lent = snapshots.trail.sendable(2 * EVERY)
    expected = [EVERY, 2 * EVERY] if emulator == "libretro" else []
    assert [each.done for each in lent.kept] == expected
    assert (lent.seed, lent.actions) == (7, ACTIONS[: 2 * EVERY])
    env.close()
