"""Super Mario Bros.: button sets, cheap frames, and what counts as progress, for all four games."""

from dataclasses import replace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gym_super_mario_bros.actions import COMPLEX_MOVEMENT, RIGHT_ONLY, SIMPLE_MOVEMENT
from gym_super_mario_bros.smb2_env import SuperMarioBros2Env
from gym_super_mario_bros.smb3_env import SuperMarioBros3Env
from gym_super_mario_bros.smb_env import SuperMarioBrosEnv
from gymnasium.envs.registration import EnvSpec
from nes_py import NESEnv
from nes_py.nes_env import OBSERVATION_MODE_RGB_ARRAY_CONTIGUOUS, SCREEN_SHAPE_24_BIT

from icm.envs.wrappers import Env

ACTION_SETS = {"right_only": RIGHT_ONLY, "simple": SIMPLE_MOVEMENT, "complex": COMPLEX_MOVEMENT}

MOST_BLOCKS = 12_000  # more than any place has; the camera may be anywhere while one loads
MOST_FRAMES_SKIPPED = 3600  # frames in a row: a minute of play
GAME_OVER = 255  # the lives counter then, in Super Mario Bros. and Lost Levels
SETTLING = 4  # agent steps after a black screen, in which pictures fade in
CELL = 16  # pixels; the games are built of 16x16 blocks
GROUND = 14  # blocks: Mario at a height of y pixels is in row GROUND - y // 16 of a picture


class Camera(NamedTuple):
    """Where the upper left corner of the screen is, in pixels of an area of the level.

    An area is a part of a level that is loaded at once, such as a room below a pipe.
    """

    area: int
    left: int
    top: int


class View(NamedTuple):
    """The part of the screen that shows the level, not the status or what scrolls in."""

    top: int
    bottom: int
    left: int
    right: int


type Level = tuple[int, int]
"""World and stage."""


class Progress:
    """Where an episode has been."""

    cameras: tuple[Camera | None, Camera | None] = (None, None)  # of the last two frames
    level: Level = 0, 0  # of the last frame, as x and y
    x = y = 0

    def __init__(self) -> None:
        self.best_x: dict[Level, int] = {}  # in the order seen
        self.cleared: set[Level] = set()
        self.lives = -1
        self.deaths = 0
        self.ground: dict[Level, int] = {}  # best x per level in the running life

    def note(self, level: Level, x: int, y: int, passed: Level | None, lives: int) -> None:
        """Record one frame, in which the level `passed`, if any, was completed."""
        self.level, self.x, self.y = level, x, y
        if lives < self.lives:
            self.deaths += 1
            self.ground.clear()
        self.lives = lives
        if x > self.ground.get(level, -1):
            self.ground[level] = x
        if x > self.best_x.get(level, -1):
            self.best_x[level] = x
        if passed:
            self.cleared.add(passed)


class FrozenError(Exception):
    """The game skips frames without end."""


class LeanGame(NESEnv):
    """Mixin for a game of gym-super-mario-bros: frames without what nobody reads.

    Rewards and skipping are the game's own, frame by frame. Its info of 40 keys, which takes half
    of the time, is replaced by `{"progress": Progress}`, one object per episode in which every
    frame is recorded. Reading bytes of a memoryview takes half the time of a numpy array's.

    After a skipped part, such as a death, the game reports the frame before it, with the picture
    after it. Here both are from after it; and if that is the end, it is reported at once.

    The game skips until Mario can move again, and there are places where he never can: an episode
    that gets to one is truncated.
    """

    skipped = 0  # frames since the last step or reset
    is_frozen = False

    # properties of the game, see `lean`
    position: tuple[Level, int, int]  # level; Mario's x; his height, pixels up, on SMB's scale
    passed: Level | None  # the level that this frame has completed
    camera: Camera
    view: View

    def _ram_buffer(self) -> memoryview:
        return memoryview(super()._ram_buffer())

    def _did_reset(self) -> None:
        self.skipped, self.is_frozen = 0, False
        super()._did_reset()
        self.progress = Progress()

    def _frame_advance(self, action: int) -> None:
        self.skipped += 1
        if self.skipped > MOST_FRAMES_SKIPPED:
            raise FrozenError
        super()._frame_advance(action)

    def _did_step(self, done: bool) -> None:
        try:
            super()._did_step(done)
        except FrozenError:
            self.is_frozen = self.done = True
        if self.skipped and not self.is_frozen:
            self._note()
            # neither camera fits the picture: nothing is cut out
            self.progress.cameras = None, self.camera

    def step(self, action: int) -> Any:
        """One frame, see `NESEnv.step`."""
        observation, reward, terminated, truncated, info = super().step(action)
        if self.skipped and not self.is_frozen and self._get_terminated():
            # the frame in which the game reports the end, and rewards it
            observation, more, terminated, truncated, info = super().step(action)
            reward += more
        return observation, reward, terminated, truncated or self.is_frozen, info

    def _get_info(self) -> dict[str, Any]:
        self.skipped = 0
        self._note()
        self.progress.cameras = self.progress.cameras[1], self.camera
        return {"progress": self.progress}

    def _note(self) -> None:
        lives = -1 if self._life == GAME_OVER else self._life
        self.progress.note(*self.position, self.passed, lives)


