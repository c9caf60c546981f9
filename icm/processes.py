"""Processes beside the main one: deaf to its signals, and gone when it is gone."""

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize
from typing import Any

CLOSING_TIME = 4.0  # seconds for a process to end

# A terminal and a cluster's scheduler send these to every process; only the main one reacts: it
# saves and ends the others; if it is killed, they end with their pipe.
HANGUP = getattr(signal, "SIGHUP", None)  # when a terminal closes; not on Windows
TIME_IS_UP = getattr(signal, "SIGUSR2", None)  # from Slurm, set by submitit; not on Windows
SIGNALS = tuple(s for s in (signal.SIGINT, signal.SIGTERM, HANGUP, TIME_IS_UP) if s is not None)


class Assistants:
    """New Python processes, each at the other end of a pipe.

    They are new, because a fork of a process with torch's threads may hang. They import the
    main module, which must do its work under `if __name__ == "__main__"`. They end with their
    pipe to this process, however this process ends. One that fails sends its traceback, a str.

    Args:
        number: how many.
        serve: what each does, given its end of the pipe and `arguments`; must be picklable.
        arguments: for `serve`; picklable, or made by `multiprocessing` for sharing.
        patience: seconds after which a process is killed if it does not read what it is sent, or
            does not finish what it has begun to send.
    """

    def __init__(
        self, number: int, serve: Callable[..., None], *arguments: Any, patience: float = 20.0
    ) -> None:
        self._given = serve, arguments
        self._patience = patience
        self._deadlines = [math.inf] * number  # until when waiting for each has to end
        self._over = threading.Event()
        self.pipes: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        # runs at the latest when Python ends, before it waits for processes
        given = self.pipes, self.processes, self._over
        self.end = Finalize(self, _end, given, exitpriority=0)
        for _ in range(number):
            pipe, process = self._start()
            self.pipes.append(pipe)
            self.processes.append(process)
        watched = self.processes, self._deadlines, self._over
        threading.Thread(target=_watch, args=watched, daemon=True).start()

    def send(self, number: int, order: Any, /) -> None:
        """Send to a process; no error if it is gone: receiving its answer will raise one."""
        with suppress(ConnectionError), self._guard(number):
            self.pipes[number].send(order)

    def receive(self, number: int) -> Any:
        """What a process has begun to send.

        Raises:
            EOFError, OSError: it ended before it had sent all of it.
        """
        with self._guard(number):
            return self.pipes[number].recv()

    @contextmanager
    def _guard(self, number: int) -> Generator[None]:
        """Kill a process that blocks this one too long: a message may exceed a pipe's buffer."""
        self._deadlines[number] = time.monotonic() + self._patience
        try:
            yield
        finally:
            self._deadlines[number] = math.inf

    def restart(self, number: int) -> None:
        """Kill a process, and put a new one in its place."""
        self.pipes[number].close()
        self.processes[number].kill()
        self.processes[number].join()
        self.pipes[number], self.processes[number] = self._start()

    def _start(self) -> tuple[Connection, SpawnProcess]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        serve, arguments = self._given
        if os.name == "posix":  # elsewhere there is none
            with signals_blocked():  # separately, as starting it unblocks some
                resource_tracker.ensure_running()
        with signals_blocked():
            process = context.Process(target=_assist, args=(serve, theirs, *arguments), daemon=True)
            process.start()
        theirs.close()
        return ours, process


@contextmanager
def signals_blocked() -> Generator[None]:
    """Processes started inside are deaf to `SIGNALS` from their first moment; not on Windows.

    This process gets them afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def signals_handled(handle: Callable[[int, Any], None]) -> Generator[None]:
    """Inside, `handle` is called with each of `SIGNALS` that comes, and the stack frame.

    Not with SIGHUP if that is ignored from the start, as under `nohup`.
    """
    heard = [s for s in SIGNALS if s != HANGUP or signal.getsignal(s) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: list[SpawnProcess], deadlines: list[float], over: threading.Event) -> None:
    """Kill those past their deadline, until `over`."""
    while not over.wait(1.0):
        for process, deadline in zip(processes, deadlines, strict=True):
            if time.monotonic() > deadline:
                process.kill()


def _end(pipes: list[Connection], processes: list[SpawnProcess], over: threading.Event) -> None:
    over.set()
    for pipe in pipes:
        pipe.close()
    deadline = time.monotonic() + CLOSING_TIME
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.0))
    for process in processes:
        process.kill()  # nothing happens to one that has ended
        process.join()


def _assist(serve: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(ConnectionError):
        try:
            serve(pipe, *arguments)
        except Exception:
            pipe.send(traceback.format_exc())
