"""Measuring in processes that do nothing else."""

import multiprocessing
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection

type Measure = Callable[[float], float]
"""What is measured for about so many seconds."""


@contextmanager
def apart(make: Callable[[], Measure], processes: int = 1) -> Generator[Measure]:
    """The sum of what as many processes measure at the same time, each by a measure of its own.

    Args:
        make: makes the measure, in its process; must be picklable.
        processes: how many.
    """
    context = multiprocessing.get_context("spawn")
    pipes = []
    for _ in range(processes):
        ours, theirs = context.Pipe()
        context.Process(target=_measure_when_told, args=(theirs, make), daemon=True).start()
        theirs.close()
        pipes.append(ours)

    def together(seconds: float) -> float:
        for pipe in pipes:
            pipe.send(seconds)
        return float(sum(pipe.recv() for pipe in pipes))

    try:
        together(0.0)  # until all have started
        yield together
    finally:
        for pipe in pipes:
            pipe.close()


def _measure_when_told(pipe: Connection, make: Callable[[], Measure]) -> None:
    measure = make()
    try:
        while True:
            pipe.send(measure(pipe.recv()))
    except (EOFError, ConnectionError):
        pass  # the other end is closed
