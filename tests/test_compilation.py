"""Compiled and bfloat16 updates against those of plain float32, and doing without a compiler."""

import functools
import math
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import SMALL, settings, train_after, unseen
from torch import Tensor
from torch._dynamo.utils import counters

from icm.agents.base import Agent
from icm.compilation import (
    WORTHWHILE,
    Compiler,
    GivenUp,
    given_up_on_signals,
    resolve_compile,
)
from icm.device import resolve_device, resolve_precision, share_cores
from icm.factory import build_agent
from icm.soak.forked import run_forked

AGENTS = {
    "dqn": ("agent.batch_size=8", "agent.n_step=1"),  # each one makes compiling longer
    # at twice this rate rounding moves a transition across the clip
    "ppo": ("agent.rollout_steps=32", "agent.lr=5e-4"),
    "pqn": ("agent.rollout_steps=32",),
}


def make_agent(name: str, *overrides: str, size: int = 42) -> Agent:
    """An agent with a memory of noise, of so many pixels; the same whatever the overrides."""
    config = settings(
        f"agent={name}",
        "env.num_envs=4",
        "agent.batch_size=4",
        "agent.accumulate=1",
        "agent.replay_capacity=1000",
        *AGENTS[name],
        "device=cpu",
        *overrides,
    )
    agent = build_agent(config, (4, size, size), 12, resolve_device(config.device))
    shape = (4, 4, size, size)
    generator = torch.Generator().manual_seed(1)

    def flags() -> Tensor:
        return torch.rand(4, generator=generator) < 0.02

    for _ in range(40):
        agent.remember(
            torch.randn((4, 12 if name == "pqn" else 1), generator=generator),
            torch.rand(4, generator=generator),
            states=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            behaviour=torch.full((4, 12), 1 / 12),
            actions=torch.randint(0, 12, (4,), generator=generator),
            rewards=torch.randn(4, generator=generator),
            terminated=flags(),
            truncated=flags(),
            reset=flags(),
            novelty=torch.rand(4, generator=generator),
        )
    agent.input_norm.measure(agent.memory.recent_frames(1000))
    return agent


def updated(name: str, *overrides: str, size: int = 42) -> tuple[list[dict[str, float]], Tensor]:
    """Losses of three updates, and the gradient of the first."""
    agent = make_agent(name, *overrides, size=size)
    torch.manual_seed(5)  # of dropout
    losses = [{name: value.item() for name, value in agent.update().items()}]
    gradients = [p.grad.flatten().clone() for p in agent.learned if p.grad is not None]
    for _ in range(2):
        losses.append({name: value.item() for name, value in agent.update().items()})
    return losses, torch.cat(gradients)


@functools.cache
def updated_plainly(name: str, *overrides: str, size: int) -> tuple[list[dict[str, float]], Tensor]:
    """What `updated` finds in float32, uncompiled."""
    return updated(name, *overrides, "precision=float32", "compile=off", size=size)


