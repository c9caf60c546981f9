"""Files of torch.save, good and bad, through `scripts/inspect_ckpt.py` and the reader below it."""

import io
import json
import math
import os
import pickle
import re
import resource
import shlex
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, run_script, script_into
from torch import nn

from icm.checkpoint_difference import Change, compare
from icm.checkpoint_reader import MAX_BYTES, MAX_DETAILS, Checkpoint, read_checkpoint
from icm.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "inspect_ckpt.py"
EXPECTED = "expected a file written by torch.save"
MEMORY_LIMIT = 256 << 20


class Phi(nn.Module):
    """The features of the tutorial that this project's files have to be compared with."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(32, 32, 3, stride=2, padding=1)


class Qnetwork(nn.Module):
    """The action values of that tutorial."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.linear1 = nn.Linear(288, 100)
        self.linear2 = nn.Linear(100, 12, bias=False)


class Everything(nn.Module):
    """All that a state_dict can hold, or has to leave out."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.late = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        self.blocks = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])})
        self.memory = nn.GRU(2, 3)
        self.register_buffer("steps", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("nothing", None)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bfloat16s = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
        self.transposed = nn.Parameter(torch.zeros(6, 5).t())
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("uint16s", torch.zeros(3, dtype=torch.uint16))
        self.tied = nn.Linear(2, 3)
        self.tied.weight = self.blocks["a"][0].weight  # type: ignore[index]
        self.attributes = {"device": torch.device("cpu"), (0, 1): {1, 2}, "path": Path("x")}
        annotated = torch.zeros(2)
        annotated.note = "a tensor with an attribute is pickled in another way"  # type: ignore[attr-defined]
        self.register_buffer("annotated", annotated)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def lines_of(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Return the lines that torch itself would print."""
    return [f"{key}  {tensor.shape}" for key, tensor in state_dict.items()]


def totals_of(state_dict: dict[str, torch.Tensor]) -> str:
    """Return the counts of a state_dict, with shared memory counted once."""
    elements = sum(tensor.numel() for tensor in state_dict.values())
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state_dict.values()
    }
    return f"{len(state_dict)} tensors, {elements} elements, {sum(storages.values())} bytes"


def strict_json(text: str) -> Any:
    """Return what JSON in its strict form says: it has no NaN and no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def counts_of(state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the numbers of `totals_of`."""
    count, elements, size = map(int, re.findall(r"\d+", totals_of(state_dict)))
    return {"count": count, "elements": elements, "bytes": size}


def tensors_of(state_dict: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return what --json says of each tensor."""
    return [{"key": key, **kind_of(tensor)} for key, tensor in state_dict.items()]


def kind_of(tensor: torch.Tensor) -> dict[str, Any]:
    """Return what --json says of a tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "bytes": tensor.nbytes}


def assert_refused(result: subprocess.CompletedProcess[str], path: object) -> None:
    """Check that the answer is one line about `path`."""
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"inspect_ckpt.py: error: {path}: ")
    assert result.stderr.endswith(f"; {EXPECTED}\n")
    assert result.stderr.count("\n") == 1


def write_zip(path: Path, data: bytes, storages: Iterable[tuple[str, bytes]] = ()) -> Path:
    """Write a file in the format of torch.save around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in storages:
            archive.writestr(f"archive/data/{key}", content)
    return path


def write_legacy(path: Path, data: bytes) -> Path:
    """Write a file in the older format of torch.save around any pickle."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    head, keys = buffer.getvalue().split(b"\x80\x02}q\x00.")
    path.write_bytes(head + data + keys)
    return path


def short(text: str) -> bytes:
    """Return the opcode of a string."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def tensor_pickle(offset: int, size: Any, stride: Any, numel: Any = 4) -> bytes:
    """Return a pickle of {"w": tensor} with chosen numbers, over a storage named 0."""

    def number(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + short("storage") + b"ctorch\nFloatStorage\n" + short("0") + short("cpu")
    arguments = number(offset) + number(size) + number(stride) + b"\x89N"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage[1:] + number(numel) + b"tQ"
    return b"\x80\x02}" + short("w") + call + arguments + b"tRs."


MODELS = [Phi, Qnetwork, Everything, nn.ReLU]


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_whole_model_and_state_dict_print_the_same(
    model_class: type[nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    """Both kinds of file give the lines of the real state_dict, in its order."""
    model = model_class()
    state_dict = model.state_dict()
    torch.save(state_dict, tmp_path / "state.pt", **options)
    torch.save(model, tmp_path / "model.pt", **options)
    outputs = [run(tmp_path / name) for name in ("state.pt", "model.pt")]
    expected = [*lines_of(state_dict), f"total: {totals_of(state_dict)}"]
    for output in outputs:
        assert (output.returncode, output.stderr) == (0, "")
        assert output.stdout.splitlines() == expected


def test_totals_of_a_known_network(tmp_path: Path) -> None:
    """The output for a network that can be counted by hand."""
    torch.save(Qnetwork(), tmp_path / "q.pt")
    assert run(tmp_path / "q.pt").stdout == (
        "linear1.weight  torch.Size([100, 288])\n"
        "linear1.bias  torch.Size([100])\n"
        "linear2.weight  torch.Size([12, 100])\n"
        "total: 3 tensors, 30100 elements, 120400 bytes\n"
    )


def test_tied_weights_are_listed_twice_and_their_memory_once(tmp_path: Path) -> None:
    """Shared weights have two keys, as in state_dict, and one storage."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    torch.save(model, tmp_path / "tied.pt")
    assert run(tmp_path / "tied.pt").stdout.splitlines() == [
        "a.weight  torch.Size([3, 3])",
        "b.weight  torch.Size([3, 3])",
        "total: 2 tensors, 18 elements, 36 bytes",
    ]


