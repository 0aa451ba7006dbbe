"""Compares runs with a baseline at equal steps and at equal training seconds.

    megatron-salt compare --baseline runs/plain --run runs/salt --output reports/salt.md

Writes a Markdown report, with its plots as PNG files beside it, and prints its main tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    add("--baseline", dest="baselines", type=Path, required=True, metavar="DIR", **several,
        help="baseline run; or several, of different seeds")  # fmt: skip
    add("--run", dest="runs", type=Path, required=True, metavar="DIR", **several,
        help="run to compare with the baseline; or several")  # fmt: skip
    add("--label", dest="labels", default=[], metavar="NAME", **several,
        help="names, in order, of the runs, of the baselines and the runs, or of the settings "
        "(default: of each setting the directory of its first run). Runs with one name are seeds "
        "of one setting, each compared with the baseline of its seed")  # fmt: skip
    add("--teacher", type=Path, metavar="DIR", help="the teacher's own run")
    add("--output", type=Path, required=True, metavar="FILE.md")
    add("--title", default="Comparison of runs")


def run(args: argparse.Namespace) -> int:
    # matplotlib takes a second to import: --help does not wait for it
    from megatron_salt.report import load_run, with_labels, write_report

    directories = [*args.baselines, *args.runs]
    if args.output.suffix != ".md":
        raise ValueError(
            f"--output names the Markdown file to write, such as report.md: {args.output}"
        )
    runs = [load_run(directory, directory.resolve().name) for directory in directories]
    runs = with_labels(runs, len(args.baselines), args.labels)
    teacher_run = load_run(args.teacher) if args.teacher else None
    tables = write_report(runs, args.output, title=args.title, teacher_run=teacher_run)
    print(f"{tables}\n\nwritten: {args.output}")
    return 0
