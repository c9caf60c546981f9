"""Maps of what a run has explored: what places look like, and what happened there."""

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from icm.envs.mario import CELL, GROUND
from icm.exploration import Region, Visits
from icm.files import write_bytes

DPI = 100
LEFT, RIGHT, ABOVE, BELOW = 16, 96, 30, 30  # pixels around a panel
SMALLEST = 13, 40  # rows of a Super Mario Bros. screen; columns, enough for a title
LARGEST = 300, 1000  # rows and columns: more than any level has, and as much as can be drawn
SMALL = (cv2.IMWRITE_PNG_COMPRESSION, 6)  # in a sixth of the default's bytes, and the same time
DIMMED = 0.45  # relative brightness of a picture under colours


def draw_maps(regions: dict[str, Region], folder: Path) -> dict[str, bytes]:
    """Write the maps of regions, by their names, into a folder.

    Returns:
        the PNG files by their names in TensorBoard, "map/1-1" and so on.

    Raises:
        UserError: the folder cannot be written to.
    """
    images = {}
    for name, region in regions.items():
        picture = draw_map(name, region)[..., ::-1]
        png = cv2.imencode(".png", picture, SMALL)[1].tobytes()
        write_bytes(folder / f"{name}.png", png)
        images[f"map/{name}"] = png
    return images


def draw_map(name: str, region: Region) -> np.ndarray:
    """The map of one region, RGB uint8 (H, W, 3), with one pixel per game pixel."""
    picture = region.picture
    cells = {cell: visits for cell, visits in region.cells.items() if 0 <= cell[0] < LARGEST[1]}
    farthest = max((cell[0] for cell in cells), default=0)
    rows = min(max(picture.known.shape[0], SMALLEST[0]), LARGEST[0])
    columns = min(max(picture.known.shape[1], farthest + 1, SMALLEST[1]), LARGEST[1])
    pixels = np.zeros((rows * CELL, columns * CELL, 3), np.uint8)
    shown = picture.pixels[: rows * CELL, : columns * CELL]
    pixels[: shown.shape[0], : shown.shape[1]] = shown

    squares: dict[tuple[int, int], Visits] = {}
    for (x, y), visits in cells.items():
        row = min(max(GROUND - y, 0), rows - 1)  # visits above or below the picture go to its edge
        squares[row, x] = squares[row, x] + visits if (row, x) in squares else visits

    def grid(value: Callable[[Visits], float]) -> np.ndarray:
        """A value per square, nan where never visited: (rows, columns)."""
        values = np.full((rows, columns), np.nan)
        for square, visits in squares.items():
            values[square] = value(visits)
        return values

    if not cells:
        return pixels
    counts, first = grid(lambda v: v.count), grid(lambda v: v.first / 1000)
    surprise = grid(lambda v: v.surprise / v.judged if v.judged else math.nan)
    judged, ends = surprise[~np.isnan(surprise)], grid(lambda v: v.ends)
    most = np.percentile(judged, 98) if judged.size else 0
    panels = (
        ("visits, agent steps", counts, LogNorm(1, max(np.nanmax(counts), 2))),
        ("first visit, at so many thousand agent steps", first, None),
        ("mean surprise", surprise, Normalize(0, max(most, 1e-9))),
    )
    height, width = ABOVE + rows * CELL + BELOW, LEFT + columns * CELL + RIGHT
    figure = Figure(figsize=(width / DPI, (1 + len(panels)) * height / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    all_axes = [
        figure.add_axes(
            (
                LEFT / width,
                ((len(panels) - i) * height + BELOW) / figure.bbox.height,
                columns * CELL / width,
                rows * CELL / figure.bbox.height,
            )
        )
        for i in range(1 + len(panels))
    ]
    extent = (0, columns * CELL, rows * CELL, 0)
    total = int(np.nansum(ends))
    title = f"{name}: what the agent saw; ✕ where {total} lives or tries ended"
    _show(all_axes[0], pixels, title, extent)
    ended = np.nonzero(np.nan_to_num(ends))
    all_axes[0].scatter(
        (ended[1] + 0.5) * CELL,
        (ended[0] + 0.5) * CELL,
        s=20 + 200 * np.sqrt(ends[ended] / max(np.nanmax(ends), 1)),
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
