"""Environments in worker processes, on the real game."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
from conftest import ROOT, settings
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from icm.config import EnvConfig
from icm.envs import episodes_in, make_env, make_vector_env
from icm.envs.stepper import Stepper, fields_of
from icm.envs.vector import CALM, NOWHERE, WorkerVectorEnv
from icm.envs.wrappers import Env
from icm.errors import UserError
from icm.processes import SIGNALS
from icm.ranks import CORES

# three environments whose episodes end in the third step at the latest
ENV = replace(settings("env.emulator=libretro").env, num_envs=3, num_workers=2, stuck_steps=3)
ONE_WORKER = replace(ENV, num_workers=1)


@contextmanager
def vector_env(config: EnvConfig = ENV, scenery: bool = False) -> Generator[WorkerVectorEnv]:
    envs = make_vector_env(config, scenery=scenery)
    try:
        yield envs
    finally:
        envs.close()


def workers_of(envs: WorkerVectorEnv) -> list[psutil.Process]:
    return [psutil.Process(process.pid) for process in envs._workers.processes]


@pytest.fixture(scope="module")
def envs() -> Iterator[WorkerVectorEnv]:
    """Environments for all tests that leave them as they were; each begins with a reset."""
    with vector_env() as shared:
        yield shared


class SeededEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Environment `number` by itself, with the seeds that its episodes are promised."""

    def __init__(self, number: int) -> None:
        super().__init__(make_env(ENV))
        self.number, self.episode = number, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        seeds = np.random.SeedSequence(5, spawn_key=(self.number, self.episode))
        self.episode += 1
        return self.env.reset(seed=int(seeds.generate_state(1)[0]), options=options)


def play(envs: Any) -> list[Any]:
    """All that 12 steps give that Gymnasium's environments give, too, and in this way."""
    results = [envs.reset(seed=5)]
    rng = np.random.default_rng(0)
    results += [envs.step(rng.integers(0, 12, 3)) for _ in range(12)]
    envs.close()
    for *_, infos in results:
        for own in (infos, infos.get("episode", {})):
            for key in ("scenery", "seed", "actions", *NOWHERE):
                own.pop(key, None)
            # here no row is without them
            for key in ("scenery", "seed", "actions", "life_lost", "respawned"):
                own.pop(f"_{key}", None)
    return results


def assert_equal(results: Any, expected: Any) -> None:
    """Of arrays in containers: the same content, types and keys."""
    assert type(results) is type(expected)
    if isinstance(expected, dict):
        assert results.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(results[key], value)
    elif isinstance(expected, list | tuple):
        for result, value in zip(results, expected, strict=True):
            assert_equal(result, value)
    elif isinstance(expected, int):
        assert results == expected
    else:
        assert results.dtype == expected.dtype
        assert (results == expected).all()


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    """What Gymnasium's own vector environment gives, in this process."""
    makers = [partial(SeededEpisodes, number) for number in range(3)]
    return play(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP))


@pytest.mark.parametrize(
    ("num_workers", "busy_cores", "processes"),
    [(1, 9, 1), (9, 9, 3), (None, 0, min(CORES, 3))],  # at most as many as environments
)
def test_steps_are_those_of_gymnasium_whatever_the_number_of_workers(
    num_workers: int | None, busy_cores: int, processes: int, expected: list[Any]
) -> None:
    assert sum("episode" in infos for *_, infos in expected) > 2
    envs = make_vector_env(replace(ENV, num_workers=num_workers), busy_cores)
    assert len(workers_of(envs)) == processes
    assert_equal(play(envs), expected)


def test_environments_move_to_where_there_is_time_and_give_the_same(
    expected: list[Any],
) -> None:
    envs = make_vector_env(ENV, busy_cores=9)
    assert envs._balance.rows == [[2, 1], [0]]
    envs._balance.wanted = np.array([0.0, 3.0])
    assert_equal(play(envs), expected)
    assert envs._balance.rows[0] == []
    assert sorted(envs._balance.rows[1]) == [0, 1, 2]


