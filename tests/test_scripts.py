"""The real scripts in subprocesses, as a user runs them: what works, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path

import imageio.v2 as imageio
import psutil
import pytest
import torch
from conftest import (
    FULL,
    ROOT,
    SMALL,
    UNSEEN,
    forked_training,
    metrics_of,
    run_script,
    settings,
    train_after,
    unseen,
    wait_for_lines,
    whole_training,
    without_speed,
)

from icm import checkpoint
from icm.config import GameConfig
from icm.errors import UserError
from icm.playing import load_agent
from icm.soak.forked import run_forked, start_forked

FAST = ("env.emulator=libretro",)
TOO_LONG = "/" + 300 * "x"
"""A path that cannot be looked at, not even by root."""

# --- what works ---------------------------------------------------------------------------------


def test_train_leaves_a_complete_run_folder(trained: Path) -> None:
    assert (trained / ".hydra" / "config.yaml").is_file()
    assert list(trained.glob("events.out.tfevents.*"))
    lines = metrics_of(trained)
    assert [line["step"] for line in lines] == [32, 64, 96]
    for name in (
        "explore/cells",
        "explore/levels",
        "reward/intrinsic",
        "reward/extrinsic",
        "loss/forward",
        "loss/inverse",
        "loss/q",
        "icm/inverse_accuracy",
        "icm/inverse_gain",
        "q/mean",
        "policy/epsilon",
        "policy/entropy",
        "speed/agent_steps_per_s",
        "speed/frames_per_s",
        "speed/update_share",
    ):
        assert name in lines[-1], name
    height, width, _ = imageio.imread(trained / "maps" / "1-1.png").shape
    assert height > 800
    assert width > 600
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names == ["latest.pt", "replay_000000096.pt", "step_000000096.pt"]


def test_tensorboard_has_the_same_numbers_as_metrics_jsonl(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained), size_guidance={"histograms": 0})
    events.Reload()
    for line in metrics_of(trained):
        for name, value in line.items():
            if name != "step":
                points = {e.step: e.value for e in events.Scalars(name)}
                assert points[int(line["step"])] == pytest.approx(value, rel=1e-5)
    for name in ("curiosity/surprise", "policy/actions"):
        seen = [event.histogram_value.num for event in events.Histograms(name)]
        assert len(seen) == 3
        assert 90 <= sum(seen) <= 96  # an episode's last state has no action
    text = events.Tensors("run/command/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "train.py agent=dqn" in text
    text = events.Tensors("run/settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "warmup_steps: 32" in text
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert [event.step for event in events.Images("map/1-1")][-1] == 96
    shown = events.Images("map/1-1")[-1]
    image = imageio.imread(shown.encoded_image_string)
    assert (image == imageio.imread(trained / "maps" / "1-1.png")).all()


def test_checkpoints_hold_plain_data_under_the_documented_keys(trained: Path) -> None:
    content = torch.load(trained / "checkpoints" / "latest.pt", weights_only=True)
    assert content["format"] == checkpoint.FORMAT
    assert content["step"] == 96
    signal, learner = {"phi", "target_phi", "fnet", "inverse"}, {"qnetwork", "target"}
    assert set(content["models"]) == signal | learner | {"input_norm", "novelty_phi"}
    assert content["config"]["env"]["id"] == "SuperMarioBros-1-1-v0"
    assert {"optimizers", "curiosity", "rng"} <= set(content)
    assert content["versions"]["torch"] == version("torch")
    last = metrics_of(trained)[-1]
    assert {"step": 96, **content["metrics"]} == last


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(
    trained: Path, tmp_path: Path
) -> None:
    for seed, steps in ((42, 96), (43, 32)):
        folder = tmp_path / str(seed)
        done = run_script(
            *("train.py", *SMALL, *FULL, "env.emulator=nes_py", f"total_steps={steps}"),
            *(f"seed={seed}", f"hydra.run.dir={folder}"),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("env.emulator=libretro") == 1  # a hint, once
        lines = without_speed(metrics_of(trained))[: steps // 32]
        assert (without_speed(metrics_of(folder)) == lines) == (seed == 42)


def test_resume_continues_step_count_schedules_and_memory(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    done = run_script(
        "train.py",
        "agent=dqn",  # so that its settings are known
        "agent.target_tau=0.01",
        f"resume={trained / 'checkpoints' / 'latest.pt'}",
        "total_steps=160",
        "compile=off",  # false for YAML, but not for Hydra
        *UNSEEN,
        f"hydra.run.dir={folder}",
    )
    assert done.returncode == 0, done.stderr
    assert "no memory of step" not in done.stdout
    changed = [line for line in done.stdout.splitlines() if line.startswith("changed")]
    assert changed == [
        "changed: agent.target_tau=0.01, was 0.005",
        "changed: compile=off, was auto",
        "changed: map.every=0, was 32",
        "changed: report.every=0, was 32",
        "changed: total_steps=160, was 96",
        "changed: video.every=0, was 32",
    ]
    assert [line["step"] for line in metrics_of(folder)] == [128, 160]
    before = torch.load(trained / "checkpoints" / "latest.pt", weights_only=True)
    after = torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)
    assert after["step"] == 160
    assert after["agent"]["updates"] == before["agent"]["updates"] + 64 // 8
    assert after["curiosity"]["scale"]["weight"] > before["curiosity"]["scale"]["weight"]
    visits = [content["exploration"]["visits"][:, 1].sum() for content in (before, after)]
    assert visits[1] == visits[0] + 64  # of one environment, in the middle of an episode
    assert after["exploration"]["pictures"].keys() == before["exploration"]["pictures"].keys()
    # settings of the checkpoint, not the defaults, but for what was overridden
    assert after["config"]["env"]["num_envs"] == 1
    assert after["config"]["total_steps"] == 160
    assert after["config"]["compile"] == "off"
    saved = (folder / ".hydra" / "config.yaml").read_text()
    assert "num_envs: 1" in saved


@pytest.mark.parametrize(("agent", "network"), [("ppo", "actor_critic"), ("pqn", "qnetwork")])
def test_learners_from_rollouts_train_and_play(agent: str, network: str, tmp_path: Path) -> None:
    small = [
        f"agent={agent}",
        *(s for s in SMALL[1:] if "steps_per_update" not in s),
        "agent.rollout_steps=16",
        "agent.epochs=1",
    ]
    folder = whole_training(tmp_path / "run", *small, "total_steps=96")
    assert all(line["loss/inverse"] > 0 for line in metrics_of(folder)[1:])
    path = folder / "checkpoints" / "latest.pt"
    content = torch.load(path, weights_only=True)
    # after 32 random steps, rollouts of 16, each learned in 2 updates while the next is made
    assert content["agent"]["updates"] == 2 + 2 + 1
    assert {"phi", "fnet", "inverse", network} <= set(content["models"])
    done = run_script("play.py", f"ckpt={path}", "render=none", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["length"] > 0


def test_a_core_that_a_checkpoint_names_is_not_loaded(trained: Path, tmp_path: Path) -> None:
    """It would be a program of whoever wrote the checkpoint."""
    path = tmp_path / "checkpoints" / "latest.pt"
    shutil.copytree(trained / "checkpoints", path.parent)
    content = checkpoint.load(path)
    content["config"]["env"] |= {"emulator": "libretro", "core": str(tmp_path / "evil.so")}
    checkpoint.save(path, content)
    done = run_script("play.py", f"ckpt={path}", "env.stuck_steps=5", "render=none")
    assert done.returncode == 0, done.stderr
    given = (f"resume={path}", "total_steps=128", *UNSEEN)
    done = run_script("train.py", *given, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert f"changed: env.core=auto, was {tmp_path / 'evil.so'}" in done.stdout
    done = run_script("play.py", f"ckpt={path}", f"env.core={tmp_path / 'evil.so'}")
    assert_refused(done, "evil.so: no such file")


def test_of_a_damaged_latest_checkpoint_the_one_before_is_resumed_even_without_its_memory(
    trained: Path, tmp_path: Path
) -> None:
    saved, folder = tmp_path / "checkpoints", tmp_path / "run"
    shutil.copytree(trained / "checkpoints", saved, ignore=shutil.ignore_patterns("replay_*"))
    latest = saved / "latest.pt"
    latest.write_bytes(flipped(latest.read_bytes()))
    given = (f"resume={latest}", "total_steps=160", *UNSEEN)
    done = run_script("train.py", *given, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "damaged" in line]
    assert str(latest) in line
    assert line.endswith("going on with step_000000096.pt")
    assert "no memory of step" in done.stdout
    assert [line["step"] for line in metrics_of(folder)] == [128, 160]
    assert "loss/q" in metrics_of(folder)[-1]  # of a new one
    assert "step_000000096.pt" in (folder / ".hydra" / "config.yaml").read_text()
    (saved / "step_000000096.pt").write_text("damaged, too")
    done = run_script("train.py", *given, f"hydra.run.dir={tmp_path / 'none'}")
    assert_refused(done, f"{latest}: damaged")
    assert not (tmp_path / "none").exists()


def test_the_tutorial_preset_trains(tmp_path: Path) -> None:
    folder = tmp_path / "tutorial"
    given = ("env.emulator=libretro", "env.action_repeat=2", "total_steps=154", "log.every=77")
    whole_training(folder, "preset=tutorial", *given, *UNSEEN)
    last = metrics_of(folder)[-1]
    assert 0 < last["loss/q"] < float("inf")
    models = torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["models"]
    assert models["phi"]["conv1.weight"].shape == (32, 3, 3, 3)
    assert models["fnet"]["linear1.weight"].shape == (256, 300)
    assert models["inverse"]["linear1.weight"].shape == (256, 576)
    assert models["qnetwork"]["linear1.weight"].shape == (100, 288)


def test_training_on_another_packages_environment(tmp_path: Path) -> None:
    (tmp_path / "rooms.py").write_text(
        "import gymnasium as gym\n"
        "from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper\n"
        "def make(**kwargs):\n"
        "    return ImgObsWrapper(RGBImgObsWrapper(gym.make('MiniGrid-Empty-5x5-v0', **kwargs)))\n"
        "gym.register('Rooms-v0', make)\n"
    )
    script = tmp_path / "train.py"  # whose folder Python looks into
    script.symlink_to(ROOT / "scripts" / "train.py")
    done = run_script(
        str(script),
        *SMALL,
        "env.emulator=nes_py",
        "env.id=rooms:Rooms-v0",
        "env.crop=[0,0,0,0]",
        "env.action_repeat=1",
        "total_steps=64",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    last = metrics_of(tmp_path / "run")[-1]
    assert "loss/q" in last
    assert "explore/cells" not in last


def assert_a_signal_saves_and_ends(
    number: signal.Signals, to_workers: bool, process: BaseProcess, place: Path
) -> None:
    """Of a training in the folder `run`, of a place where its output is, too."""
    assert process.pid is not None
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)  # as a terminal does
    os.kill(process.pid, number)  # and then `uv run`
    for worker in workers if to_workers else []:  # as a cluster's scheduler does
        worker.send_signal(number)
    process.join(60)
    process.kill()  # nothing happens to one that has ended
    assert process.exitcode == 128 + number
    assert "Traceback" not in (place / "stderr").read_text()
    assert not psutil.wait_procs(workers, timeout=10)[1]
    step = checkpoint.load(place / "run" / "checkpoints" / "latest.pt")["step"]
    assert metrics_of(place / "run")[-1]["step"] == step // 32 * 32  # the last whole interval
    assert (place / "run" / "checkpoints" / f"step_{step:09d}.pt").is_file()


@pytest.mark.parametrize(
    ("number", "to_workers"),
    [(signal.SIGTERM, True), (signal.SIGHUP, False), (signal.SIGUSR2, True)],
)
def test_a_signal_saves_and_ends_with_its_status(
    number: signal.Signals, to_workers: bool, tmp_path: Path
) -> None:
    process = forked_training(tmp_path, *SMALL, f"hydra.run.dir={tmp_path / 'run'}")
    wait_for_lines(tmp_path / "run", 1, process.is_alive)
    assert_a_signal_saves_and_ends(number, to_workers, process, tmp_path)


def test_under_nohup_a_closed_terminal_ends_nothing_but_ctrl_c_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    script, given = train_after(ignoring, tmp_path), (*SMALL, f"hydra.run.dir={folder}")
    process = start_forked(script, given, unseen(), tmp_path, session=True)
    wait_for_lines(folder, 1, process.is_alive)
    assert process.pid is not None
    before = len(metrics_of(folder))
    os.kill(process.pid, signal.SIGHUP)
    wait_for_lines(folder, before + 3, process.is_alive)
    assert_a_signal_saves_and_ends(signal.SIGINT, False, process, tmp_path)


def test_learning_that_breaks_down_ends_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = ("agent.lr=1e30", "curiosity.lr=1e30", "checkpoint.every=32", f"hydra.run.dir={folder}")
    done = run_script("train.py", *SMALL, *given)
    assert_refused(done, "finite; resume an older step_….pt")
    assert checkpoint.load(folder / "checkpoints" / "latest.pt")["agent"]["skipped"] < 50


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = forked_training(tmp_path, *SMALL, f"hydra.run.dir={folder}")
    wait_for_lines(folder, 1, process.is_alive)
    assert process.pid is not None
    found = psutil.Process(process.pid).children(recursive=True)
    workers = [worker for worker in found if "spawn_main" in " ".join(worker.cmdline())]
    for worker in workers:
        worker.suspend()  # the step does not end, and nothing can be saved
    main, spent = psutil.Process(process.pid), None
    while spent != (spent := sum(main.cpu_times()[:2])):  # until it waits for them
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == -signal.SIGINT
    for worker in workers:
        worker.resume()
    assert workers
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert not (folder / "checkpoints").exists()


def test_play_prints_one_json_line_per_episode(trained: Path) -> None:
    done = run_script(
        *("play.py", f"ckpt={trained / 'checkpoints' / 'latest.pt'}", "env.stuck_steps=6"),
        *("episodes=2", "render=none"),
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["episode"] for line in lines] == [0, 1]
    for line in lines:
        assert line["distance"] >= 40  # where Mario starts
        assert line["length"] > 0
        assert line["intrinsic_reward"] > 0
        assert {"flag", "game_reward", "levels"} <= set(line)


def test_play_writes_a_video_where_there_is_no_display(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "game.mp4"
    latest = trained / "checkpoints" / "latest.pt"
    given = (f"ckpt={latest}", "env.stuck_steps=6", "env.emulator=libretro", "greedy=true")
    done = run_script("play.py", *given, f"out={out}")
    assert done.returncode == 0, done.stderr
    length = json.loads(done.stdout)["length"]
    reader = imageio.get_reader(out)
    assert reader.get_meta_data()["codec"] == "h264"
    assert reader.get_meta_data()["fps"] == 60
    images = [image for image in reader]  # noqa: C416 (its length is said to be infinite)
    assert 6 * (length - 1) < len(images) <= 6 * length
    assert images[0].shape == (720, 1280, 3)
    assert images[0].std() > 20


def test_play_writes_animations_and_single_pictures_of_the_game_alone(
    trained: Path, tmp_path: Path
) -> None:
    latest = trained / "checkpoints" / "latest.pt"
    given = (f"ckpt={latest}", "env.stuck_steps=6", "env.emulator=libretro", "mind=false")
    lengths = []
    for out in (tmp_path / "game.gif", tmp_path / "frames"):
        done = run_script("play.py", *given, "speed=2", f"out={out}")
        assert done.returncode == 0, done.stderr
        lengths.append(json.loads(done.stdout)["length"])
    assert lengths[0] == lengths[1]
    animation = list(imageio.get_reader(tmp_path / "game.gif"))
    assert len(animation) == pytest.approx(6 * lengths[0] * 20 / 120, abs=1)
    assert animation[0].shape[:2] == (240, 256)
    pictures = sorted((tmp_path / "frames").iterdir())
    assert len(pictures) == pytest.approx(6 * lengths[0] * 60 / 120, abs=3)
    assert imageio.imread(pictures[0]).shape == (240, 256, 3)


def test_play_opens_a_window_where_there_is_a_display(trained: Path, tmp_path: Path) -> None:
    # SDL's driver without a screen; nobody closes the window
    environment = unseen() | {"SDL_VIDEODRIVER": "dummy"}
    latest = trained / "checkpoints" / "latest.pt"
    fast = (f"ckpt={latest}", "speed=8", "env.emulator=libretro")
    given = (*fast, "env.stuck_steps=6")
    process = start_forked("play.py", given, environment, tmp_path)
    printed = tmp_path / "stdout"
    while not (printed.exists() and printed.read_text().endswith("\n")):
        assert process.is_alive()
        time.sleep(0.05)
    assert json.loads(printed.read_text())["length"] >= 6
    assert process.is_alive()
    process.terminate()
    process.join()
    # but who wants a file gets one
    given = (*fast, "env.stuck_steps=1", f"out={tmp_path / 'game.mp4'}")
    ended = run_forked("play.py", given, environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "game.mp4").exists()


def test_evaluate_ends_with_json_and_prints_a_table(trained: Path) -> None:
    done = run_script(
        "evaluate.py",
        f"ckpt={trained / 'checkpoints' / 'latest.pt'}",
        "episodes=2",
        "env.stuck_steps=1",
        "env.id=SuperMarioBros-1-2-v0",
        "env.emulator=libretro",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["episodes"] == 2
    assert result["policy"] == "sampled"
    assert result["levels"] == ["1-2"]
    assert result["env"]["stuck_steps"] == 1  # trained with 20
    assert result["env"]["id"] == "SuperMarioBros-1-2-v0"  # and on 1-1
    assert result["env"]["emulator"] == "libretro"  # and on nes_py
    assert result["env"]["sticky_probability"] == 0  # as trained
    assert result["random"]["length_mean"] == 1  # nobody runs 15 pixels in his first 6 frames
    for key in ("distance_mean", "distance_stderr", "flag_rate", "past_200", "past_948"):
        assert key in result
    assert result["random"]["policy"] == "random"
    assert result["greedy"]["policy"] == "greedy"
    assert any(line.startswith("distance") and "±" in line for line in table)


def test_an_exported_checkpoint_is_small_and_plays_but_is_not_resumed(
    trained: Path, tmp_path: Path
) -> None:
    latest, out = trained / "checkpoints" / "latest.pt", tmp_path / "new" / "small.pt"
    done = run_script("export.py", f"ckpt={latest}", f"out={out}", "env.stuck_steps=10")
    assert done.returncode == 0, done.stderr
    assert f"{out}: {out.stat().st_size / 1e6:.2f} MB" in done.stdout
    assert out.stat().st_size < 0.35 * latest.stat().st_size
    small, whole = (torch.load(path, weights_only=True) for path in (out, latest))
    assert small["config"]["env"] == whole["config"]["env"] | {"stuck_steps": 10}
    for name, model in whole["models"].items():
        for key, value in model.items():
            torch.testing.assert_close(
                small["models"][name][key].float(), value, rtol=1e-3, atol=1e-6
            )
    done = run_script("play.py", f"ckpt={out}", "render=none", "env.emulator=libretro")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["intrinsic_reward"] > 0

    before = out.read_bytes()
    assert_refused(run_script("export.py", f"ckpt={latest}", f"out={out}"), f"out={out}: exists")
    assert out.read_bytes() == before
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    done = run_script("train.py", f"resume={out}", "total_steps=200", folder)
    assert_refused(done, str(out), "exported for playing")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "keys", "others"),
    [
        ("train.py", ("total_steps", "action_repeat", "inverse_dropout", "agent: dqn"), ("ckpt",)),
        ("play.py", ("ckpt", "mind"), ("agent",)),
    ],
)
def test_help_shows_the_real_keys(
    name: str, keys: tuple[str, ...], others: tuple[str, ...]
) -> None:
    done = run_script(name, "--help")
    assert done.returncode == 0
    for key in keys:
        assert key in done.stdout
    for key in others:
        assert key not in done.stdout


# --- what is refused: one line, status 2, nothing changed ----------------------------------------


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("agent.learning_rate=1", ["learning_rate"]),
        ("preset=nothing", ["nothing", "tutorial"]),
        ("env.num_envs=many", ["env.num_envs", "many"]),
        ("env.num_envs=0", ["env.num_envs=0", "at least 1"]),
        ("agent.replay_capacity=100000000000", ["agent.replay_capacity", "GB", "would fit"]),
        ("env.crop=[300,0,0,0]", ["env.crop"]),
        ("env.crop=5", ["env.crop: must be a list, as in env.crop=[A,B]"]),
        ("preset=pathak", ["agent.extrinsic_discount: there is no such setting of agent=dqn"]),
        ("env.id=SuperMarioBros-9-9-v0", ["SuperMarioBros-9-9-v0"]),
        ("env.id=CartPole-v1", ["CartPole-v1", "uint8 images"]),
        ("env.id=GymV26Environment-v0", ["GymV26Environment-v0", "shimmy"]),
        ("curiosity=null", ["Config group override must be a string"]),
        ("device=gpu", ["device=gpu", "cuda"]),
        ("device=cuda", ["device=cuda", "0 CUDA devices"]),
        ("resume=/does/not/exist.pt", ["/does/not/exist.pt", "no such file"]),
        ("resume=checkpoints", ["checkpoints: a folder; give a checkpoint, runs/"]),
        (f"resume={TOO_LONG}", [TOO_LONG, "File name too long"]),
        ("=", ["unknown setting"]),
        ("checkpoints/1-1.pt", ["checkpoints/1-1.pt: cannot be read as NAME=VALUE"]),
        ("resume", ["resume: cannot be read as NAME=VALUE"]),
        ("--resume=latest.pt", ["--resume=latest.pt", "settings are given as NAME=VALUE"]),
    ],
)
def test_train_refuses(override: str, words: list[str], tmp_path: Path) -> None:
    given = (*SMALL[:-1], "env.emulator=nes_py", override)
    done = run_script("train.py", *given, f"hydra.run.dir={tmp_path / 'run'}")
    assert_refused(done, *words)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_start_that_is_refused_leaves_no_new_folder(tmp_path: Path) -> None:
    program = train_after(f"import os\nos.chdir({str(tmp_path)!r})", tmp_path)
    assert_refused(run_script(program, *SMALL, "env.id=SuperMarioBros-9-9-v0"), "9-9")
    assert [path.name for path in tmp_path.iterdir()] == ["train_after.py"]


def test_a_run_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    losing = (
        "import os, shutil\n"
        "from icm import checkpoint\n"
        "from icm.errors import WriteError\n"
        "def save(path, content):\n"
        "    shutil.rmtree(path.parents[1], ignore_errors=True)\n"
        "    raise WriteError(f'cannot write {path}')\n"
        "checkpoint.save = save\n"
        f"os.chdir({str(tmp_path)!r})"
    )
    done = run_script(train_after(losing, tmp_path), *SMALL, "total_steps=64")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: cannot write " in done.stderr.splitlines()[-1]


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_never_writes_into_the_folder_of_another(trained: Path, tmp_path: Path) -> None:
    before = contents(trained)
    done = run_script("train.py", *SMALL, "total_steps=32", f"hydra.run.dir={trained}")
    assert_refused(done, str(trained), "exists", "compile=auto, not off")
    assert contents(trained) == before
    # nor into one that nothing was saved in yet
    shutil.copytree(trained / ".hydra", tmp_path / "young" / ".hydra")
    (tmp_path / "young" / "metrics.jsonl").touch()
    done = run_script("train.py", *SMALL, f"hydra.run.dir={tmp_path / 'young'}")
    assert_refused(done, "young", "exists", "compile=auto, not off")
    # where it has the defaults of settings that were not there yet
    settings = tmp_path / "young" / ".hydra" / "config.yaml"
    whole = re.sub("(?m)^report:\n.*\n", "", settings.read_text())
    settings.write_text(whole)
    done = run_script("train.py", *SMALL, f"hydra.run.dir={tmp_path / 'young'}")
    assert_refused(done, "young", "a run of compile=auto, not off")
    same = ("compile=auto", *FULL, "env.emulator=nes_py", "total_steps=96")
    drawn = ("map.every=32", "video.every=32", "report.every=32")
    given = (*SMALL, *drawn, *same, f"hydra.run.dir={tmp_path / 'young'}")
    assert_refused(run_script("train.py", *given), "young", "report.every=25000, not 32")
    for damaged in ("env: {id", whole[: whole.index("hidden")]):
        settings.write_text(damaged)
        assert_refused(run_script("train.py", *given), "young", "no settings in .hydra/config.yaml")
        assert settings.read_text() == damaged
    # but into that of a start that was refused
    (tmp_path / "young" / "metrics.jsonl").unlink()
    assert_refused(run_script("train.py", *given[:-1], "device=cuda", given[-1]), "device=cuda: ")
    assert "device: cuda" in settings.read_text()
    # nor into any other
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "poem.txt").touch()
    before = contents(tmp_path)
    done = run_script("train.py", *SMALL, f"hydra.run.dir={tmp_path / 'mine'}")
    assert_refused(done, "mine", "no run folder")
    assert contents(tmp_path) == before


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    from icm.run_folder import new_folder

    taken = [new_folder(tmp_path / "run") for _ in range(3)]
    assert taken == [tmp_path / name for name in ("run", "run_2", "run_3")]
    assert all(folder.is_dir() for folder in taken)


def test_an_unwritable_folder_is_refused() -> None:
    done = run_script("train.py", *SMALL, "hydra.run.dir=/proc/run")  # not even root may
    assert_refused(done, "/proc/run")


def test_a_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = run_script("train.py", *SMALL, f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert_refused(done, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def flipped(content: bytes) -> bytes:
    """A bit in the middle, among the numbers of a tensor, is another."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def bad_checkpoint(kind: str, trained: Path, tmp_path: Path) -> Path:
    good = trained / "checkpoints" / "latest.pt"
    path = tmp_path / f"{kind}.pt"
    if kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == "flipped":
        path.write_bytes(flipped(good.read_bytes()))
    elif kind == "text":
        path.write_text("these are not the weights you are looking for")
    elif kind == "foreign":
        torch.save({"conv1.weight": torch.zeros(3)}, path)
    elif kind == "pickle":
        torch.save(Path("object"), path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "sizes":
        content = torch.load(good, weights_only=True)
        content["models"]["phi"]["conv1.weight"] = torch.zeros(32, 3, 3, 3)
        torch.save(content, path)
    elif kind == "game":
        content = torch.load(good, weights_only=True)
        content["config"]["env"]["actions"] = "simple"
        torch.save(content, path)
    elif kind == "nan":
        content = torch.load(good, weights_only=True)
        content["models"]["phi"]["conv1.weight"][0] = float("nan")
        torch.save(content, path)
    elif kind == "endless":  # a number in the file, some gigabytes in memory
        content = torch.load(good, weights_only=True)
        content["exploration"]["surprise"] = torch.zeros(1).expand(1 << 40)
        torch.save(content, path)
    elif kind == "hollow":
        torch.save({"format": checkpoint.FORMAT, "models": {}}, path)
    elif kind == "listed":
        torch.save(torch.load(good, weights_only=True) | {"config": [1]}, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "missing", "empty", "truncated", "flipped", "text", "foreign", "pickle", "directory",
        "sizes", "game", "nan", "endless", "hollow", "listed",
    ],
)  # fmt: skip
def test_a_bad_checkpoint_is_not_loaded(kind: str, trained: Path, tmp_path: Path) -> None:
    path = bad_checkpoint(kind, trained, tmp_path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_agent(path, torch.device("cpu"), GameConfig(None, None, None, None, None))


@pytest.mark.parametrize(
    ("script", "kind"), [("play.py", "flipped"), ("train.py", "sizes"), ("evaluate.py", "game")]
)
def test_a_bad_checkpoint_is_refused(script: str, kind: str, trained: Path, tmp_path: Path) -> None:
    path = bad_checkpoint(kind, trained, tmp_path)
    if script == "train.py":
        folder = f"hydra.run.dir={tmp_path / 'run'}"
        done = run_script(script, f"resume={path}", "total_steps=500", folder)
    else:
        done = run_script(script, f"ckpt={path}", "device=cpu")
    assert_refused(done, str(path))


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("play.py", [], ["ckpt"]),
        ("evaluate.py", [], ["ckpt"]),
        ("play.py", ["episodes=0"], ["episodes=0"]),
        ("evaluate.py", ["episodes=-3"], ["episodes=-3"]),
        ("evaluate.py", ["env.stuck_steps=-1"], ["env.stuck_steps=-1"]),
        ("play.py", ["env.id=CartPole-v1"], ["CartPole-v1"]),
        ("play.py", ["render=film"], ["render=film", "video"]),
        ("play.py", ["render=human"], ["render=human", "display"]),
        ("play.py", [*FAST, "render=video", "out=/proc/film.mp4"], ["/proc/film.mp4"]),
        ("play.py", ["render=none", "out=film.mp4"], ["out=film.mp4", "render=none"]),
        ("play.py", [*FAST, f"out={TOO_LONG}"], [TOO_LONG, "File name too long"]),
        ("play.py", ["seed=-1"], ["seed=-1", "at least 0"]),
        ("evaluate.py", ["seed=-1"], ["seed=-1", "at least 0"]),
        ("play.py", ["speed=0"], ["speed=0", "between"]),
    ],
)
def test_players_refuse(script: str, arguments: list[str], words: list[str], trained: Path) -> None:
    if arguments:
        arguments = [f"ckpt={trained / 'checkpoints' / 'latest.pt'}", *arguments]
    assert_refused(run_script(script, *arguments), *words)


