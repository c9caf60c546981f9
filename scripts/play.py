"""Watch a checkpoint play: `python scripts/play.py ckpt=PATH [episodes=1] [render=video]`.

Prints one JSON line per episode.
"""

from omegaconf import DictConfig

from icm import cli


def main(settings: DictConfig) -> None:
    """Play in a window if there is a display, else into an mp4."""
    import json
    import os
    import sys
    from collections.abc import Iterator
    from pathlib import Path

    from icm.config import FASTEST, SLOWEST, PlayConfig, check_seed, typed
    from icm.errors import UserError

    options = typed(settings, PlayConfig)
    if options.episodes < 1:
        raise UserError(f"episodes={options.episodes}: must be at least 1")
    if not SLOWEST <= options.speed <= FASTEST:
        limits = f"between {SLOWEST:g} and {FASTEST:g}"
        raise UserError(f"speed={options.speed}: must be {limits}, times the game's own")
    check_seed(options.seed)
    displays = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    has_display = sys.platform != "linux" or any(map(os.environ.get, displays))
    render = options.render
    if render == "auto":
        render = "human" if has_display and options.out is None else "video"
    if render not in ("none", "human", "video"):
        raise UserError(f"render={render}: must be one of auto, human, video, none")
    if options.out is not None and render != "video":
        raise UserError(f"out={options.out}: render={render} writes no file; render=video does")
    if render == "human" and not has_display:
        raise UserError("render=human: there is no display here; render=video writes an mp4")

    # only now, because torch is slow to import
    from icm.agents.base import Agent
    from icm.device import resolve_device, share_cores
    from icm.playing import Moment, Player, load_agent

    device = resolve_device(options.device)

    def load(path: Path) -> tuple[Agent, int]:
        agent, _, step = load_agent(path, device, options.env)
        return agent, step

    def in_window(player: Player) -> Iterator[Moment]:
        from icm.viz.window import Window

        window = Window(player, path, load, options.mind, options.speed)
        yield from window.play(options.episodes)
        window.close()

    def into_video(player: Player) -> Iterator[Moment]:
        from icm.viz.mind import MindPanel, beside
        from icm.viz.video import FPS, record

        folder = path.resolve().parent  # of a run, or wherever a single file lies
        videos = (folder.parent if folder.name == "checkpoints" else folder) / "videos"
        out = Path(options.out) if options.out else videos / f"play_{path.stem}.mp4"
        panel = MindPanel(player.actions) if options.mind else None
        with record(out, FPS * options.speed) as video:
            for moment in player.play(options.episodes):
                mind = panel.draw(moment) if panel else None
                for frame in moment.frames:
                    video.add(frame if mind is None else beside(frame, mind))
                yield moment
        print(f"video: {out}", file=sys.stderr)

    path = Path(options.ckpt)
    share_cores(device)
    agent, config, step = load_agent(path, device, options.env)
    number = 0
    is_watched = render != "none"
    with Player(agent, config, step, options.greedy, options.seed, is_watched) as player:
        if render == "human":
            moments = in_window(player)
        elif render == "video":
            moments = into_video(player)
        else:
            moments = player.play(options.episodes)
        for moment in moments:
            if moment.episode is not None:
                print(json.dumps({"episode": number, **moment.episode}), flush=True)
                number += 1


if __name__ == "__main__":
    cli.run(main, "play")