def test_class_of_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a class of the script that trained it."""
    monkeypatch.setattr(sys.modules["__main__"], "Phi", Phi, raising=False)
    monkeypatch.setattr(Phi, "__module__", "__main__")
    torch.save(Phi(), tmp_path / "phi.pt")
    assert b"__main__\nPhi" in (tmp_path / "phi.pt").read_bytes()
    assert run(tmp_path / "phi.pt").stdout.splitlines()[:-1] == lines_of(Phi().state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    """Later protocols have other opcodes for classes, sets and framing."""
    model = Everything()
    torch.save(model, tmp_path / "model.pt", pickle_protocol=protocol)
    found = read_checkpoint(str(tmp_path / "model.pt")).networks[""]
    assert [(key, tensor.shape) for key, tensor in found] == [
        (key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()
    ]


def test_every_dtype(tmp_path: Path) -> None:
    """The bytes of a storage follow from its type, for all types of dense tensors."""
    dtypes = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
    strange = re.compile(r"torch\.(q|bits|bcomplex|u?int[1-7]$)")  # quantized, or without numbers
    tensors = {
        str(dtype): torch.zeros(6 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        for dtype in dtypes
        if not strange.match(str(dtype))
    }
    assert len(tensors) >= 22
    torch.save(tensors, tmp_path / "dtypes.pt")
    found = read_checkpoint(str(tmp_path / "dtypes.pt")).networks[""]
    assert {key: (tensor.shape, tensor.storage.nbytes) for key, tensor in found} == {
        key: (tuple(tensor.shape), tensor.nbytes) for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("zip_format", [True, False])
def test_the_data_of_large_tensors_is_not_read(zip_format: bool, tmp_path: Path) -> None:
    """The limit on what is read is one on the description, not on the size of the file."""
    path = tmp_path / "large.pt"
    state_dict = {"w": torch.zeros(MAX_BYTES), "b": torch.zeros(3)}
    torch.save(state_dict, path, _use_new_zipfile_serialization=zip_format)
    result = run(path)
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == f"total: {totals_of(state_dict)}"
    os.truncate(path, path.stat().st_size - 1)
    assert_refused(run(path), path)


@pytest.fixture(scope="module")
def project_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Write a checkpoint as this project does."""
    models: dict[str, nn.Module] = {"phi": Phi(), "qnetwork": Qnetwork(), "none": nn.ReLU()}
    parameters = [p for model in models.values() for p in model.parameters()]
    adam = {  # what Adam.state_dict returns, without the seconds that torch.optim takes to import
        "state": {
            i: {"step": torch.tensor(1.0), "exp_avg": torch.ones_like(p), "exp_avg_sq": p**2}
            for i, p in enumerate(parameters)
        },
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [*range(len(parameters))]}],
    }
    checkpoint = {
        "format": 1,
        "config": {
            "seed": 7,
            "env": {"id": "SuperMarioBros-v0", "core": None, "shape": (3, 42, 42)},
            "lr": 1e-4,
        },
        "versions": {"python": "3.13.1", "torch": "2.10"},
        "metrics": {"episode/distance": 1638.25, "loss/value": None, "explore/cells": 1809},
        "step": 1234,
        "models": {name: model.state_dict() for name, model in models.items()},
        "optimizers": {"adam": adam},
        "curiosity": {"mean": 0.5, "count": torch.zeros(7)},
        "rng": {"torch": torch.get_rng_state(), "python": (3, tuple(range(625)), None)},
    }
    path = tmp_path_factory.mktemp("project") / "ckpt.pt"
    torch.save(checkpoint, path)
    return path, checkpoint


def test_project_checkpoint(project_checkpoint: tuple[Path, dict[str, Any]]) -> None:
    """What it is, the networks, the totals, the optimizer as a count, and the configuration."""
    path, checkpoint = project_checkpoint
    models = checkpoint["models"]
    everything = {f"{n}.{key}": t for n, model in models.items() for key, t in model.items()}
    states = checkpoint["optimizers"]["adam"]["state"].items()
    optimizer = {f"{i}.{key}": t for i, state in states for key, t in state.items()}
    assert len(optimizer) == 3 * len(everything)
    assert run(path).stdout.splitlines() == [
        "format: 1",
        "step: 1234",
        "seed: 7",
        "versions:",
        "  python: 3.13.1",
        "  torch: 2.10",
        "metrics:",
        "  episode/distance: 1638.25",
        "  loss/value: null",
        "  explore/cells: 1809",
        *lines_of(everything),
        *(f"{name}: {totals_of(model)}" for name, model in models.items()),
        f"total: {totals_of(everything)}",
        f"optimizers (not listed, not in the total): {totals_of(optimizer)}",
        "config:",
        "  seed: 7",
        "  env:",
        "    id: SuperMarioBros-v0",
        "    core: null",
        "    shape: [3, 42, 42]",
        "  lr: 0.0001",
    ]
    assert "phi.conv1.weight  torch.Size([32, 3, 3, 3])" in run(path).stdout


def test_project_checkpoint_as_json(project_checkpoint: tuple[Path, dict[str, Any]]) -> None:
    """The same and the types and sizes of all tensors, as one object."""
    path, checkpoint = project_checkpoint
    models = {
        name: {f"{name}.{key}": tensor for key, tensor in model.items()}
        for name, model in checkpoint["models"].items()
    }
    everything = {key: tensor for model in models.values() for key, tensor in model.items()}
    states = checkpoint["optimizers"]["adam"]["state"].items()
    optimizer = {f"{i}.{key}": t for i, state in states for key, t in state.items()}
    result = run("--json", path)
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    assert strict_json(result.stdout) == {
        "path": str(path),
        "format": 1,
        "step": 1234,
        "seed": 7,
        "versions": checkpoint["versions"],
        "metrics": checkpoint["metrics"],
        "config": {
            **checkpoint["config"],
            "env": {**checkpoint["config"]["env"], "shape": [3, 42, 42]},
        },
        "networks": {
            name: {"tensors": tensors_of(model), **counts_of(model)}
            for name, model in models.items()
        },
        "total": counts_of(everything),
        "optimizers": counts_of(optimizer),
    }


def test_json_of_other_files(tmp_path: Path) -> None:
    """A model and its state_dict are one network without a name; the details are null."""
    model = Everything()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "bad.pt").write_text("no")
    result = run("--json", *(tmp_path / name for name in ("state.pt", "bad.pt", "model.pt")))
    assert result.returncode == 2
    assert result.stderr.startswith(f"inspect_ckpt.py: error: {tmp_path / 'bad.pt'}: ")
    counts = counts_of(model.state_dict())
    details = dict.fromkeys(("format", "step", "seed", "versions", "metrics", "config"))
    assert [strict_json(line) for line in result.stdout.splitlines()] == [
        {
            "path": str(tmp_path / name),
            **details,
            "networks": {"": {"tensors": tensors_of(model.state_dict()), **counts}},
            "total": counts,
            "optimizers": None,
        }
        for name in ("state.pt", "model.pt")
    ]


