"""Several learners of one agent, started by torchrun."""

import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from conftest import UNSEEN, metrics_of, run_script, saved_training, unseen, whole_training

from icm import checkpoint
from icm.soak.forked import start_forked

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
COMMON = (
    "env.emulator=libretro",
    "env.num_envs=8",
    "env.stuck_steps=20",  # short episodes
    "agent.warmup_steps=160",
    "agent.replay_capacity=4000",
    "agent.batch_size=4",
    "agent.sequence_length=8",
    "total_steps=560",
    "checkpoint.every=320",
    "log.every=80",
    *UNSEEN,
    "precision=float32",
    "compile=off",
    "device=cpu",
)
PPO = (
    *COMMON,
    "agent.rollout_steps=16",
    "agent.replayed=4",
    "agent.epochs=3",
    "agent.accumulate=2",  # twice as many updates as steps of the optimizer
)
DQN = (
    *COMMON,
    "agent=dqn",
    "curiosity=disagreement",
    "curiosity.episodic_scale=null",
    "agent.steps_per_update=16",
)


def ranks(folder: Path, *given: str, launcher: tuple[str, ...]) -> subprocess.Popen[str]:
    """A training that has a checkpoint by now."""
    how = {"launcher": launcher, "stderr": subprocess.DEVNULL}
    return saved_training(folder, *given, f"hydra.run.dir={folder}", **how)


def assert_same(run: Path, other: Path) -> None:
    """Two runs did the same, and what they learned differs by rounding alone."""
    one, two = (checkpoint.load(each / "checkpoints" / "latest.pt") for each in (run, other))
    assert one["step"] == two["step"] == 560
    assert one["agent"]["updates"] == two["agent"]["updates"] >= 20
    assert one["episodes"] == two["episodes"]
    for name, weights in one["models"].items():
        torch.testing.assert_close(weights, two["models"][name], rtol=1e-4, atol=2e-5)


def test_ranks_learn_what_one_process_learns_and_go_on_when_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # or the second attempt may read what the first has left in it, and wait for ever
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    expected = whole_training(tmp_path / "alone", *PPO)
    run = tmp_path / "ranks"
    training = ranks(run, *PPO, launcher=(*TORCHRUN, "--max-restarts=1"))
    of_it = psutil.Process(training.pid).children(recursive=True)
    second = next(p for p in of_it if "RANK" in (env := p.environ()) and env["RANK"] == "1")
    second.kill()
    assert training.wait(120) == 0
    assert_same(expected, run)
    lines, told = metrics_of(expected), metrics_of(run)
    assert [line["step"] for line in told] == [80, 160, 240, 320, 400, 480, 560]
    for line, its in zip(lines, told, strict=True):
        others = its.keys() ^ line.keys()
        assert others - {"speed/save_share"} == {"speed/ranks_share"}  # it has begun again
        for name in line:
            if name.startswith(("episode/", "explore/")):
                assert its[name] == line[name]
            elif name in ("reward/intrinsic", "policy/entropy", "loss/forward", "loss/value"):
                assert its[name] == pytest.approx(line[name], rel=1e-3)
        assert its["speed/ranks_share"] > 0
    assert {"episode/distance", "explore/cells", "loss/value"} <= told[-1].keys()
    assert {path.name for path in run.iterdir()} - {".hydra", ".lock", "metrics.jsonl"} == {
        "checkpoints",
        *(path.name for path in run.glob("events.*")),
    }


def test_what_ranks_saved_goes_on_in_one_process(tmp_path: Path) -> None:
    expected = whole_training(tmp_path / "alone", *DQN)
    run = tmp_path / "ranks"
    training = ranks(run, *DQN, launcher=TORCHRUN)
    training.send_signal(signal.SIGTERM)
    assert training.wait(60) != 0
    saved = checkpoint.load(run / "checkpoints" / "latest.pt")["step"]
    assert 320 <= saved < 560
    assert_same(expected, whole_training(run, *DQN))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("agent.batch_size=5",), "agent.batch_size=5: must be a multiple of 2, the world size"),
        (("-m", "seed=1,2"), "-m: torchrun trains one agent at a time; a sweep needs a launcher"),
    ],
)
def test_what_ranks_cannot_do_is_one_line(
    given: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    two = {"RANK": "0", "WORLD_SIZE": "2"}
    done = run_script("train.py", *given, f"hydra.run.dir={folder}", env=two)
    assert done.returncode == 2
    assert done.stderr == f"train.py: error: {complaint}\n"
    assert not folder.exists()


OF_EACH_RANK = """
import sys

for name in [name for name in sys.modules if name.partition(".")[0] == "icm"]:
    del sys.modules[name]  # imported before this was a rank
import torch
from icm.collectives import average_, own, together
from icm.curiosity import ICM
from icm.models import Fnet, InverseNet, Phi
from icm.ranks import RANK

torch.manual_seed(0)
phi = Phi((2, 16, 16))
icm = ICM(phi, Fnet(phi.num_features, 4, 16), InverseNet(phi.num_features, 4, 16),
          beta=0.2, eta=1.0, target_tau=None, normalize_features=True)
states, after = torch.rand(2, 12, 2, 16, 16)
actions, valid = torch.randint(4, (12,)), torch.rand(12) < 0.7
with together(torch.device("cpu")):
    given = icm.encode(own(states)), own(actions), icm.encode(own(after))
    loss, parts = icm.loss(icm(*given, torch.full((len(given[1]), 4), 0.25)), own(valid))
    loss.backward()
    found = [loss.detach(), parts["loss/forward"], *(p.grad for p in icm.parameters())]
    average_(found)
if RANK == 0:
    torch.save(found, sys.argv[1])
"""


def test_ranks_share_the_variance_of_a_batch(tmp_path: Path) -> None:
    script = tmp_path / "of_each_rank.py"
    script.write_text(OF_EACH_RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for world in (1, 2):
        out, running = tmp_path / f"of_{world}.pt", []
        for rank in range(world):
            told = {"RANK": str(rank), "WORLD_SIZE": str(world)}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place = tmp_path / f"{rank}_of_{world}"
            place.mkdir()
            running.append(start_forked(str(script), (str(out),), unseen() | told, place))
        for process in running:
            process.join(60)
            process.kill()  # nothing happens to one that has ended
            assert process.exitcode == 0
        found.append(torch.load(out))
    alone, of_ranks = found
    assert max(gradient.abs().max() for gradient in alone[2:]) > 1e-3
    torch.testing.assert_close(of_ranks, alone, rtol=1e-4, atol=1e-7)
