"""`torch.compile` where it pays and where it works."""

from collections.abc import Callable
from typing import Any

import torch

from icm.errors import UserError

WORTHWHILE = 2_000
"""Updates after which the time that compiling takes, up to a minute, is won back (measured)."""


def resolve_compile(name: str, updates: int) -> str:
    """`auto` becomes `off` for a run of fewer `updates` than are worth it."""
    return "off" if name == "auto" and updates < WORTHWHILE else name


def compiled[**P, R](
    function: Callable[P, R], compiling: str, device: torch.device
) -> Callable[P, R]:
    """`function` of tensors of always the same shapes, compiled when it is first called.

    On a GPU its kernels are replayed as a CUDA graph: no Python between them. What it returns is
    then overwritten by the next call. Dropout draws the same numbers compiled or not.

    Args:
        function: what to compile.
        compiling: `on`, `off`, or `auto`: where it fails, for want of a compiler for instance, one
            line says so and `function` is used as it is.
        device: where its tensors are.

    Raises:
        UserError: (of the first call) compiling is `on` and failed.
    """
    if compiling == "off":
        return function
    # one process compiles: more would stay, each with the memory of a whole PyTorch
    options: dict[str, Any] = {"fallback_random": True, "compile_threads": 1}
    if device.type == "cuda":
        options["triton.cudagraphs"] = True
    chosen = torch.compile(function, dynamic=False, options=options)
    tried = False

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal chosen, tried
        if tried:
            return chosen(*args, **kwargs)
        tried = True
        try:
            return chosen(*args, **kwargs)
        except Exception as error:  # of any kind: a mistake of `function` shows again below
            reason = " ".join(str(error).split())[:200]
            if compiling == "on":
                raise UserError(
                    f"compile=on: failed ({reason}); compile=auto and compile=off work"
                ) from None
            print(f"compile=auto: not compiled, updates take longer ({reason})")
            chosen = function
            return function(*args, **kwargs)

    return call
