"""Files that are written whole or not at all."""

import os
import socket
import subprocess
from pathlib import Path
from typing import BinaryIO

import pytest

from icm.errors import UserError
from icm.files import json_lines, numbered, remove_leftovers, write_bytes, write_whole


def test_what_cannot_be_written_whole_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    write_bytes(path, b"precious")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"precious"
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*latest\.pt: No space left on device"):
        write_whole(path, write)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_line_is_named_and_one_that_is_being_written_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 32}\n{"st')
    assert json_lines(path) == [{"step": 32}]
    path.write_text('{"step": 32}\n\0\0\0\n{"step": 96}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        json_lines(path)
    path.write_text('{"step": 32}\n{"speed": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 has no step"):
        json_lines(path)


def test_what_dead_processes_of_this_machine_were_writing_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = socket.gethostname()
    (tmp_path / "maps").mkdir()
    dead = [
        tmp_path / f".latest.pt.{here}.{ended.pid}.tmp",
        tmp_path / "maps" / f".1-1.png.{here}.{ended.pid}.tmp",
        tmp_path / f".latest.pt.{here}.{os.getpid()}.tmp",  # of one of this number before
    ]
    others = [
        tmp_path / f".latest.pt.{here}.{os.getppid()}.tmp",
        tmp_path / f".latest.pt.another.{ended.pid}.tmp",
        tmp_path / ".mine.tmp",
        tmp_path / "latest.pt",
    ]
    for file in (*dead, *others):
        file.touch()
    remove_leftovers(tmp_path)
    assert not any(file.exists() for file in dead)
    assert all(file.exists() for file in others)


def test_files_are_in_order_of_their_steps_and_others_are_somebody_s_own(tmp_path: Path) -> None:
    steps = [99_975_000, 999_975_000, 1_000_000_000, 10_000_025_000]
    files = [tmp_path / f"step_{step:09d}.pt" for step in steps]
    for file in (*files, tmp_path / "step_000100000_good.pt", tmp_path / "step_best.pt"):
        file.touch()
    assert numbered(tmp_path, "step") == files


def test_what_is_written_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "latest.pt", []

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    write_bytes(path, b"precious")
    assert synced == [(8, False)]
