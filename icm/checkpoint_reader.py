"""What a torch file holds, read without running or importing anything that the file names.

A torch file is a pickle, and a pickle is a program: `torch.load` of a whole model runs whatever
its author put in. Here the program is only read as a description: a class or a function becomes
its name, a call of it an object with that name, and a tensor its shape, its type and its place in
a storage. The data of a tensor is read only by `Data.read`. So any file can be inspected, even of
a model whose class is not on this machine.
"""

import io
import math
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

from icm.errors import UserError

MAX_BYTES = 8 << 20
"""How much of a file is read: 8 MiB describe some 30 000 tensors, and a hostile pickle of that
size stays below 1 GiB of memory."""
MAX_ENTRIES = 100_000
MAX_KEY_LENGTH = 500
MAX_DEPTH = 64
MAX_DIMENSIONS = 64
MAX_DETAILS = 1 << 18
"""Most values and characters in a checkpoint's details; a real one has some 5000."""
_INT64 = 1 << 63  # torch keeps every size, stride and count below this

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_LENGTHS = 26  # where a member's header has the lengths of its last two fields

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",  # newer types have no storage class: their tensors name the type
}
_ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The memory that one or several tensors of a file view."""

    key: str
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of a file, without its data. `offset` and `stride` count elements."""

    shape: tuple[int, ...]
    dtype: str
    storage: Storage
    offset: int
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def item_size(self) -> int:
        """The bytes of one element."""
        return _ITEM_SIZES[self.dtype]

    @property
    def span(self) -> int:
        """The bytes of its storage from its first element to the end of its last."""
        if not self.numel:
            return 0
        steps = zip(self.shape, self.stride, strict=True)
        return (1 + sum((n - 1) * step for n, step in steps)) * self.item_size


type Entries = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Data:
    """The data of a file's storages: where each begins, in bytes, and the byte order."""

    path: str
    status: os.stat_result
    positions: dict[str, int]
    is_big_endian: bool

    def read(self, tensor: Tensor) -> bytes:
        """Return the `tensor.span` bytes that begin with the first element of `tensor`.

        Raises `UserError` if the file is no longer the one that was described.
        """
        with _refusing(self.path), open(self.path, "rb") as file:
            position = self.positions[tensor.storage.key]
            file.seek(position + tensor.offset * tensor.item_size)
            data = file.read(tensor.span)
            # A training replaces its latest.pt: this must still be the file described.
            if _identity(os.fstat(file.fileno())) != _identity(self.status):
                raise UserError("changed while it was read")
        return data


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds.

    `networks` maps a name to the tensors of that network. A file that is no checkpoint of this
    project but a state_dict or a model is a single network without a name; it has no `details` and
    no `optimizers`. `details` are its format, step, versions, metrics and config, if present:
    dicts, lists, strings and numbers, but with any content, since a file may lie.
    """

    data: Data
    networks: dict[str, Entries]
    details: dict[str, Any] = field(default_factory=dict)
    optimizers: Entries | None = None

    @property
    def entries(self) -> Entries:
        """The tensors of all networks."""
        return [entry for entries in self.networks.values() for entry in entries]

    @property
    def seed(self) -> Any:
        """The seed of the configuration, None if there is none."""
        match self.details:
            case {"config": {"seed": seed}}:
                return seed
        return None


def read_checkpoint(path: str) -> Checkpoint:
    """Return what the file at `path` holds: a state_dict, a whole model or a checkpoint.

    Raises `UserError`, with one line that names the path, for anything else.
    """
    with _refusing(path):
        return _checkpoint(*_read(path))


@contextmanager
def _refusing(path: str) -> Generator[None]:
    """Turn errors while the file is read into a `UserError` that names it."""
    try:
        yield
        return
    except UserError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or "cannot be read"
    except Exception:  # a damaged file can fail anywhere, a hostile one wherever it likes
        reason = "damaged or truncated"
    raise UserError(f"{printable(path)}: {reason}; expected a file written by torch.save")


def printable(text: str) -> str:
    """Return `text` with escapes for what would break a line or steer a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _checkpoint(contents: Any, data: Data) -> Checkpoint:
    """Return the tensors of a file's `contents`, grouped by network, and its details."""
    match contents:
        case {"format": int(version), "step": int(step), "models": dict(models), **others}:
            if max(abs(version), abs(step)) >= _INT64:
                raise UserError("a checkpoint with an impossible format or step")
            networks: dict[str, Entries] = {name: [] for name in models}
            for key, tensor in _entries(models):
                networks.setdefault(key.partition(".")[0], []).append((key, tensor))
            details: dict[str, object] = {"format": version, "step": step}
            details |= {k: others[k] for k in ("versions", "metrics", "config") if k in others}
            return Checkpoint(
                data,
                networks,
                details=_plain(details),
                optimizers=_entries(others.get("optimizers")),
            )
        case dict() | _Object(state={"_parameters": _}):
            return Checkpoint(data, {"": _entries(contents)})
    raise UserError("holds neither a state_dict nor a model")


