"""What a run has found: places, what they look like, and what happened there."""

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch

from icm.envs.mario import CELL

type Cell = tuple[int, int, int, int, int]
"""World, stage, area, x // 16, y // 16; see `icm.envs.mario`."""

type Place = tuple[int, int, int]
"""World, stage, area."""


@dataclass
class Visits:
    """What happened in a cell."""

    first: int  # agent step of the first visit
    count: int = 0
    ends: int = 0  # lives and episodes that ended here
    surprise: float = 0.0  # sum over the visits that were judged


@dataclass
class Picture:
    """What is known of a place."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))
    known: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # columns of blocks

    def add(self, block: int, strip: np.ndarray) -> None:
        """Put a strip, uint8 (H, W, 3), at a column of blocks; what is known already stays."""
        end = block + strip.shape[1] // CELL
        if end > len(self.known):
            pixels = np.zeros((strip.shape[0], end * CELL, 3), np.uint8)
            pixels[: self.pixels.shape[0], : self.pixels.shape[1]] = self.pixels
            self.pixels = pixels
            self.known = np.concatenate((self.known, np.zeros(end - len(self.known), bool)))
        for column in range(block, end):
            if not self.known[column]:
                source = slice((column - block) * CELL, (column - block + 1) * CELL)
                self.pixels[:, column * CELL : (column + 1) * CELL] = strip[:, source]
                self.known[column] = True


class Exploration:
    """Cells with their visits, pictures of places, and the greatest distance of an episode."""

    def __init__(self) -> None:
        self.cells: dict[Cell, Visits] = {}
        self.pictures: dict[Place, Picture] = {}
        self.distance_max = 0.0
        self.here: list[Visits | None] = []  # of each environment

    def visit(self, step: int, infos: dict[str, Any], ended: np.ndarray) -> None:
        """Take in a vector step.

        Args:
            step: agent step at its end.
            infos: of a `WorkerVectorEnv`.
            ended: whether an episode or a life ended, bool (num_envs,).
        """
        for place, block, strip in infos.get("scenery", ()):
            self.pictures.setdefault(place, Picture()).add(block, strip)
        for visits, has_ended in zip(self.here, ended.tolist(), strict=False):
            if visits is not None and has_ended:
                visits.ends += 1
        self.here = [None] * len(ended)
        if "cell" not in infos:
            return
        cells = infos["cell"].tolist()
        for row in np.flatnonzero(infos["_cell"]).tolist():
            visits = self.cells.setdefault(tuple(cells[row]), Visits(step))
            visits.count += 1
            self.here[row] = visits

    def judge(self, surprise: list[float]) -> None:
        """Take in how surprising the latest vector step was, of each environment."""
        for visits, value in zip(self.here, surprise, strict=True):
            if visits is not None:
                visits.surprise += value

    def statistics(self) -> dict[str, float]:
        """The `explore/` metrics; none for an environment without cells."""
        if not self.cells:
            return {}
        return {
            "explore/cells": len(self.cells),
            "explore/levels": len({cell[:2] for cell in self.cells}),
            "explore/distance_max": self.distance_max,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; the pictures as PNG files."""
        visits = self.cells.values()
        return {
            "distance_max": self.distance_max,
            "cells": torch.tensor(list(self.cells)),
            "visits": torch.tensor([[v.first, v.count, v.ends] for v in visits]),
            "surprise": torch.tensor([v.surprise for v in visits], dtype=torch.float64),
            "pictures": {
                " ".join(map(str, place)): {
                    "png": torch.from_numpy(cv2.imencode(".png", picture.pixels[..., ::-1])[1]),
                    "known": torch.from_numpy(picture.known),
                }
                for place, picture in self.pictures.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; checkpoints from before it had visits begin without."""
        self.distance_max = state["distance_max"]
        if "visits" not in state:
            return
        table = zip(
            state["cells"].tolist(),
            state["visits"].tolist(),
            state["surprise"].tolist(),
            strict=True,
        )
        for cell, (first, count, ends), surprise in table:
            self.cells[tuple(cell)] = Visits(first, count, ends, surprise)
        for name, picture in state["pictures"].items():
            world, stage, area = map(int, name.split())
            pixels = cv2.imdecode(picture["png"].numpy(), cv2.IMREAD_COLOR)
            assert pixels is not None
            self.pictures[world, stage, area] = Picture(
                pixels[..., ::-1].copy(), picture["known"].numpy()
            )