def test_odd_details_are_shown_safely(tmp_path: Path) -> None:
    """A file may hold anything where texts and numbers are expected."""
    checkpoint = {
        "format": 1,
        "step": 2,
        "models": {},
        "config": ["a\x1b[31m\nb", {"seed": 3}, torch.zeros(2), torch.device("cpu"), Phi, 10**30],
        "versions": "\x1b]0;title\x07\n2.10",
        "metrics": {"a\nb": math.nan, "c": -math.inf, "d": {}, "e": {1, 2}, "f": True},
    }
    path = tmp_path / "odd.pt"
    torch.save(checkpoint, path)
    assert run(path).stdout.splitlines() == [
        "format: 1",
        "step: 2",
        "versions: \\x1b]0;title\\x07\\n2.10",
        "metrics:",
        "  a\\nb: NaN",
        "  c: -Infinity",
        "  d: {}",
        "  e: [1, 2]",
        "  f: true",
        "total: 0 tensors, 0 elements, 0 bytes",
        "optimizers (not listed, not in the total): 0 tensors, 0 elements, 0 bytes",
        'config: ["a\\u001b[31m\\nb", {"seed": 3}, "<tensor>", "<torch.device>", '
        f'"<{Phi.__module__}.Phi>", "<an integer of 100 bits>"]',
    ]
    output = run("--json", path).stdout
    assert output.isascii()
    assert output.removesuffix("\n").isprintable()
    report = strict_json(output)
    assert report["metrics"] == {"a\nb": None, "c": None, "d": {}, "e": [1, 2], "f": True}
    assert report["seed"] is None


def test_other_nested_checkpoints_are_listed_with_their_path(tmp_path: Path) -> None:
    """A state_dict or a model anywhere in nested dicts is found."""
    path = tmp_path / "other.pt"
    torch.save({"epoch": 3, "model": nn.Linear(2, 1), "best": {"w": torch.zeros(5)}}, path)
    assert run(path).stdout.splitlines() == [
        "model.weight  torch.Size([1, 2])",
        "model.bias  torch.Size([1])",
        "best.w  torch.Size([5])",
        "total: 3 tensors, 8 elements, 32 bytes",
    ]


def test_several_files_and_the_form_of_the_argument(tmp_path: Path) -> None:
    """Each good file has a header; a bad one has an error and does not stop the rest."""
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.zeros(2, 3)}, good)
    bad.write_bytes(b"")
    single = run(f"ckpt={good}")
    assert single.stdout == run(good).stdout != ""
    several = run(good, bad, f"ckpt={good}")
    assert several.returncode == 2
    assert several.stdout == 2 * f"{good}:\n{single.stdout}"
    assert several.stderr == f"inspect_ckpt.py: error: {bad}: empty file; {EXPECTED}\n"


