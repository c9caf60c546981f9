"""What a run has found: cells, pictures of places, and keeping them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings

from icm import checkpoint
from icm.checkpoint import with_tensors
from icm.envs import make_env
from icm.envs.mario import CELL, GROUND
from icm.exploration import Exploration, Picture, Recording


def infos(*cells: tuple[int, ...], present: tuple[bool, ...] | None = None) -> dict[str, Any]:
    has = np.ones(len(cells), bool) if present is None else np.array(present)
    no = np.zeros(len(cells), bool)
    return {"cell": np.array(cells, np.int32), "_cell": has, "life_lost": no, "returned": no}


def cells_of(found: Exploration) -> dict[tuple[int, ...], dict[str, Any]]:
    return {
        (*place, *cell): vars(visits)
        for place, region in found.regions.items()
        for cell, visits in region.cells.items()
    }


def test_cells_know_what_happened_in_them() -> None:
    found = Exploration()
    here, there, other = (1, 1, 37, 2, 4), (1, 1, 37, 3, 4), (1, 2, 0, 3, 4)
    assert found.statistics() == {}
    found.visit(0, infos(here, here), np.array([False, False]))
    found.visit(32, infos(there, here), np.array([False, False]))
    found.judge([2.0, 0.5])
    # the life that ends here was lost there, and goes on elsewhere
    found.visit(64, infos(here, other), np.array([True, False]))
    found.judge([math.nan, 1.0])  # nothing is known of a new life's start
    assert found.statistics() == {
        "explore/cells": 3,
        "explore/levels": 2,
        "explore/distance_max": 0.0,
    }
    at = cells_of(found)
    assert at[here] == {"first": 0, "count": 4, "ends": 0, "judged": 1, "surprise": 0.5}
    assert at[there] == {"first": 32, "count": 1, "ends": 1, "judged": 1, "surprise": 2.0}
    assert at[other] == {"first": 64, "count": 1, "ends": 0, "judged": 1, "surprise": 1.0}


def test_places_know_how_many_lives_have_come_there() -> None:
    found = Exploration()
    street, room, next_level = (1, 1, 37, 2, 4), (1, 1, 66, 2, 4), (1, 2, 0, 2, 4)

    def visit(step: int, here: Any, there: Any, **more: tuple[int, int]) -> None:
        given = {name: np.array(flags) for name, flags in more.items()}
        found.visit(step, infos(here, there) | given, given.pop("ended", np.zeros(2, bool)))

    visit(0, street, street)
    visit(2, room, street)
    visit(4, street, street)  # the same life again
    visit(6, next_level, room)
    visit(8, street, street, life_lost=(True, False))  # where the next life of the first one begins
    assert [
        (p["place"], p["first"], p["lives"], p["ends"], p["cells"]) for p in found.places()
    ] == [
        ("1-1", 0, 3, 0, 1),
        ("1-1_area_2", 2, 2, 0, 1),
        ("1-2", 6, 1, 1, 1),
    ]
    # episodes end; one begins anew, and one in the middle of the one before
    visit(10, room, room, ended=(True, True), life_lost=(True, True))
    again = Exploration()
    again.load_state_dict(with_tensors(found.state_dict()))
    for each in (found, again):
        found = each
        visit(12, room, room, returned=(False, True))
        visit(14, next_level, next_level)
        assert [p["lives"] for p in found.places()] == [3, 3, 3]


def test_the_way_to_the_level_that_was_discovered_last_is_kept() -> None:
    found, nobody = Exploration(), np.zeros(2, bool)
    start, room, next_level = (1, 1, 37, 2, 4), (1, 1, 66, 2, 4), (1, 2, 0, 2, 4)
    assert found.visit(0, infos(start, start), nobody) == 0
    assert found.visit(2, infos(start, room), nobody) is None
    assert found.way is None
    assert found.visit(4, infos(start, next_level), nobody) == 1
    found.discover(4, (7, [3, 4]))
    again = Exploration()
    again.load_state_dict(with_tensors(found.state_dict()))
    assert found.way == again.way == Recording(step=4, score=2.0, seed=7, actions=[3, 4])
    assert again.visit(6, infos(next_level, next_level), nobody) is None
    again.move("SuperMarioBros-v0", "SuperMarioBros-v0")
    assert again.recordings() == {}


def test_an_environment_without_cells_has_none() -> None:
    found = Exploration()
    no = np.array([False, False])
    found.visit(0, {"life_lost": no, "returned": no}, no)
    found.judge([1.0, 1.0])
    found.visit(
        32, infos((1, 1, 0, 2, 4), (0, 0, 0, 0, 0), present=(True, False)), np.zeros(2, bool)
    )
    found.judge([1.0, 1.0])
    assert list(cells_of(found)) == [(1, 1, 0, 2, 4)]


def test_a_picture_grows_and_keeps_what_it_shows() -> None:
    picture = Picture()
    patches = [np.full((CELL, 2 * CELL, 3), value, np.uint8) for value in (10, 20, 30)]
    picture.add((0, 3), patches[0])
    picture.add((0, 4), patches[1])
    picture.add((2, 0), patches[2])
    blocks = picture.pixels[::CELL, ::CELL, 0]
    assert blocks.tolist() == [[0, 0, 0, 10, 10, 20], [0] * 6, [30, 30, 0, 0, 0, 0]]
    assert (picture.pixels[:CELL, 5 * CELL :] == 20).all()
    assert picture.known.tolist() == (blocks > 0).tolist()


def explored(
    steps: int, env_id: str = "SuperMarioBros-1-1-v0", emulator: str = "libretro"
) -> Exploration:
    """What an agent sees that runs to the right, and jumps every now and then."""
    given = (f"env.id={env_id}", f"env.emulator={emulator}", "env.noop_max=0")
    env = make_env(settings(*given).env, scenery=True)
    found = Exploration()
    env.reset(seed=1)
    for step in range(steps):
        _, _, terminated, _, info = env.step(4 if step % 8 < 5 else 3)
        several = infos(info["cell"])
        several["scenery"] = [info["scenery"]] if "scenery" in info else []
        found.visit(step, several, np.array([terminated]))
        if terminated:
            break
    env.close()
    return found


def test_strips_of_the_screen_make_a_picture_of_the_level() -> None:
    found = explored(60, emulator="nes_py")
    ((place, region),) = found.regions.items()
    assert place[:2] == (1, 1)
    picture = region.picture
    reached = max(x for x, y in region.cells)
    assert picture.known.all()
    assert picture.known.shape[0] == 13
    assert picture.known.shape[1] >= reached + 8
    assert picture.pixels.shape == (208, picture.known.shape[1] * CELL, 3)
    # strips fit each other: the ground is the same in all blocks where nobody stands
    ground = picture.pixels[-CELL:].reshape(CELL, -1, CELL, 3).swapaxes(0, 1)
    assert (ground == ground[0]).all()
    # and so are the first bricks, in blocks 20, 22 and 24, which came into sight one by one
    bricks = picture.pixels[7 * CELL : 8 * CELL].reshape(CELL, -1, CELL, 3).swapaxes(0, 1)
    assert (bricks[20] == bricks[22]).all()
    assert (bricks[20] == bricks[24]).all()
    assert (bricks[20] != bricks[19]).any()


@pytest.mark.parametrize("emulator", ["nes_py", "libretro"])
@pytest.mark.parametrize(
    ("env_id", "steps", "ground"),
    [
        ("SuperMarioBros2-1-1-v0", 40, slice(11, 13)),
        ("SuperMarioBros3-1-1-v0", 40, slice(26, 27)),
        ("SuperMarioBros2USA-1-1-v0", 45, None),
    ],
)
def test_other_games_have_pictures(
    env_id: str, steps: int, ground: slice | None, emulator: str
) -> None:
    found = explored(steps, env_id, emulator)
    region = max(found.regions.values(), key=lambda region: region.picture.known.sum())
    picture = region.picture
    blocks = picture.pixels.reshape(picture.known.shape[0], CELL, -1, CELL, 3).swapaxes(1, 2)
    if ground is None:  # it falls down a tower: more than one screen, which fits together
        assert picture.known.shape == (picture.known.shape[0], 16)
        assert picture.known.shape[0] > 20
        bottom = int(np.flatnonzero(picture.known.any(1)).max())
        tower = blocks[bottom - 6 : bottom - 2, 8]
        assert (tower == tower[0]).all()
    else:
        bottom = blocks[ground][:, picture.known[-1]]
        same = (bottom == bottom[:, :1]).all((0, 2, 3, 4))
        assert len(same) > 12
        assert same.mean() > 0.8  # all but where somebody stands or something grows
    # it has been where the picture is
    seen = [0 <= GROUND - y < len(blocks) for _, y in region.cells]
    assert np.mean(seen) > 0.9


def test_a_place_is_pictured_once_it_is_lit() -> None:
    """In Super Mario Bros. 2 USA, the screen is off for a while behind a door."""
    given = settings("env.id=SuperMarioBros2USA-1-1-v0", "env.emulator=libretro").env
    env = make_env(given, scenery=True)
    env.reset(seed=3)
    choose, action, pieces, dark = np.random.default_rng(3), 0, {}, 0
    chances = [0.02, 0.1, 0.2, 0.1, 0.3, 0.05, 0.05, 0.08, 0.02, 0.02, 0.03, 0.03]
    game: Any = env.unwrapped
    for step in range(112):
        if step % 4 == 0:
            action = int(choose.choice(12, p=chances))
        info = env.step(action)[-1]
        dark += not game.screen.any()
        if "scenery" in info:
            place, _, piece = info["scenery"]
            pieces.setdefault(place, []).append(piece)
    env.close()
    assert dark > 5
    assert set(pieces) == {(1, 1, 0), (1, 1, 2)}
    assert pieces[1, 1, 2][0].shape == (240, 224, 3)
    assert pieces[1, 1, 2][0].mean() > 100


def episode(distance: int | None, actions: list[int], seed: int = 7) -> dict[str, Any]:
    progress = {} if distance is None else {"distance": np.int64(distance)}
    return {"reward": 5.0, **progress, "seed": np.int64(seed), "actions": actions}


def test_the_best_episode_is_the_farthest_and_of_those_the_shortest() -> None:
    found = Exploration()
    for step, distance, actions in (
        (32, 100, [1, 2]),
        (64, 300, [1, 2, 3]),
        (96, 200, [1]),
        (128, 300, [1, 1, 1]),
        (160, 300, [4, 5]),
    ):
        found.finish(step, episode(distance, actions))
    assert found.best == Recording(step=160, score=300.0, seed=7, actions=[4, 5])
    assert found.distance_max == 300
    other = Exploration()
    other.finish(32, episode(None, [3]))
    assert other.best == Recording(step=32, score=5.0, seed=7, actions=[3])
    assert other.distance_max == 0


def test_the_average_is_of_the_last_hundred_episodes() -> None:
    found = Exploration()
    for number in range(99):
        found.finish(number, episode(0 if number == 0 else 100, [1]))
    assert found.average() is None
    found.finish(99, episode(100, [1]))
    assert found.average() == 99
    found.finish(100, episode(200, [1]))
    assert found.average() == 101


def test_news_are_the_places_visited_since_the_last_call() -> None:
    found, ended = Exploration(), np.array([False])
    for cell in ((1, 1, 37, 2, 4), (1, 1, 66, 2, 4), (1, 2, 0, 2, 4)):
        found.visit(0, infos(cell), ended)
    assert list(found.news()) == ["1-1", "1-1_area_2", "1-2"]
    assert found.news() == {}
    found.visit(32, infos((1, 1, 66, 3, 4)), ended)
    assert found.news() == {"1-1_area_2": found.regions[1, 1, 66]}


def test_another_game_is_still_to_be_found_and_another_level_of_it_is_not() -> None:
    found = explored(20)
    found.finish(20, episode(123, [4, 3]))
    found.move("SuperMarioBros-1-1-v0", "SuperMarioBros-1-1-v0")  # with other settings
    assert found.best is None
    assert found.distance_max == 123.0
    found.move("SuperMarioBros-1-1-v0", "SuperMarioBros-1-2-v0")
    assert found.distance_max == 0.0
    assert found.statistics()["explore/cells"] > 0
    found.move("SuperMarioBros-1-2-v0", "SuperMarioBros2-v0")
    assert not found.regions
    assert found.news() == {}


def test_exploration_is_saved_and_restored(tmp_path: Path) -> None:
    found = explored(20)
    found.judge([0.25])
    found.finish(20, episode(123, [4, 3]))
    checkpoint.save(tmp_path / "state.pt", {"exploration": found.state_dict()})
    state = torch.load(tmp_path / "state.pt", weights_only=True)["exploration"]
    again = Exploration()
    again.load_state_dict(state)
    assert cells_of(again) == cells_of(found)
    assert again.distance_max == 123.0
    assert again.best == found.best
    assert again.regions.keys() == found.regions.keys()
    for place, region in found.regions.items():
        assert (again.regions[place].picture.pixels == region.picture.pixels).all()
        assert (again.regions[place].picture.known == region.picture.known).all()
    assert list(again.news()) == ["1-1"]
    empty = Exploration()
    checkpoint.save(tmp_path / "empty.pt", Exploration().state_dict())
    empty.load_state_dict(torch.load(tmp_path / "empty.pt", weights_only=True))
    assert not cells_of(empty)
    assert empty.best is None


@pytest.mark.parametrize("now", ["SuperMarioBros-1-1-v0", "SuperMarioBros-1-2-v0"])
def test_the_average_begins_anew_with_other_settings_of_the_environment(now: str) -> None:
    found = Exploration()
    for number in range(100):
        found.finish(number, episode(100, [1]))
    assert found.average() == 100
    found.move("SuperMarioBros-1-1-v0", now)
    assert found.average() is None
    found.finish(100, episode(300, [1]))
    assert found.objective() == 300
