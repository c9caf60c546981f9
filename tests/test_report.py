"""Reports: what they say, and that they stand alone."""

import base64
import json
import re
from pathlib import Path

import html5lib
import numpy as np
import pytest
from conftest import run_script, script_into
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from icm.arguments import run
from icm.errors import UserError
from icm.viz.report import (
    colours,
    compared,
    draw_mean,
    names_of,
    read_run,
    read_runs,
    smoothed,
    thousands,
    write_report,
)


def page_of(path: Path) -> str:
    """The text of a report; it is valid and asks no network for anything."""
    text = path.read_text()
    html5lib.HTMLParser(strict=True).parse(text)
    addresses = set(re.findall(r"https?://[^\"<> ]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    return text


def make_run(folder: Path, seed: int, **settings: object) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    known = {
        "seed": seed,
        "resume": None,
        "total_steps": 4000,
        "env": {"id": "SuperMarioBros-1-1-v0"},
        "agent": {"name": "ppo"},
        "curiosity": {"name": "icm"},
    }
    OmegaConf.save(OmegaConf.create(known | settings), folder / ".hydra" / "config.yaml")
    given = [f"seed={seed}", "device=cpu", *(f"{name}=<b>" for name in settings)]
    OmegaConf.save(OmegaConf.create(given), folder / ".hydra" / "overrides.yaml")
    rows = [
        {
            "step": step,
            "episode/distance": 100.0 * seed + step,
            "episode/flag": float(step == 3000),
            "explore/cells": 10,
            "explore/levels": 1 + (seed == 3),
            "explore/distance_max": 3161.0,
            "icm/inverse_gain": None if step == 1000 else 0.25,
            "speed/agent_steps_per_s": 10.0,
        }
        for step in (1000, 2000, 3000, 4000)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_a_training_writes_its_report(trained: Path) -> None:
    text = page_of(trained / "report.html")
    for words in (
        "dqn with icm, seed 42",
        "SuperMarioBros-1-1-v0",
        "96 of 96",
        "Does it explore?",
        "Is it fast?",
        "warmup_steps: 32",
        f"resume={trained}/checkpoints/latest.pt",
        'alt="map of 1-1" src="data:image/png;base64,',
        "<tr><th>place</th><th>first visit</th><th>lives that came there</th>",
        "<tr><td>1-1</td><td>after 0 agent steps</td>",
    ):
        assert words in text, words


def test_a_report_shows_the_films(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run", 7), tmp_path / "report.html"
    films = {"best": "Its best episode", "way": "The way to the level that it discovered last"}
    (run / "videos").mkdir()
    for number in range(3):
        for name in [*films][:number]:
            (run / "videos" / f"{name}.mp4").write_bytes(name.encode())
        write_report([read_run(run)], out)
        text = page_of(out)
        assert text.count("<video") == number
        for name, title in [*films.items()][:number]:
            film = base64.b64encode(name.encode()).decode()
            assert re.search(rf"<h2>{title}</h2>[^§]*base64,{film}", text)


def test_facts_are_those_of_the_log(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", 7))
    assert run.minutes.tolist() == pytest.approx([x / 600 for x in (1000, 2000, 3000, 4000)])
    assert run.facts() == {
        "agent": "ppo with icm, seed 7",
        "game": "SuperMarioBros-1-1-v0",
        "agent steps": "4 000 of 4 000",
        "time": "7 minutes",
        "distance of an episode, last tenth": "4700 pixels",
        "farthest": "3161 pixels",
        "discovered": "10 cells in 1 level",
        "first flag": "after 3 000 agent steps, 5.0 minutes",
        "inverse gain, last tenth": "0.25 nats",
    }
    later = read_run(make_run(tmp_path / "later", 7, resume="latest.pt"))
    assert later.minutes.tolist() == pytest.approx([x / 600 for x in (0, 1000, 2000, 3000)])
    assert later.facts()["time since it was resumed"] == "5 minutes"


def test_runs_that_differ_in_their_seed_alone_are_one_curve(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"seed{seed}", seed) for seed in (1, 2, 3)]
    other = make_run(tmp_path / "other", 1, agent={"name": "<b>dqn"})
    out = tmp_path / "new" / "report.html"
    done = run_script("report.py", *folders, other, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    text = page_of(out)
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", text)]
    columns = ["kind", "runs", "agent steps", "minutes", "distance", "inverse gain", "farthest"]
    assert rows[0] == [*columns, "cells", "levels"]
    assert rows[1] == [
        *(
            '<span style="color: #1f4e8c">■</span> no other setting',
            "3",
            "4000 ± 0",
            "7 ± 0",
            "4200 ± 58",
            "0.25 ± 0.00",
            "3161 ± 0",
        ),
        *("10 ± 0", "1.3 ± 0.3"),
    ]
    assert rows[2][:5] == [
        '<span style="color: #c8641b">■</span> agent=&lt;b&gt;',
        "1",
        "4000",
        "7",
        "4100",
    ]
    assert len(rows) == 3
    alone = tmp_path / "alone.html"
    write_report([read_run(folders[0])], alone)
    assert "no other setting" not in page_of(alone)


def test_means_are_of_what_all_runs_have_logged(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"seed{seed}", seed) for seed in (1, 2)]
    log = folders[1] / "metrics.jsonl"
    first, *_, last = log.read_text().splitlines(keepends=True)
    log.write_text(first + last)  # what came between could not be written
    axes = Figure().subplots()
    draw_mean(axes, [read_run(folder) for folder in folders], "episode/distance", "", "red", "-")
    ((x, y),) = (line.get_data() for line in axes.lines)
    assert list(x) == [1, 4]
    assert list(y) == [2650, 2650]  # smoothed: of 1150 and 4150


def test_a_run_and_what_goes_on_with_it_are_two_kinds(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", 1))
    on = make_run(tmp_path / "on", 1, resume="latest.pt")
    rows = [{"step": step, "speed/agent_steps_per_s": 10.0} for step in (5000, 6000)]
    (on / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read_run(on).kind != run.kind
    again = read_run(make_run(tmp_path / "again", 2, resume="latest.pt"))
    assert again.kind == run.kind  # which began where it did


def test_where_environments_ran_makes_no_other_kind(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", 1))
    on_ray = read_run(make_run(tmp_path / "on_ray", 2, collector="ray"))
    assert on_ray.kind == run.kind
    assert read_run(make_run(tmp_path / "other", 2, device="cuda")).kind != run.kind


def test_a_run_that_has_just_begun_is_not_averaged_with_complete_ones(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"seed{seed}", seed) for seed in (1, 2, 3)]
    log = folders[2] / "metrics.jsonl"
    log.write_text(log.read_text().partition("\n")[0] + "\n")
    out = tmp_path / "report.html"
    write_report([read_run(folder) for folder in folders], out)
    cell = r"\s*<td>(.*?)</td>"
    rows = re.findall(rf"</span> (.*?)</th>{cell}{cell}", page_of(out))
    assert sorted(rows) == [
        ("no other setting", "2", "4000 ± 0"),
        ("no other setting (not complete)", "1", "1000"),
    ]


@pytest.mark.parametrize("number", [1, 6, 7, 40])
def test_every_kind_has_its_own_colour(number: int) -> None:
    assert len(set(colours(number))) == number


def test_a_kind_of_runs_without_a_metric_is_no_reason_to_warn(tmp_path: Path) -> None:
    without = make_run(tmp_path / "without", 1)
    other = make_run(tmp_path / "other", 1, agent={"name": "dqn"})
    rows = [{"step": 1000, "q/mean": 0.5, "loss/q": 0.4}]
    (other / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = run_script("report.py", without, other, "--out", tmp_path / "report.html")
    assert done.returncode == 0
    assert done.stderr == ""


def test_what_settings_do_not_tell_apart_is_named_by_its_folder(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, 1)) for name in ("first", "second", "third")]
    assert names_of([runs[:2], runs[2:]]) == ["first and 1 more", "third"]
    # and what these do not, by where they are
    runs = [read_run(make_run(tmp_path / place / "run", 1)) for place in ("here", "there")]
    assert names_of([runs[:1], runs[1:]]) == [f"{tmp_path}/here/run", f"{tmp_path}/there/run"]


def test_a_sweep_is_all_runs_in_its_folder_that_have_begun(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / f"{seed}_seed={seed}", seed)
    for seed, log in ((3, ""), (4, '{"step": 20')):
        (make_run(tmp_path / f"{seed}_seed={seed}", seed) / "metrics.jsonl").write_text(log)
    assert [run.name for run in read_runs(tmp_path)] == ["1_seed=1", "2_seed=2"]


def test_report_refuses(tmp_path: Path) -> None:
    (make_run(tmp_path / "empty", 1) / "metrics.jsonl").write_text("")
    with (make_run(tmp_path / "damaged", 1) / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    run = make_run(tmp_path / "run", 1)
    (tmp_path / "new").mkdir()
    for arguments, words in (
        ([], "RUN"),
        ([tmp_path / "none"], f"{tmp_path}/none: no run folder"),
        ([tmp_path / "new"], "new: no run folder of scripts/train.py (there is no metrics.jsonl"),
        ([tmp_path / "empty"], "nothing has been logged"),
        ([tmp_path / "damaged"], "metrics.jsonl: line"),
        ([run, "--out", "/proc/report.html"], "cannot write /proc/report.html"),
    ):
        done = run_script("report.py", *arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
    given = ("report.py", run, "--out", tmp_path / "report.html")
    full = script_into("/dev/full", *given)
    assert full == (2, "report.py: error: [Errno 28] No space left on device\n")
    assert (tmp_path / "report.html").exists()
    assert script_into(None, *given) == (1, "")


@pytest.mark.parametrize(
    "text", ["resume: null\nenv: {id: SMB}\nagent: {name: ppo}\n", "agent: {name", "- agent", ""]
)
def test_settings_that_were_cut_off_are_refused(text: str, tmp_path: Path) -> None:
    settings = make_run(tmp_path, 1) / ".hydra" / "config.yaml"
    settings.write_text(text)
    with pytest.raises(UserError, match=f"^{settings}: damaged"):
        read_run(tmp_path)


def test_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, 1))
    for damaged in ("[", "5", '[{"place": "1-1"}]'):
        (tmp_path / "places.json").write_text(damaged)
        with pytest.raises(UserError, match=r"places\.json: damaged"):
            write_report([run], tmp_path / "report.html")


def test_a_folder_that_cannot_be_looked_at_is_none() -> None:
    with pytest.raises(UserError, match=r"xx: no run folder .*File name too long"):
        read_runs(Path(300 * "x"))


def test_smoothing_is_a_mean_over_neighbours() -> None:
    values = np.array([np.nan, *range(12)], dtype=float)
    assert smoothed(values)[6] == pytest.approx(5)
    assert smoothed(values)[0] == pytest.approx(2)  # of 0 to 4
    assert np.isnan(smoothed(np.full(3, np.nan))).all()
    assert thousands(1234567) == "1 234 567"


def test_results_are_of_the_last_tenth_and_the_best_kind_is_first(tmp_path: Path) -> None:
    kinds = {}
    for name, distance in (("near", 0.0), ("far", 100.0)):
        rows = [
            {"step": 200 * n, "episode/distance": distance + n, "speed/agent_steps_per_s": 10.0}
            for n in range(1, 21)
        ]
        folder = make_run(tmp_path / name, 1)
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        kinds[name] = [read_run(folder)]
    assert [kinds[name][0].figures()["distance"] for name in kinds] == [19.5, 119.5]
    _, table = compared(kinds)
    assert [cells[0] for _, cells in table] == ["far", "near"]
    assert [colour for colour, _ in table] == [*reversed(colours(2))]  # those of their curves


def test_an_interrupted_script_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err == ""
