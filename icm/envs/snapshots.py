"""Going back in a running episode without playing it again from its beginning."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from nes_py import NESEnv

from icm.envs.mario import Progress
from icm.envs.wrappers import Env

EVERY = 8  # agent steps of an episode from one snapshot to the next
MOST = 32  # snapshots of an episode, the latest; with its picture one has 0.2 MB

PLAIN = (int, float, str, tuple, dict, np.generic, np.random.Generator, Progress)
"""What a game of nes-py changes in itself when it steps; its emulator has a state of its own."""


@dataclass
class Snapshot:
    """Where an episode was after some of its actions."""

    done: int  # how many
    emulator: Any
    game: dict[str, Any]
    wrappers: list[dict[str, Any]]  # what each of them names in `changing`
    state: np.ndarray
    info: dict[str, Any]


class Snapshots:
    """Those of the running episode of one environment.

    Whoever goes back finds everything as if the episode had been played again up to there, its
    random numbers too. Environments that are no game of nes-py have none.
    """

    def __init__(self, env: Env) -> None:
        self._game: Any = env.unwrapped
        self._wrappers: list[Any] = []
        layer: Any = env
        while layer is not self._game:
            if getattr(type(layer), "changing", ()):
                self._wrappers.append(layer)
            layer = layer.env
        self._seed = -1
        self._actions: list[int] = []
        self._kept: list[Snapshot] = []

    def begin(self, seed: int) -> None:
        """An episode begins."""
        self._seed, self._actions, self._kept = seed, [], []

    def add(self, action: int, state: np.ndarray, info: dict[str, Any]) -> None:
        """A step of it was made."""
        self._actions.append(action)
        if len(self._actions) % EVERY == 0 and isinstance(self._game, NESEnv):
            self._kept.append(self._take(state, info))
            del self._kept[:-MOST]

    def reach(self, seed: int, actions: list[int]) -> int:
        """How many of an episode's first actions led to the latest one on their way; 0: none."""
        if seed != self._seed:
            return 0
        done = (kept.done for kept in reversed(self._kept))
        return next((n for n in done if actions[:n] == self._actions[:n]), 0)

    def take_over(self, others: "Snapshots") -> None:
        """Have those of another environment like this one; this one has been reset before."""
        self._seed = others._seed
        self._actions, self._kept = others._actions.copy(), others._kept.copy()

    def go_back(self, seed: int, actions: list[int]) -> Snapshot | None:
        """Let the environment be where the episode was after the first of its actions.

        Args:
            seed: of the episode.
            actions: its first ones.

        Returns:
            the latest snapshot on that way; None if there is none.
        """
        reach = self.reach(seed, actions)
        if not reach:
            return None
        while self._kept[-1].done > reach:  # not on this way, nor will it be again
            self._kept.pop()
        snapshot = self._kept[-1]
        self._actions = actions[: snapshot.done]
        self._game.load_state(snapshot.emulator)
        game, wrappers = copy.deepcopy((snapshot.game, snapshot.wrappers))
        vars(self._game).update(game)
        for wrapper, values in zip(self._wrappers, wrappers, strict=True):
            vars(wrapper).update(values)
        return snapshot

    def _take(self, state: np.ndarray, info: dict[str, Any]) -> Snapshot:
        game = {name: value for name, value in vars(self._game).items() if isinstance(value, PLAIN)}
        wrappers = [{name: getattr(w, name) for name in w.changing} for w in self._wrappers]
        game, wrappers = copy.deepcopy((game, wrappers))
        emulator = self._game.dump_state()
        return Snapshot(len(self._actions), emulator, game, wrappers, state, info)