def test_torch_is_not_imported(tmp_path: Path) -> None:
    """The script starts fast: it loads neither torch nor what comes with it."""
    torch.save(Phi(), tmp_path / "phi.pt")
    command = [sys.executable, "-X", "importtime", str(SCRIPT), str(tmp_path / "phi.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = [line.rpartition("|")[2].strip() for line in result.stderr.splitlines()]
    assert "icm.checkpoint_reader" in imported
    assert not [name for name in imported if name.partition(".")[0] in {"torch", "numpy", "hydra"}]


def test_closed_pipe_and_odd_encoding_end_quietly(tmp_path: Path) -> None:
    """Neither a reader such as `head` nor odd characters cause a traceback."""
    torch.save({"gewicht_ä": torch.zeros(1), "a\x1b[31m\nb": torch.zeros(1)}, tmp_path / "k.pt")
    result = run(tmp_path / "k.pt", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.stdout.splitlines()[:2] == [
        "gewicht_\\xe4  torch.Size([1])",
        "a\\x1b[31m\\nb  torch.Size([1])",
    ]
    assert script_into(None, "inspect_ckpt.py", tmp_path / "k.pt") == (1, "")
    status, told = script_into("/dev/full", "inspect_ckpt.py", "--json", tmp_path / "k.pt")
    assert (status, told) == (2, "inspect_ckpt.py: error: [Errno 28] No space left on device\n")
    for more in ([], ["--json"]):
        closed = shlex.join([sys.executable, str(SCRIPT), *more, str(tmp_path / "k.pt")]) + " >&-"
        done = subprocess.run(closed, shell=True, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (0, "")


# Two files


def save(path: Path, content: object, **options: Any) -> Path:
    """Write `content` and return the path."""
    torch.save(content, path, **options)
    return path


def norms_of(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Return the norms of b - a and of a as torch has them."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    return (b - a).norm().item(), a.norm().item()


def change_of(a: Path, b: Path) -> Change | None:
    """Return the change of the only tensor of two files."""
    [pair] = compare(read_checkpoint(str(a)), read_checkpoint(str(b))).networks[""]
    return pair.change


def as_big_endian(path: Path) -> Path:
    """Rewrite a file of float32s, or of complex64s, as a machine of another byte order would."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path.with_suffix(".big"), "w") as archive:
        for name, content in members.items():
            if "/data/" in name:
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            archive.writestr(name, b"big" if name.endswith("/byteorder") else content)
    return path.with_suffix(".big")


REAL = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex128, torch.complex64, torch.complex32]
WHOLE = [
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX, *WHOLE], ids=str)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_norms_of_every_dtype(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    """The change of random tensors, as torch computes it; more than one chunk of elements."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    random = [
        30 * torch.randn(90_001, generator=torch.manual_seed(seed), dtype=wide) for seed in (1, 2)
    ]
    a, b = ((x * (x.real > 0)).to(dtype) for x in random)  # some are zero, none is below
    paths = [save(tmp_path / f"{n}.pt", {"w": t}, **options) for n, t in (("a", a), ("b", b))]
    norm, before = norms_of(a, b)
    change = change_of(paths[0], paths[1])
    assert change is not None
    assert change.norm == pytest.approx(norm, rel=1e-9) != 0
    assert change.relative == pytest.approx(norm / before, rel=1e-9)
    assert change_of(paths[0], paths[0]) == Change(0.0, change.before)


def test_norms_of_every_view(tmp_path: Path) -> None:
    """Elements pair up by their index, however a file lays them out."""
    base = torch.randn(4000, generator=torch.manual_seed(3))
    views = {
        "whole": base,
        "part": base[100:200],
        "strided": base[5:3000:7],
        "transposed": base.view(50, 80).t(),
        "permuted": base.view(2, 4, 5, 100).permute(3, 1, 0, 2),
        "column": base.view(50, 80)[:, 3],
        "expanded": base[7].expand(30, 2),
        "overlapping": base.as_strided((100, 100), (3, 1)),
        "scalar": base[9],
        "empty": base[:0].view(0, 3),
        "ones": base[:1].view((1,) * 64),
    }
    plain = {key: torch.randn(view.shape) for key, view in views.items()}
    a = read_checkpoint(str(save(tmp_path / "a.pt", views)))
    b = read_checkpoint(str(save(tmp_path / "b.pt", plain)))
    for x, y, one, other in ((a, b, views, plain), (b, a, plain, views)):
        for pair in compare(x, y).networks[""]:
            norm, before = norms_of(one[pair.key], other[pair.key])
            assert pair.change is not None
            assert pair.change.norm == pytest.approx(norm, rel=1e-9)
            assert math.sqrt(pair.change.before) == pytest.approx(before, rel=1e-9)


def test_norms_between_dtypes_and_byte_orders(tmp_path: Path) -> None:
    """Rounded weights are close to those they were, a file of another machine is equal."""
    w = torch.randn(1000, generator=torch.manual_seed(4))
    a = save(tmp_path / "a.pt", {"w": w})
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        change = change_of(a, save(tmp_path / "b.pt", {"w": w.to(dtype)}))
        assert change is not None
        assert change.norm == pytest.approx(norms_of(w, w.to(dtype))[0], rel=1e-9)
    for tensor in (w, w.view(torch.complex64)):
        path = save(tmp_path / "c.pt", {"w": tensor})
        assert change_of(path, as_big_endian(path)) == Change(0.0, change.before)


def test_a_change_in_the_last_bit_of_a_long_integer(tmp_path: Path) -> None:
    """It is 1, although a float64 has no room for it, and the widest change does not wrap."""
    tensors = [torch.tensor([value]) for value in (2**62, 2**62 + 1, 2**63 - 1, -(2**63))]
    paths = [save(tmp_path / f"{i}.pt", {"w": tensor}) for i, tensor in enumerate(tensors)]
    norms = [change_of(paths[i], paths[j]) for i, j in ((0, 1), (1, 0), (2, 3), (3, 2))]
    assert [change and change.norm for change in norms] == [1.0, 1.0, 2.0**64, 2.0**64]


def test_tensors_without_a_change_to_speak_of(tmp_path: Path) -> None:
    """Other shapes, complex against real, and types without numbers here have no norm."""
    a = {
        "same": torch.ones(3),
        "shape": torch.ones(3),
        "kind": torch.ones(4),
        "float8": torch.ones(2).to(torch.float8_e5m2),
        "gone": torch.ones(2, 2),
    }
    b = {
        "new\n": torch.ones(()),
        "float8": torch.zeros(2).to(torch.float8_e5m2),
        "kind": torch.ones(4, dtype=torch.complex64),
        "shape": torch.ones(1, 3, dtype=torch.float16),
        "same": torch.tensor([1.0, 3.0, 1.0]),
    }
    paths = [save(tmp_path / "a.pt", a), save(tmp_path / "b.pt", b)]
    assert run("--diff", *paths).stdout.splitlines() == [
        f"a: {paths[0]}",
        f"b: {paths[1]}",
        "only in a: gone  torch.Size([2, 2])",
        "only in b: new\\n  torch.Size([])",
        " ||b - a||    / ||a||  tensor",
        "         2      1.155  same",
        "         -          -  shape  float32 -> float16, [3] -> [1, 3]",
        "         -          -  kind  float32 -> complex64",
        "         -          -  float8",
        "         2      1.155  total",
    ]
    report = strict_json(run("--json", "--diff", *paths).stdout)
    norms = {"norm": 2.0, "relative": 2 / math.sqrt(3)}
    assert report == {
        "a": str(paths[0]),
        "b": str(paths[1]),
        "details": [],
        "only_in_a": tensors_of({"gone": a["gone"]}),
        "only_in_b": tensors_of({"new\n": b["new\n"]}),
        "networks": {
            "": {
                "tensors": [
                    {
                        "key": key,
                        "a": kind_of(a[key]),
                        "b": kind_of(b[key]),
                        **(norms if key == "same" else dict.fromkeys(norms)),
                    }
                    for key in ("same", "shape", "kind", "float8")
                ],
                **norms,
            }
        },
        "total": norms,
    }


def test_where_nothing_can_be_compared_nothing_is_said_to_be_the_same(tmp_path: Path) -> None:
    a = save(tmp_path / "a.pt", {"net.w": torch.zeros(3), "net.v": torch.ones(2)})
    b = save(tmp_path / "b.pt", {"net.w": torch.ones(4)})
    lines = run("--diff", a, b).stdout.splitlines()
    assert lines[-1] == "         -          -  total"
    assert strict_json(run("--json", "--diff", a, b).stdout)["total"]["norm"] is None


def test_norms_that_are_no_numbers(tmp_path: Path) -> None:
    """A network that has diverged is said to have, and JSON stays strict."""
    values = {"nan": (1.0, math.nan), "inf": (1.0, math.inf), "from_zero": (0.0, 2.0)}
    paths = [
        save(tmp_path / f"{i}.pt", {key: torch.tensor(pair[i]) for key, pair in values.items()})
        for i in (0, 1)
    ]
    result = run("--diff", *paths)
    assert result.stderr == ""
    assert result.stdout.splitlines()[3:] == [
        "       nan        nan  nan",
        "       inf        inf  inf",
        "         2        inf  from_zero",
        "       nan        nan  total",
    ]
    network = strict_json(run("--json", "--diff", *paths).stdout)["networks"][""]
    assert [tensor["norm"] for tensor in network["tensors"]] == [None, None, 2.0]
    assert [tensor["relative"] for tensor in network["tensors"]] == [None] * 3


def test_difference_of_two_models(tmp_path: Path) -> None:
    """A whole model and a state_dict have the same keys, in either format of torch.save."""
    models = [Everything(), Everything()]
    a = save(tmp_path / "a.pt", models[0])
    b = save(tmp_path / "b.pt", models[1].state_dict(), _use_new_zipfile_serialization=False)
    found = compare(read_checkpoint(str(a)), read_checkpoint(str(b)))
    before, after = (model.state_dict() for model in models)
    assert (found.details, found.only) == ({}, {"a": [], "b": []})
    assert [pair.key for pair in found.networks[""]] == list(before)
    for pair in found.networks[""]:
        assert pair.change is not None
        norm, _ = norms_of(before[pair.key], after[pair.key])
        assert pair.change.norm == pytest.approx(norm, rel=1e-9)


def test_difference_of_two_project_checkpoints(
    project_checkpoint: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Every detail that differs by its dotted name, then the tensors, the networks, the total."""
    path, checkpoint = project_checkpoint
    models = {name: dict(model) for name, model in checkpoint["models"].items()}
    models["qnetwork"]["linear1.bias"] = models["qnetwork"]["linear1.bias"] + 0.5
    config = {"seed": 7, "env": {"id": "SuperMarioBros-v0", "core": "auto"}, "lr": 1e-4, "new": {}}
    later = {
        **checkpoint,
        "step": 5678,
        "config": {**config, "log": {"every": 1}},
        "versions": {**checkpoint["versions"], "torch": "2.11"},
        "metrics": {**checkpoint["metrics"], "explore/cells": 1810},
        "models": models,
    }
    other = save(tmp_path / "later.pt", later)
    result = run("--diff", f"ckpt={path}", other)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:10] == [
        f"a: {path}",
        f"b: {other}",
        "step: 1234 -> 5678",
        'versions.torch: "2.10" -> "2.11"',
        "metrics.explore/cells: 1809 -> 1810",
        'config.env.core: null -> "auto"',
        "config.env.shape: [3, 42, 42] -> absent",
        "config.log.every: absent -> 1",
        " ||b - a||    / ||a||  tensor",
        "         0          0  phi.conv1.weight",
    ]
    bias = checkpoint["models"]["qnetwork"]["linear1.bias"]
    whole = torch.cat([t.flatten() for t in checkpoint["models"]["qnetwork"].values()])
    everything = torch.cat(
        [t.flatten() for model in checkpoint["models"].values() for t in model.values()]
    )
    relative = {n: 5 / t.norm() for n, t in (("b", bias), ("q", whole), ("all", everything))}
    assert f"         5{relative['b']:>11.4g}  qnetwork.linear1.bias" in lines
    assert lines[-3:] == [
        "         0          0  phi",
        f"         5{relative['q']:>11.4g}  qnetwork",
        f"         5{relative['all']:>11.4g}  total",
    ]
    report = strict_json(run("--json", "--diff", path, other).stdout)
    assert report["details"][-3:] == [
        {"key": "config.env.core", "a": None, "b": "auto"},
        {"key": "config.env.shape", "a": [3, 42, 42]},
        {"key": "config.log.every", "b": 1},
    ]
    assert report["networks"]["qnetwork"]["norm"] == pytest.approx(5, rel=1e-6)
    assert report["networks"]["none"] == {"tensors": [], "norm": None, "relative": None}


def test_checkpoints_of_a_real_training(tmp_path: Path) -> None:
    """All that a training writes is shown, and what has learned has moved as torch says."""
    settings = ("total_steps=64", "checkpoint.every=32", f"hydra.run.dir={tmp_path / 'run'}")
    done = run_script("train.py", *SMALL, *settings)
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / "run" / "checkpoints" / f"step_{step:09d}.pt" for step in (32, 64)]
    first, second = (torch.load(path, weights_only=True) for path in paths)

    lines = run(paths[1]).stdout.splitlines()
    assert lines[:3] == [f"format: {second['format']}", "step: 64", "seed: 42"]
    networks = {f"{n}.{k}": t for n, m in second["models"].items() for k, t in m.items()}
    start = lines.index(lines_of(networks)[0])
    assert lines[start : start + len(networks)] == lines_of(networks)
    assert {"  total_steps: 64", "    id: SuperMarioBros-1-1-v0"} <= set(lines)
    assert max(len(line) for line in lines if not line.startswith("optimizers")) <= 80
    report = strict_json(run("--json", paths[1]).stdout)
    for name in ("config", "versions", "metrics"):
        assert report[name] == json.loads(json.dumps(second[name])) != {}

    report = strict_json(run("--json", "--diff", *paths).stdout)
    steps, *others = report["details"]
    assert steps == {"key": "step", "a": 32, "b": 64}
    assert {detail["key"].partition(".")[0] for detail in others} == {"metrics"}
    assert report["only_in_a"] == report["only_in_b"] == []
    assert list(report["networks"]) == list(first["models"])
    for name, network in report["networks"].items():
        before, after = first["models"][name], second["models"][name]
        for tensor in network["tensors"]:
            key = tensor["key"].removeprefix(f"{name}.")
            norm, _ = norms_of(before[key], after[key])
            assert tensor["norm"] == pytest.approx(norm, rel=1e-9)
        whole = [torch.cat([t.flatten() for t in model.values()]) for model in (before, after)]
        assert network["norm"] == pytest.approx(norms_of(whole[0], whole[1])[0], rel=1e-9)
    assert report["networks"]["phi"]["norm"] > 0
    assert max(map(len, run("--diff", *paths).stdout.splitlines()[2:])) <= 80


def test_one_pair_of_tensors_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Large files are compared in the memory of their largest tensors."""
    size = 4 << 20
    content = {str(i): torch.randn(size // 4) for i in range(8)}
    a, b = (
        read_checkpoint(str(save(tmp_path / f"{n}.pt", content, **options)))
        for n, options in (("a", {}), ("b", {"_use_new_zipfile_serialization": False}))
    )
    tracemalloc.start()
    compare(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size < 8 * size < (tmp_path / "a.pt").stat().st_size


def test_refusals_of_differences(tmp_path: Path) -> None:
    """One line that names the file or the number of files, and nothing on stdout."""
    good = save(tmp_path / "good.pt", {"w": torch.zeros(4)})
    for paths in ([good], [good] * 3):
        result = run("--diff", *paths)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            f"inspect_ckpt.py: error: --diff compares two files, not {len(paths)}; "
            "expected [--json] PATH [PATH ...], or [--json] --diff PATH PATH\n"
        )
    for paths in ([good, tmp_path / "no\n.pt"], [tmp_path / "no\n.pt", good]):
        assert_refused(run("--diff", *paths), f"{tmp_path}/no\\n.pt")
        assert_refused(run("--json", "--diff", *paths), f"{tmp_path}/no\\n.pt")


@pytest.mark.parametrize(
    "numbers", [((4_000_000,), (0,)), ((2**20, 2**20), (0, 0)), ((3, 2**60), (1, 0))]
)
def test_a_tensor_that_repeats_its_data_without_end(
    numbers: tuple[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    """It can be listed, but to go through it would take hours, or forever."""
    hostile = write_zip(tmp_path / "x.pt", tensor_pickle(0, *numbers), [("0", bytes(16))])
    good = save(tmp_path / "good.pt", {"w": torch.zeros(4)})
    assert run(hostile).returncode == 0
    for paths in ([hostile, good], [good, hostile]):
        result = run("--diff", *paths)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            f"inspect_ckpt.py: error: {hostile}: its tensors repeat its data more than 100 times; "
            "expected tensors with data of their own\n"
        )


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_that_changes_meanwhile(replace: bool, tmp_path: Path) -> None:
    """A training replaces its latest.pt: numbers of two files must not be mixed."""
    path, new = (save(tmp_path / n, {"w": torch.ones(4)}) for n in ("latest.pt", "new.pt"))
    checkpoint = read_checkpoint(str(path))
    if replace:
        new.replace(path)
    else:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"latest\.pt: changed while it was read; expected"):
        compare(checkpoint, checkpoint)
    path.unlink()
    with pytest.raises(UserError, match=r"latest\.pt: No such file or directory; expected"):
        compare(checkpoint, checkpoint)


# What is not a torch file


def test_no_arguments() -> None:
    """The usage is one line."""
    result = run()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("inspect_ckpt.py: error: ")
    assert "PATH" in result.stderr
    assert result.stderr.count("\n") == 1


def test_files_that_are_no_torch_files(tmp_path: Path) -> None:
    """Each is refused by one line that names the path and the reason."""
    torch.save(Phi().state_dict(), tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("epoch,loss\n1,0.5\n")
    (tmp_path / "truncated").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "line\nbreak").write_text("")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    torch.save([1, 2], tmp_path / "list")
    reasons = {
        "missing": "No such file or directory",
        "directory": "is a directory",
        "fifo": "is not a regular file",
        "empty": "empty file",
        "text": "not a torch file",
        "pickle": "not a torch file",
        "truncated": "damaged or truncated",
        "zip": "a zip file without the data.pkl of torch.save",
        "tensor": "holds neither a state_dict nor a model",
        "list": "holds neither a state_dict nor a model",
        "line\\nbreak": "empty file",
    }
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    result = run(*(tmp_path / name.replace("\\n", "\n") for name in reasons))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        f"inspect_ckpt.py: error: {tmp_path / name}: {reason}; {EXPECTED}"
        for name, reason in reasons.items()
    ]


def test_unreadable_kinds_of_tensors_are_named(tmp_path: Path) -> None:
    """What cannot be described is refused, not left out."""
    torch.save({"w": torch.zeros(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(UserError, match="not dense"):
        read_checkpoint(str(tmp_path / "sparse.pt"))
    torch.save({"w": torch.zeros(8, dtype=torch.uint8).view(torch.bits8)}, tmp_path / "bits.pt")
    with pytest.raises(UserError, match="type that is not supported"):
        read_checkpoint(str(tmp_path / "bits.pt"))


# Hostile files

COMMAND = short("touch CANARY")
CANARY_MODULE = "open('CANARY', 'w')\nclass Phi: pass\n"
EVIL_MODULE = b"cevil_module\nPhi\n"
CALLS = {
    "reduce": b"\x80\x02cposix\nsystem\n" + COMMAND + b"\x85R.",
    "reduce_os": b"\x80\x02cos\nsystem\n" + COMMAND + b"\x85R.",
    "reduce_protocol_4": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + COMMAND + b"\x85R.",
    "eval": b"\x80\x02cbuiltins\neval\n" + short("open('CANARY', 'w')") + b"\x85R.",
    "exec_py2": b"\x80\x02c__builtin__\nexec\n" + short("open('CANARY', 'w')") + b"\x85R.",
    "open": b"\x80\x02cbuiltins\nopen\n" + short("CANARY") + short("w") + b"\x86R.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n" + short("x") + b"\x86R.",
    "dotted": b"\x80\x04\x8c\x05posix\x8c\x0fsystem.__call__\x93" + COMMAND + b"\x85R.",
    "torch_load": b"\x80\x02ctorch\nload\n" + short("CANARY") + b"\x85R.",
    "newobj": b"\x80\x02" + EVIL_MODULE + b")\x81.",
    "newobj_ex": b"\x80\x04" + EVIL_MODULE + b")}\x92.",
    "inst": b"\x80\x02(" + COMMAND + b"iposix\nsystem\n.",
    "obj": b"\x80\x02(cposix\nsystem\n" + COMMAND + b"o.",
    "build": b"\x80\x02" + EVIL_MODULE + b")\x81}" + short("x") + b"K\x01sb.",
    "build_global": b"\x80\x02cos\nenviron\n}" + short("CANARY") + b"K\x01sb.",
    "setitem": b"\x80\x02cos\nenviron\n" + short("CANARY") + short("x") + b"s.",
    "appends": b"\x80\x02csys\npath\n(" + short("CANARY") + b"e.",
    "import": b"\x80\x02" + EVIL_MODULE + b".",
    "extension": b"\x80\x02\x82\x01.",
    "nested": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN"
    + COMMAND
    + b"\x85NtR.",
    "pid_module": b"\x80\x02(" + short("module") + b"cos\nsystem\nNNtQ" + COMMAND + b"\x85R.",
}
REFUSED_OPCODES = {"inst", "obj", "extension"}  # no protocol of torch.save writes them


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_nothing_is_called_or_imported(write: Any, tmp_path: Path) -> None:
    """Every way of a pickle to name and call something leaves no trace."""
    (tmp_path / "evil_module.py").write_text(CANARY_MODULE)
    paths = {name: write(tmp_path / f"{name}.pt", data) for name, data in CALLS.items()}
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run(*paths.values(), cwd=tmp_path, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == len(CALLS)
    for line, path in zip(result.stderr.splitlines(), paths.values(), strict=True):
        assert line.startswith(f"inspect_ckpt.py: error: {path}: ")
        assert line.endswith(EXPECTED)
    assert not (tmp_path / "CANARY").exists()
    read_to_the_end = [line for line in result.stderr.splitlines() if "holds neither" in line]
    assert len(read_to_the_end) == len(CALLS) - len(REFUSED_OPCODES)


@pytest.mark.parametrize("name", ["reduce", "eval", "newobj_ex", "inst", "obj", "build"])
def test_the_canaries_are_good_ones(name: str, tmp_path: Path) -> None:
    """An ordinary unpickler falls for the files of the test before."""
    (tmp_path / "evil_module.py").write_text(CANARY_MODULE)
    command = f"import pickle; pickle.loads({CALLS[name]!r})"
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=False, capture_output=True)
    assert (tmp_path / "CANARY").exists()


def test_a_hostile_object_beside_good_tensors_is_inert(tmp_path: Path) -> None:
    """A call is skipped, and the tensors beside it are listed."""
    call = b"cposix\nsystem\n" + short(f"touch {tmp_path}/CANARY") + b"\x85R"
    good = tensor_pickle(0, (4,), (1,))
    data = good[:-1] + short("evil") + call + b"s."
    path = write_zip(tmp_path / "mixed.pt", data, [("0", bytes(16))])
    assert run(path).stdout.splitlines() == [
        "w  torch.Size([4])",
        "total: 1 tensors, 4 elements, 16 bytes",
    ]
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    ("numbers", "accepted"),
    [
        ((0, (4,), (1,)), True),
        ((0, (2, 2), (1, 2)), True),
        ((0, (1000,), (0,)), True),
        ((0, (), ()), True),
        ((3, (), ()), True),
        ((4, (0,), (1,)), True),
        ((4, (), ()), False),
        ((0, (5,), (1,)), False),
        ((1, (4,), (1,)), False),
        ((0, (2, 2), (1, 3)), False),
        ((0, (-4,), (1,)), False),
        ((0, (4,), (-1,)), False),
        ((-1, (4,), (1,)), False),
        ((0, (2.0,), (1,)), False),
        ((0, (True,), (1,)), False),
        ((0, ("4",), (1,)), False),
        ((0, "4", "1"), False),
        ((0, 4, 1), False),
        ((0, None, None), False),
        ((0, (4,), (1, 1)), False),
        ((0, (1,) * 65, (1,) * 65), False),
        ((0, (10**18,), (1,)), False),
        ((0, (10**18,) * 3, (0,) * 3), False),
        ((0, (10**5000,), (0,)), False),
        ((0, (10**9,), (1,), 10**9), False),
        ((0, (4,), (1,), -4), False),
        ((0, (4,), (1,), 2**70), False),
        ((0, (4,), (1,), "4"), False),
    ],
)
def test_sizes_lie_inside_the_storage(
    numbers: tuple[Any, ...], accepted: bool, tmp_path: Path
) -> None:
    """Only a view that torch could make is accepted."""
    path = write_zip(tmp_path / "sizes.pt", tensor_pickle(*numbers), [("0", bytes(16))])
    if accepted:
        [(key, tensor)] = read_checkpoint(str(path)).networks[""]
        assert (key, tensor.shape, tensor.storage.nbytes) == ("w", numbers[1], 16)
    else:
        with pytest.raises(UserError, match=EXPECTED):
            read_checkpoint(str(path))


def test_a_storage_has_its_data_in_the_file(tmp_path: Path) -> None:
    """A missing, misnamed or short storage is refused."""
    data = tensor_pickle(0, (4,), (1,))
    for storages in ([], [("1", bytes(16))], [("0", bytes(15))]):
        with pytest.raises(UserError, match=EXPECTED):
            read_checkpoint(str(write_zip(tmp_path / "missing.pt", data, storages)))


def test_members_that_grow_or_lie_about_their_order(tmp_path: Path) -> None:
    """Nothing is decompressed, neither data nor the byte order, which is one of two."""
    path = tmp_path / "x.pt"
    for compressed, order, reason in (
        ("data/0", b"little", "a compressed zip file"),
        ("byteorder", b"little" * 1_000_000, "a compressed zip file"),
        ("", b"middle", "neither little nor big"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            members = {"data.pkl": tensor_pickle(0, (4,), (1,)), "data/0": bytes(16)}
            for name, content in {**members, "byteorder": order}.items():
                kind = zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
                archive.writestr(f"archive/{name}", content, compress_type=kind)
        with pytest.raises(UserError, match=reason):
            read_checkpoint(str(path))


def test_an_ordered_dict_of_python_2_has_its_items(tmp_path: Path) -> None:
    """It is called with them, where that of Python 3 gets them afterwards."""
    item = tensor_pickle(0, (4,), (1,)).removeprefix(b"\x80\x02}").removesuffix(b"s.")
    data = b"\x80\x02ccollections\nOrderedDict\n]](" + item + b"ea\x85R."
    path = write_zip(tmp_path / "x.pt", data, [("0", bytes(16))])
    expected = {"w": torch.zeros(4)}
    assert run(path).stdout.splitlines() == [*lines_of(expected), f"total: {totals_of(expected)}"]


def test_data_of_the_older_format_is_that_of_its_tensors(tmp_path: Path) -> None:
    """The keys of the data are texts, and those of the tensors, all of them."""
    data = tensor_pickle(0, (4,), (1,))
    path = write_legacy(tmp_path / "x.pt", data)
    head = path.read_bytes().partition(data)[0]
    for keys, reason in (
        ([], "larger than its data"),
        (["1"], "data of no tensor"),
        ([("0",)], "data of no tensor"),
        (["0"] * 3, "larger than its data"),
        (3, "damaged"),
    ):
        path.write_bytes(head + data + pickle.dumps(keys, protocol=2) + bytes(24))
        with pytest.raises(UserError, match=reason):
            read_checkpoint(str(path))
    path.write_bytes(head + data + pickle.dumps(["0"], protocol=2) + bytes(24))
    assert change_of(path, path) == Change(0.0, 0.0)
    view = data.replace(b"tQ", short("1") + b"K\x00K\x02\x87tQ")
    path.write_bytes(head + view + pickle.dumps(["0"], protocol=2) + bytes(24))
    with pytest.raises(UserError, match="without a proper storage"):
        read_checkpoint(str(path))


def repeated(opcode: bytes, count: int) -> bytes:
    """Return a pickle of many equal opcodes."""
    return b"\x80\x04" + opcode * count + b"."


EMPTY_MODULE_STATE = (
    b"(" + short("_parameters") + b"}" + short("_buffers") + b"}" + short("_modules")
)
CHECKPOINT = (
    b"\x80\x02}(" + short("format") + b"K\x01" + short("step") + b"K\x01" + short("models") + b"}"
)
LONG_TEXT = b"X" + struct.pack("<I", MAX_DETAILS) + b"k" * MAX_DETAILS
BOMBS = {
    "recursive_dict": b"\x80\x02}q\x00" + short("a") + b"h\x00s.",
    "recursive_module": b"\x80\x02c__main__\nPhi\n)\x81q\x00}" + EMPTY_MODULE_STATE
    + b"}" + short("me") + b"h\x00sub.",
    "forked_module": b"\x80\x02c__main__\nPhi\n)\x81q\x00}" + EMPTY_MODULE_STATE
    + b"}(" + short("me") + b"h\x00" + short("too") + b"h\x00uub.",
    "billion_laughs": b"\x80\x02}q\x00" + b"".join(
        b"}q%c(" % i + short("a") + b"h%c" % (i - 1) + short("b") + b"h%c" % (i - 1) + b"u"
        for i in range(1, 50)
    ) + b".",
    "deep_lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep_tuple_as_key": b"\x80\x02})" + b"\x85" * 500_000 + b"Ns.",
    "deep_tuple_in_set": b"\x80\x02cbuiltins\nset\n])" + b"\x85" * 500_000 + b"a\x85R.",
    "deep_tuple_in_frozenset": b"\x80\x04()" + b"\x85" * 500_000 + b"\x91.",
    "memo_index": b"\x80\x02Nr\xff\xff\xff\xff.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "frame_overflow": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "binbytes8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"N.",
    "binunicode8": b"\x80\x04\x8d" + b"\xff" * 8 + b"N.",
    "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"N.",
    "long4": b"\x80\x02\x8b\xff\xff\xff\x7fN.",
    "long4_negative": b"\x80\x02\x8b\xff\xff\xff\xffN.",
    "protocol": b"\x80\xffN.",
    "no_stop": b"\x80\x02N",
    "empty": b"",
    "stack_underflow": b"\x80\x02tR.",
    "sets": repeated(b"\x8f", 100_000),
    "storage_of_nothing": b"\x80\x02NQ.",
    "odd_storage": b"\x80\x02(" + short("storage") + b"NNNNtQ.",
    "reduce_of_an_int": b"\x80\x02K\x01)R.",
    "long_key": b"\x80\x02}X" + struct.pack("<I", 1 << 20) + b"k" * (1 << 20) + b"}s.",
    "huge_step": b"\x80\x02}(" + short("format") + b"K\x01" + short("step")
    + b"\x8a\xff" + b"\x7f" * 255 + short("models") + b"}u.",
    "config_that_contains_itself": CHECKPOINT + short("config") + b"}q\x00"
    + short("me") + b"h\x00su.",
    "versions_that_contain_themselves": CHECKPOINT + short("versions") + b"]q\x00(h\x00h\x00eu.",
    "deep_config": CHECKPOINT + short("config") + b"]" * 200_000 + b"a" * 199_999 + b"u.",
    "deep_tuple_as_metrics": CHECKPOINT + short("metrics") + b")" + b"\x85" * 500_000 + b"u.",
    "laughing_metrics": CHECKPOINT + short("metrics") + b"]q\x00" + b"".join(
        b"0](" + b"h%c" % (i - 1) * 9 + b"eq%c" % i for i in range(1, 50)
    ) + b"u.",
    "long_text": CHECKPOINT + short("metrics") + LONG_TEXT + b"u.",
    "long_name": CHECKPOINT + short("config") + b"}" + LONG_TEXT + b"Nsu.",
    "long_class": CHECKPOINT + short("config") + b"c" + b"k" * MAX_DETAILS + b"\nx\nu.",
    "repeated_text": CHECKPOINT + short("config") + b"](" + short("k" * 9999) + b"q\x00"
    + b"h\x00" * 100_000 + b"eu.",
    "too_big": b"\x80\x02B" + struct.pack("<I", MAX_BYTES) + bytes(MAX_BYTES) + b".",
}  # fmt: skip
HARMLESS = {"deep_tuple_as_key"}  # such a key cannot name a tensor, so the dict is empty


def test_bombs_end_in_one_line_and_little_memory(tmp_path: Path) -> None:
    """All bombs, one after the other, in one process of 256 MiB."""

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))

    paths = {name: write_zip(tmp_path / f"{name}.pt", data) for name, data in BOMBS.items()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * (32 << 20) + b"N.")
    paths["zip_bomb"] = tmp_path / "bomb.pt"
    assert paths["zip_bomb"].stat().st_size < 1 << 18
    result = run(*paths.values(), preexec_fn=limit_memory)
    assert result.returncode == 2
    assert result.stdout == "".join(
        f"{paths[name]}:\ntotal: 0 tensors, 0 elements, 0 bytes\n" for name in HARMLESS
    )
    refused = [path for name, path in paths.items() if name not in HARMLESS]
    for line, path in zip(result.stderr.splitlines(), refused, strict=True):
        assert line.startswith(f"inspect_ckpt.py: error: {path}: ")
        assert line.endswith(EXPECTED)
    for name in HARMLESS:  # the others are refused before it matters how they would be printed
        accepted = run("--json", paths[name], preexec_fn=limit_memory)
        assert strict_json(accepted.stdout)["total"]["count"] == 0


def test_reasons_of_the_common_refusals(tmp_path: Path) -> None:
    """The line says what is wrong, where it is not plain damage."""
    reasons = {
        "recursive_module": "contains itself",
        "forked_module": "contains itself",
        "billion_laughs": "more than 100000 entries",
        "long_key": "a key is longer than 500 characters",
        "too_big": "more than 8 MiB",
        "config_that_contains_itself": "contains itself",
        "versions_that_contain_themselves": "contains itself",
        "deep_config": "nested more than 64 levels",
        "laughing_metrics": "more than 262144 characters",
        "long_text": "more than 262144 characters",
        "long_name": "more than 262144 characters",
        "long_class": "more than 262144 characters",
        "repeated_text": "more than 262144 characters",
    }
    for name, reason in reasons.items():
        path = write_zip(tmp_path / f"{name}.pt", BOMBS[name])
        with pytest.raises(UserError, match=reason):
            read_checkpoint(str(path))


# Damaged files


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Write a small model in both formats."""
    contents = []
    for zip_format in (True, False):
        buffer = io.BytesIO()
        torch.save(nn.Linear(3, 2), buffer, _use_new_zipfile_serialization=zip_format)
        contents.append(buffer.getvalue())
    return contents


def outcome(path: Path, content: bytes) -> Checkpoint | None:
    """Return what is read, or None after a proper refusal; let everything else pass."""
    path.write_bytes(content)
    try:
        return read_checkpoint(str(path))
    except UserError as error:
        refusal = str(error)
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal
    return None


def test_truncated_files_are_refused(images: list[bytes], tmp_path: Path) -> None:
    """No prefix of a file passes for the file."""
    for image in images:
        assert outcome(tmp_path / "x.pt", image) is not None
        for length in {*range(0, len(image), max(1, len(image) // 150)), len(image) - 1}:
            assert outcome(tmp_path / "x.pt", image[:length]) is None


def test_flipped_bits_are_read_or_refused(images: list[bytes], tmp_path: Path) -> None:
    """A flipped bit gives a result or a refusal and nothing else."""
    for image in images:
        refused = 0
        for i in range(100):
            flipped = bytearray(image)
            flipped[i * len(image) // 100] ^= 1 << (i % 8)
            refused += outcome(tmp_path / "x.pt", bytes(flipped)) is None
        assert 0 < refused < 100


def test_flipped_bits_behind_a_good_checksum(images: list[bytes], tmp_path: Path) -> None:
    """The same for each byte of a pickle whose checksum matches."""
    with zipfile.ZipFile(io.BytesIO(images[0])) as archive:
        data = archive.read("archive/data.pkl")
    storages = [("0", bytes(24)), ("1", bytes(8))]
    refused = 0
    for position in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        path = write_zip(tmp_path / "x.pt", bytes(flipped), storages)
        refused += outcome(path, path.read_bytes()) is None
    assert 0 < refused < len(data) / 5
