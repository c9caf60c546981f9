"""Measure speed: `python scripts/bench.py [quick=true]`; `--help` lists the settings."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(settings: "DictConfig") -> None:
    """Measure the parts and whole trainings; print tables, write JSON."""
    import json
    import signal
    import sys
    from pathlib import Path

    from icm.bench.report import tables
    from icm.bench.suite import BenchConfig, measure, trained
    from icm.config import checked
    from icm.errors import UserError
    from icm.files import write_bytes
    from icm.processes import signals_handled

    options = checked(settings, BenchConfig)
    if not hasattr(signal, "SIGSTOP"):
        raise UserError("bench.py pauses processes, which Linux and macOS can")
    config = trained(options)
    out = Path(options.out)
    is_new = not out.exists()
    try:  # before minutes of measuring; what is there stays until then
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror}") from None
    if is_new:
        out.unlink()
    # leave by an exception: it ends what runs
    with signals_handled(lambda number, frame: sys.exit(128 + number)):
        result = measure(options, config)
    print(tables(result))
    write_bytes(out, f"{json.dumps(result, indent=1)}\n".encode())
    print(f"written to {out}")


if __name__ == "__main__":
    from icm import cli  # here, because worker processes import this file, too

    cli.run(main, "bench")
