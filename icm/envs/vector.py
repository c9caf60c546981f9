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
from icm.output import say

NOWHERE: dict[str, np.generic] = {
    "returned": np.False_,
    "origin": np.int64(-1),
    "undone": np.int64(0),
}
"""The infos of an environment whose episode has not begun in the middle of another."""

REPLAY_SPEED = 10.0  # agent steps per second of a replay, at least: a quarter of a busy nes-py
CALM = 1000  # vector steps between two that truncate episodes, at least


class Workers(Protocol):
    """Where environments run, and how to talk to them.

    arrays: of all environments, see `icm.envs.stepper.fields_of`. A worker reads its inputs and
        writes its results there, by the time its answer is heard at the latest.
    number: how many there are, numbered from 0.
    late: how many of them, the last ones, compete with the caller for a core.
    """

    arrays: dict[str, np.ndarray]
    number: int
    late: int

    def send(self, worker: int, order: Order, /) -> None:
        """Let an idle worker step; no error if it is gone."""

    def listen(self, worker: int, patience: float) -> Answer | str:
        """The answer to the last order, or to the start; a str if the worker failed.

        That is its traceback or a line that says why, also if `patience` seconds were not enough.
        """

    def trail(self, worker: int, row: int, done: int, patience: float) -> Trail | None:
        """Those of an environment's snapshots that lead to where `done` actions were done.

        The worker must be idle. None: they are not available, and the way is replayed.
        """

    def restart(self, worker: int, /) -> None:
        """End a worker, and begin to start a new one in its place."""

    @property
    def end(self) -> Callable[[], None]:
        """Ends all workers, even busy ones; idempotent."""


class WorkerVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Environments in workers, several in each.

    It does not know where the workers run (`Workers`): in processes on this machine
    (`icm.envs.local`) or on a Ray cluster (`icm.envs.on_ray`).

    A caller that computes between `step_async` and `step_wait` needs a core for that. Workers left
    without a core are `late`: they step in `step_wait`, when the caller's core is free, and have
    fewer environments, so that all workers finish together (`icm.envs.balance`). An episode depends
    on its environment's number, on how many episodes that had before, on the seed and the actions,
    not on the worker that it runs in.

    An ended episode is reset by the following step, whose action is ignored (NEXT_STEP). Of an
    environment's infos, `cell` and `episode` are passed on, as Gymnasium would, and `scenery` as a
    list over all. `episode` also has `seed` and `actions`, a list, which replay it. `life_lost` and
    `respawned` are bool (num_envs,); where a game does not tell, an episode that terminates is a
    lost life. `returned`, `origin` and `undone` are explained below.

    In environments that practise (`icm.envs.practice`), a life is an episode, which ends truncated,
    and the next one may begin in the middle of it or of another, with the same seed: up to there,
    it is that episode again.

    `returned`, bool (num_envs,): whether an episode has begun in the middle; `origin`, int64
    (num_envs,): the environment whose episode it continues, knowing what that had seen up to there,
    -1 if none; `undone`, int64 (num_envs,): how many of that one's actions came after that.
    Only environments that do not practise have `episode`: the others do not show how far an agent
    gets from the start.

    A worker that fails, or does not answer for long, is replaced by a new one, which replays the
    running episodes: nothing is lost but time. If it fails, too, the episodes are taken for the
    cause: they end truncated, without an `episode` info. `failures` counts both.

    Args:
        make: builds one environment, which says what all are like.
        num_envs: how many, at least 1.
        start: starts 1 to `num_envs` workers, given the arrays that they need.
        patience: seconds for a step; a start and a reset, which may build environments, may take
            twenty times as long, and a replay what it needs at `REPLAY_SPEED`.
        first: number of the first environment, if these are a part of more.
        practice: where episodes begin; None: with a reset.

    Raises:
        RuntimeError: a worker failed at its start, or episodes would have to be cut again soon
            after others were; with its traceback. All methods raise it, and close first.
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
        # the environments that these come from
        self._origin = np.full(num_envs, NOWHERE["origin"])
        self._undone = np.zeros(num_envs, np.int64)  # how many of their latest are left out
        self._lent: dict[int, Trail] = {}  # snapshots for these from other workers

        self._patience, self._first = patience, first
        self.failures = 0
        self._steps, self._cut_at = 0, -CALM  # vector steps so far; the last one that cut episodes
        self._workers = start(fields_of(env, num_envs))
        self._again = [0] * self._workers.number  # actions that each was sent to replay
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
        last reset with a seed.

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
        """Do not step these environments until the next `reset`: their episodes have ended."""
        self._resting |= set(rows)
        for name in ("terminated", "truncated"):  # or they would be reset
            self._arrays[name][list(rows)] = False

    def way(self, row: int) -> tuple[int, list[int]]:
        """The seed of an environment's running episode, and its actions from the start to here."""
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

    @staticmethod
    def check(state: dict[str, Any], num_envs: int, num_actions: int) -> int:
        """Check what `state_dict` gave; returns how many actions `restore` will play.

        Raises:
            Exception: of any kind, if this is no such state of so many environments and actions.
        """
        np.random.SeedSequence(state["entropy"])
        for name in ("begun", "seeds", "resumed"):
            numbers = np.array(state[name], np.int64)
            if numbers.shape != (num_envs,) or numbers.min() < 0:
                raise ValueError(f"{name} of its episodes is no number per environment")
        actions = state["actions"]
        played = np.array([action for way in actions for action in way], np.int64)
        if len(actions) != num_envs or not ((played >= 0) & (played < num_actions)).all():
            raise ValueError("the actions of its episodes are none of this game's")
        return len(played)

    def restore(self, state: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Replay running episodes, up to where `state_dict` was taken.

        No way of saving a state works for all emulators, but all of them are deterministic.

        Returns:
            observations of the last step then, whether an episode ended with it, bool (num_envs,),
            and its infos, with the scenery of all steps.
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
        infos = self._infos() | {"scenery": scenery}
        return self._arrays["observations"].copy(), ended, infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments with their actions, int (num_envs,); see `step_wait`."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        """Let all workers but the late ones step, while this process does something else."""
        self._steps += 1
        arrays = self._arrays
        arrays["actions"][:] = actions
        ended = arrays["terminated"] | arrays["truncated"]
        self._open(ended, arrays["life_lost"], arrays["truncated"])
        for row in set(np.flatnonzero(~arrays["opening"]).tolist()) - self._resting:
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
        self._arrays["rewards"][list(self._returning)] = 0.0  # of what was replayed
        infos = self._infos()
        for row, episode in episodes:
            episode |= {"seed": int(self._arrays["seeds"][row]), "actions": self._played[row]}
            infos = self._add_info(infos, {"episode": episode}, row)
        infos["scenery"] = scenery
        names = ("observations", "rewards", "terminated", "truncated")
        observations, rewards, terminated, truncated = (self._arrays[n].copy() for n in names)
        return observations, rewards, terminated, truncated, infos

    def _infos(self) -> dict[str, Any]:
        """The infos that every step has."""
        middle = [row for row, actions in self._returning.items() if actions]
        returned = np.isin(np.arange(self.num_envs), middle)
        origin, undone = self._origin.copy(), self._undone.copy()
        return infos_of(self._arrays) | {"returned": returned, "origin": origin, "undone": undone}

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers, after the step under way."""
        self._workers.end()

    def _open(self, opening: np.ndarray, died: np.ndarray, cut: np.ndarray) -> None:
        """Let the next step begin an episode where `opening`, bool (num_envs,), says so.

        `died` and `cut`, bool (num_envs,): how the last one ended.
        """
        self._returning, self._lent = {}, {}
        self._origin[:] = NOWHERE["origin"]
        self._undone[:] = 0
        sources: dict[int, int] = {}  # of those opened here: whose way they have
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
        free[list(self._returning)] = False  # a new worker would have to replay all
        self._balance.move(free)

    def _start(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()
        self._send(self._balance.early, self._returning)

    def _send(self, workers: Iterable[int], played: dict[int, list[int]]) -> None:
        """Let workers step; `played` is replayed in opening episodes."""
        for worker in workers:
            rows = set(self._balance.rows[worker]) - self._resting
            actions = {row: played[row] for row in rows & played.keys()}
            lent = {row: self._lent[row] for row in rows & self._lent.keys()}
            self._again[worker] = sum(map(len, actions.values()))
            self._workers.send(worker, (rows, actions, lent))

    def _listen(self, worker: int, patience: float) -> Answer | str:
        """The answer to the last order; a worker that has to replay actions gets more time."""
        return self._workers.listen(worker, patience + self._again[worker] / REPLAY_SPEED)

    def _receive(
        self, patience: float
    ) -> tuple[list[tuple[int, dict[str, Any]]], list[Any], list[float]]:
        """Ended episodes (number of the environment, statistics), scenery, seconds by worker."""
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
        arrays["truncated"] |= arrays["respawned"] & arrays["practises"]
        # the first picture of a place stays: keep it independent of workers
        return episodes, [picture for _, picture in sorted(scenery, key=itemgetter(0))], seconds

    def _say(self, what: str, reason: str) -> None:
        """Count and report a failure."""
        self.failures += 1
        say(f"{what}: {reason.strip().splitlines()[-1]}", sys.stderr)

    def _begin_anew(self, failed: list[int]) -> dict[int, Answer]:
        """Replace failed workers; returns the new ones' answers to the running step.

        They start together: workers on a lost machine fail together.
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
        """Truncate the episodes of a worker that failed again, and replace the worker."""
        if 0 < self._steps - self._cut_at < CALM:
            self._sure(worker, reason)
        self._cut_at = self._steps
        self._say(f"worker {worker} of the environments failed again, its episodes are cut", reason)
        self._workers.restart(worker)
        self._sure(worker, self._workers.listen(worker, 20 * self._patience))
        rows = sorted(set(self._balance.rows[worker]) - self._resting)
        for name in ("rewards", "terminated", "life_lost", "respawned"):
            self._arrays[name][rows] = 0
        self._arrays["truncated"][rows] = True
        return NOTHING

    def _sure(self, worker: int, answer: Answer | str) -> Answer:
        """The answer; raises for a failure."""
        if isinstance(answer, str):
            self.close()
            raise RuntimeError(f"worker {worker} of the environments failed:\n{answer}")
        return answer


def infos_of(arrays: Mapping[str, np.ndarray] | np.ndarray) -> dict[str, Any]:
    """What workers tell in every step, as infos: from arrays, or fields of an array, by name."""
    infos: dict[str, Any] = {name: arrays[name].copy() for name in ("life_lost", "respawned")}
    if arrays["has_cell"].any():
        infos |= {"cell": arrays["cells"].copy(), "_cell": arrays["has_cell"].copy()}
    return infos
