"""The soak test: that it runs what it says, and that it sees what is wrong."""

import json
import os
import random
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, composed, run_script, unseen, wait_for_lines

from icm import checkpoint
from icm.checkpoint_reader import read_checkpoint
from icm.errors import UserError
from icm.soak.files import KINDS, _wrong, forged, forgeries
from icm.soak.forked import Ended, start_forked
from icm.soak.pieces import compare
from icm.soak.program import QUICK, Findings, Training, end_all


@pytest.mark.usefixtures("shared_memory")
def test_a_short_soak_holds_and_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, whose scripts are forked: a new one would have to import all for that."""
    folder = tmp_path / "soak"
    short = ["parts=[kills,files]", "kills=1", "files=1", "seed=14", f"folder={folder}"]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "soak.py"))["main"](composed("soak", *short))
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    result = json.loads((folder / "soak.json").read_text())
    assert [part["failures"] for part in result["parts"].values()] == [[], []]
    kills, files = result["parts"].values()
    assert kills["tried"] == 1
    assert kills["figures"].keys() == {"dqn"}
    assert files["tried"] == 1
    assert files["figures"].keys() == KINDS.keys()
    assert sum(sum(ends.values()) for ends in files["figures"].values()) == 1
    assert f"written to {folder / 'soak.json'}" in printed


def test_without_the_signals_it_sends_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGSTOP")
    monkeypatch.setitem(sys.modules, "icm.soak.suite", None)  # there it cannot be imported
    with pytest.raises(UserError, match=r"soak\.py sends signals"):
        runpy.run_path(str(ROOT / "scripts" / "soak.py"))["main"](composed("soak"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_is_refused_or_harmless(
    kind: str, trained: Path, tmp_path: Path
) -> None:
    whole = (trained / "checkpoints" / "latest.pt").read_bytes()
    path, canary = tmp_path / "latest.pt", tmp_path / "CANARY"
    for number in range(3):
        damaged = KINDS[kind](whole, random.Random(number), canary)
        assert damaged != whole
        path.write_bytes(damaged)
        for read in (checkpoint.load, lambda path: read_checkpoint(str(path))):
            with suppress(UserError):
                read(path)
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("alone", [True, False])
def test_no_forgery_runs_anything(alone: bool, trained: Path, tmp_path: Path) -> None:
    whole = (trained / "checkpoints" / "latest.pt").read_bytes()
    path, canary = tmp_path / "latest.pt", tmp_path / "CANARY"
    path.write_bytes(forged(whole, forgeries(canary)[0], alone=alone))
    with suppress(Exception):
        torch.load(path, weights_only=False)
    assert canary.exists()  # so it runs where pickles are trusted
    canary.unlink()
    for forgery in forgeries(canary):
        path.write_bytes(forged(whole, forgery, alone=alone))
        for read in (checkpoint.load, lambda path: read_checkpoint(str(path))):
            with suppress(UserError):
                read(path)
        assert list(tmp_path.iterdir()) == [path]


def test_a_training_that_was_left_running_is_ended(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", QUICK)
    end_all()
    assert training.process.returncode == -signal.SIGKILL


def test_a_signal_ends_it_and_its_trainings(tmp_path: Path) -> None:
    folder = tmp_path / "soak"
    place = tmp_path / "place"
    place.mkdir()
    given = ("parts=[kills]", "kills=60", f"folder={folder}")
    running = start_forked("soak.py", given, unseen(), place, session=True)
    wait_for_lines(folder / "kills" / "dqn" / "000", 1, running.is_alive)
    assert running.pid is not None
    below = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGTERM)
    running.join(60)
    assert (place / "status").read_text() == str(128 + signal.SIGTERM)
    assert not psutil.wait_procs(below, timeout=10)[1]
    assert len(list((folder / "kills").glob("*/*.txt"))) == 2  # no more were started


def test_a_part_that_is_none_and_a_folder_that_exists_are_refused(tmp_path: Path) -> None:
    for argument, words in (
        ("parts=[kill]", "parts=kill: must be some of kills, stops"),
        ("parts=[]", "parts=: must be some of kills, stops"),
        ("kills=-1", "kills=-1: must be at least 0"),
        ("minutes=0", "minutes=0.0: must be a positive number"),
        ("parts=[kills]", f"folder={tmp_path}: cannot be created"),
    ):
        done = run_script("soak.py", argument, f"folder={tmp_path}")
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "failures"),
    [
        ([{"step": 64, "a": 1.0}, {"step": 96, "a": 2.0, "speed/x": 5.0}], 0),
        ([{"step": 96, "a": 2.0}], 1),  # 64 is missing
        ([{"step": 64, "a": 1.5}, {"step": 96, "a": 2.0}], 1),  # 64 was otherwise
        ([{"step": 32, "a": 0.0}, {"step": 64, "a": 1.0}], 1),  # 32 was before
    ],
)
def test_lines_that_are_missing_or_otherwise_are_seen(
    lines: list[dict[str, float]], failures: int
) -> None:
    found = Findings()
    logged = {64: {"step": 64, "a": 1.0}}
    compare(logged, lines, 40, found, Path("run"))
    assert len(found.failures) == failures


def test_a_bit_anywhere_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path, weights = tmp_path / "small.pt", torch.arange(64.0)
    settings = {"format": checkpoint.FORMAT, "step": 5, "config": {"seed": 1}}
    checkpoint.save(path, {**settings, "models": {"phi": {"w": weights}}})
    whole, refused = path.read_bytes(), 0
    places = range(0, len(whole), 5)
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            found = checkpoint.load(path)
        except UserError:
            refused += 1
            continue
        assert torch.equal(found.pop("models")["phi"]["w"], weights), place
        assert found == settings, place
    assert refused > len(places) / 4


def test_what_is_marked_as_a_folder_is_refused(tmp_path: Path) -> None:
    """PyTorch would read nothing of it, and take whatever is in memory for the weights."""
    path, weights = tmp_path / "small.pt", torch.arange(64.0)
    models = {"phi": {"w": weights}}
    checkpoint.save(path, {"format": checkpoint.FORMAT, "step": 5, "config": {}, "models": models})
    assert torch.equal(checkpoint.load(path)["models"]["phi"]["w"], weights)
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))  # of the tensor
    changed = bytearray(whole)
    changed[entry + 38] |= 0x10
    path.write_bytes(changed)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    now, path = checkpoint.FORMAT, tmp_path / "old.pt"
    checkpoint.save(path, {"format": now - 1, "step": 5, "config": {}, "models": {}})
    with pytest.raises(UserError, match=f"checkpoint format {now - 1}; this program reads {now}"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Ended(0, "", "", 1 << 20), None),
        (Ended(2, "", "play.py: error: x: damaged\n", 1 << 20), None),
        (Ended(None, "", "", 1 << 20), "did not end"),
        (Ended(0, "", "Traceback (most recent call last):\n", 1 << 20), "exit status 0"),
        (Ended(1, "", "play.py: error: x\n", 1 << 20), "exit status 1"),
        (Ended(-9, "", "", 1 << 20), "exit status -9"),
        (Ended(2, "", "play.py: error: x\nand more\n", 1 << 20), "not one clear line"),
        (Ended(2, "", "damaged\n", 1 << 20), "not one clear line"),
        (Ended(0, "", "", 1 << 30), "took 1024 MiB of memory"),
    ],
)
def test_what_a_script_does_wrong_with_a_file_is_seen(ended: Ended, words: str | None) -> None:
    told = _wrong(ended, Ended(0, "", "", 1 << 20), size=1000)
    assert told is None if words is None else words in str(told)
