"""Measure speed while learning: `python scripts/bench.py [seconds=20] [rounds=3] [out=FILE]`."""

from omegaconf import DictConfig

from icm import cli


def main(settings: DictConfig) -> None:
    """Measure the tutorial's loop and training in turn; the last line is JSON."""
    import json
    import math
    import signal
    import sys
    from pathlib import Path
    from statistics import median

    from icm.bench import measure
    from icm.config import typed
    from icm.errors import UserError

    options = typed(settings, measure.BenchConfig)
    seconds, overrides = options.seconds, options.train
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds={seconds}: must be a positive number")
    if options.rounds < 1:
        raise UserError(f"rounds={options.rounds}: must be at least 1")
    out = None if options.out is None else Path(options.out)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"out={out}: must name a file in a folder that exists")
    for number in (signal.SIGINT, signal.SIGTERM):  # leave by an exception: it ends what runs
        signal.signal(number, lambda number, frame: sys.exit(128 + number))

    machine = measure.machine()
    rates: dict[str, list[float]] = {"tutorial": [], "nes_py": []}
    device = ""
    for done in range(1, options.rounds + 1):
        rate, device = measure.training_rate(seconds, overrides)  # first: it checks `train`
        rates["nes_py"].append(rate)
        rates["tutorial"].append(measure.tutorial_rate(seconds))
        latest = ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items())
        print(
            f"round {done} of {options.rounds}: {latest} agent steps/s", file=sys.stderr, flush=True
        )
    ratios = [ours / theirs for ours, theirs in zip(*reversed(rates.values()), strict=True)]

    each = [f"round {done}" for done in range(1, options.rounds + 1)]
    print("".join(f"{cell:>12}" for cell in ("", "median", "min", "max", *each)))
    for name, values in (*rates.items(), ("ratio", ratios)):
        cells = [median(values), min(values), max(values), *values]
        print(f"{name:>12}" + "".join(f"{cell:12.2f}" for cell in cells))
    print("in agent steps/s while learning; ratio: nes_py (default training) to tutorial")
    if machine["load"] > 0.25 * machine["cores"]:
        busy = f"load {machine['load']:.1f} on {machine['cores']} cores"
        print(f"the machine was busy before ({busy}): neither rates nor ratio are to be trusted")
    line = json.dumps(
        {
            "end_to_end": {
                "tutorial": {
                    "agent_steps_per_s": median(rates["tutorial"]),
                    "rounds": rates["tutorial"],
                },
                "nes_py": {
                    "agent_steps_per_s": median(rates["nes_py"]),
                    "rounds": rates["nes_py"],
                    "vs_tutorial": median(ratios),
                    "vs_tutorial_rounds": ratios,
                },
            },
            "seconds": seconds,
            "train": overrides,
            "device": device,
            "machine": machine,
        }
    )
    print(line)
    if out is not None:
        try:
            out.write_text(line + "\n")
        except OSError as error:
            raise UserError(f"out={out}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    cli.run(main, "bench")
