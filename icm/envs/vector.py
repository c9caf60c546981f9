"""Environments in worker processes, several in each, that step at the same time."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from math import prod
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from icm.envs.balance import Balance
from icm.envs.wrappers import Env
from icm.processes import CLOSING_TIME, Assistants

type Memory = dict[str, tuple[Any, tuple[int, ...], Any]]
"""Shared arrays by name: their bytes, shape and type."""


class WorkerVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Environments in worker processes, some of them in each.

    States, actions, rewards, ends and cells lie in memory shared with the workers; what else goes
    to and fro in a step is one short message per worker, with the statistics of ended episodes and
    pictures of places that are new.

    A caller that computes between `step_async` and `step_wait` needs a core for that. Workers for
    which none is left are `late`: they step in `step_wait`, where the caller's core is free, and
    have as few environments as lets all workers end at the same time (`icm.envs.balance`). An
    episode depends on its environment's number, on how many it had before, on the seed and the
    actions, not on the process that it runs in.

    An ended episode is reset by the following step, whose action is ignored (NEXT_STEP). Of an
    environment's infos, `cell`, `life_lost` and `episode` are passed on, as Gymnasium would, and
    `scenery` as a list of all there is. `episode` has `seed` and `actions`, a list, as well, which
    play it again.

    Workers are `icm.processes.Assistants`. The memory has no name under which it could be left
    behind. In place of one that fails, or does not answer for long, a new one plays the running
    episodes again, up to where they were: nothing is lost but time. `failures` counts them.

    Args:
        make: builds one environment; must be picklable. It is called here once, too.
        num_envs: how many, at least 1.
        num_workers: processes, from 1 to `num_envs`.
        late: how many of them step in `step_wait`, fewer than `num_workers`.
        patience: seconds for a step; starting, a reset, which may build environments, and playing
            again may take twenty times as long.
        first: number of the first environment, if these are a part of more.

    Raises:
        RuntimeError: a worker failed at its start, or twice in a step, with its traceback. All
            methods raise it, and close first.
    """

    def __init__(
        self,
        make: Callable[[], Env],
        num_envs: int,
        num_workers: int,
        late: int = 0,
        patience: float = 20.0,
        first: int = 0,
    ) -> None:
        env = make()  # a mistake is reported from here, not from a worker
        env.close()
        self.num_envs = num_envs
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}

        context = multiprocessing.get_context("spawn")
        memory: Memory = {}
        for name, shape, dtype in (
            ("observations", env.observation_space.shape, env.observation_space.dtype),
            ("actions", (), np.int64),
            ("seeds", (), np.int64),  # of the running episodes
            ("rewards", (), np.float64),
            ("opening", (), np.bool),  # whether the next step begins an episode
            ("terminated", (), np.bool),
            ("truncated", (), np.bool),
            ("cells", (5,), np.int32),
            ("life_lost", (), np.bool_),
            ("has_cell", (), np.bool),
        ):
            whole = (num_envs, *(shape or ()))
            size = prod(whole) * np.dtype(dtype).itemsize
            memory[name] = context.RawArray("b", size), whole, dtype
        self._arrays = arrays_in(memory)
        self._balance = Balance(num_envs, num_workers, late)
        self._entropy = np.random.SeedSequence().entropy
        self._begun = np.zeros(num_envs, np.int64)  # episodes since the seed was given
        self._played: list[list[int]] = [[] for _ in range(num_envs)]  # actions of running episodes
        self._resting: set[int] = set()

        self._options: dict[str, Any] | None = None
        self._patience, self._first = patience, first
        self.failures = 0
        self._workers = Assistants(num_workers, _work, make, memory)
        for worker in range(num_workers):
            self._sure(worker, self._listen(worker, 20 * patience))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new episodes.

        Episode k of environment i gets a seed made of `seed`, i and k, where k counts from the
        reset that names a seed.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._entropy = seed
            self._begun[:] = 0
        self._resting.clear()
        self._open(np.ones(self.num_envs, np.bool))
        self._start(options)
        observations, _, _, _, infos = self._finish(20 * self._patience)
        return observations, infos

    def rest(self, rows: Collection[int]) -> None:
        """Step these environments no more until the next `reset`: their episodes have ended."""
        self._resting |= set(rows)
        for name in ("terminated", "truncated"):  # or they would be reset
            self._arrays[name][list(rows)] = False

    def state_dict(self) -> dict[str, Any]:
        """What `restore` needs, in plain containers; not while a step is under way."""
        return {
            "entropy": self._entropy,
            "begun": self._begun.tolist(),
            "seeds": self._arrays["seeds"].tolist(),
            "actions": [actions.copy() for actions in self._played],
        }

    def restore(self, state: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Play running episodes again, up to where `state_dict` was taken.

        No emulator saves its state in a way that all of them could; but all do the same again.

        Returns:
            observations and infos as of the last step then, and whether an episode ended with it,
            bool (num_envs,).
        """
        self._entropy = state["entropy"]
        self._begun[:] = state["begun"]
        self._arrays["seeds"][:] = state["seeds"]
        self._arrays["opening"][:] = True
        self._played = [list(actions) for actions in state["actions"]]
        self._send(range(self._balance.num_workers), None, dict(enumerate(self._played)))
        self._receive(20 * self._patience)
        ended = self._arrays["terminated"] | self._arrays["truncated"]
        return self._arrays["observations"].copy(), ended, self._infos()

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments with their actions, int (num_envs,); see `step_wait`."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        """Let the workers step, but the late ones, while this process does something else."""
        self._arrays["actions"][:] = actions
        self._open(self._arrays["terminated"] | self._arrays["truncated"])
        for row in np.flatnonzero(~self._arrays["opening"]).tolist():
            self._played[row].append(int(actions[row]))
        self._start(None)

    def step_wait(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for the workers.

        Returns:
            copies of the observations (num_envs, ...), rewards float64 (num_envs,), terminated and
            truncated bool (num_envs,), and the infos.
        """
        return self._finish(self._patience)

    def _finish(
        self, patience: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """See `step_wait`."""
        lead = time.perf_counter() - self._started
        self._send(self._balance.late, self._options)
        episodes, scenery, seconds = self._receive(patience)
        self._balance.measured(lead, seconds)
        infos = self._infos()
        for row, episode in episodes:
            episode |= {"seed": int(self._arrays["seeds"][row]), "actions": self._played[row]}
            infos = self._add_info(infos, {"episode": episode}, row)
        infos["scenery"] = scenery
        names = ("observations", "rewards", "terminated", "truncated")
        observations, rewards, terminated, truncated = (self._arrays[n].copy() for n in names)
        return observations, rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers, after the step that is under way."""
        self._workers.end()

    def _open(self, opening: np.ndarray) -> None:
        """Let the next step begin an episode where `opening`, bool (num_envs,), says so."""
        for row in np.flatnonzero(opening).tolist():
            key = self._first + row, self._begun[row]
            seeds = np.random.SeedSequence(self._entropy, spawn_key=key)
            self._arrays["seeds"][row] = seeds.generate_state(1)[0]
            self._played[row] = []
        self._begun += opening
        self._arrays["opening"][:] = opening
        self._balance.move(opening)

    def _start(self, options: dict[str, Any] | None) -> None:
        """Begin a step."""
        self._options = options
        self._started = time.perf_counter()
        self._send(self._balance.early, options)

    def _send(
        self,
        workers: range,
        options: dict[str, Any] | None,
        played: dict[int, list[int]] | None = None,
    ) -> None:
        """Let workers step: options of episodes that open, and actions to play in them at once."""
        for worker in workers:
            rows = set(self._balance.rows[worker]) - self._resting
            with suppress(ConnectionError):  # of a dead worker: `_receive` says why
                self._workers.pipes[worker].send((rows, options, played or {}))

    def _infos(self) -> dict[str, Any]:
        """What is known of all environments in every step."""
        if not self._arrays["has_cell"].any():
            return {}
        present = self._arrays["has_cell"].copy()
        return {
            "cell": self._arrays["cells"].copy(),
            "_cell": present,
            "life_lost": self._arrays["life_lost"].copy(),
            "_life_lost": present.copy(),
        }

    def _receive(
        self, patience: float
    ) -> tuple[list[tuple[int, dict[str, Any]]], list[Any], list[float]]:
        """Ended episodes (number of the environment, statistics), scenery; seconds by worker."""
        episodes, scenery, seconds = [], [], []
        for worker in range(self._balance.num_workers):
            answer = self._listen(worker, patience)
            if isinstance(answer, str):
                answer = self._begin_anew(worker, answer)
            episodes += answer[0]
            scenery += answer[1]
            seconds.append(answer[2])
        return episodes, scenery, seconds

    def _listen(self, worker: int, patience: float) -> Any:
        """What a worker answers; a str if it failed."""
        pipe, process = self._workers.pipes[worker], self._workers.processes[worker]
        try:
            # twice, because of processes that were paused together the time is over when they go on
            if pipe.poll(patience / 2) or pipe.poll(patience / 2):
                return pipe.recv()
        except (EOFError, ConnectionError):
            process.join(CLOSING_TIME)
            return f"it ended with exit code {process.exitcode}"
        return f"it did not answer for {patience:g} seconds"

    def _begin_anew(self, worker: int, reason: str) -> Any:
        """The answer to the running step of a new worker in the place of one that failed."""
        self.failures += 1
        last = reason.strip().splitlines()[-1]
        line = f"worker {worker} of the environments failed, and begins anew: {last}"
        with suppress(OSError):  # that nobody reads it any more is no reason to end
            print(line, file=sys.stderr)
        self._workers.restart(worker)
        self._sure(worker, self._listen(worker, 20 * self._patience))
        rows = self._balance.rows[worker]
        self._arrays["opening"][rows] = True
        played = {row: self._played[row] for row in rows}
        self._send(range(worker, worker + 1), self._options, played)
        return self._sure(worker, self._listen(worker, 20 * self._patience))

    def _sure(self, worker: int, answer: Any) -> Any:
        """An answer that is none of failure."""
        if isinstance(answer, str):
            self.close()
            raise RuntimeError(f"worker {worker} of the environments failed:\n{answer}")
        return answer


def arrays_in(memory: Memory) -> dict[str, np.ndarray]:
    """Views of shared memory."""
    return {
        name: np.frombuffer(content, dtype).reshape(shape)
        for name, (content, shape, dtype) in memory.items()
    }


def _work(pipe: Connection, make: Callable[[], Env], memory: Memory) -> None:
    """What a worker does: step the environments it is told to, which are rows of the arrays."""
    arrays = arrays_in(memory)
    envs: dict[int, Env] = {}
    episodes: list[tuple[int, dict[str, Any]]] = []
    scenery: list[Any] = []
    start = time.perf_counter()
    while True:
        pipe.send((episodes, scenery, time.perf_counter() - start))
        rows, options, played = pipe.recv()  # which to step: some may be new, others gone
        start = time.perf_counter()
        for row in envs.keys() - rows:
            envs.pop(row).close()
        for row in rows - envs.keys():
            envs[row] = make()
        episodes, scenery = [], []
        for row, env in envs.items():
            reward: Any = 0.0
            terminated = truncated = False
            if arrays["opening"][row]:
                state, info = env.reset(seed=int(arrays["seeds"][row]), options=options)
                actions = played.get(row, [])
            else:
                actions = [int(arrays["actions"][row])]
            for action in actions:
                state, reward, terminated, truncated, info = env.step(action)
            arrays["observations"][row] = state
            arrays["rewards"][row] = reward
            arrays["terminated"][row] = terminated
            arrays["truncated"][row] = truncated
            arrays["has_cell"][row] = "cell" in info
            if "cell" in info:
                arrays["cells"][row] = info["cell"]
                arrays["life_lost"][row] = info["life_lost"]
            if "scenery" in info:
                scenery.append(info["scenery"])
            if "episode" in info:
                episodes.append((row, info["episode"]))
