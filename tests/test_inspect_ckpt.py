"""Files of torch.save, good and bad, through `scripts/inspect_ckpt.py` and the reader below it."""

import io
import os
import pickle
import re
import resource
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from icm.checkpoint_reader import MAX_BYTES, Checkpoint, read_checkpoint
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
        "config": {"env": {"id": "SuperMarioBros-v0"}, "lr": 1e-4, "shape": [3, 42, 42]},
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
    """Format and step, the networks, the totals, and the optimizer as a count."""
    path, checkpoint = project_checkpoint
    models = checkpoint["models"]
    everything = {f"{n}.{key}": t for n, model in models.items() for key, t in model.items()}
    states = checkpoint["optimizers"]["adam"]["state"].items()
    optimizer = {f"{i}.{key}": t for i, state in states for key, t in state.items()}
    assert len(optimizer) == 3 * len(everything)
    assert run(path).stdout.splitlines() == [
        "format: 1",
        "step: 1234",
        *lines_of(everything),
        *(f"{name}: {totals_of(model)}" for name, model in models.items()),
        f"total: {totals_of(everything)}",
        f"optimizers (not listed, not in the total): {totals_of(optimizer)}",
    ]
    assert "phi.conv1.weight  torch.Size([32, 3, 3, 3])" in run(path).stdout


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
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "k.pt")]
    closed = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (closed.returncode, closed.stderr) == (1, "")


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


def repeated(opcode: bytes, count: int) -> bytes:
    """Return a pickle of many equal opcodes."""
    return b"\x80\x04" + opcode * count + b"."


EMPTY_MODULE_STATE = (
    b"(" + short("_parameters") + b"}" + short("_buffers") + b"}" + short("_modules")
)
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
    assert result.stdout.splitlines() == [
        line
        for name in HARMLESS
        for line in (f"{paths[name]}:", "total: 0 tensors, 0 elements, 0 bytes")
    ]
    refused = [path for name, path in paths.items() if name not in HARMLESS]
    for line, path in zip(result.stderr.splitlines(), refused, strict=True):
        assert line.startswith(f"inspect_ckpt.py: error: {path}: ")
        assert line.endswith(EXPECTED)


def test_reasons_of_the_common_refusals(tmp_path: Path) -> None:
    """The line says what is wrong, where it is not plain damage."""
    reasons = {
        "recursive_module": "contains itself",
        "forked_module": "contains itself",
        "billion_laughs": "more than 100000 entries",
        "long_key": "a key is longer than 500 characters",
        "too_big": "more than 8 MiB",
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
