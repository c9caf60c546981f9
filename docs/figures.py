# /// script
# requires-python = ">=3.13"
# dependencies = ["matplotlib", "numpy", "imageio[ffmpeg]"]
# ///
"""Draws the figures: `uv run docs/figures.py EPISODE.mp4`, a video of scripts/play.py.

docs/images/run.png: above frames of the episode, below the training curves of every seed.
docs/images/level.png, game.png: means over seeds of the rows in docs/results.md that are there.
"""

import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent
SEEDS = {42: "#1f4e8c", 4: "#c8641b", 5: "#3a9158"}
CURVES = (
    ("episode/distance", "distance of an episode, pixels"),
    ("explore/cells", "cells discovered"),
    ("icm/inverse_gain", "inverse gain, nats"),
)
ROWS = {
    "level": ("PPO, ICM (default)", "#1f4e8c"),
    "level_random_features": ("PPO, random features", "#c8641b"),
    "level_dqn": ("DQN, ICM", "#3a9158"),
    "level_pqn": ("PQN, ICM", "#8a4fb0"),
    "level_none": ("PPO, no curiosity", "#777777"),
    "game": ("PPO, ICM (default)", "#1f4e8c"),
    "game_random_features": ("PPO, random features", "#c8641b"),
}
LEVEL = (CURVES[0], CURVES[1], ("episode/flag", "share of episodes at the flag"))
GAME = (CURVES[0], CURVES[1], ("episode/levels_passed", "levels passed in a game"))
FIRST_PAPER = 711  # pixels
FPS = 60
FRAMES = 6
SMOOTH = 5  # log intervals on either side


def lines_of(row: str, seed: int) -> list[dict[str, float]]:
    """The log intervals of a training; none if it is not there."""
    path = DOCS / f"results/{row}_seed{seed}.metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(lines: list[dict[str, float]], name: str) -> np.ndarray:
    """A metric in every log interval, NaN where it is missing."""
    return np.array([line.get(name, np.nan) for line in lines], dtype=float)


def minutes(lines: list[dict[str, float]]) -> np.ndarray:
    """Minutes of training at the end of every log interval."""
    steps = np.diff(curve(lines, "step"), prepend=0)
    return np.cumsum(steps / curve(lines, "speed/agent_steps_per_s")) / 60


def smoothed(y: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, as far as there are any."""
    windows = [y[max(0, i - SMOOTH) : i + SMOOTH + 1] for i in range(len(y))]
    return np.array([np.nan if np.isnan(w).all() else np.nanmean(w) for w in windows])


def tidy(axes: plt.Axes, title: str) -> None:
    """What all plots have."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_run(video: Path) -> None:
    """Draw docs/images/run.png."""
    figure = plt.figure(figsize=(12.4, 5.9))
    frames = iio.imread(video)
    top = figure.subplots(
        1,
        FRAMES,
        gridspec_kw={"bottom": 0.62, "top": 0.93, "wspace": 0.05, "left": 0.05, "right": 0.98},
    )
    for axes, index in zip(top, np.linspace(0, len(frames) - 1, FRAMES).astype(int), strict=True):
        axes.imshow(frames[index])
        axes.set_title(f"{index / FPS:.0f} s", fontsize=10)
        axes.axis("off")
    bottom = figure.subplots(
        1, len(CURVES), gridspec_kw={"bottom": 0.1, "top": 0.52, "left": 0.05, "right": 0.98}
    )
    for axes, (name, title) in zip(bottom, CURVES, strict=True):
        for seed, colour in SEEDS.items():
            lines = lines_of("level", seed)
            x, y = curve(lines, "step") / 1000, curve(lines, name)
            axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(x, smoothed(y), color=colour, linewidth=1.8, label=f"seed {seed}")
        tidy(axes, title)
        axes.set_xlabel("agent steps, thousands")
    first_paper(bottom[0])
    bottom[0].legend(frameon=False)
    figure.savefig(DOCS / "images/run.png", dpi=100)


def first_paper(axes: plt.Axes) -> None:
    """Mark the distance that Pathak et al. 2017 reach after 1.5 million iterations."""
    axes.axhline(FIRST_PAPER, color="grey", linestyle="--", linewidth=1)
    right = axes.get_xlim()[1]
    axes.text(right, FIRST_PAPER, f"{FIRST_PAPER}", va="bottom", ha="right", color="grey")


def draw_means(name: str, curves: tuple[tuple[str, str], ...]) -> None:
    """Draw docs/images/<name>.png of the rows whose names begin so.

    Above over agent steps, below over minutes; mean of the seeds, and its standard error shaded.
    """
    figure, grid = plt.subplots(2, len(curves), figsize=(12.4, 7), layout="constrained")
    for row, (label, colour) in ROWS.items():
        runs = [lines for seed in SEEDS if (lines := lines_of(row, seed))]
        if row.split("_")[0] != name or not runs:
            continue
        for axes_of_time, time in zip(grid, ("step", "minutes"), strict=True):
            times = [curve(r, "step") / 1000 if time == "step" else minutes(r) for r in runs]
            x = np.linspace(0, min(t[-1] for t in times), 200)
            for axes, (metric, title) in zip(axes_of_time, curves, strict=True):
                each = [
                    np.interp(x, t, smoothed(curve(r, metric)))
                    for t, r in zip(times, runs, strict=True)
                ]
                mean = np.mean(each, 0)
                axes.plot(x, mean, color=colour, linewidth=1.8, label=f"{label} ({len(runs)})")
                if len(each) > 1:
                    error = np.std(each, 0, ddof=1) / len(each) ** 0.5
                    axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2)
                tidy(axes, title)
                axes.set_xlabel("agent steps, thousands" if time == "step" else "minutes")
    for axes in grid[:, 0]:
        first_paper(axes)
    grid[0, 0].legend(frameon=False)
    figure.savefig(DOCS / f"images/{name}.png", dpi=100)


if __name__ == "__main__":
    draw_run(Path(sys.argv[1]))
    draw_means("level", LEVEL)
    draw_means("game", GAME)