def test_an_environment_that_has_moved_away_serves_for_the_next_that_comes() -> None:
    made = 0

    def make() -> Env:
        nonlocal made
        made += 1
        return make_env(ENV)

    fields = fields_of(make_env(ENV), 3)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in fields.items()}
    stepper = Stepper(make, arrays)
    screens = []
    for rows in ({0}, {0, 1}, {1}, {1, 2}):
        arrays["opening"][:] = arrays["seeds"][:] = 1
        stepper.step((rows, {}, {}))
        arrays["opening"][:] = False
        arrays["actions"][:] = 3
        for _ in range(3):
            stepper.step((rows, {}, {}))
        screens += [arrays["observations"][row].copy() for row in rows]
    assert made == 2
    assert all((screen == screens[0]).all() for screen in screens)


def test_environments_that_rest_are_left_alone_and_the_others_are_as_they_would_be(
    envs: WorkerVectorEnv, expected: list[Any]
) -> None:
    rng = np.random.default_rng(0)  # the same actions as there
    assert_equal(envs.reset(seed=5)[0], expected[0][0])
    rested, stood = list[int](), np.empty(0)
    actions, played = list[int](), 0
    for wanted in expected[1:]:
        found = envs.step(rng.integers(0, 12, 3))
        ended = wanted[2] | wanted[3]
        awake = [row for row in range(3) if row not in rested]
        for results, all_of_them in zip(found[:4], wanted[:4], strict=True):
            assert_equal(results[awake], all_of_them[awake])
        if rested:
            assert (found[0][0] == stood).all()
            assert not found[2][0]
            assert not found[3][0]
            assert not found[4].get("_episode", np.zeros(1))[0]
        elif ended[0]:
            envs.rest([0])
            rested, stood = [0], found[0][0].copy()
            actions = episodes_in(found[4])[0]["actions"]
            played = len(actions)
    assert rested
    assert len(actions) == played  # which replay the episode
    assert (envs.reset(seed=5)[0] == expected[0][0]).all()
    first = np.random.default_rng(0).integers(0, 12, 3)
    assert (envs.step(first)[0] == expected[1][0]).all()


def test_episodes_tell_how_to_play_them_again(envs: WorkerVectorEnv) -> None:
    rng, episodes, given = np.random.default_rng(0), [], list[np.ndarray]()
    envs.reset(seed=5)
    for _ in range(12):
        given.append(rng.integers(0, 12, 3))
        ended = episodes_in(envs.step(given[-1])[-1])
        episodes += [ended[0]] if 0 in ended else []
    assert len(episodes) > 1
    done = 0  # steps, of which the first of an episode after the first has no action
    for number, episode in enumerate(episodes):
        seeds = np.random.SeedSequence(5, spawn_key=(0, number))
        assert episode["seed"] == seeds.generate_state(1)[0]
        done += number > 0
        assert episode["actions"] == [int(a[0]) for a in given[done : done + episode["length"]]]
        done += episode["length"]


def test_another_one_goes_on_where_one_was() -> None:
    config = replace(ENV, sticky_probability=0.25)
    moments = (0, 2, 3, 4, 9)  # of an episode its start, middle, end and what follows
    given = np.random.default_rng(0).integers(0, 12, (moments[-1] + 8, 3))
    with vector_env(config) as envs:
        envs.reset(seed=5)
        states, steps = [envs.state_dict()], []
        for actions in given:
            steps.append(envs.step(actions))
            states.append(envs.state_dict())
    assert states[0]["begun"] != states[8]["begun"]
    with vector_env(replace(config, num_workers=1)) as envs:
        for done in reversed(moments):
            state = states[done]
            observations, ended, infos = envs.restore(json.loads(json.dumps(state)))
            assert envs.state_dict() == state
            if done:
                last = steps[done - 1]
                assert (observations == last[0]).all()
                assert (ended == last[2] | last[3]).all()
                assert (infos["cell"] == last[4]["cell"]).all()
            for step in range(done, done + 8):
                assert_equal(envs.step(given[step])[:4], steps[step][:4])
            assert envs.state_dict() == states[done + 8]


