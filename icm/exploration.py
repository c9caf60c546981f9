"""What a run has found: places, what they look like, and what happened there.

Nothing here imports torch, so that a process that only draws stays small.
"""

import math
from collections import defaultdict, deque
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np

from icm.envs.mario import CELL

LATEST = 100  # episodes in an agent's average score

type Place = tuple[int, int, int]
"""World, stage, area; see `icm.envs.mario`."""

type Cell = tuple[int, int]
"""x // 16, y // 16 in a place."""


@dataclass
class Visits:
    """What happened in a cell."""

    first: int  # agent step of the first visit
    count: int = 0
    ends: int = 0  # lives and episodes that ended here
    judged: int = 0  # visits whose surprise is known
    surprise: float = 0.0  # sum over those

    def __add__(self, other: "Visits") -> "Visits":
        """What happened in two cells."""
        return Visits(
            min(self.first, other.first),
            self.count + other.count,
            self.ends + other.ends,
            self.judged + other.judged,
            self.surprise + other.surprise,
        )


@dataclass
class Picture:
    """What a place looks like, as far as known, in blocks of 16x16 pixels."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))
    known: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))  # (rows, columns)

    def add(self, block: tuple[int, int], patch: np.ndarray) -> None:
        """Put a patch, uint8 (H, W, 3), at a row and column; what is known already stays."""
        row, column = block
        rows, columns = patch.shape[0] // CELL, patch.shape[1] // CELL
        missing = (
            max(0, row + rows - self.known.shape[0]),
            max(0, column + columns - self.known.shape[1]),
        )
        if any(missing):
            self.known = np.pad(self.known, [(0, n) for n in missing])
            self.pixels = np.pad(self.pixels, [*((0, n * CELL) for n in missing), (0, 0)])
        there = slice(row, row + rows), slice(column, column + columns)
        new = ~self.known[there]
        self.known[there] = True
        new = new.repeat(CELL, 0).repeat(CELL, 1)
        self.pixels[row * CELL : (row + rows) * CELL, column * CELL : (column + columns) * CELL][
            new
        ] = patch[new]


@dataclass
class Region:
    """What is known of a place."""

    picture: Picture = field(default_factory=Picture)
    cells: dict[Cell, Visits] = field(default_factory=dict)
    lives: int = 0  # that have come here


@dataclass
class Recording:
    """An episode, or its beginning, that can be replayed.

    step: agent steps of the run by its end.
    score: its distance; in a game without distances, its reward. Of a way: levels known by then.
    seed: of its environment.
    actions: from the first to the last.
    """

    step: int
    score: float
    seed: int
    actions: list[int]


class Exploration:
    """Places and what is known of them, the greatest distance, the best and the latest episodes.

    And the way to the level that was discovered last: the episode that first got there, up to
    there.
    """

    def __init__(self) -> None:
        self.regions: dict[Place, Region] = defaultdict(Region)
        self.distance_max = 0.0
        self.best: Recording | None = None
        self.way: Recording | None = None
        self.latest: deque[float] = deque(maxlen=LATEST)  # scores, see `Recording`
        self.here: list[Visits | None] = []  # of each environment
        self.at: list[Place | None] = []
        # where the running life of each has been; None: the next one has not begun
        self.been: list[set[Place] | None] = []
        self.changed: set[Place] = set()

    def move(self, before: str, now: str) -> None:
        """Continue in an environment with other settings, given both ids.

        Another game's places are others, even under the same names.
        """
        self.best = self.way = None  # replays would differ here
        self.latest.clear()
        if before != now:
            self.distance_max = 0.0
        if before.partition("-")[0] != now.partition("-")[0]:
            self.regions.clear()
            self.changed.clear()

    def visit(self, step: int, infos: dict[str, Any], ended: np.ndarray) -> int | None:
        """Record a vector step.

        Args:
            step: agent step at its end.
            infos: of a `WorkerVectorEnv`.
            ended: whether an episode ended, bool (num_envs,).

        Returns:
            number of an environment in a level new to the run; None: there is none.
        """
        known = self.levels()
        self.see(infos)
        over = ended | infos["life_lost"]
        for visits, is_over in zip(self.here, over.tolist(), strict=False):
            if visits is not None and is_over:
                visits.ends += 1
        self.stand(step, infos, len(ended))
        for visits in self.here:
            if visits is not None:
                visits.count += 1
        self._come(over, ended, infos["returned"])
        at = enumerate(self.at)
        return next((row for row, place in at if place and place[:2] not in known), None)

    def see(self, infos: dict[str, Any]) -> None:
        """Add scenery to the pictures of places."""
        for place, block, strip in infos.get("scenery", ()):
            self.regions[place].picture.add(block, strip)

    def _come(self, over: np.ndarray, ended: np.ndarray, returned: np.ndarray) -> None:
        """Count lives at the places that they have reached.

        Args:
            over: whether a life has ended; if its episode goes on, the next has begun.
            ended: whether an episode has ended.
            returned: whether one has begun in the middle of another, whose life counted there.
                All bool (num_envs,).
        """
        if len(self.been) != len(self.at):
            self.been = [None] * len(self.at)
        for row, place in enumerate(self.at):
            been = self.been[row]
            if place is None:
                continue
            if ended[row]:
                self.been[row] = None
                continue
            if been is None or over[row]:
                self.been[row] = been = {place} if returned[row] else set()
            if place not in been:
                been.add(place)
                self.regions[place].lives += 1

    def stand(self, step: int, infos: dict[str, Any], num_envs: int) -> None:
        """Record where all are, without a visit."""
        self.here = [None] * num_envs
        self.at = [None] * num_envs
        if "cell" not in infos:
            return
        cells = infos["cell"].tolist()
        for row in np.flatnonzero(infos["_cell"]).tolist():
            world, stage, area, x, y = cells[row]
            self.at[row] = place = world, stage, area
            self.here[row] = self.regions[place].cells.setdefault((x, y), Visits(step))
            self.changed.add(place)

    def judge(self, surprise: list[float]) -> None:
        """Record the surprise of the latest vector step, of each environment; nan: unknown."""
        for visits, value in zip(self.here, surprise, strict=True):
            if visits is not None and not math.isnan(value):
                visits.judged += 1
                visits.surprise += value

    def finish(self, step: int, episode: dict[str, Any]) -> None:
        """Record an episode that ended by an agent step, see `EpisodeStatistics`."""
        self.distance_max = max(self.distance_max, float(episode.get("distance", 0)))
        score = float(episode.get("distance", episode["reward"]))
        self.latest.append(score)
        actions = episode["actions"]
        if self.best is None or (score, -len(actions)) > (self.best.score, -len(self.best.actions)):
            self.best = Recording(step, score, int(episode["seed"]), list(actions))

    def discover(self, step: int, way: tuple[int, list[int]]) -> None:
        """Record the way to a new level: seed and actions of the episode that got there."""
        self.way = Recording(step, float(len(self.levels())), *way)

    def recordings(self) -> dict[str, Recording]:
        """Episodes worth watching, by name: "best" and "way", if they exist."""
        found = {"best": self.best, "way": self.way}
        return {name: episode for name, episode in found.items() if episode is not None}

    def levels(self) -> set[tuple[int, int]]:
        """World and stage of all levels visited."""
        return {at[:2] for at, region in self.regions.items() if region.cells}

    def objective(self) -> float:
        """Mean score of the latest episodes, however few; 0 if none. What a search maximises."""
        return sum(self.latest) / max(1, len(self.latest))

    def average(self) -> float | None:
        """Mean score of the latest episodes; None if fewer than `LATEST`."""
        return self.objective() if len(self.latest) == LATEST else None

    def names(self) -> dict[Place, str]:
        """Of all places: "1-1", or "1-1_area_2" for the second area found in a level."""
        areas: dict[tuple[int, int], int] = defaultdict(int)  # of each level, so far
        names = {}
        for place in self.regions:
            level = place[:2]
            areas[level] += 1
            names[place] = "{}-{}".format(*level)
            names[place] += f"_area_{areas[level]}" if areas[level] > 1 else ""
        return names

    def news(self) -> dict[str, Region]:
        """Regions visited since the last call, by name."""
        found = {n: self.regions[at] for at, n in self.names().items() if at in self.changed}
        self.changed.clear()
        return found

    def places(self) -> list[dict[str, Any]]:
        """What is known of every place, in the order of discovery.

        `place`: its name; `first`: agent step of the first visit; `lives` that have come there;
        `ends`: lives and episodes that ended there; `cells` visited.
        """
        found = [
            {
                "place": name,
                "first": min(visits.first for visits in region.cells.values()),
                "lives": region.lives,
                "ends": sum(visits.ends for visits in region.cells.values()),
                "cells": len(region.cells),
            }
            for at, name in self.names().items()
            if (region := self.regions[at]).cells
        ]
        return sorted(found, key=lambda place: place["first"])

    def statistics(self) -> dict[str, float]:
        """The `explore/` metrics; none for an environment without cells."""
        cells = sum(len(region.cells) for region in self.regions.values())
        if not cells:
            return {}
        return {
            "explore/cells": cells,
            "explore/levels": len(self.levels()),
            "explore/distance_max": self.distance_max,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and arrays; the pictures as PNG files."""
        cells, visits = [], []
        for place, region in self.regions.items():
            cells += [(*place, *cell) for cell in region.cells]
            visits += list(region.cells.values())
        return {
            "distance_max": self.distance_max,
            "best": None if self.best is None else asdict(self.best),
            "way": None if self.way is None else asdict(self.way),
            "latest": list(self.latest),
            "cells": np.array(cells, np.int64).reshape(-1, 5),
            "visits": np.array([(v.first, v.count, v.ends, v.judged) for v in visits], np.int64),
            "surprise": np.array([v.surprise for v in visits], np.float64),
            "lives": {" ".join(map(str, at)): region.lives for at, region in self.regions.items()},
            "been": [None if been is None else [*map(list, been)] for been in self.been],
            "pictures": {
                " ".join(map(str, place)): {
                    "png": cv2.imencode(".png", region.picture.pixels[..., ::-1])[1],
                    "known": region.picture.known,
                }
                for place, region in self.regions.items()
                if region.picture.known.any()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict` that a checkpoint kept."""
        self.distance_max = state["distance_max"]
        kept = (state.get(name) for name in ("best", "way"))
        self.best, self.way = (None if each is None else Recording(**each) for each in kept)
        self.latest.extend(map(float, state["latest"]))
        table = zip(
            state["cells"].tolist(),
            state["visits"].tolist(),
            state["surprise"].tolist(),
            strict=True,
        )
        for (world, stage, area, x, y), (first, count, ends, judged), surprise in table:
            visits = Visits(first, count, ends, judged, surprise)
            self.regions[world, stage, area].cells[x, y] = visits
        for name, picture in state["pictures"].items():
            world, stage, area = map(int, name.split())
            pixels = cv2.imdecode(picture["png"].numpy(), cv2.IMREAD_COLOR)
            assert pixels is not None
            known = picture["known"].numpy()
            self.regions[world, stage, area].picture = Picture(pixels[..., ::-1].copy(), known)
        for name, lives in state["lives"].items():
            world, stage, area = map(int, name.split())
            self.regions[world, stage, area].lives = lives
        self.been = [None if each is None else {*map(tuple, each)} for each in state["been"]]
        self.changed.update(self.regions)


def restored(state: dict[str, Any]) -> Exploration:
    """What a checkpoint says has been found."""
    found = Exploration()
    found.load_state_dict(state)
    return found
