"""On a GPU: updates against those of plain float32 on the CPU, graphs, waiting, resuming."""

from pathlib import Path

import pytest
import torch
from test_compilation import make_agent, updated
from test_resume import config_of, latest, leaves, memory, train

from icm import checkpoint
from icm.agents import base
from icm.bench.learner import update
from icm.compilation import WARM_UPS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("name", "mode", "tolerance", "angle"),
    [
        ("ppo", ("precision=float32", "compile=off"), 3e-3, 2e-2),
        ("ppo", ("precision=float32", "compile=on"), 3e-3, 2e-2),
        ("ppo", ("precision=bf16", "compile=on"), 3e-2, 6e-2),
        ("dqn", ("precision=bf16", "compile=on"), 3e-2, 6e-2),
        ("pqn", ("precision=bf16", "compile=on"), 3e-2, 6e-2),
    ],
)
def test_updates_agree_with_plain_float32_on_the_cpu(
    name: str, mode: tuple[str, ...], tolerance: float, angle: float
) -> None:
    quiet = ("curiosity.inverse_dropout=0",)  # a GPU draws other numbers
    losses, gradient = updated(name, *mode, *quiet, "device=cuda")
    expected, plain = updated(name, *mode, *quiet, "precision=float32", "compile=off")
    for found, wanted in zip(losses, expected, strict=True):
        for key, value in wanted.items():
            smallest = 1e-2 if key in ("loss/policy", "q/mean", "value/mean") else 1e-4
            assert found[key] == pytest.approx(value, rel=tolerance, abs=smallest), key
    cosine = torch.cosine_similarity(gradient.cpu().double(), plain.double(), dim=0)
    assert cosine.item() > 1 - angle**2 / 2


@pytest.mark.parametrize("name", ["dqn", "ppo", "pqn"])
def test_an_update_waits_for_nothing(name: str) -> None:
    agent = make_agent(name, "device=cuda", "precision=bf16", "compile=on")
    for _ in range(WARM_UPS + 1):
        update(agent)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            update(agent)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("name", "curiosity", "accumulate", "world_size"),
    [("dqn", "icm", 1, 1), ("ppo", "icm", 1, 1), ("pqn", "icm", 1, 1), ("ppo", "icm", 3, 1)]
    + [("ppo", other, 1, 1) for other in ("random_features", "rnd", "disagreement", "none")]
    + [("ppo", "icm", 3, 2)],
)
def test_a_compiled_update_does_what_one_call_after_the_other_does(
    name: str, curiosity: str, accumulate: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is recorded whole, but not that of one of several ranks, which exchange in between."""
    monkeypatch.setattr(base, "WORLD_SIZE", world_size)
    last = torch.cuda.device_count() - 1
    quiet = ("curiosity.inverse_dropout=0",) if curiosity == "icm" else ()
    found = []
    for compiling in ("on", "off"):
        agent = make_agent(
            *(name, f"curiosity={curiosity}", f"device=cuda:{last}"),
            *("precision=float32", f"compile={compiling}", *quiet),
            f"agent.accumulate={accumulate}",
        )
        losses = [update(agent) for _ in range(accumulate * (WARM_UPS + 4))]
        found.append([{key: value.item() for key, value in parts.items()} for parts in losses])
    for compiled, plain in zip(*found, strict=True):
        for key, value in plain.items():
            assert compiled[key] == pytest.approx(value, rel=0.05, abs=0.02), key


@pytest.mark.parametrize("learner", ["dqn", "ppo"])
@pytest.mark.parametrize("mode", [("compile=off",), ("precision=bf16", "compile=on")])
def test_a_run_stopped_on_a_gpu_goes_on_there_and_on_a_cpu(
    tmp_path: Path, learner: str, mode: tuple[str, ...]
) -> None:
    config = config_of(learner, "device=cuda", *mode)
    whole = train(config, tmp_path / "whole")
    first = train(config, tmp_path / "first", 64)
    second = train(config, tmp_path / "second", resume=latest(first))
    on_cpu = train(config_of(learner, "device=cpu"), tmp_path / "third", resume=latest(first))
    begun = leaves(checkpoint.load(latest(first))["models"])
    expected = leaves(checkpoint.load(latest(whole))["models"])

    def way(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        names = [name for name in expected if "input_norm" not in name]
        return sum((a[n].cpu() - b[n].cpu()).double().square().sum().item() for n in names) ** 0.5

    moved = way(expected, begun)
    assert moved > 0
    for folder in (second, on_cpu):
        found = leaves(checkpoint.load(latest(folder))["models"])
        off = way(found, expected) / moved  # about 1 where something else is learned
        print(learner, mode, folder.name, "is off by", off, flush=True)
        assert off < 0.5
    remembered = [checkpoint.load_file(memory(folder)) for folder in (whole, second)]
    assert (remembered[0]["actions"] == remembered[1]["actions"]).all()
