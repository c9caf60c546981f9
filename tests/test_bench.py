"""The benchmark through its real script, and the loop it takes as its baseline. No speeds here."""

import copy
import json
import runpy
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, composed, run_script

from icm.bench.apart import apart
from icm.bench.contenders import Contender, rate_of
from icm.bench.suite import compared
from icm.bench.tutorial import TutorialLoop, downscale, make_env
from icm.errors import UserError


def test_bench_measures_everything_and_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "bench.json"
    # total_steps: an end for the training, should the benchmark be killed
    train = [*SMALL, "log.every=16", "total_steps=50000"]
    done = run_script(
        "bench.py", "quick=true", "seconds=0.1", "rounds=1", f"out={out}", f"train={train}",
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["emulator"]) >= {"nes_py", "fceumm"}
    for name, environment in result["environment"].items():
        frames = 1 / result["emulator"][name]["frames_per_s"]
        assert environment["frames_per_s"] == pytest.approx(
            1 / frames / (1 + environment["overhead_with_state"])
        )
    tutorial = result["end_to_end"]["tutorial"]["agent_steps_per_s"]
    assert tutorial > 0
    learning = result["update"]["seconds_per_agent_step"]
    for name in ("nes_py", "libretro"):
        ours = result["end_to_end"][name]
        assert ours["agent_steps_per_s"] > 0
        assert ours["vs_tutorial"] == pytest.approx(ours["agent_steps_per_s"] / tutorial)
        assert ours["vs_sb3"] is None  # not in a quick run
        ideal = ours["ideal_agent_steps_per_s"]  # on all cores, had emulation cost nothing:
        assert 0 < ideal < result["machine"]["cores"] / learning
        assert ours["share_of_ideal"] == pytest.approx(ours["agent_steps_per_s"] / ideal)
        vector = result["vector"][name]
        assert vector["share_of_alone"] == pytest.approx(
            vector["agent_steps_per_s"] / vector["alone_agent_steps_per_s"]
        )
        assert name in done.stdout
    modes = result["update"]["modes"]
    assert list(modes) == ["float32 as PyTorch comes", "float32"]
    assert result["update"]["speedup"] == pytest.approx(modes["float32"]["speedup"])
    assert done.stdout.splitlines()[-1] == f"written to {out}"
    assert result["train"] == ["compile=off", *train]
    assert "using cpu (1 threads)" in result["device"]
    assert result["machine"]["torch"] in torch.__version__


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("rounds=0", "rounds=0: must be"),
        (
            "train=['env.num_envs=0']",
            "train=['env.num_envs=0']: env.num_envs=0: must be at least 1",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(argument: str, named: str, tmp_path: Path) -> None:
    done = run_script("bench.py", argument, f"out={tmp_path}/new/bench.json")
    assert not list(tmp_path.iterdir())
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"bench.py: error: {named}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seconds", 0, "seconds=0.0: must be"),
        ("seconds", float("nan"), "seconds=nan: must be"),
        ("seconds", "long", "seconds: Value 'long'"),
        ("rounds", 0, "rounds=0: must be"),
        ("rounds", 1.5, "rounds: Value '1.5'"),
        ("train", "fast", "train: "),
        ("out", "README.md/bench.json", "out=README.md/bench.json: cannot be written: "),
        ("out", ".", "out=.: cannot be written: "),
        ("quick", "perhaps", "quick: Value 'perhaps'"),
    ],
)
def test_a_mistake_is_found_before_anything_is_measured(
    key: str, value: object, message: str
) -> None:
    bench = runpy.run_path(str(ROOT / "scripts" / "bench.py"))
    settings = copy.deepcopy(composed("bench"))
    settings[key] = value
    with pytest.raises(UserError) as error:
        bench["main"](settings)
    assert str(error.value).startswith(message)


def test_what_cannot_be_measured_apart_is_told() -> None:
    unmeasurable: Any = partial(float, "one")  # makes no measure
    told = "ValueError: could not convert string to float: 'one'"
    with pytest.raises(RuntimeError, match=told), apart(unmeasurable):
        pytest.fail("it was measured")


def test_rates_are_those_of_the_lines_after_the_first() -> None:
    lines = [
        {"step": 200, "speed/agent_steps_per_s": 10.0},  # of before
        {"step": 300, "speed/agent_steps_per_s": 50.0},  # 2 s
        {"step": 450, "speed/agent_steps_per_s": 150.0},  # 1 s
    ]
    assert rate_of(lines) == pytest.approx(250 / 3)


