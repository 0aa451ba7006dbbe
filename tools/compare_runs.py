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
    parser.add_argument(
        "--baseline",
        dest="baselines",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="baseline run; or several, of different seeds",
    )
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
        help="names of the runs in their order, instead of their directories'; as many more in "
        "front of them as there are baselines name these. Runs with the same name are seeds of one "
        "setting, each compared with the baseline of its seed",
    )
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="the teacher's own run")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.md")
    parser.add_argument("--title", default="Comparison of runs")
    args = parser.parse_args()
    every = len(args.baselines) + len(args.runs)
    if args.labels and len(args.labels) not in (len(args.runs), every):
        parser.error(
            f"{len(args.labels)} labels for {len(args.runs)} runs: give one for each, "
            f"or {len(args.baselines)} more in front for --baseline"
        )
    if args.output.suffix != ".md":
        parser.error(f"--output names the Markdown file to write, such as report.md: {args.output}")
    return args


def main() -> None:
    args = parse_args()
    directories = [*args.baselines, *args.runs]
    # Baselines without names of their own are called like the first of them.
    labels = [args.baselines[0].resolve().name] * len(args.baselines)
    labels += args.labels or [directory.resolve().name for directory in args.runs]
    if len(args.labels) == len(directories):
        labels = args.labels
    try:
        runs = [load_run(*pair) for pair in zip(directories, labels, strict=True)]
        teacher_run = load_run(args.teacher) if args.teacher else None
        tables = write_report(runs, args.output, title=args.title, teacher_run=teacher_run)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{tables}\n\nwritten: {args.output}")


if __name__ == "__main__":
    main()
