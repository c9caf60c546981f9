"""Measuring in processes that do nothing else."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from icm.processes import Assistants

type Measure = Callable[[float], float]
"""Measures for about that many seconds."""


@contextmanager
def apart(make: Callable[[], Measure], processes: int = 1) -> Generator[Measure]:
    """The sum of what several processes measure at the same time, each by its own measure.

    Args:
        make: makes the measure, in its process; must be picklable.
        processes: how many.

    Raises:
        RuntimeError: a measure cannot be made, with the traceback, or its process was killed.
    """
    assistants = Assistants(processes, _measure_when_told, make)

    def together(seconds: float) -> float:
        for number in range(processes):
            assistants.send(number, seconds)
        try:
            found = [pipe.recv() for pipe in assistants.pipes]
        except (EOFError, OSError):
            raise RuntimeError("cannot be measured: its process was killed") from None
        for each in found:
            if isinstance(each, str):
                raise RuntimeError(f"cannot be measured:\n{each}")
        return float(sum(found))

    try:
        together(0.0)  # until all have started
        yield together
    finally:
        assistants.end()


def _measure_when_told(pipe: Connection, make: Callable[[], Measure]) -> None:
    measure = make()
    while True:
        pipe.send(measure(pipe.recv()))
