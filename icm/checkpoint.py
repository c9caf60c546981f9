"""Checkpoints: written whole or not at all, loaded without executing anything."""

import sys
import warnings
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from icm.errors import UserError
from icm.files import numbered, write_whole

FORMAT = 3


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content`: plain containers, tensors, and arrays, which become tensors.

    Raises:
        WriteError: it cannot be written, see `write_whole`.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(with_tensors(content), file)
        except RuntimeError as error:
            # after a disk error, PyTorch still finishes its archive, and fails again
            raise error.__context__ or error from None

    write_whole(path, write)


def with_tensors(content: Any) -> Any:
    """`content` with its arrays as tensors: loading arrays would need full pickle."""
    if isinstance(content, dict):
        return {key: with_tensors(value) for key, value in content.items()}
    return torch.from_numpy(content) if isinstance(content, np.ndarray) else content


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program onto the CPU.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    content = load_file(path)
    kinds = {"format": int, "config": dict, "step": int, "models": dict}
    if (
        not isinstance(content, dict)
        or not all(isinstance(content.get(name), kind) for name, kind in kinds.items())
        or content["step"] < 0
    ):
        raise UserError(f"{path}: not a checkpoint of this program (scripts/train.py writes them)")
    if content["format"] != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {content['format']}; this program reads {FORMAT}"
        )
    return content


def for_playing(content: dict[str, Any]) -> dict[str, Any]:
    """What playing needs of a checkpoint's content, with weights in half precision.

    A third of the size: without the optimizer, the rollouts and the places that resuming needs.
    """

    def half(value: Any) -> Any:
        return value.half() if value.is_floating_point() else value

    models = {
        name: {key: half(value) for key, value in model.items()}
        for name, model in content["models"].items()
    }
    names = ("format", "config", "step", "curiosity", "versions", "metrics")
    kept = {name: content[name] for name in names if name in content}
    numbers = {k: v for k, v in content["agent"].items() if isinstance(v, int | float)}
    return {**kept, "models": models, "agent": numbers}


def newest_whole(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint `path`, and what it holds.

    If that is `latest.pt` and damaged or missing, the newest intact one beside it; a line on
    stderr says so.

    Raises:
        UserError: there is none.
    """
    try:
        return path, load(path)
    except UserError as error:
        if path.name != "latest.pt":
            raise
        reason = error if path.exists() else f"{path}: missing"
        for older in reversed(numbered(path.parent, "step")):
            with suppress(UserError):
                content = load(older)
                print(f"{reason}; going on with {older.name}", file=sys.stderr)
                return older, content
        raise


def memory_name(step: int) -> str:
    """Name of the memory file of an agent step, beside its checkpoint."""
    return f"replay_{step:09d}.pt"


def with_memory(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A checkpoint and the memory of the same step beside it, if there is one.

    Of a damaged one, a line on stderr tells. A running training may replace both in between; then
    both are read again.

    Raises:
        UserError: the checkpoint is damaged or missing.
    """
    while True:
        content = load(path)
        beside = path.with_name(memory_name(content["step"]))
        try:
            return content, load_file(beside)
        except UserError as error:
            reason = error
        if load(path)["step"] == content["step"]:
            if beside.is_file():
                print(reason, file=sys.stderr)
            return content, None


@contextmanager
def restoring(path: Path) -> Generator[None]:
    """Turn errors while the content of `path` is restored into a `UserError` that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # invalid content leads to many kinds
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: incomplete or of another version ({what})") from None


def load_file(path: Path) -> Any:
    """Read any file of plain containers and tensors onto the CPU.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.is_file() or path.stat().st_size == 0:
        what = "a folder" if path.is_dir() else "empty file" if path.is_file() else "no such file"
        raise UserError(f"{path}: {what}; give a checkpoint, runs/…/checkpoints/latest.pt")
    try:
        if not _is_whole(path):
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd files cause some
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not all(map(_has_its_data, _tensors(content))):
            raise ValueError
        return content
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except Exception:  # torch raises many kinds for damaged and foreign files
        raise UserError(
            f"{path}: damaged or not a checkpoint of this program (scripts/train.py writes them)"
        ) from None


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in containers."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        yield from _tensors([*content.values()])
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)


def _has_its_data(tensor: Tensor) -> bool:
    """Whether each element of a tensor has its own place in the file, in any order.

    One number repeated without end would fill memory, and could not be written to.
    """
    dense = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != dense:
            return False
        dense *= size
    return True


def _is_whole(path: Path) -> bool:
    """Whether a file of `torch.save` is intact: torch itself checks no checksum."""
    with zipfile.ZipFile(path) as archive:
        # what is marked as a folder has no data for PyTorch, and no checksum covers that mark
        is_plain = all(
            member.compress_type == zipfile.ZIP_STORED and not member.external_attr
            for member in archive.infolist()
        )
        return is_plain and archive.testzip() is None