def test_what_cannot_go_on_is_not_resumed(trained: Path, tmp_path: Path) -> None:
    latest = trained / "checkpoints" / "latest.pt"
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    same = ("preset=default", "agent=dqn", "curiosity=icm")
    done = run_script("train.py", f"resume={latest}", *same, folder)
    assert_refused(done, "total_steps=96")
    done = run_script("train.py", f"resume={latest}", "preset=tutorial", folder)
    assert_refused(done, "preset=tutorial")
    done = run_script("train.py", f"resume={latest}", "agent=pqn", folder)
    assert_refused(done, "agent=pqn", "keeps the groups")
    longer = ("agent=dqn", "total_steps=128", "agent.warmup_steps=9")
    done = run_script("train.py", f"resume={latest}", *longer, folder)
    assert_refused(done, "agent.warmup_steps=9", "was made with 32")
    shutil.copytree(trained, tmp_path / "own")
    younger = tmp_path / "own" / "checkpoints" / "step_000000032.pt"
    checkpoint.save(younger, checkpoint.load(latest) | {"step": 32})
    given = ("agent=dqn", f"hydra.run.dir={tmp_path / 'own'}")
    done = run_script("train.py", f"resume={younger}", *given)
    assert_refused(done, str(younger), "goes on from latest.pt", "another hydra.run.dir")
    assert not (tmp_path / "run").exists()


