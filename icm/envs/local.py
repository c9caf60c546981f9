"""Workers as processes on this machine."""

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from math import prod
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from icm.envs.snapshots import Trail
from icm.envs.stepper import NOTHING, Answer, Fields, Order, Stepper
from icm.envs.wrappers import Env
from icm.processes import CLOSING_TIME, Assistants

type Memory = dict[str, tuple[Any, tuple[int, ...], Any]]
"""Shared arrays by name: their bytes, shape and type."""


class LocalWorkers(Assistants):
    """Worker processes; see `icm.envs.vector.Workers`.

    The arrays are in shared memory, which has no name and so cannot be left behind; besides, a
    step exchanges one short message with each worker.

    Args:
        make: builds one environment; must be picklable.
        number: how many.
        late: how many of them step in `step_wait`, fewer than `number`.
        fields: the arrays.
    """

    def __init__(self, make: Callable[[], Env], number: int, late: int, fields: Fields) -> None:
        context = multiprocessing.get_context("spawn")
        memory: Memory = {
            name: (context.RawArray("b", prod(shape) * np.dtype(dtype).itemsize), shape, dtype)
            for name, (shape, dtype) in fields.items()
        }
        self.arrays = arrays_in(memory)
        self.number, self.late = number, late
        super().__init__(number, _work, make, memory)

    def send(self, worker: int, order: Order) -> None:
        """See `Workers`."""
        super().send(worker, (Stepper.step, order))

    def trail(self, worker: int, row: int, done: int, patience: float) -> Trail | None:
        """See `Workers`."""
        super().send(worker, (Stepper.trail, row, done))
        found: Any = self.listen(worker, patience)
        if isinstance(found, Trail):
            return found
        # or a late answer could be taken for the next one
        self.processes[worker].kill()
        self.processes[worker].join()
        with suppress(EOFError, OSError):
            self.receive(worker)
        return None

    def listen(self, worker: int, patience: float) -> Answer | str:
        """See `Workers`."""
        pipe, process = self.pipes[worker], self.processes[worker]
        try:
            # twice: if both processes were paused, the first timeout is over when they resume
            if pipe.poll(patience / 2) or pipe.poll(patience / 2):
                return self.receive(worker)
        except (EOFError, OSError):
            process.join(CLOSING_TIME)
            return f"it ended with exit code {process.exitcode}"
        return f"it did not answer for {patience:g} seconds"


def arrays_in(memory: Memory) -> dict[str, np.ndarray]:
    """Views of shared memory."""
    return {
        name: np.frombuffer(content, dtype).reshape(shape)
        for name, (content, shape, dtype) in memory.items()
    }


def _work(pipe: Connection, make: Callable[[], Env], memory: Memory) -> None:
    stepper = Stepper(make, arrays_in(memory))
    pipe.send(NOTHING)
    while True:
        task, *arguments = pipe.recv()
        pipe.send(task(stepper, *arguments))
