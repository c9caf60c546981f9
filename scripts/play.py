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

    from icm.config import PlayConfig, checked
    from icm.errors import UserError

    options = checked(settings, PlayConfig)
    displays = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    has_display = sys.platform != "linux" or any(map(os.environ.get, displays))
    render = options.render
    if render == "auto":
        render = "human" if has_display and options.out is None else "video"
    if options.out is not None and render != "video":
        raise UserError(f"out={options.out}: render={render} writes no file; render=video does")
    if render == "human" and not has_display:
        raise UserError("render=human: there is no display here; render=video writes an mp4")

    # only now, because torch is slow to import
    from icm.viz.playback import play

    for number, episode in enumerate(play(options, render)):
        print(json.dumps({"episode": number, **episode}), flush=True)


if __name__ == "__main__":
    cli.run(main, "play")
