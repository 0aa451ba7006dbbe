"""The report's tables, as Markdown that also reads well in a terminal. The baseline comes first."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_salt.files.markdown import markdown_table
from megatron_salt.report import runs
from megatron_salt.report.runs import Arm, RunLog, baseline_of, find_crossing, marked, same_text


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows by the names of their columns. The first row has all; what others leave out is empty."""
    return markdown_table(list(rows[0]), [[row.get(name, "") for name in rows[0]] for row in rows])


def _named_runs(arms: Sequence[Arm]) -> Iterator[tuple[str, RunLog, RunLog]]:
    """Every run with its name in the tables and the baseline that it is compared with."""
    for arm in arms:
        for run in arm.runs:
            baseline = baseline_of(run, arms[0])
            yield marked(arm.name_of(run), run, baseline), run, baseline


def results_table(
    arms: Sequence[Arm], teachers: Mapping[str, float], teacher_run: RunLog | None
) -> str:
    """The main table: what each run reached and what it took. The baseline comes first.

    With a single teacher it says from which evaluation on a run is ahead of it.
    """

    def ahead(run: RunLog) -> str:
        if len(teachers) != 1:
            return ""
        if not same_text(run, baseline_of(run, arms[0])):
            return "-"
        crossing = find_crossing(run, next(iter(teachers.values())))
        return f"{crossing.evaluation_step}" if crossing is not None else "never"

    def row(name: str, run: RunLog) -> dict[str, str]:
        done = f"{run.num_steps}"
        return {
            "run": name,
            "final nats/token": f"{run.final.ce_nats:.4f}",
            "final accuracy": f"{100 * run.final.accuracy:.2f} %",
            "best nats/token (step)": f"{run.best.ce_nats:.4f} ({run.best.step})",
            "ahead of the teacher from step": ahead(run) if run is not teacher_run else "",
            "steps": done if run.final.step == run.num_steps else f"{run.final.step} of {done}",
            "tokens": f"{run.num_tokens:,}",
            "training s": f"{run.median_s[-1]:,.1f}",
            "sum of its steps s": f"{run.summed_s[-1]:,.1f}",
        }

    rows = [row(name, run) for name, run, _ in _named_runs(arms)]
    for label, ce_nats in teachers.items():
        rows.append({"run": f"*{label}*", "final nats/token": f"{ce_nats:.4f}"})
    if teacher_run is not None:
        name = f"*{teacher_run.label}, its own run*"
        rows.append(row(marked(name, teacher_run, arms[0].runs[0]), teacher_run))
    return _table(rows)


def datasets_table(arms: Sequence[Arm]) -> str | None:
    """Final losses on each held-out dataset; None where no run has several."""
    names = dict.fromkeys(name for _, run, _ in _named_runs(arms) for name in run.final.by_dataset)

    def cell(name: str, run: RunLog, baseline: RunLog) -> str:
        own, other = (each.final.by_dataset.get(name) for each in (run, baseline))
        if own is None or other is None or run is baseline:
            return "" if own is None else f"{own:.4f}"
        return f"{own:.4f} ({f'{own - other:+.4f}' if same_text(run, baseline) else '-'})"

    header = ["run", *(f"{name}, nats/token (minus the baseline's)" for name in names)]
    rows = [[label, *(cell(name, *both) for name in names)] for label, *both in _named_runs(arms)]
    return markdown_table(header, rows) if names else None


def held_out_notes(arms: Sequence[Arm], teacher_run: RunLog | None) -> list[str]:
    """Which runs were not, or may not have been, measured on their baseline's held-out text."""
    named = list(_named_runs(arms))
    if teacher_run is not None:
        pair = teacher_run, arms[0].runs[0]
        named.append((marked(teacher_run.label, *pair), *pair))
    notes = [
        f"**{name}: other held-out text** ({run.held_out_text}) than the baseline's "
        f"({baseline.held_out_text}): losses cannot be compared, what would follow is given as -."
        for name, run, baseline in named
        if not same_text(run, baseline)
    ]
    if unknown := ", ".join(name for name, run, _ in named if run.held_out is None):
        notes.append(
            f"**Held-out text not checked**: no checkpoint says on which text {unknown} was "
            f"measured; losses on different text cannot be compared."
        )
    return notes


