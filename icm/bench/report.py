"""The tables that scripts/bench.py prints."""

from collections.abc import Iterator
from typing import Any


def tables(result: dict[str, Any]) -> str:
    """The results of `icm.bench.suite.measure` as text."""
    return "\n".join(_lines(result))


def _row(name: str, *cells: object) -> str:
    return f"{name:28}" + "".join(f"{cell:>14}" for cell in cells)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}{unit}"


def _spread(rounds: list[float]) -> str:
    return f"{_number(min(rounds))}-{_number(max(rounds))}"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield _row("emulator", "frames/s", "seen drawn")
    for name, found in result["emulator"].items():
        skipping = _number(found.get("skipping_frames_per_s"))
        yield _row(name, _number(found["frames_per_s"]), skipping)
    yield ""
    yield _row("environment", "frames/s", "agent steps/s", "overhead", "with state")
    for name, found in result["environment"].items():
        shares = (f"{100 * found[key]:.0f} %" for key in ("overhead", "overhead_with_state"))
        yield _row(
            name, _number(found["frames_per_s"]), _number(found["agent_steps_per_s"]), *shares
        )
    yield ""
    yield _row("many environments", "agent steps/s", "alone", "share", "spread")
    for name, found in result["vector"].items():
        yield _row(
            name,
            _number(found["agent_steps_per_s"]),
            _number(found["alone_agent_steps_per_s"]),
            _number(found["share_of_alone"]),
            _spread(found["share_of_alone_rounds"]),
        )
    for name, rows in result["scaling"].items():
        for row in rows:
            sizes = f"{name}: {row['envs']} in {row['processes']}"
            yield _row(sizes, _number(row["agent_steps_per_s"]))
    yield ""
    update = result["update"]
    yield _row("update", "samples/s", "ms", "speedup")
    for name, found in update["modes"].items():
        yield _row(name, *(_number(found[key]) for key in ("samples_per_s", "ms", "speedup")))
    acting = f"acting {update['act_ms']:.1f} ms, observing {update['observe_ms']:.1f} ms"
    yield f"{acting} per vector step; in all {update['seconds_per_agent_step'] * 1e3:.2f} ms"
    yield "of one core per agent step"
    yield ""
    yield _row("training", "agent steps/s", "spread", "x tutorial", "x SB3", "of ideal")
    for name, found in result["end_to_end"].items():
        yield _row(
            name,
            _number(found["agent_steps_per_s"]),
            _spread(found["rounds"]),
            _number(found.get("vs_tutorial")),
            _number(found.get("vs_sb3")),
            _number(found.get("share_of_ideal")),
        )
    machine = result["machine"]
    if machine["busy"] > 0.1 * machine["cores"]:
        busy = f"{machine['busy']:.1f} of {machine['cores']} cores"
        yield f"the machine had other things to do ({busy}): no figure here is to be trusted"
