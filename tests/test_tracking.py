"""Averages of a log interval."""

import math
from pathlib import Path

import pytest
import torch
from conftest import metrics_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from icm.tracking import Clock, Tracker


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
    tracker.write(4, tracker.averages())
    tracker.add({"policy/entropy": torch.tensor([])})
    tracker.add({"policy/entropy": torch.tensor([3.0, 0.0, 2.0, 1.0])})
    assert tracker.averages() == {"policy/entropy": 1.5}
    tracker.write(8, tracker.averages())
    assert tracker.averages() == {}
    tracker.close()


def test_speeds_and_shares_are_those_of_their_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("icm.tracking.time.perf_counter", lambda: now)
    clock = Clock(32)
    for _ in range(2):
        with clock.phase("update"):
            now += 1.5
    now += 7.0
    rates = {"speed/agent_steps_per_s": 10.0, "speed/frames_per_s": 60.0}
    assert clock.speeds(132, 6) == pytest.approx(rates | {"speed/update_share": 0.3})
    now += 5.0
    assert clock.speeds(142, 6) == {"speed/agent_steps_per_s": 2.0, "speed/frames_per_s": 12.0}


def test_what_is_no_number_is_null_in_the_log(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, {})
    tracker.collect("curiosity/surprise", torch.tensor([math.nan, math.inf]))
    tracker.write(4, {"loss/q": math.nan, "q/mean": -math.inf, "loss/forward": 1.0})
    tracker.close()
    (line,) = metrics_of(tmp_path)
    assert line == {"step": 4, "loss/q": None, "q/mean": None, "loss/forward": 1.0}