def test_only_whole_lines_from_learning_count() -> None:
    contender = Contender(lambda folder: [], "metrics.jsonl", learning="speed/update_share")
    assert contender._lines() == []
    lines: list[dict[str, float]] = [
        {"step": 100, "speed/agent_steps_per_s": 900.0},
        {"step": 200, "speed/agent_steps_per_s": 500.0, "speed/update_share": 0.5},
        {"step": 300, "speed/agent_steps_per_s": 50.0, "speed/update_share": 0.5},
    ]
    contender.progress.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    assert contender._lines() == lines[1:]


def test_turns_pause_a_training(tmp_path: Path) -> None:
    program = tmp_path / "count.py"
    program.write_text(
        "import time\n"
        "from icm.bench.progress import Report\n"
        "report, step = Report(0), 0\n"
        "while True:\n"
        "    time.sleep(0.01)\n"
        "    step += 1\n"
        "    report(step)\n"
    )
    with Contender(lambda folder: [sys.executable, str(program)]) as contender:
        contender.get_ready()
        for _ in range(2):
            lines = len(contender._lines())
            time.sleep(1.5)
            assert len(contender._lines()) == lines
            assert 0 < contender.turn(0.5) <= 100
            assert len(contender._lines()) >= lines + 2
        process = contender.process
    assert process.returncode is not None
    assert not contender.folder.exists()


def test_a_training_that_fails_is_reported() -> None:
    for program, error, said in (
        ("import sys; print('x: error: n=0: no', file=sys.stderr); sys.exit(2)", UserError, "^n=0"),
        ("raise ValueError('of its own')", RuntimeError, "of its own"),
        ("pass", UserError, "ended before it had learned"),
    ):
        with (
            pytest.raises(error, match=said),
            Contender(lambda folder, program=program: [sys.executable, "-c", program]) as failing,
        ):
            failing.get_ready()


def test_the_tutorial_updates_once_per_agent_step_when_it_holds_a_batch() -> None:
    loop = TutorialLoop(make_env(), batch_size=8)
    before = [parameter.detach().clone() for parameter in loop.encoder.parameters()]
    losses = [loop.step() for _ in range(12)]
    loop.env.close()
    assert [loss is not None for loss in losses] == [False] * 7 + [True] * 5
    assert all(int(state["step"]) == 5 for state in loop.optimizer.state.values())
    for loss in losses[7:]:
        assert loss is not None
        assert torch.isfinite(torch.stack((loss.q, loss.forward, loss.inverse))).all()
    after = loop.encoder.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    state, action, _, next_state = loop.replay.memory[0]
    assert state.shape == next_state.shape == (1, 3, 42, 42)
    assert state.dtype == torch.float32
    assert 0 <= action < 12
    assert torch.equal(state[0, 0], state[0, 2])  # the first state: one frame, three times
    assert not torch.equal(next_state, state)


def test_the_tutorial_cuts_episodes_and_bounds_its_replay() -> None:
    loop = TutorialLoop(make_env(), batch_size=1_000)  # so that it never learns
    loop.episode_steps = 100
    loop.step()
    assert loop.episode_steps == 0
    transition = loop.replay.memory[0]
    for _ in range(1_100):
        loop.replay.add(transition)
    loop.env.close()
    assert len(loop.replay.memory) == 1_000


def test_downscale_keeps_brightness_and_takes_the_brightest_channel() -> None:
    image = torch.zeros(240, 256, 3, dtype=torch.uint8)
    image[..., 1] = 102
    image[:, 128:, 2] = 255
    small = downscale(image.numpy())
    assert small.shape == (42, 42)
    assert small[:, :15] == pytest.approx(0.4)
    assert small[:, -15:] == pytest.approx(1.0)


def test_a_rate_is_compared_with_the_faster_rival_round_by_round() -> None:
    rates = {
        "tutorial": [1.0, 2.0, 4.0],
        "sb3_ppo": [10.0, 20.0, 30.0],
        "sb3_dqn": [5.0, 5.0, 5.0],
        "nes_py": [40.0, 40.0, 60.0],
    }
    found = compared(rates, {"nes_py": [80.0, 100.0, 100.0]})
    assert found["nes_py"]["vs_tutorial"] == 20  # of 40, 20 and 15
    assert (found["nes_py"]["sb3"], found["nes_py"]["vs_sb3"]) == ("sb3_ppo", 2)
    assert found["nes_py"]["share_of_ideal"] == 0.5  # of 0.5, 0.4 and 0.6
    assert "vs_sb3" not in found["sb3_dqn"]
