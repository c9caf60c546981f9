"""Cheap frames change nothing: states, rewards, ends, cells and statistics of the plain games."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from conftest import settings
from gym_super_mario_bros.actions import COMPLEX_MOVEMENT
from gym_super_mario_bros.smb3_env import SuperMarioBros3Env
from gym_super_mario_bros.smb_env import SuperMarioBrosEnv
from gymnasium.wrappers import FrameStackObservation
from nes_py.wrappers import JoypadSpace

from icm.config import EnvConfig
from icm.envs import make_env
from icm.envs.cores import find_core
from icm.envs.libretro import LibretroEmulator, on_libretro
from icm.envs.mario import GROUND, SMB3_PLACES, StuckLimit
from icm.envs.wrappers import ActionRepeat, Env, EpisodeStatistics, NoopStart, StickyActions
from icm.errors import UserError

ENV = settings().env
RUNNING = np.array([2, 2, 4, 4, 6, 2, 1, 1, 1, 1, 1, 1]) / 26  # mostly right, B, A and all of them


class FrameByFrame(gym.Wrapper[Any, Any, Any, Any]):
    """Progress and cell from the whole info of every frame."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        observation, info = self.env.reset(seed=seed, options=options)
        self.best: dict[str, int] = {}
        self.cleared: set[str] = set()
        self.life, self.ground, self.deaths = None, {}, 0
        return observation, self.note(info)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.note(info)
        game: Any = self.unwrapped
        if not terminated and game._get_terminated():  # by what was skipped
            observation, more, terminated, truncated, info = self.env.step(action)
            reward += more
        # of what the picture shows, where frames were skipped
        return observation, reward, terminated, truncated, self.note(game._get_info())

    def note(self, info: dict[str, Any]) -> dict[str, Any]:
        level = f"{info['world']}-{info['stage']}"
        self.best[level] = max(int(info["x_pos"]), self.best.get(level, 0))
        if info["clear"]:
            self.cleared.add(level)
        life = -1 if info["life"] == 255 else info["life"]  # 255: the game is over
        if self.life is not None and life < self.life:
            self.deaths += 1
            self.ground = {}
        self.life = life
        self.ground[level] = max(int(info["x_pos"]), self.ground.get(level, 0))
        progress = {
            "distance": sum(self.best.values()),
            "flag": len(self.cleared) > 0,
            "levels_passed": len(self.cleared),
            "levels": " ".join(self.best),
        }
        y = (info["y_pos"] - 256 * max(info.get("y_viewport", 1) - 1, 0)) // 16
        if not isinstance(self.unwrapped, SuperMarioBrosEnv):  # there y grows downwards
            y = GROUND - 1 - y
        cell = [info["world"], info["stage"], info["x_pos"] // 16, y]
        return {
            "game_progress": progress,
            "cell": np.array(cell, np.int32),
            "progress": SimpleNamespace(ground=self.ground),  # for StuckLimit
            "deaths": self.deaths,
            "cleared": level in self.cleared,
        }


class Small(gym.ObservationWrapper[Any, Any, Any]):
    observation_space = gym.spaces.Box(0, 255, (42, 42), np.uint8)

    def observation(self, observation: Any) -> Any:
        image = np.ascontiguousarray(observation[32:])
        return cv2.resize(image, (42, 42), interpolation=cv2.INTER_AREA).max(axis=2)


def plain_env(config: EnvConfig) -> Env:
    """What `make_env` makes, of unchanged games, with all their infos and pictures."""
    spec = gym.spec(config.id)
    if config.emulator == "libretro":
        spec = on_libretro(spec, find_core(config.core))
    env: Env = FrameByFrame(JoypadSpace(gym.make(spec), COMPLEX_MOVEMENT))
    if config.sticky_probability:
        env = StickyActions(env, config.sticky_probability)
    if config.noop_max:
        env = NoopStart(env, config.noop_max)
    env = ActionRepeat(env, config.action_repeat)
    env = StuckLimit(env, config.stuck_steps, config.stuck_distance)
    return EpisodeStatistics(FrameStackObservation(Small(env), config.frame_stack))


def compare(config: EnvConfig, seed: int, episodes: int) -> tuple[int, int]:
    """Play episodes in both; returns how many agent steps they had, and lives lost."""
    rng = np.random.default_rng(seed)
    env, plain = make_env(config), plain_env(config)
    steps = lost = 0
    for episode in range(episodes):
        start = seed if episode == 0 else None
        (state, info), (plain_state, plain_info) = env.reset(seed=start), plain.reset(seed=start)
        outcome: list[Any] = []  # reward, terminated, truncated
        deaths = 0
        while True:
            died = plain_info["deaths"] > deaths or (
                any(outcome[1:2]) and not plain_info["cleared"]
            )
            assert info["life_lost"] == died
            lost += plain_info["deaths"] - deaths
            deaths = plain_info["deaths"]
            assert (state == plain_state).all()
            world, stage, _, x, y = info["cell"].tolist()  # the area is in no info of the games
            assert [world, stage, x, y] == plain_info["cell"].tolist()
            assert info["cell"].dtype == plain_info["cell"].dtype
            assert info.get("episode") == plain_info.get("episode")
            if any(outcome[1:]):
                break
            if steps % 3 == 0:
                action = int(rng.choice(12, p=RUNNING))
            state, *outcome, info = env.step(action)
            plain_state, *plain_outcome, plain_info = plain.step(action)
            assert outcome == plain_outcome
            steps += 1
    env.close()
    plain.close()
    return steps, lost


def has_core() -> bool:
    try:
        return find_core("auto") != Path()
    except UserError:
        return False


EMULATORS = ["nes_py"] + ["libretro"] * has_core()


@pytest.mark.parametrize(
    ("env_id", "action_repeat", "sticky_probability", "noop_max", "emulator", "episodes"),
    [
        ("SuperMarioBros-1-1-v0", 6, 0.0, 30, EMULATORS[-1], 2),
        ("SuperMarioBros-4-2-v0", 4, 0.25, 30, EMULATORS[-1], 2),
        ("SuperMarioBros-v0", 6, 0.25, 0, EMULATORS[-1], 2),
        ("SuperMarioBros-v0", 6, 0.25, 0, "nes_py", 1),
        ("SuperMarioBros2-v0", 1, 0.0, 30, EMULATORS[-1], 2),
        ("SuperMarioBros2USA-1-1-v0", 4, 0.0, 30, EMULATORS[-1], 2),
        ("SuperMarioBros3-1-1-v0", 6, 0.25, 30, EMULATORS[-1], 2),
    ],
)
def test_an_agent_step_is_the_sum_of_plain_frames(
    env_id: str,
    action_repeat: int,
    sticky_probability: float,
    noop_max: int,
    emulator: str,
    episodes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, corrected in SMB3_PLACES.items():
        monkeypatch.setattr(SuperMarioBros3Env, name, corrected)
    config = replace(
        ENV,
        id=env_id,
        emulator=emulator,
        action_repeat=action_repeat,
        stuck_steps=180 // action_repeat,
        sticky_probability=sticky_probability,
        noop_max=noop_max,
    )
    steps, lost = compare(config, seed=3, episodes=episodes)
    assert steps > 60
    assert lost > 0 or env_id != "SuperMarioBros-v0"  # three lives


@pytest.mark.parametrize("phase", range(6))
def test_a_lost_life_is_told_with_the_picture_that_shows_the_next_one(phase: int) -> None:
    config = replace(ENV, id="SuperMarioBros-v0", emulator=EMULATORS[-1], noop_max=0)
    env = make_env(replace(config, stuck_steps=0))
    game: Any = env.unwrapped
    env.reset()
    for _ in range(phase):  # so that lives end in every frame of an agent step
        game.step(0)
    lives, lost, over = 2, 0, False
    while not over:
        _, _, over, _, info = env.step(3)  # right, into the first goomba
        now = -1 if game.ram[0x75A] == 255 else int(game.ram[0x75A])
        assert info["life_lost"] == info["respawned"] == (now < lives)
        assert over == (now < 0)
        if now < lives:
            lost += 1
            assert over or info["cell"][3] == 40 // 16  # where Mario starts
        lives = now
    assert lost == 3
    env.close()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every frame of a core: whether it is drawn."""
    frames: list[bool] = []
    advance = LibretroEmulator.frame_advance

    def watch(emulator: LibretroEmulator, action: int) -> None:
        frames.append(emulator.draw)
        advance(emulator, action)

    monkeypatch.setattr(LibretroEmulator, "frame_advance", watch)
    return frames


@pytest.mark.skipif(not has_core(), reason="there is no core for this platform")
def test_of_an_agent_step_the_last_frame_is_drawn_and_all_if_somebody_watches(
    drawn: list[bool],
) -> None:
    config = replace(ENV, emulator="libretro", noop_max=0)
    env = make_env(config)
    env.reset()
    drawn.clear()
    env.step(3)
    assert drawn == [False] * 5 + [True]
    env.close()

    pictures: list[np.ndarray] = []
    env = make_env(config, "rgb_array", lambda game: pictures.append(np.array(game.render())))
    plain = JoypadSpace(
        gym.make(on_libretro(gym.spec(ENV.id), find_core("auto"))), COMPLEX_MOVEMENT
    )
    env.reset()
    plain.reset()
    drawn.clear()
    for action in (3, 4, 5):
        env.step(action)
        expected = [plain.step(action)[0].copy() for _ in range(6)]
        assert all((a == b).all() for a, b in zip(pictures[-6:], expected, strict=True))
    assert all(drawn)
    env.close()
    plain.close()
