"""Maps: what stands where, and the files."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from icm.envs.mario import CELL
from icm.errors import UserError
from icm.exploration import Exploration, Picture, Visits
from icm.viz.map import ABOVE, BELOW, LEFT, ROWS, draw_maps

GREEN = (0, 200, 0)


def found() -> Exploration:
    """A level of 50 blocks, all green, with one visited cell, and a second area without picture."""
    exploration = Exploration()
    picture = Picture()
    picture.add(0, np.full((ROWS * CELL, 30 * CELL, 3), GREEN, np.uint8))
    exploration.pictures[1, 2, 7] = picture
    exploration.cells = {
        (1, 2, 7, 20, 4): Visits(first=3000, count=10, ends=2, surprise=5.0),
        (1, 2, 7, 49, 4): Visits(first=9000, count=1),
        (1, 2, 9, 3, 99): Visits(first=4000, count=1),
    }
    return exploration


def test_a_map_shows_the_picture_and_colours_where_somebody_was(tmp_path: Path) -> None:
    images = draw_maps(found(), tmp_path / "maps")
    assert list(images) == ["1-2", "1-2_area_2"]
    image = images["1-2"]
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


def test_maps_are_files(tmp_path: Path) -> None:
    images = draw_maps(found(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-2.png", "1-2_area_2.png"]
    for name, image in images.items():
        assert (cv2.imread(str(tmp_path / f"{name}.png"))[..., ::-1] == image).all()
    assert draw_maps(Exploration(), tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        draw_maps(found(), tmp_path / "file")


def test_places_that_no_level_has_do_not_end_a_training(tmp_path: Path) -> None:
    exploration = found()
    exploration.cells[1, 2, 7, 4095, 4] = Visits(first=1, count=1)
    exploration.cells[2, 1, 0, -1, 4] = Visits(first=1, count=1)
    images = draw_maps(exploration, tmp_path)
    assert (images["1-2"] == draw_maps(found(), tmp_path)["1-2"]).all()
    assert (images["2-1"] == 0).all()
