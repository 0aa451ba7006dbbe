"""Compares runs with a baseline at equal steps and at equal training seconds.

python tools/compare_runs.py --baseline runs/plain --run runs/salt --output reports/salt.md

Writes a Markdown report, with its plots as PNG files beside it, and prints its main tables.
"""

import argparse
import sys
from pathlib import Path

from megatron_salt.report import load_run, write_report


def parse_args() -> argparse.Namespace:
    summary, usage, rest = (__doc__ or "").split("\n\n", 2)
    parser = argparse.ArgumentParser(description=f"{summary} {rest}", epilog=f"example: {usage}")
    parser.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="baseline run")
    parser.add_argument(
        "--run",
        dest="runs",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="run to compare with the baseline; may be repeated",
    )
    parser.add_argument(
        "--label",
        dest="labels",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="names of the runs in their order, instead of their directories'; "
        "one more in front of them names the baseline",
    )
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="the teacher's own run")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.md")
    parser.add_argument("--title", default="Comparison of runs")
    args = parser.parse_args()
    if args.labels and len(args.labels) not in (len(args.runs), len(args.runs) + 1):
        parser.error(
            f"{len(args.labels)} labels for {len(args.runs)} runs: give one for each, "
            f"or one more in front for the baseline"
        )
    if args.output.suffix != ".md":
        parser.error(f"--output names the Markdown file to write, such as report.md: {args.output}")
    return args


def main() -> None:
    args = parse_args()
    if not args.labels:
        labels = [None] * (1 + len(args.runs))
    elif len(args.labels) == len(args.runs):
        labels = [None, *args.labels]
    else:
        labels = args.labels
    try:
        directories = [args.baseline, *args.runs]
        runs = [load_run(*pair) for pair in zip(directories, labels, strict=True)]
        teacher_run = load_run(args.teacher) if args.teacher else None
        tables = write_report(runs, args.output, title=args.title, teacher_run=teacher_run)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{tables}\n\nwritten: {args.output}")


if __name__ == "__main__":
    main()
