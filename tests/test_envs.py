"""The environments, on the real games."""

import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import settings
from gym_super_mario_bros._roms.rom_path import smb3_rom_path
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from nes_py import NESEnv

from icm.envs import action_count, action_names, make_env
from icm.envs.mario import MarioProgress, Progress, StuckLimit
from icm.envs.wrappers import ActionRepeat, GreyImage, NoopStart, StickyActions
from icm.errors import UserError

ENV = settings().env
QUICK = replace(ENV, emulator="libretro")  # where the emulator is not the point

RIGHT = 3  # hold right and B, with complex movement


class Counter(gym.Env[Any, Any]):
    """Shows the number of the frame and rewards it with 1; ends after 50 frames."""

    observation_space = spaces.Box(0, 255, (20, 30, 3), np.uint8)
    action_space = spaces.Discrete(4)

    def __init__(self) -> None:
        self.actions: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.actions = []
        return np.zeros((20, 30, 3), np.uint8), {}

    def step(self, action: Any) -> Any:
        self.actions.append(int(action))
        frame = len(self.actions)
        return np.full((20, 30, 3), frame, np.uint8), 1.0, frame >= 50, False, {}


gym.register("Counter-v0", Counter)


@pytest.mark.parametrize("emulator", ["nes_py", "libretro"])
def test_in_super_mario_bros_3_a_death_is_no_end_of_a_level_and_an_entry_is_no_place(
    emulator: str,
) -> None:
    env = make_env(replace(ENV, id="SuperMarioBros3-v0", emulator=emulator, noop_max=0))
    game: Any = env.unwrapped

    def lost_on_the_way_to_the_map() -> bool:
        lost = False
        while not game._is_on_map:
            lost |= env.step(0)[-1]["life_lost"]
        for _ in range(3):
            lost |= env.step(0)[-1]["life_lost"]
        return lost

    env.reset(seed=0)
    for step in range(27):
        env.step(RIGHT + (step % 6 < 4))  # with jumps
    assert game._x_position > 300  # more than a page
    game.ram[0x5EE:0x5F1] = memoryview(bytes([0, 0, 1]))  # time is up
    assert lost_on_the_way_to_the_map()
    assert game.progress.cleared == set()
    # back to the start of the map; on it to the right, up and, with A, into the level
    for action in [0] * 40 + [1] * 4 + [0] * 8 + [11] * 4 + [0] * 8 + [5] + [0] * 40:
        env.step(action)
    assert game._is_in_level
    assert 300 < game.progress.best_x[1, 1] < 400
    game.ram[0x14] = 1  # the level is done
    assert not lost_on_the_way_to_the_map()
    assert game.progress.cleared == {(1, 1)}
    assert 300 < game.progress.best_x[1, 1] < 400
    env.close()


@pytest.mark.parametrize("emulator", ["nes_py", "libretro"])
def test_in_super_mario_bros_2_usa_only_who_leaves_a_level_alive_has_passed_it(
    emulator: str,
) -> None:
    config = replace(ENV, id="SuperMarioBros2USA-1-2-v0", emulator=emulator, noop_max=0)
    env = make_env(config)
    game: Any = env.unwrapped
    env.reset(seed=0)
    steps = [env.step(RIGHT) for _ in range(20)]
    before, last = steps[-2][-1], steps[-1][-1]
    assert [step[2] for step in steps] == [False] * 19 + [True]
    assert game._level == 0  # the death leads to the game's own first level
    assert last["life_lost"]
    assert last["episode"]["levels"] == "1-2"
    assert not last["episode"]["flag"]
    assert 200 < last["episode"]["distance"] < 216
    assert last["cell"][:4].tolist() == before["cell"][:4].tolist() == [1, 2, 0, 13]

    env.reset(seed=0)
    game.ram[0x4EC] = 3  # the level is done
    for _ in range(60):
        _, _, terminated, _, info = env.step(0)
        if terminated:
            break
    assert terminated
    assert not info["life_lost"]
    assert info["episode"]["levels"] == "1-2"
    assert info["episode"]["levels_passed"] == 1
    env.close()

    env = make_env(replace(config, id="SuperMarioBros2USA-v0"))
    game = env.unwrapped
    env.reset(seed=0)
    game.ram[0x4EC] = 4  # a warp
    for _ in range(2):
        env.step(0)
    assert game.progress.cleared == {(1, 1)}
    assert list(game.progress.best_x) == [(1, 1), (4, 1)]
    env.close()


@pytest.mark.parametrize("env_id", ["SuperMarioBros-1-3-v0", "SuperMarioBros2-1-3-v0"])
def test_who_falls_into_a_pit_is_below_the_ground(env_id: str) -> None:
    env = make_env(replace(QUICK, id=env_id, noop_max=0))
    env.reset(seed=0)
    heights = []
    for _ in range(30):
        _, _, terminated, _, info = env.step(RIGHT)
        heights.append(info["cell"][-1])
        if terminated:
            break
    assert terminated
    assert heights[-1] == -1
    assert max(heights) < 6
    env.close()


