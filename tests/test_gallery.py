"""What is drawn of a run, and when."""

import math
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import settings
from test_exploration import infos

from icm.exploration import Exploration, Recording
from icm.files import write_whole
from icm.viz.clip import film
from icm.viz.gallery import Gallery
from icm.viz.studio import Drawn, maps, report

SHORT = ("env.emulator=libretro", "env.noop_max=0", "report.every=0")


def explored() -> Exploration:
    found = Exploration()
    found.visit(1, infos((1, 1, 37, 2, 4)), np.array([False]))
    return found


def wait(gallery: Gallery, found: Exploration, step: int) -> Drawn:
    while (drawn := gallery.update(step, 0, found)) is None:
        time.sleep(0.05)
    return drawn


def test_things_are_drawn_at_their_intervals_and_only_what_is_new(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, settings("map.every=10", "video.every=20", *SHORT))
    found = explored()
    found.best = Recording(step=3, score=40.0, seed=1, actions=[3, 3])
    found.way = Recording(step=2, score=2.0, seed=1, actions=[3])
    assert gallery.update(9, 9, found) is None
    assert not gallery.studio.is_busy
    assert gallery.update(12, 3, found) is None
    drawn = wait(gallery, found, 12)
    assert drawn.step == 12
    assert list(drawn.images) == ["map/1-1"]
    # nobody has been anywhere since, but there are films to make
    gallery.update(24, 12, found)
    drawn = wait(gallery, found, 24)
    assert list(drawn.images) == ["clip/best"]
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    films = ["videos/best.gif", "videos/best.mp4", "videos/way.mp4"]
    assert names == ["maps/1-1.png", *films]
    gallery.update(40, 16, found)
    assert not gallery.studio.is_busy
    found.visit(41, infos((1, 1, 37, 3, 4)), np.zeros(1, bool))
    (last,) = gallery.finish(42, found, lambda: math.inf)
    assert last.step == 42
    assert list(last.images) == ["map/1-1"]
    assert gallery.studio.assistants is None


def test_what_could_not_be_drawn_or_was_due_meanwhile_is_drawn_the_next_time(
    tmp_path: Path,
) -> None:
    gallery = Gallery(tmp_path, settings("map.every=10", "video.every=10", *SHORT))
    found = explored()
    found.best = Recording(step=3, score=40.0, seed=1, actions=[3, 3])
    for folder in ("maps", "videos"):
        (tmp_path / folder).touch()  # so that it cannot be one
    gallery.update(10, 10, found)
    assert len(wait(gallery, found, 10).complaints) == 2
    for folder in ("maps", "videos"):
        (tmp_path / folder).unlink()
    gallery.update(20, 10, found)
    found.visit(21, infos((1, 2, 0, 3, 4)), np.zeros(1, bool))
    drawn = gallery.update(30, 10, found) or wait(gallery, found, 30)  # it is drawing
    assert drawn.complaints == []
    assert set(drawn.images) == {"map/1-1", "clip/best"}
    assert list(wait(gallery, found, 31).images) == ["map/1-2"]
    gallery.close()


@pytest.mark.parametrize("logged", ["", "{}\n"])
def test_what_is_half_drawn_in_the_end_is_removed(logged: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(logged)
    gallery = Gallery(tmp_path, settings("map.every=10", *SHORT))
    for_ever = partial(subprocess.call, ["sleep", "1000"], -1, None, None)  # and into that file
    gallery.studio.order(1, [partial(write_whole, tmp_path / "maps" / "1-1.png", for_ever)])
    assert gallery.studio.assistants is not None
    drawing = psutil.Process(gallery.studio.assistants.processes[0].pid)
    while not (children := drawing.children()):
        time.sleep(0.05)
    assert list(tmp_path.rglob("*.tmp"))
    patience = iter((math.inf, 0.0))  # a signal comes while it waits
    (told,) = gallery.finish(2, explored(), lambda: next(patience))
    assert told.images == {}
    how = f"; `python scripts/report.py {tmp_path}` writes the report" if logged else ""
    assert told.complaints == [f"no time to draw everything{how}"]
    assert not drawing.is_running()
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["maps", "metrics.jsonl"]


def test_nothing_is_drawn_where_nothing_is_wanted(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, settings("map.every=0", "video.every=0", *SHORT))
    assert gallery.update(1000, 1000, explored()) is None
    assert gallery.finish(1000, explored(), lambda: math.inf) == []
    assert gallery.studio.assistants is None
    assert not list(tmp_path.iterdir())


def test_a_report_is_due_at_its_intervals_once_something_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = Gallery(tmp_path, settings("map.every=0", "video.every=0", "report.every=10"))
    found, ordered = explored(), []
    monkeypatch.setattr(gallery.studio, "order", lambda *order: ordered.append(order))
    gallery.update(10, 10, found)  # nothing is logged yet
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    gallery.update(19, 9, found)
    assert ordered == []
    gallery.update(20, 1, found)
    ((step, (drawing,)),) = ordered
    assert (step, drawing.func, drawing.args) == (20, report, (tmp_path, found.places()))


def test_the_report_is_drawn_last_because_it_shows_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = Gallery(tmp_path, settings("map.every=10", "video.every=10", "report.every=10"))
    found, ordered = explored(), []
    found.best = Recording(step=3, score=40.0, seed=1, actions=[3, 3])
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    monkeypatch.setattr(gallery.studio, "order", lambda step, drawings: ordered.extend(drawings))
    gallery.update(10, 10, found)
    assert [drawing.func for drawing in ordered] == [maps, film, report]
