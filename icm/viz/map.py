"""Maps of what a run has explored: what places look like, and what happened there."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from icm.checkpoint import write_whole
from icm.envs.mario import CELL
from icm.exploration import Cell, Exploration, Picture, Place, Visits

ROWS = 13  # blocks of a screen without its status bar
GROUND = 14  # a cell with y // 16 = y is in row GROUND - y: there stands a small Mario
DPI = 100
LEFT, RIGHT, ABOVE, BELOW = 16, 96, 30, 30  # pixels around a panel
NARROWEST = 40  # blocks: room for a title
WIDEST = 1000  # blocks: more than any level has, and as much as can be drawn
DIMMED = 0.45  # what is left of a picture's brightness under colours


def draw_maps(exploration: Exploration, folder: Path) -> dict[str, np.ndarray]:
    """Write a map of every place into a folder, as PNG.

    Returns:
        the images, RGB uint8 (H, W, 3), by the names of the files: "1-1", or "1-1_area_2" for the
        second area that was found of a level.

    Raises:
        UserError: the folder cannot be written to.
    """
    places: dict[Place, dict[Cell, Visits]] = defaultdict(dict)
    for cell, visits in exploration.cells.items():
        places[cell[:3]][cell] = visits
    areas: dict[tuple[int, int], int] = defaultdict(int)  # of each level, so far
    images = {}
    for place, cells in places.items():
        level = place[:2]
        areas[level] += 1
        name = "{}-{}".format(*level) + (f"_area_{areas[level]}" if areas[level] > 1 else "")
        images[name] = draw_map(name, exploration.pictures.get(place, Picture()), cells)
        _write_png(folder / f"{name}.png", images[name])
    return images


def draw_map(name: str, picture: Picture, cells: dict[Cell, Visits]) -> np.ndarray:
    """The map of one place, RGB uint8 (H, W, 3), a pixel of the game as a pixel."""
    cells = {cell: visits for cell, visits in cells.items() if 0 <= cell[3] < WIDEST}
    farthest = max((cell[3] for cell in cells), default=0)
    blocks = min(max(len(picture.known), farthest + 1, NARROWEST), WIDEST)
    pixels = np.zeros((ROWS * CELL, blocks * CELL, 3), np.uint8)
    shown = picture.pixels[:, : blocks * CELL]
    pixels[: shown.shape[0], : shown.shape[1]] = shown

    def grid(value: Callable[[Visits], float]) -> np.ndarray:
        """A value of every cell, nan where nobody has been: (ROWS, blocks)."""
        values = np.full((ROWS, blocks), np.nan)
        for (*_, x, y), visits in cells.items():
            values[min(max(GROUND - y, 0), ROWS - 1), x] = value(visits)
        return values

    if not cells:
        return pixels
    counts, first = grid(lambda v: v.count), grid(lambda v: v.first / 1000)
    surprise, ends = grid(lambda v: v.surprise / v.count), grid(lambda v: v.ends)
    panels = (
        ("visits, agent steps", counts, LogNorm(1, max(np.nanmax(counts), 2))),
        ("first visit, at so many thousand agent steps", first, None),
        ("mean surprise", surprise, Normalize(0, max(np.nanpercentile(surprise, 98), 1e-9))),
    )
    height, width = ABOVE + ROWS * CELL + BELOW, LEFT + blocks * CELL + RIGHT
    figure = Figure(figsize=(width / DPI, (1 + len(panels)) * height / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    all_axes = [
        figure.add_axes(
            (
                LEFT / width,
                ((len(panels) - i) * height + BELOW) / figure.bbox.height,
                blocks * CELL / width,
                ROWS * CELL / figure.bbox.height,
            )
        )
        for i in range(1 + len(panels))
    ]
    extent = (0, blocks * CELL, ROWS * CELL, 0)
    total = int(np.nansum(ends))
    _show(all_axes[0], pixels, f"{name}: what the agent saw; ✕ where {total} lives ended", extent)
    rows, columns = np.nonzero(np.nan_to_num(ends))
    all_axes[0].scatter(
        (columns + 0.5) * CELL,
        (rows + 0.5) * CELL,
        s=20 + 200 * np.sqrt(ends[rows, columns] / max(np.nanmax(ends), 1)),
        marker="x",
        color="red",
        linewidths=2,
    )
    for axes, (title, values, norm) in zip(all_axes[1:], panels, strict=True):
        _show(axes, (pixels * DIMMED).astype(np.uint8), title, extent)
        heat = axes.imshow(values, cmap="plasma", norm=norm, extent=extent, alpha=0.75)
        x, y, w, h = axes.get_position().bounds
        figure.colorbar(heat, cax=figure.add_axes((x + w + 8 / width, y, 12 / width, h)))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _show(
    axes: Axes, pixels: np.ndarray, title: str, extent: tuple[float, float, float, float]
) -> None:
    axes.imshow(pixels, extent=extent, interpolation="none")
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xticks(range(0, pixels.shape[1] + 1, 10 * CELL))
    axes.set_yticks([])
    axes.tick_params(labelsize=8)


def _write_png(path: Path, image: np.ndarray) -> None:
    png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    write_whole(path, lambda file: file.write(png))
