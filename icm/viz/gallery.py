"""What is drawn of a run, and when."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from icm.config import Config
from icm.exploration import Exploration, Recording
from icm.files import remove_leftovers
from icm.intervals import crossed
from icm.ranks import RANK
from icm.viz.clip import film, film_way
from icm.viz.studio import Drawing, Drawn, Studio, maps, report

LOOK = 0.1  # seconds to wait for a drawing before asking `patience` again


class Gallery:
    """Maps, films and the report of a run, drawn beside it at their intervals.

    Of several learners, only the first draws.

    Args:
        folder: the run folder.
        config: all settings.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.studio = Studio()
        every = {"map": config.map.every, "video": config.video.every}
        every["report"] = config.report.every  # last, because it shows the others
        self.every = {name: steps for name, steps in every.items() if steps and RANK == 0}
        self.due: set[str] = set()
        self.filmed: dict[str, Recording] = {}

    def update(self, step: int, num_envs: int, exploration: Exploration) -> Drawn | None:
        """Begin to draw what is due; does not wait, except once for the process to start.

        Args:
            step: agent steps by now.
            num_envs: agent steps since the call before.
            exploration: what the run has found.

        Returns:
            what has been drawn since.
        """
        self.due |= {name for name, every in self.every.items() if crossed(step, num_envs, every)}
        drawn = self._finished(exploration)
        if self.due and not self.studio.is_busy:
            self._order(step, exploration)
        return drawn

    def finish(
        self, step: int, exploration: Exploration, patience: Callable[[], float]
    ) -> list[Drawn]:
        """Draw everything once more, and end.

        Args:
            step: agent steps by now.
            exploration: what the run has found.
            patience: seconds to wait for the drawing under way and this one together; asked
                repeatedly, because somebody may be in a hurry by then.
        """
        start = time.monotonic()

        def awaited() -> Drawn | None:
            drawn = None
            while self.studio.is_busy and drawn is None and time.monotonic() < start + patience():
                drawn = self._finished(exploration, LOOK)
            return drawn

        drawn = [awaited()]
        if self.every and not self.studio.is_busy:
            self.due = set(self.every)
            self._order(step, exploration)
            drawn.append(awaited())
        if self.studio.is_busy:
            lost = "no time to draw everything"
            if self._is_logged():
                lost += f"; `python scripts/report.py {self.folder}` writes the report"
            drawn.append(Drawn(step, {}, [lost]))
        self.close()
        return [each for each in drawn if each is not None]

    def close(self) -> None:
        """End the drawing process, and remove what it leaves half drawn."""
        self.studio.close()
        remove_leftovers(self.folder)

    def _finished(self, exploration: Exploration, seconds: float = 0.0) -> Drawn | None:
        """What has been drawn, see `Studio`; if any of it failed, all will be drawn again."""
        drawn = self.studio.finished(seconds)
        if drawn is not None and drawn.complaints:
            self.filmed.clear()
            exploration.changed.update(exploration.regions)
        return drawn

    def _is_logged(self) -> bool:
        """Whether there is anything to report."""
        log = self.folder / "metrics.jsonl"
        return log.is_file() and log.stat().st_size > 0

    def _order(self, step: int, exploration: Exploration) -> None:
        drawings: list[Drawing] = []
        if "map" in self.due and (news := exploration.news()):
            drawings.append(partial(maps, news, self.folder / "maps"))
        if "video" in self.due:
            films = {"best": film, "way": film_way}
            for name, episode in exploration.recordings().items():
                if episode is not self.filmed.get(name):
                    self.filmed[name] = episode
                    path = self.folder / "videos" / f"{name}.mp4"
                    drawings.append(partial(films[name], self.config.env, episode, path))
        if "report" in self.due and self._is_logged():
            drawings.append(partial(report, self.folder, exploration.places()))
        self.due.clear()
        if drawings:
            self.studio.order(step, drawings)
