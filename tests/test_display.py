"""What a terminal shows of a training, and what a log file gets."""

import os
import pty
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from conftest import SMALL, forked_training

from icm.display import Display, counted

METRICS = {
    "episode/distance": 812.4,
    "explore/distance_max": 3161.0,
    "explore/levels": 2,
    "episode/flag": 0.07,
    "speed/agent_steps_per_s": 251.3,
    "speed/act_share": 0.03,
    "speed/update_share": 0.6,
}


@pytest.mark.parametrize("colours", [False, True])
def test_a_file_gets_a_plain_line_a_minute_and_a_last_one(
    colours: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if colours:  # rich takes any file for a terminal then
        monkeypatch.setenv("FORCE_COLOR", "1")
    now = 1000.0
    monkeypatch.setattr("icm.display.time.monotonic", lambda: now)
    display = Display(0, 240_000)
    now += 59
    display.advance(10)
    now += 2
    display.advance(20)  # before anything is logged
    display.show(2000, METRICS)
    now += 61
    display.saved = 3000
    display.show(4000, METRICS)
    display.advance(4010)
    display.advance(6000)
    display.show(240_000, METRICS)
    display.close()
    found = "distance 812 · best 3161 · levels 2 · at a flag 7% · 251 steps/s · act 3%, update 60%"
    assert capsys.readouterr().err.splitlines() == [
        "step 20 of 240,000",
        f"step 4,010 of 240,000 · {found} · saved 3,000",
        f"step 240,000 of 240,000 · {found} · saved 3,000",
    ]


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_a_terminal_that_is_gone_is_no_reason_to_end(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", kind)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        display = Display(0, 64)
        os.close(ours)
        display.show(64, METRICS)
        display.say("drawing failed")
        display.close()


def test_a_terminal_gets_a_live_picture_of_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    ours, theirs = pty.openpty()
    (tmp_path / "stderr").symlink_to(os.ttyname(theirs))
    given = (*SMALL, "total_steps=64", f"hydra.run.dir={tmp_path / 'run'}")
    process = forked_training(tmp_path, *given)
    shown = b""
    while ours in wait([ours, process.sentinel]):
        shown += os.read(ours, 4096)
    process.join()
    os.close(ours)
    os.close(theirs)
    assert process.exitcode == 0, shown
    assert "saved step 64" in (tmp_path / "stdout").read_text()
    text = shown.decode()
    assert "64 / 64 steps" in text
    assert "steps/s" in text
    assert "cells" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is there again


def test_a_terminal_shows_how_many_there_have_been(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [*counted(range(3), "episodes", 3)] == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr("sys.stdout", terminal)
        for _ in counted(range(3), "episodes", 3):
            print("long" * 100)
    shown = os.read(ours, 1 << 20).decode()
    assert "3/3" in shown
    assert shown.count("long" * 100) == 3  # not broken into several lines
    os.close(ours)
