"""Reproduces rows of docs/results.md with the scripts that users run, seed by seed."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icm.errors import UserError
from icm.files import ROOT, json_lines, latest, write_lines
from icm.uncertainty import standard_error

METRICS = (
    "episode/distance",
    "episode/length",
    "episode/flag",
    "episode/levels_passed",
    "explore/cells",
    "explore/levels",
    "explore/distance_max",
    "icm/inverse_gain",
    "icm/inverse_accuracy",
    "policy/entropy",
    "policy/kl",
    "loss/forward",
    "reward/intrinsic",
    "speed/agent_steps_per_s",
)
"""What a summary keeps of every log interval."""


@dataclass
class Row:
    """See `conf/reproduce.yaml`."""

    train: list[Any]
    evaluate: dict[str, list[str]]
    after: str | None = None  # the row whose checkpoint with the same seed is continued


@dataclass
class ReproduceConfig:
    """See `conf/reproduce.yaml`."""

    row: str
    seeds: list[int]
    folder: str
    device: str
    rows: dict[str, Row]


def reproduce(config: ReproduceConfig) -> dict[str, list[dict[str, Any]]]:
    """Train and evaluate what is still missing of a row.

    An interrupted training continues. Written beside the runs are, for every seed,
    `<row>_seed<seed>.metrics.jsonl` and, for every evaluation, `<row>_seed<seed>.<name>.json`.

    Returns:
        the results of every evaluation, one per seed.

    Raises:
        UserError: there is no such row, no seed, or a script failed.
    """
    if config.row not in config.rows:
        raise UserError(f"row={config.row}: must be one of {', '.join(config.rows)}")
    if not config.seeds:
        raise UserError("seeds=[]: must be one or more")
    row, folder = config.rows[config.row], Path(config.folder)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in row.evaluate}
    for seed in config.seeds:
        name = f"{config.row}_seed{seed}"
        given = [*flattened(row.train), f"seed={seed}", f"device={config.device}"]
        run = folder / name
        metrics = folder / f"{name}.metrics.jsonl"
        if not metrics.exists():
            if row.after:
                before = f"{row.after}_seed{seed}"
                if not (folder / f"{before}.metrics.jsonl").exists():  # it may have been stopped
                    raise UserError(f"row={config.row}: needs row={row.after} of seed {seed} first")
                given.append(f"resume={latest(folder / before)}")
            script("train.py", [*given, f"hydra.run.dir={run}"])
            write_lines(metrics, map(json.dumps, summarised(json_lines(run / "metrics.jsonl"))))
        for kind, overrides in row.evaluate.items():
            out = folder / f"{name}.{kind}.json"
            if not out.exists():
                arguments = [f"ckpt={latest(run)}", f"device={config.device}", *overrides]
                printed = script("evaluate.py", arguments, capture=True)
                write_lines(out, printed.splitlines()[-1:])
            try:
                results[kind].append(dict(json.loads(out.read_text())))
            except (ValueError, TypeError):
                raise UserError(f"{out}: damaged; without it, it is made again") from None
    return results


def flattened(settings: list[Any]) -> Iterator[str]:
    """The settings in nested lists."""
    for setting in settings:
        if isinstance(setting, list):
            yield from flattened(setting)
        else:
            yield str(setting)


def summarised(rows: list[dict[str, Any]]) -> Iterator[dict[str, float]]:
    """A summary of a training's log intervals."""
    for row in rows:
        kept = {k: round(row[k], 4) for k in METRICS if row.get(k) is not None}
        yield {"step": row["step"], **kept}


def script(name: str, arguments: list[str], capture: bool = False) -> str:
    """Run a script of this program; return captured output.

    Raises:
        UserError: it failed. Its own message has been printed.
        SystemExit: a signal stopped it; a training has saved itself then.
    """
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    print("$", name, *arguments, flush=True)
    running = subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True)
    # a training takes time to save; Ctrl-C reaches it directly
    before = [
        signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.signal(signal.SIGTERM, lambda number, frame: running.terminate()),
    ]
    printed, _ = running.communicate()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    status = running.returncode
    if status < 0 or status > 128:
        sys.exit(128 - status if status < 0 else status)
    if status:
        raise UserError(f"{name} ended with status {status}")
    return printed or ""


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Distance and share of episodes past a level: per seed, then means of several."""
    lines = []
    for kind, of_seeds in results.items():
        for policy in ("sampled", "greedy", "random"):
            found = [result if policy == "sampled" else result[policy] for result in of_seeds]
            if "distance_mean" not in found[0]:
                continue
            distances, flags = ([f[key] for f in found] for key in ("distance_mean", "flag_rate"))
            cells = [f"{x:6.0f} ({share:.2f})" for x, share in zip(distances, flags, strict=True)]
            if len(distances) > 1:
                mean, error = np.mean(distances), standard_error(np.array(distances))
                cells.append(f"mean {mean:.0f} ± {error:.0f} ({np.mean(flags):.2f})")
            lines.append(f"{kind:10}{policy:10}" + "  ".join(cells))
    return "\n".join(lines)