def lean(spec: EnvSpec, game: type[NESEnv]) -> EnvSpec:
    """The specification of a Mario game, with cheap frames (`LeanGame`); others as they are."""
    kinds = (
        (SuperMarioBrosEnv, _smb_camera, _smb_position, View(32, 240, 0, 256)),
        (SuperMarioBros2Env, _smb2_camera, _smb2_position, View(0, 240, 32, 256)),
        (SuperMarioBros3Env, _smb3_camera, _smb3_position, View(0, 193, 16, 240)),
    )
    own: dict[str, Any] = {}
    for kind, camera, position, view in kinds:
        if issubclass(game, kind):
            own = {"camera": property(camera), "position": property(position), "view": view}
    if not own:
        return spec
    own["passed"] = property(_smb2_passed if issubclass(game, SuperMarioBros2Env) else _passed)
    if issubclass(game, SuperMarioBros3Env):
        own |= SMB3_PLACES
    maker: Any = type(game.__name__, (LeanGame, game), own)
    return replace(spec, entry_point=maker)


def _smb_camera(game: Any) -> Camera:
    """In Super Mario Bros. and Lost Levels: type and number of the area; edge of the screen."""
    ram = game.ram
    return Camera(32 * ram[0x74E] + ram[0x74F], 256 * ram[0x71A] + ram[0x71C], -32)


def _smb2_camera(game: Any) -> Camera:
    """In Super Mario Bros. 2 USA: number of the area; edges of the screen."""
    if game._left_target_stage and (camera := game.progress.cameras[1]):
        return camera
    ram = game.ram
    return Camera(ram[0x532], 256 * ram[0x4BE] + ram[0x4C0], 256 * ram[0xCA] + ram[0xCB])


def _smb3_camera(game: Any) -> Camera:
    """In Super Mario Bros. 3: address of the area's layout; scrolling."""
    ram = game.ram
    return Camera(256 * ram[0x62] + ram[0x61], 256 * ram[0x12] + ram[0xFD], ram[0xFC])


def _smb3_is_on_map(game: Any) -> bool:
    return game.ram[SMB3_TILESET] == 0 and any(game._map_position)


def _smb3_is_in_level(game: Any) -> bool:
    return game.ram[SMB3_TILESET] > 0 and game._time > 0 and game._x_page < SMB3_PAGES


SMB3_TILESET = 0x70A  # of the loaded level; 0: the map
SMB3_PAGES = 16  # of 256 pixels: no level has more. On entry, the page is still a row of the map
SMB3_PLACES = {
    "_is_on_map": property(_smb3_is_on_map),
    "_is_in_level": property(_smb3_is_in_level),
}
"""Where Mario is in Super Mario Bros. 3.

The game's own properties go by the time left: when it is up or Mario has died, they take the end
of a level for the map, and so the level for completed; and when he enters one, they place him at
8192 pixels. Rewards and ends depend on them.
"""


def _level(game: Any) -> Level:
    return game._world, game._stage


def _passed(game: Any) -> Level | None:
    """By the game's own info["clear"]."""
    return _level(game) if game._flag_get else None


def _smb2_passed(game: Any) -> Level | None:
    """In Super Mario Bros. 2 USA: one that is left alive, to the next or by a warp.

    The game sets and clears its own mark of a level's end within one frame.
    """
    progress: Progress = game.progress
    died = game._life < progress.lives or game._is_game_over
    if died or not progress.best_x or progress.level == _level(game):
        return None
    return progress.level


def _smb_position(game: Any) -> tuple[Level, int, int]:
    """The height is already counted from below, but begins anew below the screen."""
    height = int(game._y_position) - 256 * max(game._y_viewport - 1, 0)
    return _level(game), game._x_position, height


def _smb2_position(game: Any) -> tuple[Level, int, int]:
    """A single level is left in the last frame, at a death for the game's own first one."""
    progress: Progress = game.progress
    if game._left_target_stage:
        return progress.level, progress.x, progress.y
    return _level(game), game._x_position, _from_above(int(game._y_position))