def test_scenery_is_passed_on_once_if_it_is_wanted(envs: WorkerVectorEnv) -> None:
    envs.reset(seed=5)
    assert envs.step(np.array([3, 3, 3]))[-1]["scenery"] == []
    found = []
    for parts in ([[2, 0], [1]], [[1], [0, 2]]):
        with vector_env(scenery=True) as watched:
            watched._balance.rows = parts
            watched._balance.wanted = np.array([len(part) for part in parts], float)
            watched.reset(seed=5)
            found.append([watched.step(np.array([3, 5, 0]))[-1]["scenery"] for _ in range(5)])
            state = watched.state_dict()
    steps, others = found
    # in the same order whoever steps them: what is shown first stays
    for one, other in zip(steps, others, strict=True):
        for (*place, strip), (*same_place, same_strip) in zip(one, other, strict=True):
            assert place == same_place
            assert (strip == same_strip).all()
    with vector_env(ONE_WORKER, scenery=True) as again:  # of the way that is played again, too
        (first,) = (each for each in steps if each)
        assert len(again.restore(state)[-1]["scenery"]) == len(first)
    seen = [scenery for scenery in steps if scenery]
    assert len(seen) == 1  # what the first screen shows, and there is nothing new so soon
    assert [(place[:2], block, strip.shape) for place, block, strip in seen[0]] == [
        ((1, 1), (0, 0), (208, 256, 3))
    ] * 3


def test_an_unseeded_reset_goes_on_with_the_seeds(envs: WorkerVectorEnv) -> None:
    def seeds_after_reset(seed: int | None) -> list[int]:
        envs.reset(seed=seed)
        return envs._arrays["seeds"].tolist()

    first = [seeds_after_reset(seed) for seed in (1, None, None)]
    assert len(set(itertools.chain(*first))) == 9
    assert [seeds_after_reset(seed) for seed in (1, None, None)] == first


def test_results_are_copies(envs: WorkerVectorEnv) -> None:
    first, infos = envs.reset(seed=0)
    kept = first.copy(), infos["cell"].copy()
    step = envs.step(np.array([3, 3, 3]))
    kept_step = [array.copy() for array in step[:4]]
    for _ in range(4):
        envs.step(np.array([4, 3, 3]))
    assert (first == kept[0]).all()
    assert (infos["cell"] == kept[1]).all()
    assert all((a == b).all() for a, b in zip(step[:4], kept_step, strict=True))


