"""How two torch files differ: their details, their tensors, and how far these moved."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from icm.checkpoint_reader import Checkpoint, Data, Entries, Tensor, printable
from icm.errors import UserError

MAX_PASSES = 100
"""How often tensors may go through their file's data: few bytes can name huge or many views."""
CHUNK = 1 << 16  # elements converted at a time

_CODES = {  # of NumPy, for one element or for each part of a complex one
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "bfloat16": "u2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint64": "u8",
    "uint32": "u4",
    "uint16": "u2",
    "uint8": "u1",
    "bool": "u1",
    "complex128": "f8",
    "complex64": "f4",
    "complex32": "f2",
}

type Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Change:
    """How far the elements of one or several tensors moved from `a` to `b`."""

    moved: float
    """The sum of the squares of b - a."""
    before: float
    """The sum of the squares of a."""

    @property
    def norm(self) -> float:
        """‖b - a‖."""
        return math.sqrt(self.moved)

    @property
    def relative(self) -> float:
        """‖b - a‖ / ‖a‖; where a is zero: 0 if b is zero too, otherwise inf."""
        if self.before:
            return self.norm / math.sqrt(self.before)
        return math.inf if self.moved else 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor that both files have.

    `change` is None if it is not defined: the shapes differ, only one of the two is complex, or a
    dtype cannot be converted here (float8, float4).
    """

    key: str
    a: Tensor
    b: Tensor
    change: Change | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between the files `a` and `b`.

    Attributes:
        details: the values that differ, by dotted name; a file that lacks one has no entry.
        only: the tensors that the other file lacks.
        networks: the tensors that both have, by their network in `a`.
    """

    details: dict[str, dict[Side, Any]]
    only: dict[Side, Entries]
    networks: dict[str, list[Pair]]


def compare(a: Checkpoint, b: Checkpoint) -> Difference:
    """Return how `b` differs from `a`; one pair of tensors is in memory at a time.

    Raises `UserError` if a file changes meanwhile, or if its tensors repeat its data too often to
    ever finish.
    """
    ours, theirs = dict(a.entries), dict(b.entries)
    for data, tensors in ((a.data, ours.values()), (b.data, theirs.values())):
        passed = sum(tensor.numel * tensor.item_size + tensor.span for tensor in tensors)
        if passed > MAX_PASSES * data.status.st_size:
            raise UserError(
                f"{printable(data.path)}: its tensors repeat its data more than {MAX_PASSES} "
                "times; expected tensors with data of their own"
            )
    return Difference(
        details=dict(_details("", {"a": a.details, "b": b.details})),
        only={
            "a": [(key, tensor) for key, tensor in ours.items() if key not in theirs],
            "b": [(key, tensor) for key, tensor in theirs.items() if key not in ours],
        },
        networks={
            name: [
                Pair(key, tensor, theirs[key], _change(a.data, b.data, tensor, theirs[key]))
                for key, tensor in dict(entries).items()
                if key in theirs
            ]
            for name, entries in a.networks.items()
        },
    )


def together(pairs: Iterable[Pair]) -> Change | None:
    """Return the change of several tensors as if they were one, None if none can be compared."""
    changes = [pair.change for pair in pairs if pair.change is not None]
    if not changes:
        return None
    return Change(sum(change.moved for change in changes), sum(change.before for change in changes))


def _details(name: str, values: dict[Side, Any]) -> Iterator[tuple[str, dict[Side, Any]]]:
    """Yield the details that differ, those in dicts one by one."""
    if all(isinstance(value, dict) for value in values.values()):
        for key in dict.fromkeys(key for value in values.values() for key in value):
            inner = {side: value[key] for side, value in values.items() if key in value}
            yield from _details(f"{name}.{key}" if name else key, inner)
    # As text: there NaN equals NaN, 1 is not True.
    elif len(values) < 2 or json.dumps(values["a"]) != json.dumps(values["b"]):
        yield name, values


def _change(a: Data, b: Data, before: Tensor, after: Tensor) -> Change | None:
    """Return the change between two tensors, None where `Pair` says so."""
    dtypes = before.dtype, after.dtype
    is_complex = {dtype.startswith("complex") for dtype in dtypes}
    if before.shape != after.shape or len(is_complex) > 1 or not _CODES.keys() >= set(dtypes):
        return None
    if not before.numel:
        return Change(0.0, 0.0)
    moved = squares = 0.0
    elements = [_elements(a, before), _elements(b, after)]
    chunks = np.nditer(elements, flags=["external_loop", "buffered"], buffersize=CHUNK)
    with np.errstate(all="ignore"):  # what a file holds may be nan, or become inf
        for x_bytes, y_bytes in chunks:
            x = _numbers(x_bytes, before.dtype, a.is_big_endian)
            y = _numbers(y_bytes, after.dtype, b.is_big_endian)
            step = _distance(x, y).astype(np.float64)
            x = x.astype(np.float64)
            moved += float(step @ step)
            squares += float(x @ x)
    return Change(moved, squares)


def _elements(data: Data, tensor: Tensor) -> np.ndarray:
    """Return the elements as bytes of the file, without dimensions of size 1."""
    size = tensor.item_size
    steps = [(n, step) for n, step in zip(tensor.shape, tensor.stride, strict=True) if n > 1]
    shape, strides = [n for n, _ in steps], [step * size for _, step in steps]
    return np.ndarray(shape, f"V{size}", data.read(tensor), strides=strides)


def _numbers(elements: np.ndarray, dtype: str, is_big_endian: bool) -> np.ndarray:
    """Return elements as numbers, complex ones as two."""
    order = ">" if is_big_endian else "<"
    numbers = np.ascontiguousarray(elements).view(f"{order}{_CODES[dtype]}")
    if dtype == "bfloat16":  # the upper half of a float32
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return |y - x|, exactly for integers: those of 64 bits do not fit into a float64."""
    if x.dtype.kind in "iu" and x.dtype.newbyteorder("=") == y.dtype.newbyteorder("="):
        return (np.maximum(x, y) - np.minimum(x, y)).view(f"u{x.itemsize}")
    return y.astype(np.float64) - x.astype(np.float64)
