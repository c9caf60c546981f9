"""Environments in workers, several in each, that step at the same time."""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from icm.envs.balance import Balance
from icm.envs.practice import Practice
from icm.envs.snapshots import Trail
from icm.envs.stepper import NOTHING, Answer, Fields, Order, fields_of
from icm.envs.wrappers import Env
from icm.processes import say

NOWHERE: dict[str, np.generic] = {
    "returned": np.False_,
    "origin": np.int64(-1),
    "undone": np.int64(0),
}
"""What infos say of an environment whose episode has not begun in the middle of another."""

REPLAY_SPEED = 50.0  # agent steps per second that an emulator plays again at least
CALM = 1000  # vector steps at least from one in which episodes are cut to the next


class Workers(Protocol):
    """Where environments live, and how they are spoken to.

    arrays: of all environments, see `icm.envs.stepper.fields_of`. A worker reads what it is given
        there and writes its results, until its answer is heard at the latest.
    number: how many there are, numbered from 0.
    late: how many of them, the last ones, compete with the caller for a core.
    """

    arrays: dict[str, np.ndarray]
    number: int
    late: int

    def send(self, worker: int, order: Order, /) -> None:
        """Let a worker step, which is not stepping; no error if it is gone."""

    def listen(self, worker: int, patience: float) -> Answer | str:
        """The answer to what was sent last, or to having been started; a str if it failed.

        That is its traceback or a line that says why, also if `patience` seconds were not enough.
        """

    def trail(self, worker: int, row: int, done: int, patience: float) -> Trail | None:
        """What of an environment's snapshots leads to where `done` actions were done.

        Of a worker that is not stepping. None: it is not to be had, and the way is played again.
        """

    def restart(self, worker: int, /) -> None:
        """End a worker, and begin to start a new one in its place."""

    @property
    def end(self) -> Callable[[], None]:
        """Ends all workers, whatever they do; again: nothing."""


class WorkerVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Environments in workers, some of them in each.

    It does not know where the workers live (`Workers`): in processes of this machine
    (`icm.envs.local`) or on a Ray cluster (`icm.envs.on_ray`).

    A caller that computes between `step_async` and `step_wait` needs a core for that. Workers for
    which none is left are `late`: they step in `step_wait`, where the caller's core is free, and
    have as few environments as lets all workers end at the same time (`icm.envs.balance`). An
    episode depends on its environment's number, on how many it had before, on the seed and the
    actions, not on the worker that it runs in.

    An ended episode is reset by the following step, whose action is ignored (NEXT_STEP). Of an
    environment's infos, `cell`, `life_lost` and `episode` are passed on, as Gymnasium would, and
    `scenery` as a list of all there is. `episode` has `seed` and `actions`, a list, as well, which
    play it again. `returned`, `origin` and `undone`, if one has begun in the middle of another: see
    below.

    In environments that practise (`icm.envs.practice`), a life is an episode, which ends truncated,
    and the next one may begin in the middle of it or of another, with the same seed: it is that
    episode again, up to there.

    `returned`, bool (num_envs,), tells who has begun in the middle; `origin`, int64 (num_envs,),
    the number of the environment whose episode has been gone on with, knowing what it had seen up
    to there, -1 if none has; `undone`, int64 (num_envs,), how many of its actions came after that.
    `episode` is of those alone that do not practise: the others tell nothing of how far an agent
    comes from the start.

    In place of a worker that fails, or does not answer for long, a new one plays the running
    episodes again, up to where they were: nothing is lost but time. If it fails, too, they are what
    makes it fail: they end truncated, without an `episode` info. `failures` counts both.

    Args:
        make: builds one environment, which says what all are like.
        num_envs: how many, at least 1.
        start: starts workers, given the arrays that they need; from 1 to `num_envs` of them.
        patience: seconds for a step; starting and a reset, which may build environments, may take
            twenty times as long, and playing again what it needs at `REPLAY_SPEED`.
        first: number of the first environment, if these are a part of more.
        practice: where episodes begin; None: at a start of their own.

    Raises:
        RuntimeError: a worker failed at its start, or episodes would have to be cut again soon
            after others were, with its traceback. All methods raise it, and close first.
    """

    def __init__(
        self,
        make: Callable[[], Env],
        num_envs: int,
        start: Callable[[Fields], Workers],
        patience: float = 20.0,
        first: int = 0,
        practice: Practice | None = None,
    ) -> None:
        env = make()  # a mistake is reported from here, not from a worker
        env.close()
        self.num_envs = num_envs
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}

        self._entropy = np.random.SeedSequence().entropy
        self._begun = np.zeros(num_envs, np.int64)  # episodes since the seed was given
        self._played: list[list[int]] = [[] for _ in range(num_envs)]  # actions of running episodes
        self._resting: set[int] = set()
        self._returning: dict[int, list[int]] = {}  # actions that opening episodes begin with
        # numbers of those whose actions these are
        self._origin = np.full(num_envs, NOWHERE["origin"])
        self._undone = np.zeros(num_envs, np.int64)  # how many of their latest ones are not
        self._lent: dict[int, Trail] = {}  # snapshots of these, where others' workers have them

        self._patience, self._first = patience, first
        self.failures = 0
        self._steps, self._cut_at = 0, -CALM  # vector steps so far; the last one that cut episodes
        self._workers = start(fields_of(env, num_envs))
        self._again = [0] * self._workers.number  # actions that each was sent to play again
        self._arrays = self._workers.arrays
        self._practice = practice or Practice(num_envs, practising=0, idle=0)
        self._arrays["practises"][:] = self._practice.practises
        self._balance = Balance(num_envs, self._workers.number, self._workers.late)
        for worker in range(self._workers.number):
            self._sure(worker, self._workers.listen(worker, 20 * patience))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new episodes.

        Episode k of environment i gets a seed made of `seed`, i and k, where k counts from the
        reset that names a seed.

        Raises:
            ValueError: options are given, which no environment here has.
        """
        if options is not None:
            raise ValueError(f"options={options}: the environments have none")
        super().reset(seed=seed)
        if seed is not None:
            self._entropy = seed
            self._begun[:] = 0
        self._resting.clear()
        nobody = np.zeros(self.num_envs, np.bool)
        self._open(~nobody, nobody, nobody)
        self._start()
        observations, _, _, _, infos = self._finish(20 * self._patience)
        return observations, infos

    def rest(self, rows: Collection[int]) -> None:
        """Step these environments no more until the next `reset`: their episodes have ended."""
        self._resting |= set(rows)
        for name in ("terminated", "truncated"):  # or they would be reset
            self._arrays[name][list(rows)] = False

    def way(self, row: int) -> tuple[int, list[int]]:
        """Of an environment's running episode: the seed, and the actions from its start to here."""
        return int(self._arrays["seeds"][row]), self._played[row].copy()

    def state_dict(self) -> dict[str, Any]:
        """What `restore` needs, in plain containers; not while a step is under way."""
        return {
            "entropy": self._entropy,
            "begun": self._begun.tolist(),
            "seeds": self._arrays["seeds"].tolist(),
            "actions": [actions.copy() for actions in self._played],
            "resumed": self._practice.began_at.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Play running episodes again, up to where `state_dict` was taken.

        No emulator saves its state in a way that all of them could; but all do the same again.

        Returns:
            observations and infos as of the last step then, with the scenery of all of them, and
            whether an episode ended with it, bool (num_envs,).
        """
        self._entropy = state["entropy"]
        self._begun[:] = state["begun"]
        self._arrays["seeds"][:] = state["seeds"]
        self._arrays["opening"][:] = True
        self._played = [list(actions) for actions in state["actions"]]
        self._practice.began_at[:] = state["resumed"]
        self._send(range(self._workers.number), dict(enumerate(self._played)))
        _, scenery, _ = self._receive(20 * self._patience)
        ended = self._arrays["terminated"] | self._arrays["truncated"]
        infos = infos_of(self._arrays) | {"scenery": scenery}
        return self._arrays["observations"].copy(), ended, infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments with their actions, int (num_envs,); see `step_wait`."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        """Let the workers step, but the late ones, while this process does something else."""
        self._steps += 1
        arrays = self._arrays
        arrays["actions"][:] = actions
        # without cells nobody knows what an end is
        died = np.where(arrays["has_cell"], arrays["life_lost"], arrays["terminated"])
        ended = arrays["terminated"] | arrays["truncated"]
        self._open(ended, died, arrays["truncated"])
        for row in np.flatnonzero(~arrays["opening"]).tolist():
            self._played[row].append(int(actions[row]))
        self._start()

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
        self._send(self._balance.late, self._returning)
        episodes, scenery, seconds = self._receive(patience)
        self._balance.measured(lead, seconds)
        self._arrays["rewards"][list(self._returning)] = 0.0  # of what was played again
        infos = infos_of(self._arrays)
        for row, episode in episodes:
            episode |= {"seed": int(self._arrays["seeds"][row]), "actions": self._played[row]}
            infos = self._add_info(infos, {"episode": episode}, row)
        infos["scenery"] = scenery
        if self._returning:
            middle = [row for row, actions in self._returning.items() if actions]
            infos["returned"] = np.isin(np.arange(self.num_envs), middle)
            infos["origin"] = self._origin.copy()
            infos["undone"] = self._undone.copy()
        names = ("observations", "rewards", "terminated", "truncated")
        observations, rewards, terminated, truncated = (self._arrays[n].copy() for n in names)
        return observations, rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers, after the step that is under way."""
        self._workers.end()

    def _open(self, opening: np.ndarray, died: np.ndarray, cut: np.ndarray) -> None:
        """Let the next step begin an episode where `opening`, bool (num_envs,), says so.

        `died` and `cut`, bool (num_envs,): how the one before ended.
        """
        self._returning, self._lent = {}, {}
        self._origin[:] = NOWHERE["origin"]
        self._undone[:] = 0
        sources: dict[int, int] = {}  # of those that have begun here: whose way it is
        for row in np.flatnonzero(opening).tolist():
            key = self._first + row, self._begun[row]
            seeds = np.random.SeedSequence(self._entropy, spawn_key=key)
            rng = np.random.default_rng(seeds)
            middle = self._practice.begin(row, died[row], cut[row], self._played, rng)
            if middle is None:
                self._arrays["seeds"][row] = seeds.generate_state(1)[0]
                self._played[row], sources[row] = [], row
                continue
            other, done, knows = middle
            source = sources.get(other, other)
            self._arrays["seeds"][row] = self._arrays["seeds"][other]
            if knows:
                self._origin[row] = self._origin[other] if other in sources else self._first + other
                self._undone[row] = len(self._played[other]) - done + self._undone[other]
            self._played[row] = self._returning[row] = self._played[other][:done]
            sources[row] = source
            home = self._balance.home(source)
            if home != self._balance.home(row):
                trail = self._workers.trail(home, source, done, self._patience)
                self._lent |= {} if trail is None else {row: trail}
        self._begun += opening
        self._arrays["opening"][:] = opening
        free = opening.copy()
        free[list(self._returning)] = False  # a new worker would have to play all again
        self._balance.move(free)

    def _start(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()
        self._send(self._balance.early, self._returning)

    def _send(self, workers: Iterable[int], played: dict[int, list[int]]) -> None:
        """Let workers step; actions to play at once in episodes that open."""
        for worker in workers:
            rows = set(self._balance.rows[worker]) - self._resting
            actions = {row: played[row] for row in rows & played.keys()}
            lent = {row: self._lent[row] for row in rows & self._lent.keys()}
            self._again[worker] = sum(map(len, actions.values()))
            self._workers.send(worker, (rows, actions, lent))

    def _listen(self, worker: int, patience: float) -> Answer | str:
        """The answer to what was sent last; who plays again what it was sent has more time."""
        return self._workers.listen(worker, patience + self._again[worker] / REPLAY_SPEED)

    def _receive(
        self, patience: float
    ) -> tuple[list[tuple[int, dict[str, Any]]], list[Any], list[float]]:
        """Ended episodes (number of the environment, statistics), scenery; seconds by worker."""
        answers: dict[int, Answer] = {}
        failed: list[int] = []
        for worker in range(self._workers.number):
            answer = self._listen(worker, patience)
            if isinstance(answer, str):
                self._say(f"worker {worker} of the environments failed, and begins anew", answer)
                failed.append(worker)
            else:
                answers[worker] = answer
        if failed:
            answers |= self._begin_anew(failed)
        episodes, scenery, seconds = [], [], []
        for _, answer in sorted(answers.items()):
            episodes += [each for each in answer[0] if not self._arrays["practises"][each[0]]]
            scenery += answer[1]
            seconds.append(answer[2])
        arrays = self._arrays
        lost = arrays["life_lost"] & ~arrays["terminated"]
        arrays["truncated"] |= lost & arrays["practises"]
        # the first picture of a place stays, whoever's worker was told first
        return episodes, [picture for _, picture in sorted(scenery, key=itemgetter(0))], seconds

    def _say(self, what: str, reason: str) -> None:
        """Count a failure, and tell it."""
        self.failures += 1
        say(f"{what}: {reason.strip().splitlines()[-1]}", sys.stderr)

    def _begin_anew(self, failed: list[int]) -> dict[int, Answer]:
        """The answers to the running step of new workers in the places of those that failed.

        They start together: those of a machine that is lost fail together.
        """
        for worker in failed:
            self._workers.restart(worker)
        for worker in failed:
            self._sure(worker, self._workers.listen(worker, 20 * self._patience))
            rows = self._balance.rows[worker]
            self._arrays["opening"][rows] = True
            self._send([worker], {row: self._played[row] for row in rows})
        answers = {}
        for worker in failed:
            answer = self._listen(worker, 20 * self._patience)
            answers[worker] = self._cut(worker, answer) if isinstance(answer, str) else answer
        return answers

    def _cut(self, worker: int, reason: str) -> Answer:
        """Truncate the episodes of a worker that failed again, and give them to a new one."""
        if 0 < self._steps - self._cut_at < CALM:
            self._sure(worker, reason)
        self._cut_at = self._steps
        self._say(f"worker {worker} of the environments failed again, its episodes are cut", reason)
        self._workers.restart(worker)
        self._sure(worker, self._workers.listen(worker, 20 * self._patience))
        rows = sorted(set(self._balance.rows[worker]) - self._resting)
        for name in ("rewards", "terminated", "life_lost"):
            self._arrays[name][rows] = 0
        self._arrays["truncated"][rows] = True
        return NOTHING

    def _sure(self, worker: int, answer: Answer | str) -> Answer:
        """An answer that is none of failure."""
        if isinstance(answer, str):
            self.close()
            raise RuntimeError(f"worker {worker} of the environments failed:\n{answer}")
        return answer


def infos_of(arrays: Mapping[str, np.ndarray] | np.ndarray) -> dict[str, Any]:
    """What is known of all environments in every step, of arrays or fields by the names of them."""
    if not arrays["has_cell"].any():
        return {}
    present = arrays["has_cell"].copy()
    return {
        "cell": arrays["cells"].copy(),
        "_cell": present,
        "life_lost": arrays["life_lost"].copy(),
        "_life_lost": present.copy(),
    }
