"""Drawing beside a training."""

import os
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from icm.errors import UserError
from icm.exploration import Region, Visits
from icm.viz.studio import NICENESS, Studio, maps, report

LONG = 120.0  # seconds, in which everything here is drawn
REGION = Region(cells={(3, 4): Visits(first=1, count=1)})


def processes() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [process for process in found if "spawn_main" in " ".join(process.cmdline())]


def niceness() -> dict[str, bytes]:
    return {"nice": str(os.nice(0)).encode()}


def refuse() -> dict[str, bytes]:
    raise UserError("no")


def fail() -> dict[str, bytes]:
    raise ValueError("broken")


def die() -> dict[str, bytes]:
    os._exit(1)


def test_orders_are_carried_out_elsewhere(tmp_path: Path) -> None:
    studio = Studio()
    assert studio.finished(LONG) is None
    studio.order(7, [partial(maps, {"1-1": REGION}, tmp_path), refuse, niceness])
    assert studio.is_busy
    drawn = studio.finished(LONG)
    assert drawn is not None
    assert drawn.step == 7
    assert drawn.images["map/1-1"] == (tmp_path / "1-1.png").read_bytes()
    assert drawn.images["nice"] == str(min(os.nice(0) + NICENESS, 19)).encode()
    assert drawn.complaints == ["no"]
    assert not studio.is_busy
    studio.order(8, [partial(report, tmp_path, [])])
    drawn = studio.finished(LONG)
    assert drawn is not None
    (complaint,) = drawn.complaints
    assert "no run folder" in complaint
    studio.close()


def assert_draws_again(studio: Studio) -> None:
    """In a new process, of which nothing is left when it is closed."""
    studio.order(9, [niceness])
    drawn = studio.finished(LONG)
    assert drawn is not None
    assert drawn.step == 9
    studio.close()
    assert not processes()


@pytest.mark.parametrize(("drawing", "words"), [(fail, "ValueError: broken"), (die, "killed")])
def test_a_process_that_fails_is_replaced(drawing: object, words: str, tmp_path: Path) -> None:
    studio = Studio()
    studio.order(7, [drawing])
    drawn = studio.finished(LONG)
    assert drawn is not None
    assert drawn.images == {}
    (complaint,) = drawn.complaints
    assert words in complaint
    assert_draws_again(studio)


def test_a_process_that_is_killed_while_it_waits_is_replaced() -> None:
    studio = Studio()
    studio.order(7, [niceness])
    assert studio.finished(LONG) is not None
    (process,) = processes()
    process.kill()
    process.wait()
    studio.order(8, [niceness])
    drawn = studio.finished(LONG)
    assert drawn is not None
    assert drawn.complaints == ["drawing failed: its process was killed"]
    assert_draws_again(studio)


def test_a_studio_that_is_closed_leaves_no_process() -> None:
    studio = Studio()
    studio.close()
    studio.order(1, [partial(time.sleep, 0.5)])
    assert studio.finished() is None
    studio.close()
    assert not studio.is_busy
    assert not processes()