def _plain(root: object) -> Any:
    """Copy `root` as dicts, lists, strings and numbers; anything else becomes its name."""
    total = 0

    def copy(node: object, key: str, depth: int) -> Any:
        # As in `_entries`: few bytes can name one long text, or one long list, many times.
        nonlocal total
        total += 1 + len(key) + (len(node) if isinstance(node, str) else 0)
        if total > MAX_DETAILS:
            raise UserError(f"config, metrics and versions of more than {MAX_DETAILS} characters")
        if depth > MAX_DEPTH:
            raise UserError(f"nested more than {MAX_DEPTH} levels deep, or contains itself")
        match node:
            case None | bool() | float() | str():
                return node
            case int():
                is_short = abs(node) < 2 * _INT64
                return node if is_short else f"<an integer of {node.bit_length()} bits>"
            case dict():
                return {k: copy(v, f"{key}.{k}", depth + 1) for k, v in node.items()}
            case list() | tuple():
                return [copy(item, key, depth + 1) for item in node]
            case _Object(cls=name) | _Global(name=name):
                return copy(f"<{name}>", key, depth)
        return f"<{type(node).__name__.lower()}>"

    return copy(root, "", 0)


def _entries(root: object) -> Entries:
    """Return the tensors below `root` by key, in the order of `Module.state_dict`."""
    found: Entries = []
    pending = [("", root, 0)]
    visited = 0
    while pending:
        key, node, depth = pending.pop()
        if isinstance(node, Tensor):
            found.append((key, node))
            continue
        children = list(islice(_children(node), MAX_ENTRIES + 1 - visited))
        visited += len(children)
        # A file of a few bytes can nest one object in itself, or nest so many references to
        # one object that they name more entries than any memory holds.
        if visited > MAX_ENTRIES:
            raise UserError(f"holds more than {MAX_ENTRIES} entries")
        if depth > MAX_DEPTH:
            raise UserError(f"nested more than {MAX_DEPTH} levels deep, or contains itself")
        for name, child in reversed(children):
            child_key = f"{key}.{name}" if key else name
            if len(child_key) > MAX_KEY_LENGTH:
                raise UserError(f"a key is longer than {MAX_KEY_LENGTH} characters")
            pending.append((child_key, child, depth + 1))
    return found


def _children(node: Any) -> Iterator[tuple[str, object]]:
    """Yield what a dict or a module holds, by name; nothing for any other object."""
    match node:
        case dict():
            yield from node.items()
        case _Object(
            state={"_parameters": parameters, "_buffers": buffers, "_modules": modules, **state}
        ):
            yield from parameters.items()
            not_saved: Any = state.get("_non_persistent_buffers_set", [])
            yield from ((name, buffer) for name, buffer in buffers.items() if name not in not_saved)
            yield from modules.items()
        case _Object(cls=name) if name.startswith("torch._utils._rebuild"):
            raise UserError("holds a tensor that is not dense (quantized, sparse or nested)")


def _read(path: str) -> tuple[object, Data]:
    """Return the contents of the file: plain containers, tensors and `_Object`s."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise UserError("is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise UserError("is not a regular file")
    if not status.st_size:
        raise UserError("empty file")
    with _LimitedFile(path) as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        read = _read_zip if is_zip else _read_legacy
        contents, positions, is_big_endian = read(file, status.st_size)
    return contents, Data(path, status, positions, is_big_endian)


class _LimitedFile(io.FileIO):
    """A file that refuses to read more than `MAX_BYTES`, whatever sizes its own bytes declare."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.left = MAX_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        limit = self.left + 1
        data = super().read(limit if size is None or size < 0 else min(size, limit)) or b""
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"more than {MAX_BYTES >> 20} MiB besides the data of the tensors")
        return data