def test_default_settings_are_valid() -> None:
    config = settings()
    assert config.env.id == "SuperMarioBros-1-1-v0"
    assert config.seed == 42
    assert config.curiosity.extrinsic_coef == 0


def test_a_job_that_does_not_come_again_says_how_it_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    requeuing = (
        "import signal\n"
        "def requeue(number, frame):\n"
        "    raise RuntimeError('Timed out too often.')\n"  # as submitit does
        "signal.signal(signal.SIGUSR2, requeue)\n"
    )
    script, given = train_after(requeuing, tmp_path), (*SMALL, f"hydra.run.dir={folder}")
    process = start_forked(script, given, unseen(), tmp_path, session=True)
    wait_for_lines(folder, 1, process.is_alive)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGUSR2)
    process.join(60)
    process.kill()  # nothing happens to one that has ended
    assert process.exitcode == 2
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line.endswith(f"{folder}: Timed out too often. The same command goes on there.")
    assert (folder / "checkpoints" / "latest.pt").is_file()


@pytest.mark.parametrize("place", ["run/checkpoints", "given"])
def test_a_video_without_a_name_is_in_the_run_folder_or_beside_a_single_file(
    place: str, trained: Path, tmp_path: Path
) -> None:
    path = tmp_path / place / "latest.pt"
    path.parent.mkdir(parents=True)
    shutil.copy(trained / "checkpoints" / "latest.pt", path)
    given = (f"ckpt={path}", "env.stuck_steps=1", "mind=false")
    done = run_script("play.py", *given, "env.emulator=libretro")
    assert done.returncode == 0, done.stderr
    out = tmp_path.resolve() / place.partition("/")[0] / "videos" / "play_latest.mp4"
    assert f"video: {out}" in done.stderr.splitlines()
    assert out.is_file()
