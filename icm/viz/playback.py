"""A checkpoint that plays: in a window, into a video, or unseen."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from icm.agents.base import Agent
from icm.config import PlayConfig
from icm.device import resolve_device, share_cores
from icm.display import counted
from icm.playing import Moment, Player, load_agent


def play(options: PlayConfig, render: str) -> Iterator[dict[str, Any]]:
    """Play; yields what is known of each episode as it ends.

    Args:
        options: the settings.
        render: `human`, `video` or `none`.

    Raises:
        UserError: the checkpoint does not play, or a video cannot be written.
    """
    device, path = resolve_device(options.device), Path(options.ckpt)
    share_cores(device)
    agent, config, step = load_agent(path, device, options.env)
    is_watched = render != "none"
    with Player(agent, config, step, options.greedy, options.seed, is_watched) as player:
        if render == "human":
            moments = _in_window(player, options, device)
        elif render == "video":
            moments = _into_video(player, options)
        else:
            moments = player.play(options.episodes)
        for moment in moments:
            if moment.episode is not None:
                yield moment.episode


def _in_window(player: Player, options: PlayConfig, device: torch.device) -> Iterator[Moment]:
    from icm.viz.window import Window  # here, because the others need no pygame

    def load(path: Path) -> tuple[Agent, int]:
        agent, _, step = load_agent(path, device, options.env)
        return agent, step

    window = Window(player, Path(options.ckpt), load, options.mind, options.speed)
    yield from window.play(options.episodes)
    window.close()


def _into_video(player: Player, options: PlayConfig) -> Iterator[Moment]:
    from icm.viz.mind import MindPanel, beside  # here, because the others need no video
    from icm.viz.video import FPS, record

    path = Path(options.ckpt)
    folder = path.resolve().parent  # of a run, or wherever a single file lies
    videos = (folder.parent if folder.name == "checkpoints" else folder) / "videos"
    out = Path(options.out) if options.out else videos / f"play_{path.stem}.mp4"
    panel = MindPanel(player.actions) if options.mind else None
    with record(out, FPS * options.speed) as video:
        for moment in counted(player.play(options.episodes), "recording, agent steps"):
            mind = panel.draw(moment) if panel else None
            for frame in moment.frames:
                video.add(frame if mind is None else beside(frame, mind))
            yield moment
    print(f"video: {out}", file=sys.stderr)
