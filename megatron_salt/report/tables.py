"""The report's tables, as Markdown that also reads well in a terminal. The baseline comes first."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_salt.files.markdown import markdown_table
from megatron_salt.report.runs import (
    Arm,
    RunLog,
    baseline_of,
    different_settings,
    find_crossing,
)


def _named_runs(arms: Sequence[Arm]) -> Iterator[tuple[str, RunLog, RunLog]]:
    """Every run with its name in the tables and the baseline that it is compared with."""
    for arm in arms:
        for run in arm.runs:
            yield arm.name_of(run), run, baseline_of(run, arms[0])


def results_table(
    arms: Sequence[Arm], teachers: Mapping[str, float], teacher_run: RunLog | None
) -> str:
    """The main table: what each run reached and what it took. The baseline comes first.

    With a single teacher it says from which evaluation on a run is ahead of it.
    """

    def ahead(run: RunLog) -> str:
        if len(teachers) != 1:
            return ""
        crossing = find_crossing(run, next(iter(teachers.values())))
        return f"{crossing.evaluation_step}" if crossing is not None else "never"

    def row(name: str, run: RunLog) -> list[str]:
        done = f"{run.num_steps}"
        return [
            name,
            f"{run.final.ce_nats:.4f}",
            f"{100 * run.final.accuracy:.2f} %",
            f"{run.best.ce_nats:.4f} ({run.best.step})",
            ahead(run) if run is not teacher_run else "",
            done if run.final.step == run.num_steps else f"{run.final.step} of {done}",
            f"{run.num_tokens:,}",
            f"{run.median_s[-1]:,.1f}",
            f"{run.summed_s[-1]:,.1f}",
        ]

    rows = [row(name, run) for name, run, _ in _named_runs(arms)]
    for label, ce_nats in teachers.items():
        rows.append([f"*{label}*", f"{ce_nats:.4f}", *[""] * 7])
    if teacher_run is not None:
        rows.append(row(f"*{teacher_run.label}, its own run*", teacher_run))
    header = [
        "run",
        "final nats/token",
        "final accuracy",
        "best nats/token (step)",
        "ahead of the teacher from step",
        "steps",
        "tokens",
        "training s",
        "sum of its steps s",
    ]
    return markdown_table(header, rows)


def seeds_table(arms: Sequence[Arm]) -> str | None:
    """Means over the seeds, with the lowest and the highest; None where all arms have one run."""
    if all(len(arm.runs) == 1 for arm in arms):
        return None
    rows = []
    for arm in arms:
        pairs = [(run, baseline_of(run, arms[0])) for run in arm.runs]
        cells = [_spread([run.final.ce_nats for run, _ in pairs], "{:.4f}")]
        if arm is arms[0]:
            cells += ["", "", ""]
        else:
            differences = [run.final.ce_nats - other.final.ce_nats for run, other in pairs]
            savings = [saving for pair in pairs if (saving := _savings(*pair)) is not None]
            cells.append(_spread(differences, "{:+.4f}"))
            if len(savings) < len(pairs):
                cells += [f"{len(savings)} of {len(pairs)} there", ""]
            else:
                cells += [_spread(column, "{:.1f} %") for column in zip(*savings, strict=True)]
        rows.append([arm.label, f"{len(arm.runs)}", *cells])
    header = [
        "mean (lowest to highest)",
        "seeds",
        "final nats/token",
        "minus the baseline's",
        "step saving",
        "time saving",
    ]
    return markdown_table(header, rows)


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(sum(values) / len(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _savings(run: RunLog, baseline: RunLog) -> tuple[float, float] | None:
    """Percent of the baseline's steps and seconds saved to its final loss; None if not reached."""
    there = find_crossing(run, baseline.final.ce_nats)
    own = find_crossing(baseline, baseline.final.ce_nats)
    assert own is not None  # its last evaluation is there
    if there is None:
        return None
    return _saved(there.step, own.step), _saved(there.median_s, own.median_s)


def _saved(value: float, baseline: float) -> float:
    return 100 * (1 - value / baseline) if baseline > 0 else math.nan


def crossing_table(arms: Sequence[Arm]) -> str:
    """Steps and seconds until each run reaches the final loss of its baseline."""
    rows = []
    for name, run, baseline in _named_runs(arms):
        crossing = find_crossing(run, baseline.final.ce_nats)
        own = find_crossing(baseline, baseline.final.ce_nats)
        assert own is not None  # its last evaluation is there
        if crossing is None:
            rows.append([name, "not reached", "not reached", "", "not reached", "", "", ""])
            continue
        savings = [
            "" if run is baseline else f"{_saved(value, reference):.1f} %"
            for value, reference in (
                (crossing.step, own.step),
                (crossing.median_s, own.median_s),
                (crossing.summed_s, own.summed_s),
            )
        ]
        rows.append(
            [
                name,
                f"{crossing.evaluation_step}",
                f"{crossing.step:.1f}",
                savings[0],
                f"{crossing.median_s:,.1f}",
                savings[1],
                f"{crossing.summed_s:,.1f}",
                savings[2],
            ]
        )
    header = [
        "run",
        "first evaluation there (step)",
        "steps (interpolated)",
        "step saving",
        "training s (median of the phase x its steps)",
        "time saving",
        "s (sum of the steps)",
        "saving by the sum",
    ]
    return markdown_table(header, rows)


def step_time_table(arms: Sequence[Arm]) -> str:
    """Step times by phase: medians, means, and the medians' ratios to the baseline's median."""

    def cells(times_s: NDArray[np.float64], baseline_s: float) -> list[str]:
        if not len(times_s):
            return ["", "", ""]
        median_s = float(np.median(times_s))
        ratio = median_s / baseline_s if baseline_s > 0 else math.nan
        return [f"{1000 * median_s:,.1f}", f"{1000 * times_s.mean():,.1f}", f"{ratio:.3f}"]

    rows = []
    for name, run, baseline in _named_runs(arms):
        baseline_s = float(np.median(baseline.step_time_s))
        teacher_time_s = run.teacher_time_s[run.is_kd & np.isfinite(run.teacher_time_s)]
        rows.append(
            [
                name,
                f"{run.num_kd_steps}",
                *cells(run.step_time_s[run.is_kd], baseline_s),
                f"{1000 * np.median(teacher_time_s):,.1f}" if len(teacher_time_s) else "",
                f"{run.num_steps - run.num_kd_steps}",
                *cells(run.step_time_s[~run.is_kd], baseline_s),
            ]
        )
    header = [
        "run",
        "KD steps",
        "KD median ms",
        "KD mean ms",
        "KD ratio",
        "teacher median ms",
        "LM steps",
        "LM median ms",
        "LM mean ms",
        "LM ratio",
    ]
    return markdown_table(header, rows)


def settings_table(arms: Sequence[Arm]) -> str | None:
    """The settings that differ between the runs; None where none does, or none is known."""
    names = different_settings([run for arm in arms for run in arm.runs])
    if not names:
        return None
    rows = []
    for arm in arms:
        known = [run.settings for run in arm.runs if run.settings]
        values = [
            ", ".join(dict.fromkeys(_setting(settings.get(name)) for settings in known))
            for name in names
        ]
        rows.append([arm.label, *values])
    return markdown_table(["run", *(f"`{name}`" for name in names)], rows)


def _setting(value: Any) -> str:
    """A setting as a cell: of paths the last part, because a report names no folders."""
    if isinstance(value, list):
        return " ".join(_setting(item) for item in value) or "none"
    if value is None:
        return "none"
    return PurePath(value).name if isinstance(value, str) else str(value)