def _smb3_position(game: Any) -> tuple[Level, int, int]:
    """Above the top of a level, the height is negative, which the game takes for positive."""
    y = (game._y_position + 0x8000) % 0x10000 - 0x8000
    return _level(game), game._x_position, _from_above(y)


def _from_above(y: int) -> int:
    """A height from a position counted from above that spans two blocks; the lower one is meant."""
    return CELL * GROUND + CELL - 1 - (y + CELL)


class Screen(gym.ObservationWrapper[Any, Any, Any]):
    """Observes the screen as a contiguous array: copying nes-py's view takes five times as long.

    uint8 (240, 256, 3), overwritten by every later observation.
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
    cell: int (5,): world, stage, area (0 if unknown), x // 16, y // 16.
    life_lost: whether one was lost in this step, or the episode terminated without a flag.
    respawned: whether one was lost and the game has gone on: to the next one or, after the last, to
        a blank picture. Neither is what the action led to.
    """

    changing = ("deaths",)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Reset and describe."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.deaths = info["progress"].deaths
        return observation, self._describe(info["progress"])

    def step(self, action: Any) -> Any:
        """Step and describe."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        progress: Progress = info.pop("progress")
        info |= self._describe(progress)
        info["life_lost"] |= terminated and progress.level not in progress.cleared
        return observation, reward, terminated, truncated, info

    def _describe(self, progress: Progress) -> dict[str, Any]:
        life_lost = progress.deaths > self.deaths
        self.deaths = progress.deaths
        camera = progress.cameras[1]
        area = camera.area if camera else 0
        cell = (*progress.level, area, progress.x // CELL, progress.y // CELL)
        return {
            "game_progress": {
                "distance": sum(progress.best_x.values()),
                "flag": bool(progress.cleared),
                "levels_passed": len(progress.cleared),
                "levels": " ".join(f"{world}-{stage}" for world, stage in progress.best_x),
            },
            "cell": np.array(cell, dtype=np.int32),
            "life_lost": life_lost,
            "respawned": life_lost,
        }


class Scenery(gym.Wrapper[Any, Any, Any, Any]):
    """Cuts out what the screen shows of a level for the first time in this environment.

    `info["scenery"]`, if there is any: the place (world, stage, area), row and column of its
    first block of 16 pixels, and the picture, uint8 (H, W, 3), a copy.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.known: dict[tuple[int, int, int], np.ndarray] = {}  # of each place, bool by block
        self.view: View = self.get_wrapper_attr("view")
        self.settling = 0  # agent steps until pictures can be trusted

    def step(self, action: Any) -> Any:
        """Step and cut out."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        progress: Progress = info["progress"]
        self.settling = max(self.settling - 1, 0) if observation.any() else SETTLING
        # the picture shows the previous frame: the game draws one frame later than it computes
        camera, now = progress.cameras
        if camera and now and camera.area == now.area and not self.settling:
            moved = abs(now.left - camera.left), abs(now.top - camera.top)
            if max(moved) < CELL:
                self._cut((*progress.level, camera.area), camera, observation, info)
        return observation, reward, terminated, truncated, info

    def _cut(
        self, place: tuple[int, int, int], camera: Camera, screen: np.ndarray, info: dict[str, Any]
    ) -> None:
        view = self.view
        top, bottom = -(-(camera.top + view.top) // CELL), (camera.top + view.bottom) // CELL
        left, right = -(-(camera.left + view.left) // CELL), (camera.left + view.right) // CELL
        if bottom * right > MOST_BLOCKS:
            return
        known = self.known.get(place, np.zeros((0, 0), bool))
        if bottom > known.shape[0] or right > known.shape[1]:
            self.known[place] = known = np.pad(known, ((0, bottom + 16), (0, right + 256)))
        there = known[top:bottom, left:right]
        if there.all():
            return
        rows, columns = np.flatnonzero(~there.all(1)), np.flatnonzero(~there.all(0))
        there[:] = True
        first_row, last_row = top + int(rows[0]), top + int(rows[-1])
        first, last = left + int(columns[0]), left + int(columns[-1])
        height = slice(first_row * CELL - camera.top, (last_row + 1) * CELL - camera.top)
        width = slice(first * CELL - camera.left, (last + 1) * CELL - camera.left)
        info["scenery"] = place, (first_row, first), screen[height, width].copy()


class StuckLimit(gym.Wrapper[Any, Any, Any, Any]):
    """Truncates an episode after `steps` agent steps without `distance` pixels of new ground.

    Ground is new if this life has not been on it: a death makes all ground new.
    """

    changing = ("best", "stuck")

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
