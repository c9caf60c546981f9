"""Watch a checkpoint play: `python scripts/play.py ckpt=PATH [episodes=1] [render=video]`.

Prints one JSON line per episode.
"""

from omegaconf import DictConfig

from icm import cli


def main(settings: DictConfig) -> None:
    """Play in a window where there is a display, into an mp4 where there is none."""
    import json
    import os
    import sys
    from contextlib import nullcontext
    from pathlib import Path

    from icm.config import PlayConfig, typed
    from icm.errors import UserError

    options = typed(settings, PlayConfig)
    if options.episodes < 1:
        raise UserError(f"episodes={options.episodes}: must be at least 1")
    has_display = sys.platform != "linux" or bool(os.environ.get("DISPLAY"))
    render = options.render
    if render == "auto":
        render = "human" if has_display else "video"
    if render not in ("none", "human", "video"):
        raise UserError(f"render={render}: must be one of auto, human, video, none")
    if render == "human" and not has_display:
        raise UserError("render=human: there is no display here; render=video writes an mp4")

    # only now, because torch takes its time to import
    import numpy as np

    from icm.device import resolve_device, share_cores
    from icm.envs import action_names
    from icm.envs.wrappers import Env
    from icm.evaluation import Moment, load_agent, play
    from icm.viz.mind import MindPanel, beside
    from icm.viz.video import Pace, VideoWriter

    path = Path(options.ckpt)
    share_cores()
    agent, config, step = load_agent(path, resolve_device(options.device), options.env)
    videos = path.parent.parent / "videos"  # of its run folder
    out = Path(options.out) if options.out else videos / f"{path.stem}.mp4"
    pace = Pace()
    frames: list[np.ndarray] = []  # of the running agent step
    panel: MindPanel | None = None
    with VideoWriter(out) if render == "video" else nullcontext() as video:

        def on_frame(env: Env) -> None:
            if video is not None:
                frames.append(np.array(env.render()))
            elif render == "human":
                env.render()
                pace.tick()

        def on_moment(env: Env, moment: Moment) -> None:
            nonlocal panel
            if video is None:
                return
            panel = panel or MindPanel(action_names(env))
            mind = panel.draw(moment)
            for frame in frames:
                video.add(beside(frame, mind))
            frames.clear()

        for number, episode in enumerate(
            play(
                agent,
                config,
                step,
                options.episodes,
                options.greedy,
                options.seed,
                "human" if render == "human" else "rgb_array",
                on_frame,
                on_moment,
            )
        ):
            print(json.dumps({"episode": number, **episode}), flush=True)
    if video is not None:
        print(f"video: {out}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, "play")
