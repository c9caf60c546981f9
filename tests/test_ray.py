"""Environments on a Ray cluster of two nodes of this machine, on the real game."""

import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import (
    FULL,
    SMALL,
    forked_training,
    metrics_of,
    run_script,
    settings,
    unseen,
    wait_for_lines,
    whole_training,
)
from omegaconf import OmegaConf
from test_lean import EMULATORS
from test_practice import APART, WAY, trail_of, until_one_is_cut
from test_vector import ENV, assert_equal

from icm import checkpoint
from icm.config import parse_config
from icm.envs import make_env, make_vector_env
from icm.envs.snapshots import EVERY, SELDOM
from icm.envs.stepper import fields_of
from icm.errors import UserError
from icm.soak.forked import run_forked
from icm.soak.program import facts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes as on Linux")

LENGTH = "total_steps=320"
MANY = ("env.num_envs=4", "checkpoint.every=1000000", "log.every=32")
ON_RAY = (*SMALL, *FULL, *MANY, "collector=ray")  # not over before a node is killed


def processes(folder: str) -> set[psutil.Process]:
    """Ray's processes of the clusters whose files are in a folder."""
    running = {each.pid: each for each in psutil.process_iter(["cmdline", "ppid"])}

    def is_of_it(process: psutil.Process) -> bool:
        parent = running.get(process.info["ppid"])
        named = any(folder in part for part in process.info["cmdline"] or ())
        return named or (parent is not None and is_of_it(parent))

    return set(filter(is_of_it, running.values()))


def named(name: str, folder: str) -> set[psutil.Process]:
    """Those of them whose name begins with `name`."""
    found = set[psutil.Process]()
    for process in processes(folder):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(name):
                found.add(process)
    return found


def raylets(folder: str) -> set[psutil.Process]:
    return named("raylet", folder)


def actors(folder: str) -> set[psutil.Process]:
    return named("ray::_Actor", folder)


@contextmanager
def ray_in_a_folder() -> Generator[str]:
    """Where Ray keeps its files; the name is short because those of sockets may not be long."""
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_worker_niceness", "0")  # or other tests would let actors starve
        patch.setenv("RAY_enable_metrics_collection", "0")
        patch.setenv("REPORTER_UPDATE_INTERVAL_MS", "3600000")  # nobody looks at the load
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())
        try:
            yield folder
        finally:
            found = processes(folder)
            for process in found:
                process.kill()
            psutil.wait_procs(found, timeout=20)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, psutil.Process]]:
    """Two nodes: the folder of their files, and the raylet of the second one."""
    with ray_in_a_folder() as folder, pytest.MonkeyPatch.context() as patch:
        # only now, because Ray reads the environment, some of which the first of these sets
        import icm.envs.on_ray  # noqa: F401, I001
        from ray.cluster_utils import Cluster

        nodes = Cluster(shutdown_at_exit=False)
        # of one core; nobody reads its logs
        node = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_log_monitor": False}
        node["plasma_directory"] = folder
        nodes.add_node(include_dashboard=False, no_monitor=True, **node)
        first = raylets(folder)
        patch.setenv("RAY_ADDRESS", nodes.address)
        nodes.add_node(**node)
        (second,) = raylets(folder) - first
        yield folder, second


