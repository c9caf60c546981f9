"""Super Mario Bros.: button sets and what counts as progress, for all four games of the package."""

from typing import Any

import gymnasium as gym
import numpy as np
from gym_super_mario_bros.actions import COMPLEX_MOVEMENT, RIGHT_ONLY, SIMPLE_MOVEMENT

from icm.envs.wrappers import Env

ACTION_SETS = {"right_only": RIGHT_ONLY, "simple": SIMPLE_MOVEMENT, "complex": COMPLEX_MOVEMENT}

CELL = 16  # pixels; the games are built of 16x16 blocks


class MarioProgress(gym.Wrapper[Any, Any, Any, Any]):
    """Adds `info["game_progress"]` and `info["cell"]`, which mean the same in every game.

    game_progress:
        distance: best `x_pos` reached, summed over the levels of the episode, pixels;
        flag: whether a flag (or another end of a level) was reached;
        levels_passed: how many were;
        levels: names of the levels seen, in order, joined by a space.
    cell: int (4,): world, stage, x // 16, y // 16.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start counting."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.best_x: dict[tuple[int, int], int] = {}
        self.cleared: set[tuple[int, int]] = set()
        self._note(info)
        return observation, info

    def step(self, action: Any) -> Any:
        """Count."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._note(info)
        return observation, reward, terminated, truncated, info

    def _note(self, info: dict[str, Any]) -> None:
        level = (int(info["world"]), int(info["stage"]))
        x = int(info["x_pos"])
        self.best_x[level] = max(x, self.best_x.get(level, 0))
        if info["clear"]:
            self.cleared.add(level)
        info["game_progress"] = {
            "distance": sum(self.best_x.values()),
            "flag": bool(self.cleared),
            "levels_passed": len(self.cleared),
            "levels": " ".join(f"{world}-{stage}" for world, stage in self.best_x),
        }
        info["cell"] = np.array([*level, x // CELL, int(info["y_pos"]) // CELL], dtype=np.int32)


class StuckLimit(gym.Wrapper[Any, Any, Any, Any]):
    """Truncates an episode after `steps` agent steps without `distance` pixels of new ground."""

    def __init__(self, env: Env, steps: int, distance: int) -> None:
        super().__init__(env)
        self.limit, self.distance = steps, distance

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start counting."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.best, self.stuck = info["game_progress"]["distance"], 0
        return observation, info

    def step(self, action: Any) -> Any:
        """Count."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if info["game_progress"]["distance"] >= self.best + self.distance:
            self.best, self.stuck = info["game_progress"]["distance"], 0
        else:
            self.stuck += 1
        return observation, reward, terminated, truncated or self.stuck >= self.limit, info