def _read_zip(file: _LimitedFile, size: int) -> tuple[object, dict[str, int], bool]:
    """Read the format of torch since 1.6: contents, positions of data, whether big endian."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("a zip file without the data.pkl of torch.save")
        unpickler = _Unpickler(io.BytesIO(archive.read(_stored(archive, pickles[0]))))
        contents = unpickler.load()
        folder = pickles[0].removesuffix(".pkl")
        positions = {}
        for key, nbytes in unpickler.storages.items():
            member = _stored(archive, f"{folder}/{key}")
            file.seek(member.header_offset + _ZIP_LENGTHS)
            position = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            if member.compress_size < nbytes or position + nbytes > size:
                raise UserError("a tensor is larger than its data in the file")
            positions[key] = position
        record = f"{folder.removesuffix('data')}byteorder"  # since 2.1
        byteorder = archive.read(_stored(archive, record)) if record in names else b"little"
    if byteorder not in (b"little", b"big"):
        raise UserError("a byte order that is neither little nor big")
    return contents, positions, byteorder == b"big"


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return a member, after checking that reading cannot inflate it."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise UserError("a compressed zip file, which torch.save does not write")
    return member


def _read_legacy(file: _LimitedFile, size: int) -> tuple[object, dict[str, int], bool]:
    """As `_read_zip`, for the older format: pickles, then the bare data."""
    stream = io.BytesIO(file.read(file.left))
    try:
        magic = _Unpickler(stream).load()
    except Exception:
        magic = None
    if magic != _LEGACY_MAGIC:
        raise UserError("not a torch file")
    _protocol_version = _Unpickler(stream).load()
    _system = _Unpickler(stream).load()
    unpickler = _Unpickler(stream)
    contents = unpickler.load()
    keys: Any = _Unpickler(stream).load()
    positions = {}
    end = stream.tell()
    for key in keys:
        if not isinstance(key, str) or key not in unpickler.storages:
            raise UserError("data of no tensor")
        positions[key] = end + 8  # after the number of elements
        end = positions[key] + unpickler.storages[key]
    if end > size or len(positions) < len(unpickler.storages):
        raise UserError("truncated: a tensor is larger than its data in the file")
    return contents, positions, False  # whatever machine wrote it


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or a function that a file names."""

    name: str


@dataclass(slots=True, eq=False)
class _Object:
    """What a call of `cls` would have made; nothing was called."""

    cls: str
    state: Any = None


def _dtype(cls: _Global) -> str:
    """Return the element type of the storage class or dtype `cls`."""
    name = cls.name.rpartition(".")[2]
    dtype = _STORAGES.get(name, name)
    if dtype not in _ITEM_SIZES:
        raise UserError("a tensor of a type that is not supported")
    return dtype


def _view(storage: Storage, dtype: str, offset: Any, size: Any, stride: Any) -> Tensor:
    """Return the tensor, after checking that it lies inside its storage."""
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise UserError("a tensor with an impossible number of dimensions")
    if not all(type(value) is int and 0 <= value < _INT64 for value in (offset, *size, *stride)):
        raise UserError("a tensor with an impossible size, stride or offset")
    tensor = Tensor(tuple(size), dtype, storage, offset, tuple(stride))
    end = offset * tensor.item_size + tensor.span
    if tensor.numel >= _INT64 or (tensor.numel and end > storage.nbytes):
        raise UserError("a tensor reaches outside its storage")
    return tensor


def _tensor_v2(
    storage: Storage, offset: object, size: object, stride: object, *_: object
) -> Tensor:
    return _view(storage, storage.dtype, offset, size, stride)


def _tensor_v3(
    storage: Storage,
    offset: object,
    size: object,
    stride: object,
    _requires_grad: object,
    _hooks: object,
    dtype: _Global,
    *_: object,
) -> Tensor:
    return _view(storage, _dtype(dtype), offset, size, stride)


