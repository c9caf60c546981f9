"""Prints the tensors of torch files: key, size and totals; runs nothing that a file contains.

    python scripts/inspect_ckpt.py PATH [PATH ...]

A PATH may be written as ckpt=PATH. It is a state_dict, a whole model or a checkpoint of this
project. torch is not needed, and not imported.
"""

import io
import os
import sys
from collections.abc import Iterator

from icm.arguments import Parser
from icm.checkpoint_reader import Checkpoint, Entries, printable, read_checkpoint
from icm.errors import UserError


def describe(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the lines that describe `checkpoint`."""
    yield from (f"{name}: {value}" for name, value in checkpoint.header.items())
    everything: Entries = [entry for network in checkpoint.networks.values() for entry in network]
    for key, tensor in everything:
        yield f"{printable(key)}  torch.Size({list(tensor.shape)})"
    for name, entries in checkpoint.networks.items():
        if name:
            yield totals(printable(name), entries)
    yield totals("total", everything)
    if checkpoint.optimizers is not None:
        yield totals("optimizers (not listed, not in the total)", checkpoint.optimizers)


def totals(name: str, entries: Entries) -> str:
    """Return the line that counts `entries`; memory that several of them share counts once."""
    elements = sum(tensor.numel for _, tensor in entries)
    memory = sum({tensor.storage.key: tensor.storage.nbytes for _, tensor in entries}.values())
    return f"{name}: {len(entries)} tensors, {elements} elements, {memory} bytes"


def main(arguments: list[str] | None = None) -> int:
    """Print what the files hold and return the exit status: 2 if any of them cannot be read."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file chooses the keys, the user the encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = Parser("inspect_ckpt.py", "Print the tensors of torch files.", "PATH [PATH ...]")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file written by torch.save")
    paths: list[str] = parser.parse_args(arguments).paths
    status = 0
    for path in (path.removeprefix("ckpt=") for path in paths):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            status = 2
            continue
        if len(paths) > 1:
            print(f"{printable(path)}:")
        for line in describe(checkpoint):
            print(line)
    sys.stdout.flush()  # here, where a closed pipe is handled, not at the end of the interpreter
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