@pytest.mark.parametrize(
    ("name", "mode", "tolerance", "angle"),
    [  # compiling one takes twenty seconds and more, half of it for the curiosity that all share
        ("dqn", ("precision=float32", "compile=on", "curiosity=none"), 1e-3, 2e-3),
        ("dqn", ("precision=bf16", "compile=off"), 2e-2, 5e-2),
        ("ppo", ("precision=float32", "compile=on"), 1e-3, 2e-3),
        ("ppo", ("precision=bf16", "compile=off"), 2e-2, 5e-2),
        ("ppo", ("precision=bf16", "compile=off", "agent.accumulate=2"), 2e-2, 5e-2),
        ("ppo", ("precision=bf16", "compile=off", "curiosity.target_tau=null"), 2e-2, 5e-2),
        ("ppo", ("precision=bf16", "compile=on", "curiosity=none"), 2e-2, 5e-2),
        ("pqn", ("precision=bf16", "compile=off"), 2e-2, 5e-2),
        ("pqn", ("precision=float32", "compile=on", "curiosity=none"), 1e-3, 2e-3),
    ],
)
@pytest.mark.filterwarnings("ignore:Guards may run slower")
def test_updates_agree_with_plain_float32(
    name: str, mode: tuple[str, ...], tolerance: float, angle: float
) -> None:
    """Losses within `tolerance` of each other, the first gradients within `angle` (radians).

    Means of what is positive and negative are near 0 by chance: a hundredth of `tolerance` is
    enough for them.
    """
    size = 42 if "compile=on" in mode else 16  # many a CPU is slow in bfloat16
    counters.clear()
    losses, gradient = updated(name, *mode, size=size)
    assert not counters["graph_break"]  # each would be a way back to Python
    same = [setting for setting in mode if not setting.startswith(("precision=", "compile="))]
    expected, plain = updated_plainly(name, *same, size=size)
    for found, wanted in zip(losses, expected, strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            smallest = 1e-2 if key in ("loss/policy", "q/mean", "value/mean") else 1e-4
            expected_value = pytest.approx(value, rel=tolerance, abs=smallest * tolerance)
            assert found[key] == expected_value, key
    if "precision=bf16" in mode:
        assert not torch.equal(gradient, plain)
    assert gradient.norm().item() == pytest.approx(plain.norm().item(), rel=tolerance)
    cosine = torch.cosine_similarity(gradient.double(), plain.double(), dim=0)
    assert cosine.item() > 1 - angle**2 / 2


@pytest.mark.filterwarnings("ignore:Guards may run slower")
def test_compiled_acting_and_judging_agree_with_plain() -> None:
    generator = torch.Generator().manual_seed(2)
    states, next_states = torch.randint(
        0, 256, (2, 4, 4, 42, 42), dtype=torch.uint8, generator=generator
    )
    previous, actions = torch.randint(0, 12, (2, 4), generator=generator)
    found = []
    for compiling in ("on", "off"):
        agent = make_agent("ppo", "precision=float32", f"compile={compiling}")
        policy = agent.probabilities(states, previous, step=100_000)
        results = [policy]
        for pair in ((states, next_states), (next_states, states)):  # there and back
            errors, places = agent.judge(pair[0], previous, actions, pair[1], policy)
            results += [errors.forward, errors.inverse, errors.logits, places]
        found.append(results)
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_short_runs_are_not_compiled() -> None:
    assert resolve_compile("auto", WORTHWHILE - 1) == "off"
    assert resolve_compile("auto", WORTHWHILE) == "auto"
    assert resolve_compile("on", 1) == "on"
    assert resolve_compile("off", WORTHWHILE) == "off"


def test_what_fails_in_itself_fails_as_it_would_uncompiled() -> None:
    def broken(x: Tensor) -> Tensor:
        return x @ torch.zeros(7, 7)

    with pytest.raises(RuntimeError, match=r"cannot be multiplied"):
        Compiler("auto", torch.device("cpu"))(broken)(torch.zeros(3, 3))


def without_compiler(folder: Path) -> dict[str, str]:
    """The environment of a script where there is no compiler, nor anything compiled before."""
    return unseen() | {"PATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}


def test_without_a_compiler_auto_goes_on_and_training_with_on_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    """In one process: to import what would compile takes most of the time."""
    compiling = (
        "import torch\n"
        "from icm.compilation import Compiler\n"
        "compiler = Compiler('auto', torch.device('cpu'))\n"
        "double, negative = compiler(lambda x: 2 * x), compiler(lambda x: -x)\n"
        "print(double(torch.ones(3)).tolist(), double(torch.ones(2)).tolist(), end=' ')\n"
        "print(negative(torch.ones(1)).tolist(), flush=True)\n"
    )
    program = train_after(compiling, tmp_path)
    given = (*SMALL, "compile=on", "total_steps=3000", f"hydra.run.dir={tmp_path}/run")
    result = run_forked(program, given, without_compiler(tmp_path), timeout=120)
    said, answer, *_ = result.stdout.splitlines()
    assert said.startswith("compile=auto: not compiled, learning is slower (")
    assert answer == "[2.0, 2.0, 2.0] [2.0, 2.0] [-1.0]"
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert "error: compile=on: failed (" in last
    assert last.endswith("compile=auto and compile=off work")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_signal_ends_compiling_and_the_function_is_used_as_it_is(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import contextlib, os, signal, threading, time, psutil, torch\n"
        "from icm.compilation import Compiler\n"
        "os.setsid()\n"
        "compilers, got, watching = set(), [], True\n"
        "signal.signal(signal.SIGINT, lambda *_: got.append('here'))\n"
        "def watch():\n"
        "    while watching:\n"
        "        for child in psutil.Process().children(recursive=True):\n"
        "            with contextlib.suppress(psutil.NoSuchProcess):\n"
        "                if child.name() == 'cc1plus' and child not in compilers:\n"
        "                    compilers.add(child)\n"
        "                    os.killpg(0, signal.SIGINT)\n"  # as a terminal does
        "        time.sleep(0.01)\n"
        "watcher = threading.Thread(target=watch)\n"
        "watcher.start()\n"
        "x = torch.ones(1000, requires_grad=True)\n"
        "compiler = Compiler('on', torch.device('cpu'))\n"
        "loss = compiler(lambda x: (x.exp() * x).sum())(x)\n"
        "loss.backward()\n"
        "double = compiler(lambda x: 2 * x)(torch.ones(2)).tolist()\n"
        "watching = False\n"
        "watcher.join()\n"
        "left = psutil.wait_procs(compilers, timeout=5)[1]\n"
        "print(x.grad[0].item(), double, len(compilers), got, len(left))\n"
        "print(signal.getsignal(signal.SIGINT).__name__)\n"
    )
    new = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # so that there is something to do
    result = run_forked(str(program), (), unseen() | new, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    first, handler = result.stdout.splitlines()
    value, rest = first.split(maxsplit=1)
    assert float(value) == pytest.approx(2 * math.e)
    assert rest == "[2.0, 2.0] 1 ['here'] 0"
    assert handler == "<lambda>"


def test_what_a_compiler_was_writing_when_a_signal_came_is_removed(tmp_path: Path) -> None:
    """Or every later run would take half a library in PyTorch's cache for a whole one."""
    path, program = tmp_path / "half.so", "import sys, time; open(sys.argv[2], 'w'); time.sleep(99)"
    before = signal.signal(signal.SIGINT, lambda *_: None)

    def compile_until_a_signal_comes() -> None:
        with given_up_on_signals():
            subprocess.Popen([sys.executable, "-c", program, "-o", path])
            while not path.exists():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(GivenUp):
            compile_until_a_signal_comes()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not path.exists()


def test_giving_up_is_not_ignored_where_python_ignores_exceptions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in the callback of a weak reference, of which PyTorch's compiler has many."""
    got: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: got.append(number))

    def compile_until_a_signal_comes() -> None:
        watched = {1}
        reference = weakref.ref(watched, lambda _: signal.raise_signal(signal.SIGINT))
        with given_up_on_signals():
            del watched
            assert reference() is None
            time.sleep(60)

    try:
        with pytest.raises(GivenUp):
            compile_until_a_signal_comes()
    finally:
        signal.signal(signal.SIGINT, before)
    assert got == [signal.SIGINT]
    assert capsys.readouterr().err == ""


def test_a_gpu_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a graph would be recorded in another one, and do nothing."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("cuda:2") == torch.device("cuda", 2)
    assert current == [2]


@pytest.mark.parametrize(("device", "threads"), [("cpu", 4), ("cuda", 1)])
def test_half_of_the_cores_learn_unless_it_is_said_how_many(
    device: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[int] = []
    monkeypatch.setattr("icm.device.CORES", 8)
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    for given in (None, "3"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        share_cores(torch.device(device))
    assert said == [threads]


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_auto_is_bf16_where_the_hardware_computes_in_it(
    avx512: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", cpu) == (avx512 or amx)
    assert [resolve_precision(name, cpu) for name in ("bf16", "float32")] == [True, False]


def test_auto_takes_a_gpu_and_each_rank_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr("icm.device.LOCAL_RANK", 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
