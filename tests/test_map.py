"""Maps: what stands where, and the files."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes

from icm.envs.mario import CELL, GROUND
from icm.errors import UserError
from icm.exploration import Region, Visits
from icm.viz.map import ABOVE, BELOW, LEFT, draw_map, draw_maps

GREEN = (0, 200, 0)
ROWS = 13  # of a screen of Super Mario Bros.


def found() -> Region:
    """A level of 50 blocks, 30 of them seen, all green, with two visited cells."""
    region = Region()
    region.picture.add((0, 0), np.full((ROWS * CELL, 30 * CELL, 3), GREEN, np.uint8))
    region.cells = {
        (20, 4): Visits(first=3000, count=10, ends=2, judged=8, surprise=5.0),
        (49, 4): Visits(first=9000, count=1, judged=1),
    }
    return region


def test_a_map_shows_the_picture_and_colours_where_somebody_was() -> None:
    image = draw_map("1-2", found())
    assert image.dtype == np.uint8

    def block(panel: int, row: int, column: int) -> np.ndarray:
        top = panel * (ABOVE + ROWS * CELL + BELOW) + ABOVE + row * CELL
        left = LEFT + column * CELL
        return image[top + 4 : top + CELL - 4, left + 4 : left + CELL - 4].reshape(-1, 3)

    assert (block(0, 5, 10) == GREEN).all()
    assert (block(0, 5, 40) == 0).all()  # unknown
    assert (block(0, 10, 20) == (255, 0, 0)).all(1).any()  # lives ended here
    for panel in (1, 2, 3):
        dim = block(panel, 5, 10)
        assert (dim == dim[0]).all()
        assert 0 < dim[0, 1] < GREEN[1]
        assert (block(panel, 10, 20) != dim[0]).any(1).all()  # the visited cell
        assert (block(panel, 9, 20) == dim[0]).all()  # nobody was above it
        assert (block(panel, 10, 49) != 0).any(1).all()  # visited, though never seen whole
    assert (block(1, 10, 20)[0] != block(1, 10, 49)[0]).any()  # ten visits are not one


def test_levels_that_scroll_up_and_down_have_more_rows() -> None:
    region = found()
    region.picture.add((20, 0), np.full((CELL, CELL, 3), (200, 0, 0), np.uint8))
    region.cells[0, GROUND - 20] = Visits(first=1, count=5)
    image = draw_map("1-2", region)
    assert image.shape[0] == 4 * (ABOVE + 21 * CELL + BELOW)
    last = image[ABOVE + 20 * CELL + 2 : ABOVE + 21 * CELL - 2, LEFT + 2 : LEFT + CELL - 2]
    assert (last == (200, 0, 0)).all()
    top = ABOVE + 21 * CELL + BELOW + ABOVE
    visited = image[top + 20 * CELL + 2 : top + 21 * CELL - 2, LEFT + 2 : LEFT + CELL - 2]
    assert (visited != 0).any(2).all()


def test_maps_are_files(tmp_path: Path) -> None:
    regions = {"1-2": found(), "1-2_area_2": Region(cells={(3, 99): Visits(first=4000, count=1)})}
    images = draw_maps(regions, tmp_path)
    assert list(images) == ["map/1-2", "map/1-2_area_2"]
    for name, region in regions.items():
        path = tmp_path / f"{name}.png"
        assert path.read_bytes() == images[f"map/{name}"]
        assert (cv2.imread(str(path))[..., ::-1] == draw_map(name, region)).all()
    assert len(list(tmp_path.iterdir())) == 2
    assert draw_maps({}, tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        draw_maps(regions, tmp_path / "file")


def test_what_happened_above_and_below_the_picture_is_added_up_at_its_edges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: dict[str, np.ndarray] = {}
    monkeypatch.setattr(
        "icm.viz.map._show", lambda axes, pixels, title, extent: shown.update({title: pixels})
    )
    cells = {
        (5, y): Visits(first=10 - y, count=3, ends=y, judged=2, surprise=1.0) for y in (0, 1, 2)
    }
    draw_map("1-1", Region(cells=cells))
    assert any("where 3 lives or tries ended" in title for title in shown)
    assert sum(cells.values(), Visits(first=99)) == Visits(8, 9, 3, 6, 3.0)


def test_places_that_no_level_has_do_not_end_a_training() -> None:
    region = found()
    region.cells[4095, 4] = Visits(first=1, count=1)
    assert (draw_map("1-2", region) == draw_map("1-2", found())).all()
    assert (draw_map("2-1", Region(cells={(-1, 4): Visits(first=1, count=1)})) == 0).all()


def test_each_panel_has_its_own_values_and_what_is_outside_the_picture_at_the_nearest_edge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    panels: list[np.ndarray] = []
    imshow = Axes.imshow

    def watch(axes: Axes, values: np.ndarray, **how: Any) -> Any:
        if "cmap" in how:
            panels.append(values)
        return imshow(axes, values, **how)

    monkeypatch.setattr(Axes, "imshow", watch)
    region = found()
    region.cells[3, GROUND + 5] = Visits(first=4000, count=7)
    region.cells[3, -5] = Visits(first=5000, count=2)
    draw_map("1-2", region)
    counts, first, surprise = panels
    squares = ((10, 20), (10, 49), (0, 3), (ROWS - 1, 3))  # the last ones: above and below it
    assert [counts[square] for square in squares] == [10, 1, 7, 2]
    assert [first[square] for square in squares] == [3, 9, 4, 5]
    assert [surprise[square] for square in squares[:2]] == [5 / 8, 0]
    assert [np.isfinite(each).sum() for each in panels] == [4, 4, 2]
