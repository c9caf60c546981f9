"""Says what torch files hold, or how two of them differ; runs nothing that a file contains.

    python scripts/inspect_ckpt.py [--json] PATH [PATH ...]
    python scripts/inspect_ckpt.py [--json] --diff PATH PATH

A PATH may be written as ckpt=PATH. It is a state_dict, a whole model or a checkpoint of this
project. torch is not needed, and not imported.
"""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from icm.arguments import Parser, run
from icm.checkpoint_reader import Entries, Tensor, printable, read_checkpoint
from icm.errors import UserError

DETAILS = ("format", "step", "seed", "versions", "metrics", "config")


def contents(path: str) -> dict[str, Any]:
    """Return what the file at `path` holds, as --json prints it.

    Raises `UserError` if it is not a file written by torch.save.
    """
    checkpoint = read_checkpoint(path)
    details, optimizers = {**checkpoint.details, "seed": checkpoint.seed}, checkpoint.optimizers
    return {
        "path": path,
        **{name: details.get(name) for name in DETAILS},
        "networks": {
            name: {"tensors": keyed(entries), **counts(entries)}
            for name, entries in checkpoint.networks.items()
        },
        "total": counts(checkpoint.entries),
        "optimizers": None if optimizers is None else counts(optimizers),
    }


def keyed(entries: Entries) -> list[dict[str, Any]]:
    """Describe each tensor, and give its key."""
    return [{"key": key, **kind(tensor)} for key, tensor in entries]


def kind(tensor: Tensor) -> dict[str, Any]:
    """Describe one tensor."""
    size = tensor.numel * tensor.item_size
    return {"shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": size}


def counts(entries: Entries) -> dict[str, int]:
    """Count `entries`; memory that several of them share counts once."""
    memory = {tensor.storage.key: tensor.storage.nbytes for _, tensor in entries}
    return {
        "count": len(entries),
        "elements": sum(tensor.numel for _, tensor in entries),
        "bytes": sum(memory.values()),
    }


def difference(a: str, b: str) -> dict[str, Any]:
    """Return how the files at `a` and `b` differ, as --diff --json prints it.

    Raises `UserError` if one of them cannot be read or compared.
    """
    from icm.checkpoint_difference import Change, compare, together  # only now: it takes NumPy

    def norms(change: Change | None) -> dict[str, float | None]:
        norm, relative = (change.norm, change.relative) if change else (None, None)
        return {"norm": norm, "relative": relative}

    found = compare(read_checkpoint(a), read_checkpoint(b))
    return {
        "a": a,
        "b": b,
        "details": [{"key": key, **values} for key, values in found.details.items()],
        "only_in_a": keyed(found.only["a"]),
        "only_in_b": keyed(found.only["b"]),
        "networks": {
            name: {
                "tensors": [
                    {"key": pair.key, "a": kind(pair.a), "b": kind(pair.b), **norms(pair.change)}
                    for pair in pairs
                ],
                **norms(together(pairs)),
            }
            for name, pairs in found.networks.items()
        },
        "total": norms(together(pair for pairs in found.networks.values() for pair in pairs)),
    }


def describe(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines for `contents`; the configuration, the longest part, ends them."""
    header = {name: report[name] for name in DETAILS if report[name] is not None}
    config = {"config": header.pop("config")} if "config" in header else {}
    yield from block(header)
    for network in report["networks"].values():
        for tensor in network["tensors"]:
            yield f"{printable(tensor['key'])}  torch.Size({tensor['shape']})"
    totals = [(printable(name), network) for name, network in report["networks"].items() if name]
    totals.append(("total", report["total"]))
    if report["optimizers"] is not None:
        totals.append(("optimizers (not listed, not in the total)", report["optimizers"]))
    for name, total in totals:
        yield "{}: {count} tensors, {elements} elements, {bytes} bytes".format(name, **total)
    yield from block(config)


def describe_difference(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines for `difference`."""
    for side in ("a", "b"):
        yield f"{side}: {printable(report[side])}"
    for detail in report["details"]:
        values = [text(detail[side]) if side in detail else "absent" for side in ("a", "b")]
        yield f"{printable(detail['key'])}: {' -> '.join(values)}"
    for side in ("a", "b"):
        for tensor in report[f"only_in_{side}"]:
            yield f"only in {side}: {printable(tensor['key'])}  torch.Size({tensor['shape']})"
    yield f"{'||b - a||':>10}{'/ ||a||':>11}  tensor"
    networks = report["networks"].items()
    for _, network in networks:
        for tensor in network["tensors"]:
            kinds = [(tensor["a"][name], tensor["b"][name]) for name in ("dtype", "shape")]
            unlike = ", ".join(f"{before} -> {after}" for before, after in kinds if before != after)
            yield row(tensor, f"{printable(tensor['key'])}  {unlike}".rstrip())
    for name, network in networks:
        if name and network["tensors"]:
            yield row(network, printable(name))
    yield row(report["total"], "total")


def block(values: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield `values` as lines much like YAML."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{printable(name)}:"
            yield from block(value, f"{indent}  ")
        else:
            bare = printable(value) if isinstance(value, str) else text(value)
            yield f"{indent}{printable(name)}: {bare}"


def text(value: Any) -> str:
    """Return `value` as JSON on one line, safe for a terminal."""
    return printable(json.dumps(value, ensure_ascii=False))


def row(norms: dict[str, Any], name: str) -> str:
    """Return a line of the table of changes."""
    norm, relative = (
        "-" if norms[key] is None else f"{norms[key]:.4g}" for key in ("norm", "relative")
    )
    return f"{norm:>10}{relative:>11}  {name}"


def finite(value: Any) -> Any:
    """Return a copy of `value` with None for the numbers that JSON lacks."""
    match value:
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def main() -> int:
    """Print what is asked for and return the exit status: 2 if a file cannot be read."""
    parser = Parser(
        "inspect_ckpt.py",
        "Print what torch files hold.",
        "[--json] PATH [PATH ...], or [--json] --diff PATH PATH",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file written by torch.save")
    parser.add_argument("--diff", action="store_true", help="print how two files differ")
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    options = parser.parse_args()
    paths = [path.removeprefix("ckpt=") for path in options.paths]
    if options.diff and len(paths) != 2:
        parser.error(f"--diff compares two files, not {len(paths)}")
    status = 0
    for path in paths[:1] if options.diff else paths:
        try:
            report = difference(*paths) if options.diff else contents(path)
        except UserError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            status = 2
            continue
        if options.json:
            print(json.dumps(finite(report), allow_nan=False))
            continue
        if not options.diff and len(paths) > 1:
            print(f"{printable(path)}:")
        for line in (describe_difference if options.diff else describe)(report):
            print(line)
    return status


if __name__ == "__main__":
    run(main)
