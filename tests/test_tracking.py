"""Averages of a log interval."""

from pathlib import Path

import torch

from icm.tracking import Tracker


def test_of_an_interval_of_resets_alone_there_is_no_average(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, {})
    tracker.add({"policy/entropy": torch.tensor(0.0)}, torch.tensor(0))
    tracker.add({"episode/length": 7.0})
    assert tracker.averages() == {"episode/length": 7.0}
    tracker.add({"policy/entropy": torch.tensor(0.0)}, torch.tensor(0))
    tracker.add({"policy/entropy": torch.tensor(6.0)}, torch.tensor(4))
    assert tracker.averages() == {"policy/entropy": 1.5}
    assert tracker.averages() == {}
    tracker.close()
