"""Films of episodes: played again, because a training draws few of their frames."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from icm.config import EnvConfig
from icm.envs import make_env
from icm.envs.wrappers import Env
from icm.exploration import Recording
from icm.viz.video import FPS, record

LONGEST = 30  # seconds; a longer best episode shows its end
MP4_FPS, GIF_FPS = 30, 10
LAPSE = 4  # how much faster than the game a way is shown


def film(config: EnvConfig, best: Recording, path: Path) -> dict[str, bytes]:
    """Replay an episode and write an mp4 of it, and an animation beside that.

    Returns:
        the animation, a GIF file, by its name in TensorBoard, "clip/best".

    Raises:
        UserError: the file cannot be written.
    """
    animation = path.with_suffix(".gif")
    with record(path, MP4_FPS) as video, record(animation, GIF_FPS) as gif:

        def show(number: int, picture: np.ndarray) -> None:
            video.add(picture)
            if number % (FPS // GIF_FPS) == 0:
                gif.add(picture)

        # the last action may have fewer frames; the first of all is shown in any case
        first = max(len(best.actions) * config.action_repeat - LONGEST * FPS, 0)
        _play_again(config, best, FPS // MP4_FPS, show, first)
    return {"clip/best": animation.read_bytes()}


def film_way(config: EnvConfig, way: Recording, path: Path) -> dict[str, bytes]:
    """Replay a way and write an mp4 of all of it, as a time lapse.

    Returns:
        nothing for TensorBoard: it may be minutes long.

    Raises:
        UserError: the file cannot be written.
    """
    with record(path, MP4_FPS) as video:
        _play_again(config, way, LAPSE * FPS // MP4_FPS, lambda _, picture: video.add(picture))
    return {}


def _play_again(
    config: EnvConfig,
    episode: Recording,
    every: int,
    show: Callable[[int, np.ndarray], None],
    first: int = 0,
) -> None:
    """Show one in `every` frames from the `first` on: its number from there, and its picture."""
    number = -first - 1

    def on_frame(env: Env) -> None:
        nonlocal number
        number += 1
        if number >= 0 and number % every == 0:
            picture: Any = env.render()
            show(number, picture)

    env = make_env(config, "rgb_array", on_frame)
    env.reset(seed=episode.seed)
    for action in episode.actions:
        env.step(action)
    env.close()
