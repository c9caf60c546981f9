"""`torch.compile` where it pays and where it works."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch.config import patch

from icm.errors import UserError
from icm.processes import signals_blocked

WORTHWHILE = 2_000
"""Updates after which the time that compiling takes, up to a minute, is won back (measured)."""


def resolve_compile(name: str, updates: int) -> str:
    """`auto` becomes `off` for a run of fewer `updates` than are worth it."""
    return "off" if name == "auto" and updates < WORTHWHILE else name


@contextmanager
def compiling() -> Iterator[None]:
    """Compile the backward pass at once, too, so that its failures are seen; say nothing."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of a missing GPU
    try:
        with warnings.catch_warnings(), patch(force_non_lazy_backward_lowering=True):
            warnings.filterwarnings("ignore", "Guards may run slower")
            yield
    finally:
        logger.setLevel(level)


class Compiler:
    """Compiles functions of tensors of always the same shapes, each when it is first called.

    The compiler, a process, is deaf to Ctrl-C, which a terminal sends it as well: a run that is to
    be saved needs what it compiles.

    On a GPU their kernels are replayed as a CUDA graph: no Python between them. What a function
    returns is then overwritten by its next call. Dropout draws the same numbers compiled or not.

    Args:
        mode: `on`, `off` (functions stay as they are), or `auto`: where compiling fails, for want
            of a compiler for instance, one line says so and functions are used as they are.
        device: where the tensors are.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self.mode = mode
        # code is generated in this process: others would stay, each with the memory of a PyTorch
        self.options: dict[str, Any] = {"fallback_random": True, "compile_threads": 1}
        if device.type == "cuda":
            self.options["triton.cudagraphs"] = True

    def __call__[**P, R](self, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, compiled.

        Raises:
            UserError: (of its first call) compiling is `on` and failed.
        """
        chosen = function
        tried = False

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal chosen, tried
            if tried or self.mode == "off":
                return chosen(*args, **kwargs)
            tried = True
            faster = torch.compile(function, dynamic=False, options=self.options)
            try:
                with signals_blocked(), compiling():
                    result = faster(*args, **kwargs)
            except Exception as error:  # of any kind: a mistake of `function` shows again below
                reason = " ".join(str(error).split())[:200]
                if self.mode == "on":
                    raise UserError(
                        f"compile=on: failed ({reason}); compile=auto and compile=off work"
                    ) from None
                print(f"compile=auto: not compiled, learning is slower ({reason})")
                self.mode = "off"
                return function(*args, **kwargs)
            chosen = faster
            return result

        return call
