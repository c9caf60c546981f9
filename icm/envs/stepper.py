"""What a worker does, wherever it runs: it steps environments, which are rows of arrays."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from icm.envs.snapshots import Snapshots, Trail
from icm.envs.wrappers import Env

type Fields = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and type of arrays by name; a row is an environment."""

type Order = tuple[set[int], dict[int, list[int]], dict[int, Trail]]
"""Rows to step, actions to replay at once in opening episodes, and snapshots other workers have
for some of these."""

type Answer = tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, Any]], float]
"""Ended episodes (row, statistics), scenery (row, picture), and the seconds that the step took."""

NOTHING: Answer = [], [], 0.0

GIVEN: Fields = {
    "actions": ((), np.int64),
    "seeds": ((), np.int64),  # of the running episodes
    "opening": ((), np.bool),  # whether the next step begins an episode
    "practises": ((), np.bool),  # whether episodes may begin inside an earlier one
}
"""What a worker is given, per row."""

RESULTS: Fields = {
    "rewards": ((), np.float64),
    "terminated": ((), np.bool),
    "truncated": ((), np.bool),
    "cells": ((5,), np.int32),
    "life_lost": ((), np.bool),
    "respawned": ((), np.bool),
    "has_cell": ((), np.bool),
}
"""What it returns besides `observations`, per row."""


def fields_of(env: Env, num_envs: int) -> Fields:
    """The arrays of `num_envs` environments like this one."""
    space = env.observation_space
    one: Fields = {"observations": (space.shape or (), space.dtype), **GIVEN, **RESULTS}
    return {name: ((num_envs, *shape), dtype) for name, (shape, dtype) in one.items()}


class Stepper:
    """Makes environments as they are needed, and steps them.

    Args:
        make: builds one environment.
        arrays: of `fields_of`; the inputs are read there, and the results written.
    """

    def __init__(self, make: Callable[[], Env], arrays: dict[str, np.ndarray]) -> None:
        self._make, self._arrays = make, arrays
        self._envs: dict[int, Env] = {}
        self._spare: list[Env] = []  # making one takes as long as 35 steps
        self._snapshots: dict[int, Snapshots] = {}  # of those that practise

    def prepare(self) -> None:
        """Make an environment ahead; raises what that raises."""
        self._spare.append(self._make())

    def step(self, order: Order) -> Answer:
        """Step the given rows; some may be new, and earlier ones gone."""
        rows, played, lent = order
        envs, arrays = self._envs, self._arrays
        start = time.perf_counter()
        for row in envs.keys() - rows:
            self._spare.append(envs.pop(row))
            self._snapshots.pop(row, None)
        for row in rows - envs.keys():
            envs[row] = self._spare.pop() if self._spare else self._make()
            if arrays["practises"][row]:
                self._snapshots[row] = Snapshots(envs[row])
        episodes: list[tuple[int, dict[str, Any]]] = []
        scenery: list[tuple[int, Any]] = []
        self._find(played, lent)
        for row, env in envs.items():
            reward: Any = 0.0
            terminated = truncated = False
            snapshots = self._snapshots.get(row)
            if arrays["opening"][row]:
                seed, actions = int(arrays["seeds"][row]), played.get(row, [])
                if snapshots and (found := snapshots.go_back(seed, actions)):
                    state, info, actions = found.state, found.info, actions[found.done :]
                else:
                    state, info = env.reset(seed=seed)
                    if snapshots:
                        snapshots.begin(seed)
            else:
                actions = [int(arrays["actions"][row])]
            for action in actions:
                state, reward, terminated, truncated, info = env.step(action)
                if "scenery" in info:
                    scenery.append((row, info["scenery"]))
                if snapshots:
                    snapshots.add(action, state, info)
            arrays["observations"][row] = state
            arrays["rewards"][row] = reward
            arrays["terminated"][row] = terminated
            arrays["truncated"][row] = truncated
            arrays["has_cell"][row] = "cell" in info
            if "cell" in info:
                arrays["cells"][row] = info["cell"]
            # other games do not tell: an end is a death
            arrays["life_lost"][row] = info.get("life_lost", terminated)
            arrays["respawned"][row] = info.get("respawned", False)
            if "episode" in info:
                episodes.append((row, info["episode"]))
        return episodes, scenery, time.perf_counter() - start

    def _find(self, played: dict[int, list[int]], lent: dict[int, Trail]) -> None:
        """Give rows that begin in the middle of an episode the trail leading furthest there.

        Before any of them goes back, and so loses what others begin with.
        """
        known = [snapshots.trail for snapshots in self._snapshots.values()]
        for row, snapshots in self._snapshots.items():
            if not self._arrays["opening"][row]:
                continue
            seed, actions = int(self._arrays["seeds"][row]), played.get(row, [])
            # its own first: `max` takes that in a tie
            among = [snapshots.trail, *known, *([lent[row]] if row in lent else [])]
            best = max(among, key=lambda trail: trail.reach(seed, actions))
            if best is not snapshots.trail:
                self._envs[row].reset(seed=seed)  # it may be a new one
                snapshots.take_over(best)

    def trail(self, row: int, done: int) -> Trail:
        """Those of an environment's snapshots that lead to where `done` actions were done."""
        snapshots = self._snapshots.get(row)
        return snapshots.trail.sendable(done) if snapshots else Trail()
