"""Redoing a row of the results with the real scripts."""

import json
from pathlib import Path

import pytest
from conftest import SMALL, composed, killed_training, run_script, settings, whole_training

from icm.config import EvaluateConfig, typed
from icm.files import latest
from icm.reproduction import ReproduceConfig, flattened, table

ROWS = (
    "+rows.tiny.train=[]",
    "+rows.tiny.evaluate={}",
    "+rows.on.train=['total_steps=160','checkpoint.every=32']",
    "+rows.on.evaluate={sticky:['episodes=1','env.sticky_probability=0.25']}",
    "+rows.on.after=tiny",
)


def reproduce(folder: Path, row: str) -> str:
    given = (f"row={row}", "seeds=[1]", f"folder={folder}", "device=cpu", *ROWS)
    done = run_script("reproduce.py", *given, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(path: Path) -> list[int]:
    """Those of a summary, in which every interval is there once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["policy/entropy"] > 0 for line in lines)
    return [line["step"] for line in lines]


def test_a_row_is_trained_evaluated_and_not_done_again(tmp_path: Path) -> None:
    before = whole_training(tmp_path / "tiny_seed1", *SMALL, "seed=1", "total_steps=64")
    done = run_script("reproduce.py", "row=on", "seeds=[1]", f"folder={tmp_path}", *ROWS)
    assert done.returncode == 2  # as if it had been stopped before its end
    assert "row=on: needs row=tiny of seed 1 first" in done.stderr
    (tmp_path / "tiny_seed1.metrics.jsonl").touch()

    run, continued = tmp_path / "on_seed1", f"resume={latest(before)}"
    given = ("total_steps=160", "checkpoint.every=32", "seed=1", "device=cpu")
    killed_training(run, continued, *given, f"hydra.run.dir={run}")
    printed = reproduce(tmp_path, "on")
    assert continued in printed
    assert "of running episodes again" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("$")] == [
        "train.py",
        "evaluate.py",
    ]
    assert f"hydra.run.dir={run}" in printed
    assert steps(tmp_path / "on_seed1.metrics.jsonl") == [96, 128, 160]
    sticky = json.loads((tmp_path / "on_seed1.sticky.json").read_text())
    assert sticky["step"] == 160
    assert sticky["env"]["sticky_probability"] == 0.25
    table = printed.splitlines()[-3:]
    policies = ["sampled", "greedy", "random"]
    assert [line.split()[:2] for line in table] == [["sticky", policy] for policy in policies]
    assert reproduce(tmp_path, "on").splitlines() == table  # nothing is run again
    (tmp_path / "on_seed1.sticky.json").write_text("")
    done = run_script("reproduce.py", "row=on", "seeds=[1]", f"folder={tmp_path}", *ROWS)
    assert done.returncode == 2
    assert done.stderr.startswith(f"reproduce.py: error: {tmp_path}/on_seed1.sticky.json: damaged")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["row", "must be given"]),
        (["row=level", "seeds=[]"], ["seeds=[]", "one or more"]),
        (["row=levels"], ["row=levels", "level, level_learned"]),
        (["row=tiny", "+rows.tiny.train=['total_steps=0']"], ["rows.tiny.evaluate"]),
        (
            ["row=tiny", "+rows.tiny.train=['total_steps=0']", "+rows.tiny.evaluate={}"],
            ["train.py ended with status 2"],
        ),
    ],
)
def test_reproduce_refuses(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    done = run_script("reproduce.py", *arguments, f"folder={tmp_path}", "device=cpu")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("reproduce.py: error: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in done.stderr


def test_all_rows_are_of_settings_that_there_are() -> None:
    rows = typed(composed("reproduce", "row=level"), ReproduceConfig).rows
    assert len(rows) > 20
    for row in rows.values():
        before = rows[row.after].train if row.after else []
        settings(*flattened([*before, *row.train]))
    for given in {tuple(each) for row in rows.values() for each in row.evaluate.values()}:
        assert typed(composed("evaluate", "ckpt=some.pt", *given), EvaluateConfig).episodes >= 30


def test_of_several_seeds_there_is_a_mean_with_its_error() -> None:
    sampled = [
        {"distance_mean": distance, "flag_rate": flags, "random": {}, "greedy": {}}
        for distance, flags in ((100.0, 0.0), (200.0, 0.5), (600.0, 1.0))
    ]
    of_seeds = [
        each | {"greedy": each, "random": {"distance_mean": 7.0, "flag_rate": 0.0}}
        for each in sampled
    ]
    lines = table({"plain": of_seeds}).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["plain", p] for p in ("sampled", "greedy", "random")
    ]
    assert lines[0].endswith("100 (0.00)     200 (0.50)     600 (1.00)  mean 300 ± 153 (0.50)")
    assert lines[2].endswith("mean 7 ± 0 (0.00)")
