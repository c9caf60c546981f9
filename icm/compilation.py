"""`torch.compile` where it pays and where it works."""

import logging
import signal
import sys
import threading
import time
import warnings
from _thread import interrupt_main
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor
from torch._functorch.config import patch

from icm.errors import UserError
from icm.output import say
from icm.processes import SIGNALS

WORTHWHILE = 2_000
"""Updates after which the time to compile, up to a minute, is won back (measured)."""

WARM_UPS = 3  # calls before a function is recorded: PyTorch's one-time set-up is done by then


def resolve_compile(name: str, updates: int) -> str:
    """`auto` becomes `off` for a run of too few `updates` to be worth it."""
    return "off" if name == "auto" and updates < WORTHWHILE else name


@contextmanager
def compiling() -> Generator[None]:
    """Compile the backward pass at once, too, to see its failures; silence warnings."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of a missing GPU
    try:
        with warnings.catch_warnings(), patch(force_non_lazy_backward_lowering=True):
            warnings.filterwarnings("ignore", "Guards may run slower")
            yield
    finally:
        logger.setLevel(level)


class GivenUp(BaseException):
    """This signal came during compilation. Not an `Exception`: PyTorch catches those."""


def interrupt(number: int) -> None:
    """Send the main thread a signal, from another; where possible, it then waits for nothing."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(cast(int, threading.main_thread().ident), number)
    else:
        interrupt_main(signal.Signals(number))


@contextmanager
def given_up_on_signals() -> Generator[None]:
    """If a signal comes inside, run this process's handler for it, then raise `GivenUp`.

    Compiling may take a minute, and the sender of a signal may kill after ten seconds.
    """
    this = psutil.Process()
    others = set(this.children(recursive=True))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook
    reminders: list[threading.Thread] = []
    is_ignored = is_ignoring = is_over = False

    def handle(number: int, frame: Any) -> None:
        nonlocal is_ignored, is_over
        if is_ignoring:
            return  # a reminder comes
        for compiler in set(this.children(recursive=True)) - others:
            with suppress(psutil.Error, OSError, ValueError):
                command, folder = compiler.cmdline(), compiler.cwd()
                compiler.kill()
                # or every later run would use a half-written library in PyTorch's cache
                Path(folder, command[command.index("-o") + 1]).unlink()
        if not is_ignored:
            handler = before[number]
            assert callable(handler)
            handler(number, frame)
        is_ignored = False
        if not is_over:
            is_over = True
            raise GivenUp(number)

    def insist(ignored: Any) -> None:
        """Raise it again where Python ignores it, as in a callback of a weak reference."""
        nonlocal is_ignored, is_ignoring, is_over
        if not isinstance(ignored.exc_value, GivenUp):
            hook(ignored)
            return
        is_ignored, is_ignoring, is_over = True, True, False
        reminders.append(threading.Thread(target=remind, args=ignored.exc_value.args))
        reminders[-1].start()
        is_ignoring = False

    def remind(number: int) -> None:
        while is_ignored and not is_over:
            interrupt(number)
            time.sleep(0.05)

    try:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handle)
        sys.unraisablehook = insist
        yield
    finally:
        is_over = True
        sys.unraisablehook = hook
        for reminder in reminders:
            reminder.join()
        for number, handler in before.items():
            signal.signal(number, handler)


class Compiler:
    """Compiles functions of tensors whose shapes never change, each when it is first called.

    If a signal comes meanwhile, neither this nor any other function is compiled: the run is about
    to end.

    On a GPU, their kernels are replayed as a CUDA graph, without Python between them. The next
    call of any such function overwrites what one returned. On a CPU, dropout draws the same
    numbers compiled or not.

    Args:
        mode: `on`, `off` (functions stay as they are), or `auto`: if compiling fails, for instance
            without a compiler, one line says so and functions stay as they are.
        device: where the tensors are.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self.mode = mode
        # compile in this process: helpers would stay, each with a PyTorch in memory
        self.options: dict[str, Any] = {"fallback_random": True, "compile_threads": 1}
        if device.type == "cpu" and sys.platform == "linux":  # tried nowhere else
            self.options["cpp_wrapper"] = True  # one C++ file per function, not one per kernel
        self.device = device

    def __call__[**P, R](self, function: Callable[P, R], *, alone: bool = True) -> Callable[P, R]:
        """`function`, compiled; if not `alone`, without a CUDA graph of its own.

        That is for parts of a `recorded` function, and for gradients that must outlive other
        calls.

        Raises:
            UserError: (at its first call) compiling is `on` and failed.
        """
        chosen = function
        tried = False
        options = self.options | {"triton.cudagraphs": alone and self.device.type == "cuda"}

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal chosen, tried
            if tried or self.mode == "off":
                return chosen(*args, **kwargs)
            tried = True
            faster = torch.compile(function, dynamic=False, options=options)
            try:
                with given_up_on_signals(), compiling():
                    result = faster(*args, **kwargs)
            except GivenUp:
                self.mode = "off"
                return function(*args, **kwargs)
            except Exception as error:  # of any kind: a bug in `function` shows again below
                reason = " ".join(str(error).split())[:200]
                if self.mode == "on":
                    raise UserError(
                        f"compile=on: failed ({reason}); compile=auto and compile=off work"
                    ) from None
                say(f"compile=auto: not compiled, learning is slower ({reason})", sys.stdout)
                self.mode = "off"
                return function(*args, **kwargs)
            chosen = faster
            return result

        return call

    def recorded[B](
        self, function: Callable[[B], tuple[list[str], Tensor]]
    ) -> Callable[[B], tuple[list[str], Tensor]]:
        """`function`, on a GPU replayed as one CUDA graph, with its effects on other tensors.

        It must wait for nothing and work on the device alone, on batches of the same shapes; its
        next call overwrites what it returns.
        """
        calls = 0
        graph: torch.cuda.CUDAGraph | None = None
        batch_read: B
        returned: tuple[list[str], Tensor]

        def call(batch: B) -> tuple[list[str], Tensor]:
            nonlocal calls, graph, batch_read, returned
            if self.mode == "off" or self.device.type != "cuda":
                return function(batch)
            calls += 1
            if calls <= WARM_UPS:
                return function(batch)
            if graph is None:
                batch_read, graph = deepcopy(batch), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    returned = function(batch_read)
            torch._foreach_copy_(tensors_in(batch_read), tensors_in(batch))
            graph.replay()
            return returned

        return call


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors of nested dataclasses and dicts, in their order."""
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch if isinstance(batch, dict) else vars(batch)
    return [tensor for part in parts.values() for tensor in tensors_in(part)]
