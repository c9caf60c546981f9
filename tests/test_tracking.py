"""Averages of a log interval."""

from pathlib import Path

import torch
from conftest import metrics_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from icm.tracking import Tracker


def test_what_goes_on_keeps_the_points_up_to_there(tmp_path: Path) -> None:
    for begin, steps in ((0, (4, 8)), (0, (8, 16, 24)), (16, (24, 32))):  # the first saved nothing
        tracker = Tracker(tmp_path, begin, {})
        for step in steps:
            tracker.write(step, {"loss/q": float(begin + step)})
        tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = {8: 8.0, 16: 16.0, 24: 40.0, 32: 48.0}
    assert {event.step: event.value for event in events.Scalars("loss/q")} == expected
    assert {row["step"]: row["loss/q"] for row in metrics_of(tmp_path)} == expected


def test_of_an_interval_of_resets_alone_there_is_no_average(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, {})
    tracker.add({"policy/entropy": torch.tensor([])})
    tracker.add({"episode/length": 7.0})
    assert tracker.averages() == {"episode/length": 7.0}
    tracker.add({"policy/entropy": torch.tensor([])})
    tracker.add({"policy/entropy": torch.tensor([3.0, 0.0, 2.0, 1.0])})
    assert tracker.averages() == {"policy/entropy": 1.5}
    assert tracker.averages() == {}
    tracker.close()
