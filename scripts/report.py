"""Write a report of runs: `python scripts/report.py RUN [RUN ...] [--out report.html]`."""

from pathlib import Path

from icm.arguments import Parser, run


def main() -> int:
    """Write the report and say where it is; a `UserError` if it cannot be made."""
    parser = Parser(
        "report.py", "Write a report of runs as one HTML file.", "RUN [RUN ...] [--out FILE]"
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="a run folder, or that of a sweep"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the file, report.html if not given"
    )
    options = parser.parse_args()

    from icm.viz.report import read_runs, write_report  # only now: importing is slow

    runs = {run.folder.resolve(): run for folder in options.runs for run in read_runs(folder)}
    write_report([*runs.values()], options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    run(main)
