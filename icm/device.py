"""Which device and which precision a run uses."""

import os

import torch

from icm.errors import UserError
from icm.ranks import CORES, LOCAL_RANK, LOCAL_WORLD_SIZE


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device; `cuda` is one GPU for each rank.

    A GPU becomes the current one, on which PyTorch records graphs.

    Raises:
        UserError: the name is none of these, there is no such GPU, or it is one for several ranks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, colon, index = name.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise UserError(f"device={name}: unknown device; one of auto, cpu, cuda, cuda:N")
    if colon and LOCAL_WORLD_SIZE > 1:
        raise UserError(f"device={name}: all ranks would share it; device=cuda gives each its own")
    number = int(index) if colon else LOCAL_RANK
    if number >= count:
        raise UserError(
            f"device={name}: {count} CUDA devices available here; device=cpu or device=auto work"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`, sent there without waiting for the device's work.

    The original on the CPU may change as soon as this has returned: CUDA has a copy by then. This
    is not for the way back to the CPU, where one has to wait.
    """
    return tensor.to(device, non_blocking=True)


def share_cores(device: torch.device) -> None:
    """Leave half of the cores to the emulators; all but one if the device is a GPU.

    Unless OMP_NUM_THREADS says otherwise. A parallel region waits for its slowest thread, and
    emulators push threads off their cores: on two busy cores, two threads were measured to learn
    up to 8 times slower than one.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if device.type == "cuda" else max(1, CORES // 2))


def busy_cores(device: torch.device) -> int:
    """How many CPU cores are busy when learning on `device`."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def describe_device(device: torch.device) -> str:
    """One line: is CUDA available, how many devices, and which one is used."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} threads"
    return f"CUDA available: {count > 0} ({count} devices); using {device} ({name})"


def resolve_precision(name: str, device: torch.device) -> bool:
    """Whether networks run under bfloat16 autocast: `auto` where the hardware computes in it."""
    if name == "auto":
        if device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return name == "bf16"
