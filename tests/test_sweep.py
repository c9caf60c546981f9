"""Runs that go on in their own folders, and many of them at once."""

import shutil
import signal
from pathlib import Path

import psutil
import pytest
from conftest import (
    FULL,
    SMALL,
    UNSEEN,
    forked_training,
    killed_training,
    metrics_of,
    run_script,
    wait_for_lines,
    whole_training,
)
from omegaconf import OmegaConf

from icm import checkpoint
from icm.exploration import restored
from icm.files import latest, lock

LENGTH = ("total_steps=96", "checkpoint.every=32")


def test_a_run_that_was_killed_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed_training(run, *SMALL, *LENGTH, f"hydra.run.dir={run}")
    latest(run).unlink()  # which kill -9 may come before, and a full disk
    with (run / "metrics.jsonl").open("a") as file:  # what it did after it had saved
        file.write('{"step": 64}\n{"step": 9')
    again = (*SMALL, *LENGTH, f"hydra.run.dir={run}")
    holder = lock(run)
    done = run_script("train.py", *again)
    assert done.returncode == 2
    assert "another training writes there" in done.stderr
    holder.lock.release()
    done = run_script("train.py", *again)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if str(latest(run)) in line)
    assert ": missing; going on with step_" in line
    assert "of running episodes again" in done.stdout
    assert [line["step"] for line in metrics_of(run)] == [32, 64, 96]
    assert all("policy/entropy" in line for line in metrics_of(run))
    done = run_script("train.py", *again)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"complete: {run}\n"


def written(run: Path) -> tuple[bytes, int]:
    """The settings of a run, and when it has saved."""
    return (run / ".hydra" / "config.yaml").read_bytes(), latest(run).stat().st_mtime_ns


def test_a_resumed_run_that_was_killed_goes_on_though_the_other_is_gone(
    trained: Path, tmp_path: Path
) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(trained / "checkpoints", other)
    command = (f"resume={other}/latest.pt", "total_steps=192", "checkpoint.every=32", *UNSEEN)
    killed_training(run, *command, f"hydra.run.dir={run}")
    shutil.rmtree(other)
    whole_training(run, *command)
    assert [line["step"] for line in metrics_of(run)] == [128, 160, 192]
    # to begin there anew, it would have to be there
    assert run_script("train.py", *command, f"hydra.run.dir={tmp_path / 'new'}").returncode == 2


@pytest.mark.usefixtures("shared_memory")  # joblib's
def test_a_sweep_that_was_killed_goes_on_with_another_launcher(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    names = ["0_curiosity=none", "1_curiosity=rnd"]
    runs = [folder / name for name in names]
    given = ("-m", "curiosity=none,rnd", f"hydra.sweep.dir={folder}")
    killed_training(runs[0], *given, *SMALL, *LENGTH)

    faster = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done = run_script("train.py", *given, *faster, *SMALL, *LENGTH)
    assert done.returncode == 0, done.stderr
    assert sorted(run.name for run in folder.iterdir() if run.is_dir()) == names
    for run in runs:
        assert [line["step"] for line in metrics_of(run)] == [32, 64, 96]

    # other settings are refused, and what the runs were stays written; processes may be others
    before = [written(run) for run in runs]
    done = run_script("train.py", *given, *SMALL, *LENGTH, "agent.lr=1")
    assert done.returncode == 2
    assert "exists, with a run of agent.lr=0.001, not 1.0" in done.stderr
    assert "curiosity=rnd" in (runs[1] / ".hydra" / "overrides.yaml").read_text()
    done = run_script("train.py", *given, *SMALL, *LENGTH, "env.num_workers=1")
    assert done.stdout.splitlines() == [f"complete: {run}" for run in runs], done.stderr
    assert [written(run) for run in runs] == before

    # no character of a folder's name keeps a script from finding a checkpoint
    folder.rename(tmp_path / "läufe (it's one)")
    moved = tmp_path / "läufe (it's one)" / names[0] / "checkpoints" / "latest.pt"
    out = tmp_path / "a=b,c.pt"
    done = run_script("export.py", f"ckpt={moved}", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(out)["step"] == 96


def test_a_job_whose_time_is_up_saves_and_comes_again(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    run = folder / "0_"
    given = ("-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={folder}")
    # as by default, or it may be over before it is told
    launcher = forked_training(tmp_path, *given, *SMALL, *FULL, "total_steps=160")
    wait_for_lines(run, 1, launcher.is_alive)
    (job,) = [
        each
        for each in psutil.Process(launcher.pid).children(recursive=True)
        if "submitit.core._submit" in each.cmdline()
    ]
    for each in (job, *job.children(recursive=True)):  # as Slurm does
        each.send_signal(signal.SIGUSR2)
    launcher.join(100)
    launcher.kill()  # nothing happens to one that has ended
    assert launcher.exitcode == 0, (tmp_path / "stderr").read_text()
    (output,) = (path.read_text() for path in folder.glob(".submitit/*/*.out"))
    _, saved, again = output.split("Starting with JobEnvironment")
    assert "saved step " in saved
    assert "of running episodes again" in again
    assert [line["step"] for line in metrics_of(run)] == list(range(32, 161, 32))


def test_a_mistake_in_one_run_of_a_sweep_is_told_and_the_others_are_done(tmp_path: Path) -> None:
    done = run_script(
        "train.py", *SMALL, "-m", "total_steps=32", "agent.lr=-1,0.001,-2",
        f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 2
    for number, lr in ((0, -1), (2, -2)):
        assert f"train.py: {number}_agent.lr={lr}: error: agent.lr={lr}.0: must be" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: error: agent.lr=-1")
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "1_agent.lr=0.001")] == [32]


def test_a_sweep_of_a_resumed_run_is_refused() -> None:
    done = run_script("train.py", "-m", "resume=runs/latest.pt", "agent.lr=1e-4,1e-3")
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: -m: the runs of a sweep begin anew; resume=")
    assert len(done.stderr.splitlines()) == 1


def test_a_sweep_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sweep"
    file.touch()
    for folder, words in ((file, "is no folder"), (file / "runs", "cannot create")):
        done = run_script("train.py", "-m", "seed=1,2", f"hydra.sweep.dir={folder}")
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_search_tries_settings_and_says_which_were_best(tmp_path: Path) -> None:
    small = [s for s in SMALL[1:] if "steps_per_update" not in s]
    given = (
        *("train.py", "-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=1"),
        *(*small, "agent.rollout_steps=16", "total_steps=64", f"hydra.sweep.dir={tmp_path}"),
    )
    done = run_script(*given)
    assert done.returncode == 0, done.stderr
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    (path,) = tmp_path.glob("*/checkpoints/latest.pt")
    assert best.best_value == restored(checkpoint.load(path)["exploration"]).objective() > 0
    assert 2e-4 <= best.best_params["agent.lr"] <= 2e-3
    again = run_script(*given)
    assert again.returncode == 0, again.stderr
    assert f"complete: {path.parents[1]}" in again.stdout.splitlines()
