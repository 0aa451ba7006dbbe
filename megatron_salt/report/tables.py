"""The report's tables, as Markdown that also reads well in a terminal. The baseline comes first."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_salt.report.runs import CONFIG_KEYS, RunLog, find_crossing


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal; numbers to the right."""
    header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
    columns = [list(column) for column in zip(header, *rows, strict=True)]
    widths = [max(3, *(len(cell) for cell in column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rules = [
        "-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)
    ]
    return "\n".join([line(header), line(rules), *(line(row) for row in rows)])


def results_table(
    runs: Sequence[RunLog], teachers: Mapping[str, float], teacher_run: RunLog | None
) -> str:
    """The main table: what each run reached and what it took. The baseline comes first."""
    rows = [
        [
            run.label,
            f"{run.final.ce_nats:.4f}",
            f"{100 * run.final.accuracy:.2f} %",
            f"{run.best.ce_nats:.4f} ({run.best.step})",
            f"{run.num_steps}"
            if run.final.step == run.num_steps
            else f"{run.final.step} of {run.num_steps}",
            f"{run.num_tokens:,}",
            f"{run.train_s[-1]:,.1f}",
        ]
        for run in runs
    ]
    for label, ce_nats in teachers.items():
        rows.append([f"*{label}*", f"{ce_nats:.4f}", "", "", "", "", ""])
    if teacher_run is not None:
        final, best = teacher_run.final, teacher_run.best
        rows.append(
            [
                f"*{teacher_run.label}, its own run*",
                f"{final.ce_nats:.4f}",
                f"{100 * final.accuracy:.2f} %",
                f"{best.ce_nats:.4f} ({best.step})",
                f"{teacher_run.num_steps}",
                f"{teacher_run.num_tokens:,}",
                f"{teacher_run.train_s[-1]:,.1f}",
            ]
        )
    header = [
        "run",
        "final nats/token",
        "final accuracy",
        "best nats/token (step)",
        "steps",
        "tokens",
        "training s",
    ]
    return markdown_table(header, rows)


def crossing_table(runs: Sequence[RunLog]) -> str:
    """Steps and seconds until each run reaches the baseline's (the first's) final loss."""
    baseline = find_crossing(runs[0], runs[0].final.ce_nats)
    assert baseline is not None  # its last evaluation is there
    rows = []
    for run in runs:
        crossing = find_crossing(run, runs[0].final.ce_nats)
        if crossing is None:
            rows.append([run.label, "not reached", "not reached", "", "not reached", ""])
            continue
        is_baseline = run is runs[0]
        rows.append(
            [
                run.label,
                f"{crossing.evaluation_step}",
                f"{crossing.step:.1f}",
                "" if is_baseline else _saving(crossing.step, baseline.step),
                f"{crossing.train_s:,.1f}",
                "" if is_baseline else _saving(crossing.train_s, baseline.train_s),
            ]
        )
    header = [
        "run",
        "first evaluation there (step)",
        "steps (interpolated)",
        "step saving",
        "training s (interpolated)",
        "time saving",
    ]
    return markdown_table(header, rows)


def _saving(value: float, baseline: float) -> str:
    return f"{100 * (1 - value / baseline):.1f} %" if baseline > 0 else "undefined"


def step_time_table(runs: Sequence[RunLog]) -> str:
    """Mean step times by phase, and medians as ratios to the baseline's median."""
    baseline_median_s = float(np.median(runs[0].step_time_s))

    def cells(times_s: NDArray[np.float64]) -> list[str]:
        if not len(times_s):
            return ["", ""]
        ratio = float(np.median(times_s)) / baseline_median_s if baseline_median_s > 0 else math.nan
        return [f"{1000 * times_s.mean():,.1f}", f"{ratio:.3f}"]

    rows = []
    for run in runs:
        teacher_time_s = run.teacher_time_s[run.is_kd & np.isfinite(run.teacher_time_s)]
        rows.append(
            [
                run.label,
                f"{run.num_kd_steps}",
                *cells(run.step_time_s[run.is_kd]),
                f"{1000 * teacher_time_s.mean():,.1f}" if len(teacher_time_s) else "",
                f"{run.num_steps - run.num_kd_steps}",
                *cells(run.step_time_s[~run.is_kd]),
            ]
        )
    header = [
        "run",
        "KD steps",
        "KD mean ms",
        "KD ratio",
        "of it teacher ms",
        "LM steps",
        "LM mean ms",
        "LM ratio",
    ]
    return markdown_table(header, rows)


def config_table(runs: Sequence[RunLog]) -> str | None:
    """Sizes, schedules and seeds as far as the runs' config.json tell them, else None."""
    keys = [key for key in CONFIG_KEYS if any(key in run.config for run in runs)]
    if not keys:
        return None
    rows = [[run.label, *(str(run.config.get(key, "")) for key in keys)] for run in runs]
    return markdown_table(["run", *(f"`{key}`" for key in keys)], rows)
