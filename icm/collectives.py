"""What ranks exchange, see `icm.ranks`; with one rank, functions return what they are given.

Ranks must call the same functions in the same order.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icm.ranks import RANK, WORLD_SIZE

PATIENCE = timedelta(hours=1)  # with another rank, which may be compiling

_seconds = 0.0  # in exchanges since the last `seconds()`


@contextmanager
def together(device: torch.device) -> Generator[None]:
    """Join all ranks: inside, they can exchange what is on the CPU or on their `device`."""
    if WORLD_SIZE == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def seconds() -> float:
    """Spent in exchanges since the last call: waiting for other ranks, and the transfer itself.

    Without those in compiled functions, which are small; of GPUs' exchanges, only the time to
    launch them, because nothing waits for them.
    """
    global _seconds
    spent, _seconds = _seconds, 0.0
    return spent


@contextmanager
def _exchange() -> Generator[None]:
    global _seconds
    start = time.perf_counter()
    yield
    _seconds += time.perf_counter() - start


def own(whole: Tensor, dim: int = 0) -> Tensor:
    """This rank's part of a tensor whose length along `dim` can be divided by the world size."""
    return whole.chunk(WORLD_SIZE, dim)[RANK]


def gathered(parts: Sequence[Tensor]) -> list[Tensor]:
    """All ranks' rows of float32 tensors (rows of a rank, ...) on one device."""
    if WORLD_SIZE == 1:
        return list(parts)
    packed = torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)
    whole = all_rows(packed)
    split = whole.split([part[0].numel() for part in parts], dim=1)
    return [
        rows.reshape(len(rows), *part.shape[1:]) for rows, part in zip(split, parts, strict=True)
    ]


def all_rows(part: Tensor) -> Tensor:
    """All ranks' rows of one tensor."""
    if WORLD_SIZE == 1:
        return part
    whole = part.new_empty((len(part) * WORLD_SIZE, *part.shape[1:]))
    with _exchange():
        dist.all_gather_into_tensor(whole, part.contiguous())
    return whole


def all_objects(given: Any) -> list[Any]:
    """What each rank gives, in rank order; anything that can be pickled."""
    if WORLD_SIZE == 1:
        return [given]
    whole = [None] * WORLD_SIZE
    with _exchange():
        dist.all_gather_object(whole, given)
    return whole


def greatest(number: int) -> int:
    """The greatest of the ranks' numbers."""
    return int(all_rows(torch.tensor([number])).max())


def summed(count: Tensor) -> Tensor:
    """Sum over ranks of a tensor, also within compiled functions."""
    if WORLD_SIZE > 1:
        count = count.clone()
        dist.all_reduce(count)
    return count


def mean_of_ranks(tensor: Tensor) -> Tensor:
    """Mean over ranks of a tensor, without gradient, also within compiled functions."""
    return summed(tensor.detach()) / WORLD_SIZE


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace float32 tensors by their means over ranks."""
    if WORLD_SIZE == 1:
        return
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    with _exchange():
        dist.all_reduce(packed)
    packed /= WORLD_SIZE
    for tensor, mean in zip(tensors, packed.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
