# /// script
# requires-python = ">=3.13"
# dependencies = ["matplotlib", "numpy", "imageio[ffmpeg]"]
# ///
"""Draws docs/images/run.png: `uv run docs/figures.py EPISODE.mp4`, a video of scripts/play.py.

Above frames of the episode, below the training curves of docs/results/level_seed*.metrics.jsonl.
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
    ("episode/distance", "distance of an episode, pixels", 711, "711"),
    ("explore/cells", "cells discovered", None, ""),
    ("icm/inverse_gain", "inverse gain, nats", None, ""),
)
FPS = 60
FRAMES = 6
SMOOTH = 5  # log intervals on either side


def smoothed(y: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, as far as there are any."""
    return np.array([np.nanmean(y[max(0, i - SMOOTH) : i + SMOOTH + 1]) for i in range(len(y))])


def main(video: Path) -> None:
    """Draw the figure."""
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
    for axes, (name, title, level, label) in zip(bottom, CURVES, strict=True):
        for seed, colour in SEEDS.items():
            lines = (DOCS / f"results/level_seed{seed}.metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            x = np.array([row["step"] for row in rows]) / 1000
            y = np.array([row.get(name, np.nan) for row in rows], dtype=float)
            axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(x, smoothed(y), color=colour, linewidth=1.8, label=f"seed {seed}")
        if level is not None:
            axes.axhline(level, color="grey", linestyle="--", linewidth=1)
            axes.text(x[-1], level, f" {label}", va="bottom", ha="right", color="grey")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("agent steps, thousands")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    bottom[0].legend(frameon=False)
    figure.savefig(DOCS / "images/run.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