def test_episodes_that_make_a_worker_fail_are_cut_but_not_again_and_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with vector_env() as envs:
        envs.reset(seed=0)
        *_, terminated, truncated, infos = envs.step(np.array([99, 0, 0]))  # no such action
        assert not terminated.any()
        assert truncated.tolist() == [True, False, False]
        assert "episode" not in infos
        assert envs.failures == 2  # it was tried again
        assert capsys.readouterr().err.splitlines() == [
            "worker 1 of the environments failed, and begins anew: KeyError: 99",
            "worker 1 of the environments failed again, its episodes are cut: KeyError: 99",
        ]
        observations, *_, truncated, _ = envs.step(np.array([99, 0, 0]))  # opens: no action counts
        assert not truncated.any()
        assert envs._played[0] == []
        frames = observations[0]
        assert (frames == frames[0]).all()  # an episode has begun
        assert frames.any()
        envs._cut_at -= CALM  # as if that had been long ago
        assert envs.step(np.array([99, 0, 0]))[3][0]
        assert envs.failures == 4
        envs.step(np.zeros(3, int))
        workers = workers_of(envs)
        with pytest.raises(RuntimeError, match=r"(?s)worker 1 .*Traceback.*KeyError: 99"):
            envs.step(np.array([99, 0, 0]))
        assert envs.closed
        assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_in_place_of_a_worker_that_dies_or_hangs_another_goes_on(
    expected: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    envs = make_vector_env(ENV, busy_cores=9)  # the second worker steps late
    # in steps in which all episodes begin, 4, 8 and 12, and in others
    fates = {2: "late", 4: "before", 6: "before", 8: "early", 10: "early", 11: "hangs", 12: "late"}
    patience, stepped = envs._patience, 0
    victims = list[psutil.Process]()

    class Failing:
        """Kills a worker, or lets it hang."""

        def __getattr__(self, name: str) -> Any:
            return getattr(envs, name)

        def step(self, actions: np.ndarray) -> Any:
            nonlocal stepped
            stepped += 1
            if stepped not in fates:
                return envs.step(actions)
            fate = fates[stepped]
            victims.append(workers_of(envs)[fate == "late"])
            if fate == "before":
                victims[-1].kill()
            else:
                victims[-1].suspend()
            envs.step_async(actions)
            if fate != "hangs":
                victims[-1].kill()
            envs._patience = 3.0 if fate == "hangs" else patience
            return envs.step_wait()

    assert_equal(play(Failing()), expected)
    assert not any(victim.is_running() for victim in victims)
    assert envs.failures == len(fates)
    assert capsys.readouterr().err.splitlines() == [
        f"worker {int(fate == 'late')} of the environments failed, and begins anew: "
        + ("it did not answer for 3 seconds" if fate == "hangs" else "it ended with exit code -9")
        for fate in fates.values()
    ]


def test_closing_ends_the_workers_in_the_middle_of_a_step_and_twice() -> None:
    with vector_env() as envs:
        workers = workers_of(envs)
        envs.reset(seed=0)
        envs.step_async(np.zeros(3, int))
        envs.close()
        assert not any(worker.is_running() for worker in workers)
        envs.close()


def test_forgetting_ends_the_workers() -> None:
    envs = make_vector_env(ONE_WORKER)
    workers = workers_of(envs)
    del envs
    assert not any(worker.is_running() for worker in workers)


PARENT = """
import sys
from icm.config import EnvConfig
from icm.envs import make_vector_env

if __name__ == "__main__":
    envs = make_vector_env(EnvConfig(**eval(sys.argv[1])))
    envs.reset(seed=0)
    print(*(process.pid for process in envs._workers.processes), flush=True)
    if sys.argv[2] == "stay":
        input()
"""


def start(
    tmp_path: Path, how: str, config: EnvConfig
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A process with environments in workers, which it never closes itself."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = subprocess.Popen(
        [sys.executable, script, repr(vars(config)), how],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    assert len(pids) == config.num_workers
    return process, [psutil.Process(int(pid)) for pid in pids]


def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    process, workers = start(tmp_path, "stay", ENV)
    if sys.platform == "linux":  # the memory is that of a file which is gone already
        maps = Path(f"/proc/{workers[0].pid}/maps").read_text().splitlines()
        shared = [line for line in maps if "/pym-" in line]
        assert shared
        assert all(line.endswith("(deleted)") for line in shared)
    children = psutil.Process(process.pid).children(recursive=True)
    assert set(workers) <= set(children)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_a_program_that_does_not_close_them_ends_all_the_same(tmp_path: Path) -> None:
    process, workers = start(tmp_path, "end", ONE_WORKER)
    assert process.wait(timeout=60) == 0
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has other signals")
def test_workers_are_deaf_to_signals_for_everybody_and_this_process_is_not() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with vector_env(ONE_WORKER) as envs:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        (worker,) = workers_of(envs)
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
        if sys.platform == "linux":  # from the first moment: inherited
            status = Path(f"/proc/{worker.pid}/status").read_text()
            blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
            assert all(blocked >> (number - 1) & 1 for number in SIGNALS)
        envs.reset(seed=0)
        assert worker.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_do_not_load_torch(envs: WorkerVectorEnv) -> None:
    for worker in workers_of(envs):
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        assert "numpy" in maps
        assert "libtorch" not in maps


def test_a_mistake_is_found_before_there_are_workers() -> None:
    before = psutil.Process().children()
    with pytest.raises(UserError, match="SuperMarioBros-9-9-v0"):
        make_vector_env(replace(ENV, id="SuperMarioBros-9-9-v0"))
    assert psutil.Process().children() == before
    with pytest.raises(UserError, match=r"env\.num_workers=0"):
        settings("env.num_workers=0")


def test_who_plays_again_is_given_the_time_for_it(
    envs: WorkerVectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs.reset(seed=5)
    assert envs._patience == 20  # as docs/reliability.md has it
    given, listen = dict[int, float](), envs._workers.listen

    def watch(worker: int, patience: float) -> Any:
        given[worker] = patience
        return listen(worker, patience)

    monkeypatch.setattr(envs._workers, "listen", watch)
    actions = [[3, 3], [3], []]
    envs.restore(envs.state_dict() | {"actions": actions})
    for worker, rows in enumerate(envs._balance.rows):
        assert given[worker] == pytest.approx(400 + sum(len(actions[row]) for row in rows) / 10)


def test_workers_step_while_the_caller_computes_and_late_ones_after_it() -> None:
    envs = make_vector_env(ENV, busy_cores=CORES)  # the second worker is late
    try:
        envs.reset(seed=5)
        envs.step_async(np.zeros(3, int))
        early, late = envs._workers.pipes
        assert early.poll(20)
        assert not late.poll(1)
        envs.step_wait()
    finally:
        envs.close()
