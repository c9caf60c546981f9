"""Several learners of one agent, started by torchrun."""

import os
import signal
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import (
    ROOT,
    UNSEEN,
    composed,
    metrics_of,
    run_script,
    unseen,
    wait_for_checkpoint,
    whole_training,
)
from omegaconf import OmegaConf

from icm import checkpoint
from icm.files import latest
from icm.soak.forked import start_forked

COMMON = (
    "env.emulator=libretro",
    "env.num_envs=8",
    "env.num_workers=1",
    "env.stuck_steps=20",  # short episodes
    "env.action_repeat=2",
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
    "agent.warmup_steps=80",
    "total_steps=440",
    "checkpoint.every=160",
)


AS_A_RANK = """
import sys

for name in [name for name in sys.modules if name.partition(".")[0] == "icm"]:
    del sys.modules[name]  # imported before this was a rank
"""
LAUNCHER = f"""{AS_A_RANK}
from torch.distributed.run import main

main()
"""


def ranks(place: Path, run: Path, *given: str) -> BaseProcess:
    """torchrun, whose training has a checkpoint in its run folder by now; it forks two ranks.

    In a session of its own, as of a terminal.
    """
    launcher = place / "torchrun.py"
    launcher.write_text(LAUNCHER)
    # or the second attempt may read what the first has left in it, and wait for ever
    environment = unseen() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    arguments = (
        *("--standalone", "--nproc-per-node=2", "--max-restarts=1"),
        *("--start-method=fork", "--run-path", str(ROOT / "scripts" / "train.py")),
        *(*given, f"hydra.run.dir={run}"),
    )
    training = start_forked(str(launcher), arguments, environment, place, session=True)
    wait_for_checkpoint(run, training.is_alive)
    return training


def assert_same(run: Path, other: Path, total: int) -> None:
    """Two runs did the same, and what they learned differs by rounding alone."""
    one, two = (checkpoint.load(each / "checkpoints" / "latest.pt") for each in (run, other))
    assert one["step"] == two["step"] == total
    assert one["agent"]["updates"] == two["agent"]["updates"] >= 20
    assert one["episodes"] == two["episodes"]
    for name, weights in one["models"].items():
        torch.testing.assert_close(weights, two["models"][name], rtol=1e-4, atol=2e-5)


def test_ranks_learn_what_one_process_learns_and_go_on_when_one_is_killed(
    tmp_path: Path,
) -> None:
    expected, run = whole_training(tmp_path / "alone", *PPO), tmp_path / "ranks"
    training = ranks(tmp_path, run, *PPO)
    # what a rank starts has its environment from its beginning
    of_it = psutil.Process(training.pid).children(recursive=True)
    second = next(p.parent() for p in of_it if p.environ().get("RANK") == "1")
    assert second is not None
    second.kill()
    training.join(120)
    assert training.exitcode == 0
    assert_same(expected, run, 560)
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
    training = ranks(tmp_path, run, *DQN)
    assert training.pid is not None
    os.kill(training.pid, signal.SIGTERM)
    training.join(60)
    assert training.exitcode != 0
    assert 160 <= checkpoint.load(latest(run))["step"] < 440
    assert_same(expected, whole_training(run, *DQN), 440)


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}])
def test_what_torchrun_would_not_set_is_one_line(left: dict[str, str], tmp_path: Path) -> None:
    done = run_script("train.py", f"hydra.run.dir={tmp_path}/run", env=left)
    assert done.returncode == 2
    given = " ".join(f"{name}={text}" for name, text in left.items())
    assert done.stderr.startswith(f"train.py: error: {given}: must be torchrun's: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("train.py", "no MASTER_ADDR and MASTER_PORT, as torchrun's"),
        ("play.py", "torchrun is for scripts/train.py"),
    ],
)
def test_ranks_without_torchrun_or_of_another_script_are_one_line(
    script: str, complaint: str
) -> None:
    left = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}
    done = run_script(script, "ckpt=none" if script == "play.py" else "seed=1", env=left)
    assert done.returncode == 2
    assert done.stderr == f"{script}: error: RANK=0 WORLD_SIZE=2: {complaint}; else unset both\n"


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
    two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run_script("train.py", *given, f"hydra.run.dir={folder}", env=two)
    assert done.returncode == 2
    assert done.stderr == f"train.py: error: {complaint}\n"
    assert not folder.exists()


OF_EACH_RANK = f"""{AS_A_RANK}
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


WAYS = f"""{AS_A_RANK}
if __name__ == "__main__":  # workers import this file, too
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from icm.collectives import together
    from icm.config import parse_config
    from icm.envs import make_vector_env
    from icm.ranks import RANK, WORLD_SIZE
    from icm.shared_envs import SharedVectorEnv

    config = parse_config(OmegaConf.load(sys.argv[2]))
    with together(torch.device("cpu")):
        envs = make_vector_env(config.env)
        envs = SharedVectorEnv(envs) if WORLD_SIZE > 1 else envs
        envs.reset(seed=3)
        for step in range(3):
            envs.step_async(np.arange(4) + step)
            envs.step_wait()
        found = [envs.way(row) for row in range(4)]
        envs.close()
    if RANK == 0:
        torch.save(found, sys.argv[1])
"""


def test_ranks_share_the_variance_of_a_batch(tmp_path: Path) -> None:
    alone, of_ranks = found_alone_and_by_ranks(tmp_path, OF_EACH_RANK)
    assert max(gradient.abs().max() for gradient in alone[2:]) > 1e-3
    torch.testing.assert_close(of_ranks, alone, rtol=1e-4, atol=1e-7)


def test_ranks_know_the_ways_of_all_environments(tmp_path: Path) -> None:
    given = tmp_path / "config.yaml"
    small = ("env.emulator=libretro", "env.num_envs=4", "env.num_workers=1")
    OmegaConf.save(composed("config", *small), given)
    alone, of_ranks = found_alone_and_by_ranks(tmp_path, WAYS, str(given))
    assert [actions for _, actions in alone] == [[row, row + 1, row + 2] for row in range(4)]
    assert of_ranks == alone


def found_alone_and_by_ranks(tmp_path: Path, program: str, *arguments: str) -> list[Any]:
    """What a program has saved, alone and as two ranks."""
    script = tmp_path / "of_each_rank.py"
    script.write_text(program)
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
            running.append(
                start_forked(str(script), (str(out), *arguments), unseen() | told, place)
            )
        for process in running:
            process.join(60)
            process.kill()  # nothing happens to one that has ended
            assert process.exitcode == 0
        found.append(torch.load(out))
    return found