def _tensor_from_type(function: _Global, _type: object, args: Any, _state: object) -> object:
    return _call(function, args)


def _parameter(data: object, *_: object) -> object:
    return data


def _ordered_dict(items: object = ()) -> dict[str, object]:
    # Python 2 gives it its items; keys become strings as in `_Unpickler._update`
    pairs = [item for item in items if isinstance(item, list)] if isinstance(items, list) else []
    return {str(key): value for key, value in pairs if isinstance(key, str | int)}


def _set(items: object) -> object:
    return items  # as a list: nothing is hashed, and a file cannot ask for copies of a long list


# All that a file can make; each is a function of this module or makes a plain container.
_REBUILD: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "__builtin__.set": _set,
    "builtins.set": _set,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_from_type,
}


def _call(function: _Global, args: Any) -> object:
    """Return what stands for a call of `function`."""
    rebuild = _REBUILD.get(function.name)
    return rebuild(*args) if rebuild else _Object(function.name)


# What torch.save writes and nothing more. BYTEARRAY8 is left out: it allocates what it declares.
_OPCODES = (
    pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.POP + pickle.POP_MARK
    + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BINFLOAT
    + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1 + pickle.LONG4
    + pickle.BINSTRING + pickle.SHORT_BINSTRING
    + pickle.BINUNICODE + pickle.SHORT_BINUNICODE + pickle.BINUNICODE8
    + pickle.BINBYTES + pickle.SHORT_BINBYTES + pickle.BINBYTES8
    + pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
    + pickle.EMPTY_LIST + pickle.EMPTY_DICT
    + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET
    + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.BINPERSID
)  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """An unpickler with nothing to call: it finds only `_Global`s.

    It extends the one in Python: the one in C allocates 64 GiB for a memo index that a file can
    name in five bytes, and cannot be kept from calling and hashing.
    """

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: pickle._Unpickler.dispatch[code] for code in _OPCODES
    }

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}
        """The bytes of each storage, as the file declares them."""

    def find_class(self, module: str, name: str) -> _Global:
        """Return the name; nothing is imported."""
        return _Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Global | Storage:
        """Return the storage, or the class of a module, that `pid` describes."""
        match pid:
            case ("module", _Global() as cls, _, _):
                return cls
            case ("storage", _Global() as cls, str(key), _, int(numel), *view) if (
                0 <= numel < _INT64 and not any(view)  # a view of another storage: none since 0.4
            ):
                dtype = _dtype(cls)
                storage = Storage(key, dtype, numel * _ITEM_SIZES[dtype])
                self.storages[key] = max(storage.nbytes, self.storages.get(key, 0))
                return storage
        raise UserError("a tensor without a proper storage")

    def load_reduce(self) -> None:
        """Describe a call: REDUCE of a function and NEWOBJ of a class come to the same here."""
        args = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], args)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_newobj_ex(self) -> None:
        """Describe a call with keyword arguments."""
        del self.stack[-2:]
        self.stack[-1] = _Object(self.stack[-1].name)

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def load_build(self) -> None:
        """Give an object its state, which for a class with slots is the first of two."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Object):
            target.state = state[0] if isinstance(state, tuple) else state

    dispatch[pickle.BUILD[0]] = load_build

    def load_append(self) -> None:
        """Append one item to a list."""
        self._extend([self.stack.pop()])

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        """Append items to a list, or add them to a set."""
        self._extend(self.pop_mark())

    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.ADDITEMS[0]] = load_appends

    def load_frozenset(self) -> None:
        """Make a set, which here is a list."""
        self.append(self.pop_mark())

    dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.EMPTY_LIST[0]]
    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_setitem(self) -> None:
        """Set one item of a dict."""
        value = self.stack.pop()
        key = self.stack.pop()
        self._update([key, value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        """Set items of a dict."""
        self._update(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def _extend(self, items: list[object]) -> None:
        # The items of any other class, here an _Object, name no tensors.
        if isinstance(target := self.stack[-1], list):
            target.extend(items)

    def _update(self, items: list[object]) -> None:
        # Only strings and numbers name tensors. All become strings because the file chooses what
        # is hashed: a deeply nested tuple overflows the C stack, numbers can all collide.
        if isinstance(target := self.stack[-1], dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, str | int):
                    target[str(key)] = value
