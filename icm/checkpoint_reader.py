"""What a torch file holds, read without running or importing anything that the file names.

A torch file is a pickle, and a pickle is a program: `torch.load` of a whole model runs whatever
its author put in. Here the program is read as a description only. A class or a function is its
name, a call of it is an object that remembers the name, and a tensor is its shape and the size
of its storage; the data of the tensors is never read. So any file can be looked at, also one of
a model whose class is not on this machine.
"""

import io
import math
import os
import pickle
import stat
import zipfile
from collections.abc import Callable, Iterator
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
_INT64 = 1 << 63  # torch keeps every size, stride and count below this

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_ITEM_SIZES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "UntypedStorage": 1,
    # Newer types have no storage class: their tensors name an UntypedStorage and the type.
    "complex32": 4,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
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
    item_size: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of a file, without its data."""

    shape: tuple[int, ...]
    storage: Storage

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


type Entries = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a file.

    `networks` maps a name to the tensors of that network. A file that is no checkpoint of this
    project, so one state_dict or one model, is a single network without a name; it has no
    `header` (format and step) and no `optimizers`.
    """

    networks: dict[str, Entries]
    header: dict[str, int] = field(default_factory=dict)
    optimizers: Entries | None = None


def read_checkpoint(path: str) -> Checkpoint:
    """Return what the file at `path` holds: a state_dict, a whole model or a checkpoint.

    Raises `UserError`, with one line that names the path, for anything else.
    """
    try:
        return _checkpoint(_read(path))
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


def _checkpoint(contents: Any) -> Checkpoint:
    """Return the tensors of a file's `contents`, grouped by network."""
    match contents:
        case {"format": int(version), "step": int(step), "models": dict(models), **others}:
            if max(abs(version), abs(step)) >= _INT64:
                raise UserError("a checkpoint with an impossible format or step")
            networks: dict[str, Entries] = {name: [] for name in models}
            for key, tensor in _entries(models):
                networks.setdefault(key.partition(".")[0], []).append((key, tensor))
            return Checkpoint(
                networks=networks,
                header={"format": version, "step": step},
                optimizers=_entries(others.get("optimizers")),
            )
        case dict() | _Object(state={"_parameters": _}):
            return Checkpoint(networks={"": _entries(contents)})
    raise UserError("holds neither a state_dict nor a model")


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


def _read(path: str) -> object:
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
        return (_read_zip if is_zip else _read_legacy)(file, status.st_size)


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


def _read_zip(file: _LimitedFile, size: int) -> object:
    """Return the contents of a file in the format that torch writes since 1.6."""
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("a zip file without the data.pkl of torch.save")
        if archive.getinfo(pickles[0]).compress_type != zipfile.ZIP_STORED:
            raise UserError("a compressed zip file, which torch.save does not write")
        unpickler = _Unpickler(io.BytesIO(archive.read(pickles[0])))
        contents = unpickler.load()
        folder = pickles[0].removesuffix(".pkl")
        for key, nbytes in unpickler.storages.items():
            member = archive.getinfo(f"{folder}/{key}")
            if member.compress_size < nbytes or member.header_offset + nbytes > size:
                raise UserError("a tensor is larger than its data in the file")
    return contents


def _read_legacy(file: _LimitedFile, size: int) -> object:
    """Return the contents of a file in the older format: pickles, then the bare data."""
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
    _storage_keys = _Unpickler(stream).load()
    if stream.tell() + sum(8 + nbytes for nbytes in unpickler.storages.values()) > size:
        raise UserError("truncated: a tensor is larger than its data in the file")
    return contents


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or a function that a file names."""

    name: str


@dataclass(slots=True, eq=False)
class _Object:
    """What a file would have made by a call of `cls`; nothing was called."""

    cls: str
    state: Any = None


def _item_size(cls: _Global) -> int:
    """Return the bytes of one element of the storage class or dtype `cls`."""
    try:
        return _ITEM_SIZES[cls.name.rpartition(".")[2]]
    except KeyError:
        raise UserError("a tensor of a type that is not supported") from None


def _view(storage: Storage, item_size: int, offset: Any, size: Any, stride: Any) -> Tensor:
    """Return the tensor, once its elements are known to lie inside its storage."""
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise UserError("a tensor with an impossible number of dimensions")
    if not all(type(value) is int and 0 <= value < _INT64 for value in (offset, *size, *stride)):
        raise UserError("a tensor with an impossible size, stride or offset")
    tensor = Tensor(tuple(size), storage)
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if tensor.numel >= _INT64 or (tensor.numel and end * item_size > storage.nbytes):
        raise UserError("a tensor reaches outside its storage")
    return tensor


def _tensor_v2(
    storage: Storage, offset: object, size: object, stride: object, *_: object
) -> Tensor:
    return _view(storage, storage.item_size, offset, size, stride)


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
    return _view(storage, _item_size(dtype), offset, size, stride)


def _tensor_from_type(function: _Global, _type: object, args: Any, _state: object) -> object:
    return _call(function, args)


def _parameter(data: object, *_: object) -> object:
    return data


def _ordered_dict() -> dict[str, object]:
    return {}


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
    """An unpickler that has nothing to call: `_Global`s are all it finds.

    It is the one in Python because the one in C takes 64 GiB for a memo index that a file can
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
        """The bytes of each storage, as far as the file declares them."""

    def find_class(self, module: str, name: str) -> _Global:
        """Return the name; nothing is imported."""
        return _Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Global | Storage:
        """Return the storage, or the class of a module, that `pid` describes."""
        match pid:
            case ("module", _Global() as cls, _, _):
                return cls
            case ("storage", _Global() as cls, str(key), _, int(numel), *_) if 0 <= numel < _INT64:
                item_size = _item_size(cls)
                storage = Storage(key, item_size, numel * item_size)
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
        # The items of a class of its own, so of an _Object, name no tensors.
        if isinstance(target := self.stack[-1], list):
            target.extend(items)

    def _update(self, items: list[object]) -> None:
        # Only strings and numbers name tensors. All become strings because the file chooses what
        # is hashed: a deeply nested tuple overflows the C stack, numbers can all collide.
        if isinstance(target := self.stack[-1], dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, str | int):
                    target[str(key)] = value