def test_a_cluster_gives_the_same_also_if_actors_die_or_hang(
    cluster: tuple[str, psutil.Process], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = cluster
    config = replace(ENV, num_envs=4, num_workers=None, sticky_probability=0.25)
    rng = np.random.default_rng(0)
    local = make_vector_env(config, scenery=True)
    envs = make_vector_env(config, busy_cores=9, scenery=True, collector="ray")
    try:
        assert capsys.readouterr().out == "Ray: 2 cores on 2 nodes; environments get 2\n"
        assert envs._balance.late == range(1, 2)
        assert_equal(envs.reset(seed=5), local.reset(seed=5))
        for step in range(16):
            if step == 4:  # one that is lost between two steps
                min(actors(folder), key=lambda actor: actor.pid).kill()
            if step == 8:  # one that does not answer
                envs._patience = 5.0
                max(actors(folder), key=lambda actor: actor.pid).suspend()
            actions = rng.integers(0, 12, 4)
            found, expected = envs.step(actions), local.step(actions)
            if step >= 4:  # a new one shows again what has been seen
                found[-1].pop("scenery"), expected[-1].pop("scenery")
            assert_equal(found, expected)
            assert envs.failures == (step >= 4) + (step >= 8)
        for actor in actors(folder):
            maps = Path(f"/proc/{actor.pid}/maps").read_text()
            assert "numpy" in maps
            assert "libtorch" not in maps
        envs._cut_at = envs._steps  # as if episodes had been cut
        worker = envs._balance.home(0)
        with pytest.raises(RuntimeError, match=rf"(?s)worker {worker} .*Traceback.*KeyError: 99"):
            envs.step(np.array([99, 0, 0, 0]))
        assert envs.closed
    finally:
        envs.close()
        local.close()
    assert not psutil.wait_procs(actors(folder), timeout=20)[1]


@pytest.mark.skipif(EMULATORS[-1] != "libretro", reason="states of nes-py stay in their process")
@pytest.mark.usefixtures("cluster")
def test_an_actor_lends_snapshots_to_another() -> None:
    envs, done = until_one_is_cut(APART, collector="ray")
    envs.step(np.array([0, 0, WAY[done]]))
    begins = len(envs.state_dict()["actions"][1])
    assert begins > SELDOM
    assert trail_of(envs, 1, begins) == [SELDOM, begins - EVERY, begins]
    assert trail_of(envs, 1, EVERY) == []  # it did not play there again
    envs.close()


def test_a_training_goes_on_when_a_node_is_killed_and_its_checkpoint_works_everywhere(
    cluster: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    folder, second_node = cluster
    run, alone = tmp_path / "run", tmp_path / "alone"
    process = forked_training(tmp_path, *ON_RAY, LENGTH, f"hydra.run.dir={run}")
    wait_for_lines(run, 1, process.is_alive)
    for each in (second_node, *second_node.children(recursive=True)):  # else a second passes
        each.kill()
    killed, before = time.monotonic(), len(metrics_of(run))
    while len(metrics_of(run)) < before + 2:
        assert process.is_alive()
        assert time.monotonic() < killed + 120  # how long it takes stands in docs/scaling.md
        time.sleep(0.05)
    process.join(60)
    assert process.exitcode == 0
    assert metrics_of(run)[-1]["workers/failures"] == 1
    whole_training(alone, *ON_RAY, "collector=local", "env.num_workers=1", LENGTH)
    assert [facts(line) for line in metrics_of(run)] == [facts(line) for line in metrics_of(alone)]

    latest = run / "checkpoints" / "latest.pt"
    for script, *given in (
        ("play.py", "render=none", f"ckpt={latest}"),
        ("train.py", f"resume={latest}", "total_steps=352", f"hydra.run.dir={tmp_path / 'on'}"),
    ):
        done = run_script(script, *given)
        assert done.returncode == 0, done.stderr
        assert "Ray" not in done.stdout
    assert metrics_of(tmp_path / "on")[-1]["step"] == 352

    # one that is killed leaves no actors
    killed = ("env.num_workers=1", f"hydra.run.dir={tmp_path / 'killed'}")
    process = forked_training(tmp_path, *ON_RAY, *killed)
    while not actors(folder):
        assert process.is_alive()
        time.sleep(0.5)
    process.kill()
    process.join()
    assert not psutil.wait_procs(actors(folder), timeout=20)[1]


@pytest.mark.usefixtures("shared_memory")  # Ray's, while it starts
def test_without_a_cluster_it_starts_one_that_ends_with_it_and_is_deaf_to_signals(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    with ray_in_a_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")  # not one that runs beside
        process = forked_training(tmp_path, *ON_RAY, f"hydra.run.dir={run}")
        assert process.pid is not None
        wait_for_lines(run, 1, process.is_alive)
        found = processes(folder)
        assert len(raylets(folder)) == 1
        os.killpg(process.pid, signal.SIGTERM)  # to every process, as a cluster's scheduler does
        for other in found:
            other.send_signal(signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "stderr").read_text()
        step = checkpoint.load(run / "checkpoints" / "latest.pt")["step"]
        assert step >= metrics_of(run)[-1]["step"]
        assert not psutil.wait_procs(found, timeout=20)[1]


def test_a_collector_that_cannot_be_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="collector=slurm: must be one of local, ray"):
        settings("collector=slurm")
    before = asdict(settings())
    del before["collector"]  # as of an older checkpoint
    assert parse_config(OmegaConf.create(before)).collector == "local"
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "icm.envs.on_ray", raising=False)
    with pytest.raises(UserError, match=r"collector=ray: there is no ray; .*\[ray\]"):
        make_vector_env(ENV, collector="ray")


@pytest.mark.usefixtures("cluster")
def test_a_cluster_with_too_few_cores_is_one_line() -> None:
    words = r"env\.num_workers=3 needs as many cores, and of the \d+ cores"
    with pytest.raises(UserError, match=words):
        make_vector_env(replace(ENV, num_envs=3, num_workers=3), collector="ray")


@pytest.mark.usefixtures("cluster")
def test_a_node_without_the_core_is_one_line() -> None:
    from icm.envs.on_ray import RayWorkers

    fields = fields_of(make_env(ENV), 1)
    elsewhere = partial(make_env, replace(ENV, core="/of/another/node.so"))
    words = "^collector=ray: on a node, env.core=/of/another/node.so: no such file"
    with pytest.raises(UserError, match=words):
        RayWorkers(elsewhere, 1, 1, 0, fields)


def test_an_address_that_is_none_is_one_line(tmp_path: Path) -> None:
    given = (*SMALL, "collector=ray", f"hydra.run.dir={tmp_path / 'run'}")
    done = run_forked("train.py", given, unseen() | {"RAY_ADDRESS": "myhead"}, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "train.py: error: collector=ray: Invalid address format: myhead\n"
