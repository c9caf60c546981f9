"""The benchmark through its real script, and the loop it takes as its baseline. No speeds here."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, run_script
from hydra import compose, initialize_config_dir

from icm.bench.measure import steady
from icm.bench.tutorial import TutorialLoop, downscale, make_env
from icm.errors import UserError


def test_bench_measures_both_loops_and_writes_what_it_prints(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    # total_steps: an end for the training, should the benchmark be killed
    train = [*SMALL, "total_steps=20000"]
    done = run_script(
        "bench.py", "seconds=2", "rounds=1", f"out={out}", f"train={train}", timeout=300
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert out.read_text() == line + "\n"
    result = json.loads(line)
    ours, tutorial = result["end_to_end"]["nes_py"], result["end_to_end"]["tutorial"]
    assert ours["agent_steps_per_s"] > 0
    assert tutorial["agent_steps_per_s"] > 0
    assert ours["vs_tutorial"] == pytest.approx(
        ours["agent_steps_per_s"] / tutorial["agent_steps_per_s"]
    )
    assert result["train"] == train
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
def test_a_mistake_is_one_line_and_exit_status_2(argument: str, named: str) -> None:
    done = run_script("bench.py", argument)
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
        ("out", "nowhere/bench.json", "out=nowhere/bench.json: must"),
        ("out", ".", "out=.: must"),
    ],
)
def test_a_mistake_is_found_before_anything_is_measured(
    key: str, value: object, message: str
) -> None:
    bench = runpy.run_path(str(ROOT / "scripts" / "bench.py"))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = compose("bench")
    settings[key] = value
    with pytest.raises(UserError) as error:
        bench["main"](settings)
    assert str(error.value).startswith(message)


def test_only_intervals_that_learned_throughout_count(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert steady(metrics) == (0, 0.0)
    lines = [
        {"step": 100, "speed/agent_steps_per_s": 900.0},
        {"step": 200, "speed/agent_steps_per_s": 500.0, "loss/q": 1.0},  # learning began here
        {"step": 300, "speed/agent_steps_per_s": 50.0, "loss/q": 1.0},  # 2 s
        {"step": 450, "speed/agent_steps_per_s": 150.0, "loss/q": 1.0},  # 1 s
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60')
    assert steady(metrics) == (250, 3.0)


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