def seeds_table(arms: Sequence[Arm]) -> str | None:
    """Means over the seeds, with the lowest and the highest; None where all arms have one run."""
    if all(len(arm.runs) == 1 for arm in arms):
        return None
    rows = []
    for arm in arms:
        pairs = [(run, baseline_of(run, arms[0])) for run in arm.runs]
        row = {
            "mean (lowest to highest)": arm.label, "seeds": f"{len(arm.runs)}",
            "final nats/token": _spread([run.final.ce_nats for run, _ in pairs], "{:.4f}"),
            "minus the baseline's": "", "step saving": "", "time saving": "",
        }  # fmt: skip
        if other := [pair for pair in pairs if not same_text(*pair)]:
            row |= {next(iter(row)): marked(arm.label, *other[0])} | dict.fromkeys([*row][3:], "-")
        elif arm is not arms[0]:
            differences = [run.final.ce_nats - other.final.ce_nats for run, other in pairs]
            row["minus the baseline's"] = _spread(differences, "{:+.4f}")
            savings = [saving for pair in pairs if (saving := _savings(*pair)) is not None]
            row["step saving"] = f"{len(savings)} of {len(pairs)} there"
            if len(savings) == len(pairs):
                for name, values in zip(("step", "time"), zip(*savings, strict=True), strict=True):
                    row[f"{name} saving"] = _spread(values, "{:.1f} %")
        rows.append(row)
    return _table(rows)


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
        if crossing is None or not same_text(run, baseline):
            never = "not reached" if same_text(run, baseline) else "-"
            rows.append([name, never, never, "", never, "", "", ""])
            continue
        row = [name, f"{crossing.evaluation_step}"]
        for measure, form in (("step", ".1f"), ("median_s", ",.1f"), ("summed_s", ",.1f")):
            value, reference = getattr(crossing, measure), getattr(own, measure)
            saving = "" if run is baseline else f"{_saved(value, reference):.1f} %"
            row += [f"{value:{form}}", saving]
        rows.append(row)
    header = [
        "run", "first evaluation there (step)", "steps (interpolated)", "step saving",
        "training s (median of the phase x its steps)", "time saving", "s (sum of the steps)",
        "saving by the sum",
    ]  # fmt: skip
    return markdown_table(header, rows)


def step_time_table(arms: Sequence[Arm]) -> str:
    """Step times by phase: medians, means, and the medians' ratios to the baseline's median."""

    def cells(phase: str, times_s: NDArray[np.float64], baseline_s: float) -> dict[str, str]:
        names = [f"{phase} {of}" for of in ("median ms", "mean ms", "ratio")]
        if not len(times_s):
            return dict.fromkeys(names, "")
        median_s = float(np.median(times_s))
        ratio = median_s / baseline_s if baseline_s > 0 else math.nan
        values = (f"{1000 * median_s:,.1f}", f"{1000 * times_s.mean():,.1f}", f"{ratio:.3f}")
        return dict(zip(names, values, strict=True))

    rows = []
    for name, run, baseline in _named_runs(arms):
        baseline_s = float(np.median(baseline.step_time_s))
        teacher_time_s = run.teacher_time_s[run.is_kd & np.isfinite(run.teacher_time_s)]
        teacher_ms = f"{1000 * np.median(teacher_time_s):,.1f}" if len(teacher_time_s) else ""
        row = {"run": name, "KD steps": f"{run.num_kd_steps}"}
        row |= cells("KD", run.step_time_s[run.is_kd], baseline_s)
        row |= {"teacher median ms": teacher_ms, "LM steps": f"{run.num_steps - run.num_kd_steps}"}
        row |= cells("LM", run.step_time_s[~run.is_kd], baseline_s)
        rows.append(row)
    return _table(rows)


def settings_table(arms: Sequence[Arm]) -> str | None:
    """The settings that differ between the runs; None where none does, or none is known."""
    every = [run for arm in arms for run in arm.runs]
    names = runs.different_settings(every)
    if len({frozenset(run.seed for run in arm.runs) for arm in arms}) == 1:
        names = [name for name in names if name != "train.seed"]
    if not names:
        return None
    depths = {name: _depth([r.settings.get(name) for r in every if r.settings]) for name in names}
    rows = []
    for arm in arms:
        known = [run.settings for run in arm.runs if run.settings]
        row = {"run": arm.label}
        for name in names:
            cells = [_setting(settings.get(name), depths[name]) for settings in known]
            row[f"`{name}`"] = ", ".join(dict.fromkeys(cells))
        rows.append(row)
    return _table(rows)


def _setting(value: Any, depth: int) -> str:
    """A setting as a cell: of paths the last parts."""
    if isinstance(value, list):
        return " ".join(_setting(item, depth) for item in value) or "none"
    if value is None:
        return "none"
    return "/".join(PurePath(value).parts[-depth:]) if isinstance(value, str) else str(value)


def _depth(values: Sequence[Any]) -> int:
    """How many last parts of paths tell them apart: as few as do, a report names no folders."""
    told_apart = [len({_setting(value, depth) for value in values}) for depth in range(1, 10)]
    return 1 + told_apart.index(max(told_apart))
