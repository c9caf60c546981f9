"""Videos, animations, single pictures, and films of recorded episodes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import settings

from icm.envs import episodes_in, make_env, make_vector_env
from icm.errors import UserError
from icm.exploration import Exploration, Recording
from icm.viz.clip import film, film_way
from icm.viz.video import record

ENV = replace(settings("env.stuck_steps=8").env, num_envs=1)


def pictures_in(path: Path) -> list[np.ndarray]:
    return [image for image in imageio.get_reader(path)]  # noqa: C416 (its length is infinite)


def picture(number: int) -> np.ndarray:
    return np.full((48, 64, 3), 4 * number, np.uint8)


@pytest.mark.parametrize(
    ("name", "fps", "pictures", "rate", "length"),
    [
        ("film.mp4", 60, 30, 60, 30),
        ("film.mp4", 15, 30, 15, 30),
        ("film.mp4", 240, 30, 60, 8),
        ("film.gif", 60, 30, 20, 10),
    ],
)
def test_a_video_has_its_pictures_at_its_rate(
    name: str,
    fps: float,
    pictures: int,
    rate: float,
    length: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("new: 100%") / name
    with record(out, fps) as video:
        for number in range(pictures):
            video.add(picture(number))
    assert [path.name for path in out.parent.iterdir()] == [name]
    found = pictures_in(out)
    assert len(found) == length
    assert found[0].shape[:2] == (48, 64)
    values = [float(image[..., :3].mean()) for image in found]
    assert values == pytest.approx([4 * n * pictures / length for n in range(length)], abs=9)
    meta = imageio.get_reader(out).get_meta_data()
    if name.endswith(".mp4"):
        assert meta["codec"] == "h264"
        assert meta["pix_fmt"].startswith("yuv420p")
        assert meta["fps"] == rate
    else:
        assert meta["duration"] == 1000 / rate
        assert meta["loop"] == 0  # for ever


def test_a_folder_gets_single_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("frames: 100%d")
    with record(out) as video:
        for number in range(3):
            video.add(picture(number))
    names = sorted(path.name for path in out.iterdir())
    assert names == ["000001.png", "000002.png", "000003.png"]
    assert (imageio.imread(out / "000003.png") == picture(2)).all()


def test_what_goes_wrong_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"film\.avi: must end in \.mp4 or \.gif"):
        record(tmp_path / "film.avi").__enter__()
    with pytest.raises(UserError, match=r"cannot write /proc/film\.mp4"):
        record(Path("/proc/film.mp4")).__enter__()
    (tmp_path / "film.mp4").write_text("precious")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "precious").touch()

    def fail(name: str) -> None:
        with record(tmp_path / name) as video:
            video.add(picture(1))
            raise KeyError

    with pytest.raises(KeyError):
        fail("film.mp4")
    with pytest.raises(UserError, match="frames: exists"):
        record(tmp_path / "frames").__enter__()
    with pytest.raises(UserError, match=r"out=\.: exists"):
        record(Path()).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "frames"]
    assert (tmp_path / "film.mp4").read_text() == "precious"
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["film.mp4", "film.gif", "frames"])
def test_a_video_for_which_there_is_no_room_in_the_end_leaves_what_was_there(
    name: str, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    (tmp_path / "film.mp4").write_text("precious")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)

    def write() -> None:
        with record(tmp_path / name) as video:
            for _ in range(3):  # ffmpeg writes them all when it ends
                video.add(rng.integers(0, 255, (48, 64, 3), np.uint8))

    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(UserError, match=rf"cannot write .*{name}"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    assert (tmp_path / "film.mp4").read_text() == "precious"


@pytest.mark.parametrize("emulator", ["nes_py", "libretro"])
def test_a_recording_is_the_episode_again(emulator: str) -> None:
    """The second one of an environment."""
    config = replace(ENV, emulator=emulator, sticky_probability=0.25)
    envs, found, rng = make_vector_env(config), Exploration(), np.random.default_rng(3)
    envs.reset(seed=11)
    ended = 0
    while ended < 2:
        _, _, terminated, truncated, infos = envs.step(rng.integers(1, 5, 1))
        ended += int((terminated | truncated)[0])
    envs.close()
    (episode,) = episodes_in(infos).values()
    found.finish(32, episode)
    best = found.best
    assert best is not None
    env = make_env(config, "rgb_array")
    env.reset(seed=best.seed)
    for action in best.actions:
        *_, info = env.step(action)
    env.close()
    assert info["episode"]["distance"] == best.score > 40


class Flash(gym.Env[np.ndarray, np.int64]):
    """Is over with its first frame."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 60}
    observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        return self.render(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.render(), 0.0, True, False, {}

    def render(self) -> np.ndarray:
        return np.full((84, 84, 3), 99, np.uint8)


def test_a_film_of_a_single_frame_shows_it(tmp_path: Path) -> None:
    gym.register("Flash-v0", Flash)
    config = replace(ENV, id="Flash-v0", crop=[0, 0, 0, 0])
    flash = Recording(step=1, score=1.0, seed=1, actions=[0])
    for each in (film, film_way):
        each(config, flash, tmp_path / "flash.mp4")
        assert len(pictures_in(tmp_path / "flash.mp4")) == 1


def test_a_film_shows_the_end_of_the_best_episode(tmp_path: Path) -> None:
    best = Recording(step=32, score=0.0, seed=7, actions=[3, 4] * 10)
    images = film(replace(ENV, emulator="libretro"), best, tmp_path / "best.mp4")
    assert images == {"clip/best": (tmp_path / "best.gif").read_bytes()}
    frames = 6 * len(best.actions)
    shown = pictures_in(tmp_path / "best.mp4")
    assert frames / 2 - 3 <= len(shown) <= frames / 2
    assert shown[0].shape == (240, 256, 3)
    assert shown[0].std() > 20
    assert len(pictures_in(tmp_path / "best.gif")) == pytest.approx(frames / 6, abs=1)
    film_way(replace(ENV, emulator="libretro"), best, tmp_path / "way.mp4")
    whole = pictures_in(tmp_path / "way.mp4")
    assert len(whole) == frames / 8
    difference = np.abs(whole[1].astype(int) - shown[4]).mean()
    assert difference < 2 < np.abs(whole[1].astype(int) - shown[-1]).mean()


def test_of_a_long_episode_the_last_seconds_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(ENV, emulator="libretro")
    best = Recording(step=32, score=0.0, seed=7, actions=[3, 4] * 10)
    film(config, best, tmp_path / "whole.mp4")
    monkeypatch.setattr("icm.viz.clip.LONGEST", 1)
    film(config, best, tmp_path / "end.mp4")
    whole, end = (pictures_in(tmp_path / f"{name}.mp4") for name in ("whole", "end"))
    assert len(end) == 30
    differences = [np.abs(end[0].astype(int) - whole[number]).mean() for number in (30, 0)]
    assert differences[0] < differences[1] / 2  # both are compressed, each in its own way
