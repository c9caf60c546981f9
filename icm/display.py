"""What is shown of work that takes minutes: of a training, also plain lines without a terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from icm.output import discard
from icm.ranks import RANK

PHASES = ("act", "observe", "update", "wait")
PLAIN_EVERY = 60.0  # seconds between two plain lines


class Stderr(Console):
    """The console of a program that continues when nobody reads its output any more."""

    def __init__(self, **options: Any) -> None:
        super().__init__(stderr=True, **options)

    @property
    def is_live(self) -> bool:
        """Whether it can show what moves.

        Rich draws nothing live on a dumb terminal, and can be told that a file is a terminal.
        """
        return self.is_interactive and sys.stderr.isatty()

    def _write_buffer(self) -> None:
        """See the class; rich would exit on a closed pipe, and raise on a lost terminal."""
        try:
            super()._write_buffer()
        except OSError:
            discard(sys.stderr.fileno())


def counted[T](items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Pass items on, and show on a terminal how many of `total` there have been."""
    console = Stderr(soft_wrap=True)  # long lines printed above stay lines
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns,
        console=console,
        transient=True,
        # printed above the bar, on the same terminal; what goes elsewhere must get there
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        disable=not console.is_live,
    ) as bar:
        yield from bar.track(items, total, description=what)


class Display:
    """Shows progress on stderr, and what the run has found so far.

    Args:
        step: agent steps already done.
        total_steps: agent steps of the whole run.
    """

    def __init__(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.saved: int | None = None
        self.printed = time.monotonic()
        console = Stderr(quiet=RANK > 0)
        self.is_live = console.is_live
        self.bar = Progress(
            TextColumn("{task.completed:,.0f} / {task.total:,.0f} steps"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("", total=total_steps, completed=step)
        self.found, self.speed = Text(), Text()
        picture = Group(self.bar, self.found, self.speed)
        self.live = Live(picture, console=console, refresh_per_second=2, transient=True)
        if self.is_live:
            self.live.start()

    def advance(self, step: int) -> None:
        """Move on to an agent step; now and then, a plain line tells what was shown last."""
        self.bar.update(self.task, completed=step)
        if not self.is_live and time.monotonic() - self.printed >= PLAIN_EVERY:
            self._print(step)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Show a log interval's metrics."""
        self.found.plain, self.speed.plain = self._found(metrics), self._speed(metrics)
        if not self.is_live and step >= self.total_steps:
            self._print(step)

    def _print(self, step: int) -> None:
        self.printed = time.monotonic()
        parts = [f"step {step:,} of {self.total_steps:,}", self.found.plain, self.speed.plain]
        self.say(" · ".join(filter(None, parts)))

    def say(self, line: str) -> None:
        """Print a line above the live picture."""
        self.live.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _found(self, metrics: dict[str, float]) -> str:
        shown = (
            ("distance", "episode/distance", "{:.0f}"),
            ("best", "explore/distance_max", "{:.0f}"),
            ("levels", "explore/levels", "{:.0f}"),
            ("cells", "explore/cells", "{:.0f}"),
            ("at a flag", "episode/flag", "{:.0%}"),
            ("gain", "icm/inverse_gain", "{:.2f}"),
        )
        return " · ".join(
            f"{label} {form.format(metrics[name])}"
            for label, name, form in shown
            if name in metrics
        )

    def _speed(self, metrics: dict[str, float]) -> str:
        phases = ", ".join(
            f"{name} {metrics[f'speed/{name}_share']:.0%}"
            for name in PHASES
            if f"speed/{name}_share" in metrics
        )
        saved = "" if self.saved is None else f" · saved {self.saved:,}"
        return f"{metrics['speed/agent_steps_per_s']:.0f} steps/s · {phases}{saved}"

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.live.stop()
