# /// script
# requires-python = ">=3.13"
# dependencies = ["matplotlib", "numpy", "imageio[ffmpeg]"]
# ///
"""Draws curves of docs/images: `uv run docs/figures.py [EPISODE.mp4] [way.mp4]`.

level.png, game.png and noise.png show rows of results.md: means over seeds and standard errors
of raw files in docs/results; practice.png: single seeds.
Given a video of checkpoints/1-1.pt, run.png shows frames of it above the curves of such agents.
Given the way.mp4 of a run folder, way.png shows frames of it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
DISTANCE = ("episode/distance", "distance of an episode, pixels")
CELLS = ("explore/cells", "cells discovered")
GAIN = ("icm/inverse_gain", "inverse gain, nats")
PASSED = ("episode/flag", "share of games past 1-1")
LEVELS = ("explore/levels", "levels reached")
ICM = ("ICM", "#1f4e8c")
RANDOM_FEATURES = ("random features", "#c8641b")
LEVEL_ROWS = {
    "level": ICM,
    "level_learned": ("ICM, surprise in learned features", "#7a4fa3"),
    "level_dqn": ("ICM, Q-learning", "#3f8f4f"),
    "level_random_features": RANDOM_FEATURES,
    "level_none": ("no curiosity", "#808080"),
}
GAME_ROWS = {
    "game_half_hour": ("today's preset", "#1f4e8c"),
    "game_layer_norm": ("750 k agent steps", "#3f8f4f"),
    "game": ("… without layer normalisation", "#c8641b"),
}
SIGNALS = {
    "icm": ICM,
    "random_features": RANDOM_FEATURES,
    "disagreement": ("disagreement", "#7a4fa3"),
}
NOISES = {
    "surprise": "without noise: distance, pixels",
    "noise": "a corner of noise",
    "switch": "noise that an action switches on",
}
PRACTICE = {
    "seed 42": ("practice", "42", "#1f4e8c"),
    "seed 4": ("practice", "4", "#c8641b"),
    "seed 5": ("practice", "5", "#3f8f4f"),
}
FPS = 60
GAME = 768  # columns of a video's frame that show the game, not the panel beside it
FRAMES = 6
SMOOTH = 5  # log intervals on either side


def smoothed(y: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, without missing ones."""
    return np.array([np.nanmean(y[max(0, i - SMOOTH) : i + SMOOTH + 1]) for i in range(len(y))])


def read(row: str, seed: str = "*") -> list[list[dict[str, float]]]:
    """The log intervals of every seed of a row, or of one, cut to the shortest."""
    seeds = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((DOCS / "results").glob(f"{row}_seed{seed}.metrics.jsonl"))
    ]
    shortest = min((len(lines) for lines in seeds), default=0)
    return [lines[:shortest] for lines in seeds]


def minutes(seeds: list[list[dict[str, float]]]) -> np.ndarray:
    """Minutes from the start of training to the end of every log interval, by its fastest seed.

    Others had something else running beside them, or paused for a while.
    """
    steps = np.diff([0, *(line["step"] for line in seeds[0])])
    speeds = [[line["speed/agent_steps_per_s"] for line in lines] for lines in seeds]
    return np.cumsum(steps / np.max(speeds, axis=0)) / 60


