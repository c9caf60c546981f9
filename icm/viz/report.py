"""A report of runs as one HTML file that needs no network: words, curves, maps, settings."""

import base64
import io
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from omegaconf import DictConfig, OmegaConf

from icm.charts import CHARTS
from icm.config import ELSEWHERE, flat, settings_of
from icm.errors import UserError
from icm.files import json_lines, latest, write_bytes
from icm.uncertainty import standard_error
from icm.versions import versions

COLOURS = ("#1f4e8c", "#c8641b", "#3a9158", "#a03070", "#6b6b6b", "#b59a00")
TEMPLATE = jinja2.Environment(
    loader=jinja2.PackageLoader("icm", "viz"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("report.html.jinja")
PLACES = "places.json"  # in a run folder: what `Exploration.places` says
SMOOTH = 5  # log intervals on either side
SVG_METADATA = ("Creator", "Date", "Format", "Type")  # left out: they name addresses


@dataclass
class Run:
    """A run folder, its settings and its log intervals, in order."""

    folder: Path
    settings: DictConfig
    given: list[str]  # settings of the command line
    rows: list[dict[str, float]]

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.resolve().name

    @property
    def is_complete(self) -> bool:
        """Whether it has reached its end."""
        return self.rows[-1]["step"] >= self.settings.total_steps

    @cached_property
    def kind(self) -> str:
        """Settings that do not differ within a kind, where it began, and whether it is complete.

        Runs of one kind are averaged.
        """
        settings: Any = OmegaConf.to_container(self.settings)
        compared = {
            name: value
            for name, value in flat(settings).items()
            if name not in ELSEWHERE | {"seed", "resume"}
        }
        return json.dumps([compared, self.rows[0]["step"], self.is_complete])

    def values(self, metric: str) -> np.ndarray:
        """A metric at every log interval, nan where there is none."""
        given = [row.get(metric) for row in self.rows]
        return np.array([np.nan if value is None else value for value in given], dtype=float)

    @cached_property
    def minutes(self) -> np.ndarray:
        """Time since the start of the run, or since it was resumed, at every log interval."""
        steps = np.diff(self.values("step"), prepend=np.nan)
        speed = self.values("speed/agent_steps_per_s")
        steps[0] = self.rows[0]["step"] if self.settings.resume is None else 0
        return np.cumsum(steps / speed) / 60

    def figures(self) -> dict[str, float]:
        """Its results; for episodes, the mean over the last tenth of the run."""
        last, latest = self.rows[-1], slice(-max(1, len(self.rows) // 10), None)
        found = {"agent steps": last["step"], "minutes": self.minutes[-1]}
        for name, metric in (
            ("distance", "episode/distance"),
            ("inverse gain", "icm/inverse_gain"),
        ):
            values = self.values(metric)[latest]
            if not np.isnan(values).all():
                found[name] = float(np.nanmean(values))
        for name, metric in (
            ("farthest", "explore/distance_max"),
            ("cells", "explore/cells"),
            ("levels", "explore/levels"),
        ):
            if metric in last:
                found[name] = last[metric]
        return found

    def facts(self) -> dict[str, str]:
        """What happened, in a few words each."""
        figures = self.figures()
        resumed = " since it was resumed" if self.settings.resume else ""
        facts = {
            "agent": f"{self.settings.agent.name} with {self.settings.curiosity.name}, "
            f"seed {self.settings.seed}",
            "game": str(self.settings.env.id),
            "agent steps": f"{thousands(int(figures['agent steps']))} of "
            f"{thousands(self.settings.total_steps)}",
            f"time{resumed}": counted(figures["minutes"], "minute"),
        }
        if "distance" in figures:
            facts["distance of an episode, last tenth"] = f"{figures['distance']:.0f} pixels"
        if "cells" in figures:
            facts["farthest"] = f"{figures['farthest']:.0f} pixels"
            cells, levels = counted(figures["cells"], "cell"), counted(figures["levels"], "level")
            facts["discovered"] = f"{cells} in {levels}"
        at_flag = np.flatnonzero(np.nan_to_num(self.values("episode/flag")))
        if len(at_flag):
            first = int(self.rows[at_flag[0]]["step"])
            facts[f"first flag{resumed}"] = (
                f"after {thousands(first)} agent steps, {self.minutes[at_flag[0]]:.1f} minutes"
            )
        if "inverse gain" in figures:
            facts["inverse gain, last tenth"] = f"{figures['inverse gain']:.2f} nats"
        return facts


def thousands(number: int) -> str:
    """A number with its digits in groups of three."""
    return f"{number:,}".replace(",", " ")


def counted(number: float, what: str) -> str:
    """So many whole ones, in words."""
    return f"{number:.0f} {what}" + ("" if round(number) == 1 else "s")


def read_runs(folder: Path) -> list[Run]:
    """The run of a run folder, or the runs of a sweep's folder that have begun to log.

    Raises:
        UserError: it is neither, or nothing was logged there.
    """
    if os.path.exists(folder / "metrics.jsonl"):  # pathlib raises if that cannot be looked at
        return [read_run(folder)]
    begun = [log for log in sorted(folder.glob("*/metrics.jsonl")) if b"\n" in log.read_bytes()]
    return [read_run(log.parent) for log in begun] or [read_run(folder)]


def read_run(folder: Path) -> Run:
    """Read a run folder, see `read_runs`."""
    overrides = folder / ".hydra" / "overrides.yaml"
    try:
        rows = json_lines(folder / "metrics.jsonl")
        settings = settings_of(folder)
        given = OmegaConf.load(overrides)
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or "its settings are damaged"
        if isinstance(error, FileNotFoundError) and folder.is_dir():
            reason = f"there is no {Path(error.filename).name} in it"
        raise UserError(f"{folder}: no run folder of scripts/train.py ({reason})") from None
    except Exception:  # from YAML, for a truncated file, for instance
        raise UserError(f"{overrides}: damaged; a full disk may be why") from None
    if not rows:
        raise UserError(f"{folder}: nothing has been logged there yet")
    return Run(folder, settings, [str(each) for each in given], rows)


def names_of(kinds: list[list[Run]]) -> list[str]:
    """Names to tell kinds of runs apart: the settings given, if they differ, else folders.

    Of runs that are not complete, it says so.
    """
    unfinished = ["" if runs[0].is_complete else " (not complete)" for runs in kinds]
    given = [
        [each for each in runs[0].given if not each.startswith(("seed=", "resume="))]
        for runs in kinds
    ]
    of_all = set(given[0]).intersection(*given)
    names = [
        " ".join(each for each in one if each not in of_all) or "no other setting" for one in given
    ]
    names = [name + more for name, more in zip(names, unfinished, strict=True)]
    if len(set(names)) == len(kinds):
        return names
    folders = [runs[0].name for runs in kinds]
    if len(set(folders)) < len(kinds):
        folders = [str(runs[0].folder) for runs in kinds]
    more = [f" and {len(runs) - 1} more" if len(runs) > 1 else "" for runs in kinds]
    return ["".join(parts) for parts in zip(folders, more, unfinished, strict=True)]


def colours(number: int) -> list[str]:
    """So many, all different."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0, 1, number))]


def compared(kinds: dict[str, list[Run]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A table of runs by kind: means, and standard errors of several runs.

    The kind with the greatest distance is first.

    Returns:
        the names of the columns; and of each kind, the colour of its curves and its cells.
    """
    figures = {name: [run.figures() for run in runs] for name, runs in kinds.items()}
    columns = list(dict.fromkeys(key for found in figures.values() for one in found for key in one))
    rows = []
    for (name, found), colour in zip(figures.items(), colours(len(kinds)), strict=True):
        cells = []
        for column in columns:
            values = np.array([one[column] for one in found if column in one])
            digits = {"inverse gain": 2, "levels": int(len(values) > 1)}.get(column, 0)
            text = f"{values.mean():.{digits}f}" if len(values) else "-"
            if len(values) > 1:
                text += f" ± {standard_error(values):.{digits}f}"
            cells.append(text)
        mean = np.mean([one.get("distance", 0) for one in found])
        rows.append((mean, colour, [name, str(len(found)), *cells]))
    rows.sort(key=lambda row: -row[0])
    return ["kind", "runs", *columns], [(colour, cells) for _, colour, cells in rows]


def write_report(runs: list[Run], out: Path) -> None:
    """Write the report of one run, or one that compares several.

    Runs that differ only in their seed are drawn as one curve with a band of ± one standard error.

    Raises:
        UserError: `out` cannot be written.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(run.kind, []).append(run)
    kinds = dict(zip(names_of([*by_settings.values()]), by_settings.values(), strict=True))
    single = runs[0] if len(runs) == 1 else None
    page = TEMPLATE.render(
        title=single.name if single else f"{len(runs)} runs",
        facts=single.facts() if single else None,
        compared=None if single else compared(kinds),
        charts=list(_charts(kinds)),
        maps=list(_maps(single.folder)) if single else [],
        places=_places(single.folder) if single else [],
        clip=_film(single.folder, "best") if single else None,
        way=_film(single.folder, "way") if single else None,
        settings=OmegaConf.to_yaml(single.settings) if single else None,
        checkpoint=shlex.quote(str(latest(single.folder))) if single else None,
        versions=versions(),
    )
    write_bytes(out, page.encode())


def _charts(kinds: dict[str, list[Run]]) -> Iterator[tuple[str, str]]:
    """Each question, and the SVG of its charts."""
    coloured = list(zip(kinds.values(), colours(len(kinds)), strict=True))
    for question, charts in CHARTS.items():
        known = {
            title: names
            for title, names in charts.items()
            if any(name in row for runs in kinds.values() for name in names for row in runs[0].rows)
        }
        if not known:
            continue
        columns = 2
        rows = -(-len(known) // columns)
        figure = Figure(figsize=(11, 2.9 * rows))
        # layout="constrained" would nearly double the time
        room = {"left": 0.05, "right": 0.99, "top": 1 - 0.1 / rows, "bottom": 0.18 / rows}
        grid = {**room, "wspace": 0.12, "hspace": 0.45}
        all_axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).flatten()
        for axes, (title, names) in zip(all_axes, known.items(), strict=False):
            for number, (runs, colour) in enumerate(coloured):
                for name, style in zip(names, ("-", "--", ":", "-."), strict=False):
                    label = "_" if number else name.partition("/")[2]  # "_": not in the legend
                    draw_mean(axes, runs, name, label, colour, style)
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel("agent steps, thousands")
            axes.tick_params(labelsize=8)
            axes.ticklabel_format(useOffset=False)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(frameon=False, fontsize=8)
        for axes in all_axes[len(known) :]:
            axes.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(SVG_METADATA))
        svg = text.getvalue()
        yield question, svg[svg.index("<svg") :]


def draw_mean(
    axes: Axes, runs: list[Run], metric: str, label: str, colour: str, style: str
) -> None:
    """Mean over runs and a band of ± one standard error; of a single run also the raw values.

    At the agent steps that all of them have logged.
    """
    logged = [dict(zip(run.values("step"), run.values(metric), strict=True)) for run in runs]
    steps = np.array(sorted(set.intersection(*map(set, logged))))
    raw = np.array([[one[step] for step in steps] for one in logged])
    if np.isnan(raw).all():
        return
    values = np.array([smoothed(one) for one in raw])
    mean = values.mean(0)
    point = "o" if len(steps) == 1 else None  # of which there is no line
    axes.plot(steps / 1000, mean, style, color=colour, label=label, marker=point)
    if len(runs) > 1:
        error = standard_error(values)
        band = (mean - error, mean + error)
        axes.fill_between(steps / 1000, *band, color=colour, alpha=0.2, linewidth=0)
    else:
        axes.plot(steps / 1000, raw[0], style, color=colour, alpha=0.2, lw=0.8)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, without missing ones; nan if all are missing."""
    padded = np.pad(values, SMOOTH, constant_values=np.nan)
    windows = np.ma.masked_invalid(sliding_window_view(padded, 2 * SMOOTH + 1))
    return np.ma.filled(windows.mean(1), np.nan)


def _film(folder: Path, name: str) -> str | None:
    """A film of a run, as base64, if there is one."""
    path = folder / "videos" / f"{name}.mp4"
    return base64.b64encode(path.read_bytes()).decode() if path.exists() else None


def _places(folder: Path) -> list[dict[str, str]]:
    """A table of the places a run discovered, in order of discovery."""
    path = folder / PLACES
    if not path.exists():
        return []
    try:
        return [
            {
                "place": place["place"].replace("_", " "),
                "first visit": f"after {thousands(place['first'])} agent steps",
                "lives that came there": thousands(place["lives"]),
                "lives and tries that ended there": thousands(place["ends"]),
                "cells": thousands(place["cells"]),
            }
            for place in json.loads(path.read_text())
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: damaged; remove it") from None


def _maps(folder: Path) -> Iterator[tuple[str, str]]:
    """The names of a run's maps and their images, as base64."""
    for path in sorted((folder / "maps").glob("*.png")):
        yield path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode()
