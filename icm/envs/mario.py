"""Super Mario Bros.: button sets, cheap frames, and what counts as progress, for all four games."""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gym_super_mario_bros.actions import COMPLEX_MOVEMENT, RIGHT_ONLY, SIMPLE_MOVEMENT
from gymnasium.envs.registration import EnvSpec
from nes_py import NESEnv
from nes_py.nes_env import OBSERVATION_MODE_RGB_ARRAY_CONTIGUOUS, SCREEN_SHAPE_24_BIT

from icm.envs.wrappers import Env

ACTION_SETS = {"right_only": RIGHT_ONLY, "simple": SIMPLE_MOVEMENT, "complex": COMPLEX_MOVEMENT}

CELL = 16  # pixels; the games are built of 16x16 blocks


class Progress:
    """Where an episode has been."""

    def __init__(self) -> None:
        self.best_x: dict[tuple[int, int], int] = {}  # per level (world, stage), as first seen
        self.cleared: set[tuple[int, int]] = set()
        self.lives = -1
        self.deaths = 0
        self.ground: dict[tuple[int, int], int] = {}  # best x per level in the running life

    def note(self, level: tuple[int, int], x: int, y: int, clear: bool, lives: int) -> None:
        """Take in one frame."""
        self.level, self.x, self.y = level, x, y
        if lives != self.lives:
            self.deaths += lives < self.lives
            self.lives = lives
            self.ground.clear()
        if x > self.ground.get(level, -1):
            self.ground[level] = x
        if x > self.best_x.get(level, -1):
            self.best_x[level] = x
        if clear:
            self.cleared.add(level)


class LeanGame(NESEnv):
    """Mixin for a game of gym-super-mario-bros: frames without what nobody reads.

    Rewards, ends and how time is skipped are the game's own, frame by frame. Its info of 40 keys,
    half of the time, is replaced by `{"progress": Progress}`, one object per episode that every
    frame was noted in. Bytes of a memoryview are read in half the time of a numpy array's.
    """

    is_clear: bool  # the game's own property, see `lean`

    def _ram_buffer(self) -> memoryview:
        return memoryview(super()._ram_buffer())

    def _did_reset(self) -> None:
        super()._did_reset()
        self.progress = Progress()

    def _get_info(self) -> dict[str, Any]:
        level = self._world, self._stage
        self.progress.note(level, self._x_position, self._y_position, self.is_clear, self._life)
        return {"progress": self.progress}


def lean(spec: EnvSpec, game: type[NESEnv]) -> EnvSpec:
    """The specification of a game of gym-super-mario-bros with cheap frames, see `LeanGame`."""
    # what is info["clear"] in its info
    clear = getattr(game, "_flag_get", None) or game._is_level_complete
    maker: Any = type(game.__name__, (LeanGame, game), {"is_clear": clear})
    return replace(spec, entry_point=maker)


class Screen(gym.ObservationWrapper[Any, Any, Any]):
    """Observes the game's screen in rows: copying nes-py's own view of it takes five times as long.

    uint8 (240, 256, 3), written over by every later observation.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.picture = np.empty(SCREEN_SHAPE_24_BIT, np.uint8)

    def observation(self, observation: Any) -> Any:
        """Copy the screen, whatever the game observed."""
        game: Any = self.unwrapped
        return game.observation(OBSERVATION_MODE_RGB_ARRAY_CONTIGUOUS, self.picture)


class MarioProgress(gym.Wrapper[Any, Any, Any, Any]):
    """Turns `info["progress"]` of a `LeanGame` into numbers that mean the same in every game.

    game_progress:
        distance: best `x_pos` reached, summed over the levels of the episode, pixels;
        flag: whether a flag (or another end of a level) was reached;
        levels_passed: how many were;
        levels: names of the levels seen, in order, joined by a space.
    cell: int (4,): world, stage, x // 16, y // 16.
    life_lost: whether one was, in this step.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Reset and describe."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.deaths = info["progress"].deaths
        return observation, self._describe(info["progress"])

    def step(self, action: Any) -> Any:
        """Step and describe."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, self._describe(info["progress"])

    def _describe(self, progress: Progress) -> dict[str, Any]:
        life_lost = progress.deaths > self.deaths
        self.deaths = progress.deaths
        cell = (*progress.level, progress.x // CELL, progress.y // CELL)
        return {
            "game_progress": {
                "distance": sum(progress.best_x.values()),
                "flag": bool(progress.cleared),
                "levels_passed": len(progress.cleared),
                "levels": " ".join(f"{world}-{stage}" for world, stage in progress.best_x),
            },
            "cell": np.array(cell, dtype=np.int32),
            "life_lost": life_lost,
        }


class StuckLimit(gym.Wrapper[Any, Any, Any, Any]):
    """Truncates an episode after `steps` agent steps without `distance` pixels of new ground.

    Ground is new that this life has not been on: after a death the way begins anew.
    """

    def __init__(self, env: Env, steps: int, distance: int) -> None:
        super().__init__(env)
        self.limit, self.distance = steps, distance

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start counting."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.best, self.stuck = sum(info["progress"].ground.values()), 0
        return observation, info

    def step(self, action: Any) -> Any:
        """Count."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        ground = sum(info["progress"].ground.values())
        if self.best <= ground < self.best + self.distance:
            self.stuck += 1
        else:
            self.best, self.stuck = ground, 0
        return observation, reward, terminated, truncated or self.stuck >= self.limit, info