def curves(
    axes: Axes,
    rows: dict[str, tuple[str, str]],
    metric: tuple[str, str],
    by_minutes: bool = False,
) -> None:
    """Means over seeds and their standard errors, a line for each row."""
    name, title = metric
    for row, (label, colour) in rows.items():
        seeds = read(row)
        if not any(name in line for lines in seeds for line in lines):
            continue
        x = minutes(seeds) if by_minutes else np.array([line["step"] for line in seeds[0]]) / 1000
        ys = [[line.get(name, np.nan) for line in lines] for lines in seeds]
        each = np.array([smoothed(np.array(y, dtype=float)) for y in ys])
        mean = each.mean(0)
        error = each.std(0, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.zeros(len(mean))
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        plural = "s" if len(each) > 1 else ""
        axes.plot(x, mean, color=colour, label=f"{label}, {len(each)} seed{plural}")
    name_axes(axes, title, by_minutes)


def name_axes(axes: Axes, title: str, by_minutes: bool) -> None:
    """Label a plot."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("minutes" if by_minutes else "agent steps, thousands")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def compare(
    file: str, rows: dict[str, tuple[str, str]], metrics: Sequence[tuple[str, str]]
) -> None:
    """Draw metrics of existing rows against agent steps and, below, against minutes."""
    if not any(read(row) for row in rows):
        return
    figure, all_axes = plt.subplots(2, len(metrics), figsize=(12.4, 6.6), layout="constrained")
    for line, by_minutes in zip(all_axes, (False, True), strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            curves(axes, rows, metric, by_minutes)
    save(figure, all_axes[0, 0], file)


def save(figure: Figure, named: Axes, file: str) -> None:
    """Save a figure, with the legend of one of its plots on top."""
    lines, names = named.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper left", ncols=len(names), frameon=False)
    figure.savefig(DOCS / "images" / file, dpi=100)


def compare_noises() -> None:
    """Draw the distances of each signal without noise, with noise and with a switch for it."""
    figure, all_axes = plt.subplots(1, 3, figsize=(12.4, 3.6), layout="constrained", sharey=True)
    for axes, (noise, title) in zip(all_axes, NOISES.items(), strict=True):
        rows = {f"{noise}_{signal}": style for signal, style in SIGNALS.items()}
        curves(axes, rows, (DISTANCE[0], title))
    save(figure, all_axes[0], "noise.png")


def show_run(video: Path) -> None:
    """Draw frames of an episode above the curves of agents like checkpoints/1-1.pt."""
    figure = plt.figure(figsize=(12.4, 5.9))
    frames = iio.imread(video)
    top = figure.subplots(
        1,
        FRAMES,
        gridspec_kw={"bottom": 0.62, "top": 0.93, "wspace": 0.05, "left": 0.05, "right": 0.98},
    )
    for axes, index in zip(top, np.linspace(0, len(frames) - 1, FRAMES).astype(int), strict=True):
        axes.imshow(frames[index][:, :GAME])
        axes.set_title(f"{index / FPS:.0f} s", fontsize=10)
        axes.axis("off")
    bottom = figure.subplots(
        1, 3, gridspec_kw={"bottom": 0.1, "top": 0.52, "left": 0.05, "right": 0.98}
    )
    for axes, metric in zip(bottom, (DISTANCE, CELLS, GAIN), strict=True):
        curves(axes, {"level_2919099": ICM}, metric)
    bottom[0].axhline(711, color="grey", linestyle="--", linewidth=1)
    bottom[0].text(240, 711, "711: Pathak et al. 2017", va="bottom", ha="right", color="grey")
    bottom[0].legend(frameon=False)
    figure.savefig(DOCS / "images/run.png", dpi=100)


def show_practice() -> None:
    """Draw how many levels each training with practice has found."""
    figure, all_axes = plt.subplots(1, 2, figsize=(12.4, 3.8), layout="constrained", sharey=True)
    for axes, by_minutes in zip(all_axes, (False, True), strict=True):
        for label, (row, seed, colour) in PRACTICE.items():
            (lines,) = read(row, seed)
            x = minutes([lines]) if by_minutes else [line["step"] / 1000 for line in lines]
            found = [line[LEVELS[0]] for line in lines]
            axes.step(x, found, where="post", label=label, color=colour)
        axes.axhline(11, color="grey", linestyle="--", linewidth=1)
        axes.text(0, 11, "11: Burda et al. 2018", va="bottom", color="grey")
        name_axes(axes, "levels discovered", by_minutes)
    save(figure, all_axes[0], "practice.png")


def show_way(video: Path) -> None:
    """Draw frames of a way, from its start to its end."""
    frames = iio.imread(video)
    figure, all_axes = plt.subplots(4, 6, figsize=(12.4, 8.2), layout="constrained")
    chosen = np.linspace(0, len(frames) - 1, all_axes.size).astype(int)
    for axes, index in zip(all_axes.flat, chosen, strict=True):
        axes.imshow(frames[index])
        axes.axis("off")
    figure.savefig(DOCS / "images/way.png", dpi=80)


if __name__ == "__main__":
    compare("level.png", LEVEL_ROWS, (DISTANCE, CELLS, GAIN))
    compare("game.png", GAME_ROWS, (PASSED, CELLS, LEVELS))
    compare_noises()
    show_practice()
    for video in map(Path, sys.argv[1:]):
        (show_way if video.stem == "way" else show_run)(video)
