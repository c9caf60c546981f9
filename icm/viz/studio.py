"""Draws what a training found, in another process."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from icm.errors import UserError
from icm.exploration import Region
from icm.files import write_bytes
from icm.processes import Assistants

type Drawing = Callable[[], dict[str, bytes]]
"""Writes files, and returns those that TensorBoard shows, PNG or GIF, by their names there."""

STARTING = 600.0  # seconds a process may take to start, for which a first order waits
NICENESS = 19  # a seventieth of a core that a training wants, too


# These import what they need when called: a training needs none of it.


def maps(regions: dict[str, Region], folder: Path) -> dict[str, bytes]:
    """See `icm.viz.map.draw_maps`."""
    from icm.viz.map import draw_maps

    return draw_maps(regions, folder)


def report(folder: Path, places: list[dict[str, Any]]) -> dict[str, bytes]:
    """Write the report of a run folder into it, and places.json; see `icm.viz.report`."""
    from icm.viz.report import PLACES, read_run, write_report

    write_bytes(folder / PLACES, json.dumps(places, indent=1).encode())
    write_report([read_run(folder)], folder / "report.html")
    return {}


class Drawn(NamedTuple):
    """Results of an order.

    step: the agent step it was given for.
    images: see `Drawing`.
    complaints: what went wrong, a line each: a drawing that fails does not end a training.
    """

    step: int
    images: dict[str, bytes]
    complaints: list[str]


class Studio:
    """Carries out one order after the other, in a process of low priority."""

    def __init__(self) -> None:
        self.assistants: Assistants | None = None
        self.is_busy = False

    def order(self, step: int, drawings: list[Drawing]) -> None:
        """Begin with drawings, in order; they are pickled. The studio must not be busy."""
        if self.assistants is None:
            self.assistants = Assistants(1, _draw, patience=STARTING)
        self.assistants.send(0, (step, drawings))
        self.is_busy = True

    def finished(self, seconds: float = 0.0) -> Drawn | None:
        """What has been drawn; None if nothing is ready within `seconds`."""
        if self.assistants is None or not self.is_busy:
            return None
        pipe = self.assistants.pipes[0]
        if not pipe.poll(seconds):
            return None
        self.is_busy = False
        try:
            answer = self.assistants.receive(0)
        except (EOFError, OSError):
            answer = "its process was killed"
        if isinstance(answer, str):  # a traceback; the next order finds a new process
            self.close()
            return Drawn(0, {}, [f"drawing failed: {answer.strip().splitlines()[-1]}"])
        return Drawn(*answer)

    def close(self) -> None:
        """End the process and any ffmpeg it writes to, even in the middle of a drawing."""
        if self.assistants is not None:
            if self.is_busy:
                with suppress(psutil.NoSuchProcess):
                    drawing = psutil.Process(self.assistants.processes[0].pid)
                    for process in (*drawing.children(), drawing):
                        process.kill()
            self.assistants.end()
            self.assistants, self.is_busy = None, False


def _draw(pipe: Connection) -> None:
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    while True:
        step, drawings = pipe.recv()
        images: dict[str, bytes] = {}
        complaints = []
        for drawing in drawings:
            try:
                images |= drawing()
            except UserError as error:
                complaints.append(str(error))
        pipe.send((step, images, complaints))
