"""Going back in a running episode without replaying it from its beginning."""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.wrappers import TimeLimit
from nes_py import NESEnv

from icm.envs import libretro
from icm.envs.mario import Progress
from icm.envs.wrappers import Env

EVERY = 8  # agent steps between the latest snapshots
RECENT = 256  # agent steps that they cover
SELDOM = 64  # agent steps between older ones; one of FCEUmm has 30 kB

PLAIN = (int, float, str, tuple, dict, np.generic, np.random.Generator, Progress)
"""Types of what an nes-py game changes when it steps; its emulator has its own state."""

FOREIGN: dict[type, tuple[str, ...]] = {TimeLimit: ("_elapsed_steps",)}
"""`changing` of wrappers that `gym.make` adds."""


@dataclass
class Snapshot:
    """Where an episode was after some of its actions."""

    done: int  # how many
    emulator: Any
    game: dict[str, Any]
    wrappers: list[dict[str, Any]]  # what each of them names in `changing`
    state: np.ndarray
    info: dict[str, Any]


@dataclass
class Trail:
    """Snapshots along an episode."""

    seed: int = -1  # of the episode; -1: there is none
    actions: list[int] = field(default_factory=list)  # so far
    kept: list[Snapshot] = field(default_factory=list)

    def reach(self, seed: int, actions: list[int]) -> int:
        """How many of an episode's first actions led to the latest snapshot of it here; 0: none."""
        if seed != self.seed:
            return 0
        done = (kept.done for kept in reversed(self.kept))
        return next((n for n in done if actions[:n] == self.actions[:n]), 0)

    def sendable(self, done: int) -> "Trail":
        """Snapshots for another process: after `done` actions, and the one before.

        Also every `SELDOM`-th step, for episodes that begin further back.

        No states of nes-py's own emulator: they cannot leave their process.
        """
        kept = [
            each
            for each in self.kept
            if each.done in (done, done - EVERY) or (each.done < done and not each.done % SELDOM)
            if isinstance(each.emulator, libretro.CoreState)
        ]
        return Trail(self.seed, self.actions[:done], kept)


class Snapshots:
    """Those of the running episode of one environment.

    After going back, everything is as if the episode had been replayed up to there, its random
    numbers too. Only nes-py games have snapshots.
    """

    def __init__(self, env: Env) -> None:
        self._game: Any = env.unwrapped
        self._wrappers: list[tuple[Any, tuple[str, ...]]] = []  # and what changes in them
        layer: Any = env
        while layer is not self._game:
            if changing := FOREIGN.get(type(layer), getattr(type(layer), "changing", ())):
                self._wrappers.append((layer, changing))
            layer = layer.env
        self.trail = Trail()

    def begin(self, seed: int) -> None:
        """Begin an episode."""
        self.trail = Trail(seed)

    def add(self, action: int, state: np.ndarray, info: dict[str, Any]) -> None:
        """Record a step of it."""
        trail = self.trail
        trail.actions.append(action)
        done = len(trail.actions)
        if done % EVERY == 0 and isinstance(self._game, NESEnv):
            trail.kept.append(self._take(state, info))
            old = done - RECENT
            trail.kept = [each for each in trail.kept if each.done > old or not each.done % SELDOM]

    def take_over(self, trail: Trail) -> None:
        """Adopt those of another environment like this one; this one must have been reset."""
        self.trail = Trail(trail.seed, trail.actions.copy(), trail.kept.copy())

    def go_back(self, seed: int, actions: list[int]) -> Snapshot | None:
        """Put the environment back to the latest snapshot along an episode's first actions.

        Args:
            seed: of the episode.
            actions: its first ones.

        Returns:
            that snapshot; None if there is none.
        """
        trail = self.trail
        reach = trail.reach(seed, actions)
        if not reach:
            return None
        while trail.kept[-1].done > reach:  # not on this way, nor will it be again
            trail.kept.pop()
        snapshot = trail.kept[-1]
        trail.actions = actions[: snapshot.done]
        self._game.load_state(snapshot.emulator)
        game, wrappers = copy.deepcopy((snapshot.game, snapshot.wrappers))
        vars(self._game).update(game)
        for (wrapper, _), values in zip(self._wrappers, wrappers, strict=True):
            vars(wrapper).update(values)
        return snapshot

    def _take(self, state: np.ndarray, info: dict[str, Any]) -> Snapshot:
        game = {name: value for name, value in vars(self._game).items() if isinstance(value, PLAIN)}
        wrappers = [{n: getattr(w, n) for n in changing} for w, changing in self._wrappers]
        game, wrappers = copy.deepcopy((game, wrappers))
        emulator = self._game.dump_state()
        return Snapshot(len(self.trail.actions), emulator, game, wrappers, state, info)