def test_in_super_mario_bros_3_heights_go_on_above_the_top() -> None:
    env = make_env(replace(QUICK, id="SuperMarioBros3-1-1-v0", noop_max=0))
    env.reset(seed=0)
    game: Any = env.unwrapped
    heights = []
    for y in (0x0110, 0x0010, 0x0000, 0xFFF0):
        game.ram[0x87], game.ram[0xA2] = divmod(y, 256)
        heights.append(game.position[2] // 16)
    assert np.diff(heights).tolist() == [16, 1, 1]
    env.close()


@pytest.mark.parametrize(
    "env_id",
    [
        "SuperMarioBros-v0",
        "SuperMarioBros2-v0",
        "SuperMarioBros2USA-v0",
        "SuperMarioBros3-v0",
    ],
)
def test_all_four_games_give_states_cells_and_progress(env_id: str) -> None:
    env = make_env(replace(QUICK, id=env_id))
    state, info = env.reset(seed=0)
    assert state.shape == (4, 42, 42)
    assert state.dtype == np.uint8
    assert state.std() > 5  # a picture, not a blank
    assert info["cell"].shape == (5,)
    states = [env.step(RIGHT)[0] for _ in range(12)]
    assert any((states[0] != other).any() for other in states[1:])
    env.close()


def test_gymnasium_and_stable_baselines_accept_the_environment() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from stable_baselines3.common.env_checker import check_env as sb3_check_env

        env = make_env(replace(QUICK, size=84))
        check_env(env, skip_render_check=True)
        sb3_check_env(env, warn=True)
        env.close()


def test_an_environment_of_another_package_works() -> None:
    from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper

    def rgb(**kwargs: Any) -> gym.Env[Any, Any]:
        return ImgObsWrapper(RGBImgObsWrapper(gym.make("MiniGrid-Empty-5x5-v0", **kwargs)))

    gym.register("MiniGridRGB-v0", rgb)
    env = make_env(replace(ENV, id="MiniGridRGB-v0", crop=[0, 0, 0, 0], action_repeat=1))
    check_env(env, skip_render_check=True)
    state, info = env.reset(seed=0)
    assert state.shape == (4, 42, 42)
    assert "cell" not in info
    for _ in range(200):
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        if terminated or truncated:
            break
    assert info["episode"]["length"] <= 200
    assert set(info["episode"]) == {"length", "reward"}
    env.close()


class OtherGame(NESEnv):
    """A game of nes-py of which nothing but its pictures is known."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(smb3_rom_path(), render_mode=render_mode)


def test_a_nes_game_that_is_no_mario_game_works() -> None:
    gym.register("OtherGame-v0", OtherGame, disable_env_checker=True)
    env = make_env(replace(ENV, id="OtherGame-v0", stuck_steps=100))
    state, info = env.reset(seed=0)
    assert state.shape == (4, 42, 42)
    assert "cell" not in info
    for _ in range(40):  # until it shows something
        state, _, terminated, truncated, _ = env.step(np.int64(0))
        assert not terminated
        assert not truncated
    assert state.std() > 5
    env.close()


def test_an_id_without_a_version_is_the_latest_one() -> None:
    env = make_env(replace(QUICK, id="SuperMarioBros-1-1"))
    assert "cell" in env.reset(seed=0)[1]
    env.close()


def test_states_are_copies_and_a_new_episode_starts_with_its_first_frame_repeated() -> None:
    env = make_env(replace(QUICK, noop_max=0))
    first, _ = env.reset(seed=0)
    kept = first.copy()
    assert all((first[0] == frame).all() for frame in first)
    later = first
    while (later == first).all():
        later = env.step(RIGHT)[0]
    assert (first == kept).all()
    again, _ = env.reset()
    assert (again == kept).all()
    env.close()


def test_distance_and_death_on_the_real_level() -> None:
    env = make_env(replace(QUICK, noop_max=0))
    env.reset(seed=0)
    terminated, length, info = False, 0, {}
    while not terminated:  # running right into the first goomba
        _, _, terminated, truncated, info = env.step(RIGHT)
        length += 1
        assert not truncated
        assert info["life_lost"] == terminated
        assert not info["respawned"]  # the picture shows how Mario dies
    assert 250 < info["episode"]["distance"] < 330
    assert info["episode"]["length"] == length
    assert info["episode"]["levels"] == "1-1"
    assert not info["episode"]["flag"]
    assert info["episode"]["levels_passed"] == 0
    env.close()


def test_stuck_episodes_are_truncated_not_terminated() -> None:
    env = make_env(replace(QUICK, noop_max=0, stuck_steps=5, stuck_distance=15))
    env.reset(seed=0)
    for step in range(1, 6):
        _, _, terminated, truncated, info = env.step(0)
        assert not terminated
        assert truncated == (step == 5)
    assert info["episode"]["length"] == 5
    env.close()


def test_progress_resets_the_stuck_limit() -> None:
    class Walk(gym.Env[Any, Any]):
        observation_space = spaces.Box(0, 255, (4, 4), np.uint8)
        action_space = spaces.Discrete(3)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.x, self.lives = 0, 2
            self.progress = Progress()
            return self.look()

        def step(self, action: Any) -> Any:
            self.x += 10 * int(action)
            if action == 2:
                self.lives, self.x = self.lives - 1, 0
            observation, info = self.look()
            return observation, 0.0, False, False, info

        def look(self) -> Any:
            self.progress.note((1, 1), self.x, 0, passed=None, lives=self.lives)
            return np.zeros((4, 4), np.uint8), {"progress": self.progress}

    env = StuckLimit(Walk(), steps=3, distance=15)
    env.reset()
    # 10, 20 (new ground), 20, 20, 20: cut
    assert [env.step(a)[3] for a in (1, 1, 0, 0, 0)] == [False, False, False, False, True]
    # a new life (2) starts from 0, and what the life before has seen is new to it
    env.reset()
    cut = [env.step(a)[3] for a in (1, 1, 0, 0, 2, 0, 1, 1, 0, 0, 0)]
    assert cut == [False] * 10 + [True]


def test_the_distance_of_an_episode_is_that_of_all_its_levels() -> None:
    class Warp(gym.Env[Any, Any]):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.progress = Progress()
            self.progress.note((1, 1), 40, 0, passed=None, lives=2)
            return None, {"progress": self.progress}

        def step(self, action: Any) -> Any:
            self.progress.note((1, 1), 3161, 0, passed=(1, 1), lives=2)
            self.progress.note((1, 2), 500, 0, passed=None, lives=2)
            self.progress.note((1, 2), 30, 0, passed=None, lives=2)
            return None, 0.0, False, False, {"progress": self.progress}

    env = MarioProgress(Warp())
    env.reset()
    *_, info = env.step(0)
    assert info["game_progress"] == {
        "distance": 3661,
        "flag": True,
        "levels_passed": 1,
        "levels": "1-1 1-2",
    }


@pytest.mark.parametrize("kind", ["always", "switched"])
def test_noisy_tv(kind: str) -> None:
    """A third of the picture in each direction is noise; the rest of it, and the game, as ever."""
    plain, noisy = (make_env(replace(QUICK, noop_max=0, noisy_tv=tv)) for tv in ("none", kind))
    (state, _), (shown, _) = plain.reset(seed=1), noisy.reset(seed=1)
    patch = np.zeros((42, 42), dtype=bool)
    patch[:14, :14] = True
    noise = [shown[-1][patch]]
    for action in (3, 3, 0, 3, 0, 0):
        state, *outcome, info = plain.step(action)
        shown, *noisy_outcome, noisy_info = noisy.step(action)
        assert outcome == noisy_outcome
        assert (info["cell"] == noisy_info["cell"]).all()
        assert (state[:, ~patch] == shown[:, ~patch]).all()
        changed = (shown[-1][patch] != noise[-1]).mean()
        assert changed > 0.9 if kind == "always" or action == 0 else changed == 0
        noise.append(shown[-1][patch])
    assert 100 < np.mean(noise) < 155
    assert np.std(noise) > 60
    again = make_env(replace(QUICK, noop_max=0, noisy_tv=kind))
    assert (again.reset(seed=1)[0][-1][patch] == noise[0]).all()
    for env in (plain, noisy, again):
        env.close()


def test_action_repeat_adds_rewards_and_stops_at_the_end() -> None:
    frames: list[int] = []
    env = ActionRepeat(Counter(), 6, lambda game: frames.append(len(game.unwrapped.actions)))  # type: ignore[attr-defined]
    env.reset()
    observation, reward, terminated, _, _ = env.step(2)
    assert (observation == 6).all()
    assert reward == 6
    assert frames == [1, 2, 3, 4, 5, 6]
    for _ in range(8):
        _, reward, terminated, _, _ = env.step(1)
    assert terminated
    assert reward == 2  # frames 49 and 50


def test_noop_start_waits_a_random_number_of_frames() -> None:
    env = NoopStart(Counter(), 30)
    waits = []
    for seed in range(40):
        env.reset(seed=seed)
        actions = env.unwrapped.actions  # type: ignore[attr-defined]
        assert not any(actions)
        waits.append(len(actions))
    assert min(waits) < 5
    assert 25 < max(waits) <= 30
    env.reset(seed=7)
    assert len(env.unwrapped.actions) == waits[7]  # type: ignore[attr-defined]


def test_sticky_actions_repeat_the_previous_one_with_their_probability() -> None:
    env = StickyActions(Counter(), 0.25)
    stuck = total = 0
    for seed in range(40):
        env.reset(seed=seed)
        wanted = [i % 4 for i in range(49)]
        for action in wanted:
            env.step(action)
        done = env.unwrapped.actions  # type: ignore[attr-defined]
        assert done[0] == wanted[0]
        stuck += sum(d != w for d, w in zip(done, wanted, strict=True))
        total += len(wanted) - 1
    assert 0.2 < stuck / total < 0.3


def test_grey_image_crops_and_averages_areas() -> None:
    class Picture(Counter):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            image = np.zeros((20, 30, 3), np.uint8)
            image[:4] = 255  # what the crop takes away
            image[4:12, 2:16] = 200  # the upper left quarter of the rest
            image[12:20, 2:9] = (90, 20, 10)  # half of the lower left one
            image[12:20, 9:16] = (10, 20, 150)  # the other half: (50, 20, 80) on average
            return image, {}

    frame, _ = GreyImage(Picture(), 2, (4, 0, 2, 0)).reset()
    assert frame.tolist() == [[200, 0], [80, 0]]


def test_mario_stands_out_from_the_sky() -> None:
    """Jumping on the spot: he covers 12 x 16 of 256 x 208 pixels, about 2 x 3 of 42 x 42."""
    env = make_env(replace(QUICK, noop_max=0, size=42, crop=[32, 0, 0, 0], frame_stack=1))
    env.reset(seed=0)
    for _ in range(3):
        state = env.step(5)[0]  # A
    env.close()
    air = state[0, 18:28, 4:11].astype(int)  # above the hill he starts in front of
    assert (air > 240).mean() > 0.5  # the sky
    assert (air < 200).sum() >= 4, air


def test_the_same_seed_plays_the_same_game() -> None:
    def play() -> list[np.ndarray]:
        env = make_env(replace(QUICK, sticky_probability=0.25))
        states = [env.reset(seed=5)[0]]
        states += [env.step(a)[0] for a in (3, 3, 4, 4, 2, 3, 6, 3)]
        env.close()
        return states

    assert all((a == b).all() for a, b in zip(play(), play(), strict=True))


@pytest.mark.parametrize(
    ("env_id", "what"),
    [
        ("SuperMarioBros-9-9-v0", "SuperMarioBros-9-9-v0"),
        ("nothing:Like-v0", "nothing"),
        ("./games:Like-v0", "is no name of a package"),
        ("CartPole-v1", "uint8 images"),
        ("Keyboard-v0", "n at most 256"),
    ],
)
def test_what_is_no_image_game_is_refused(env_id: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        make_env(replace(ENV, id=env_id))


class Keyboard(gym.Env[np.ndarray, np.int64]):
    """Has more keys than a byte has values."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(257)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode


gym.register("Keyboard-v0", Keyboard)


@pytest.mark.parametrize(("actions", "count"), [("right_only", 5), ("simple", 7), ("complex", 12)])
def test_sets_of_actions(actions: str, count: int) -> None:
    env = make_env(replace(QUICK, actions=actions))
    assert action_count(env.action_space) == len(action_names(env)) == count
    env.close()


@pytest.mark.parametrize(
    ("env_id", "places"),
    [
        ("SuperMarioBros-1-1-v0", (0x74E, 0x74F)),
        ("SuperMarioBros2-1-1-v0", (0x74E, 0x74F)),
        ("SuperMarioBros2USA-1-1-v0", (0x532,)),
        ("SuperMarioBros3-1-1-v0", (0x61, 0x62)),
    ],
)
def test_cells_tell_the_areas_of_a_level_apart(env_id: str, places: tuple[int, ...]) -> None:
    for place in places:
        env = make_env(replace(QUICK, id=env_id, noop_max=0, action_repeat=1))
        env.reset(seed=0)
        before = env.step(0)[-1]["cell"].tolist()
        game: Any = env.unwrapped
        game.ram[place] ^= 2
        after = env.step(0)[-1]["cell"].tolist()
        assert after[:2] == before[:2]
        assert after[2] != before[2], hex(place)
        env.close()


def test_grey_image_crops_all_four_sides() -> None:
    class Framed(Counter):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            image = np.full((20, 30, 3), 255, np.uint8)
            image[1:-2, 3:-4] = 50
            return image, {}

    frame, _ = GreyImage(Framed(), 2, (1, 2, 3, 4)).reset()
    assert (frame == 50).all()
