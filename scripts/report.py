"""Write a report of runs: `python scripts/report.py RUN [RUN ...] [--out report.html]`."""

import sys
from pathlib import Path

from icm.arguments import Parser
from icm.errors import UserError


def main() -> int:
    """Write the report and say where it is; the exit status is 2 if it cannot be made."""
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

    try:
        runs = {run.folder.resolve(): run for folder in options.runs for run in read_runs(folder)}
        write_report([*runs.values()], options.out)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
