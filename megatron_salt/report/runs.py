"""Runs as their `metrics.jsonl` tells them: read, checked, and measured against a target loss.

Training seconds come from `step_time_s`: the teacher's forwards count, evaluations and checkpoints
do not. Compared are the seconds of a run whose every step takes its phase's median, because a
single step that waits for another process changes a sum, and nothing else. The sum is kept beside.
Evaluations describe the model after their step; step 0 is the initial model.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_salt.files.json_files import read_object

# What every line of a training step holds. Only those that the report uses are checked further.
STEP_KEYS = ("phase", "ce_nats", "kl_nats", "kd_weight", "loss", "lr", "grad_norm", "tokens",
             "step_time_s", "tokens_per_s", "teacher_time_s")  # fmt: skip
VALID_KEYS = ("valid_ce_nats", "valid_accuracy", "valid_tokens")
BY_DATASET = f"{VALID_KEYS[0]}/"

# Where a run keeps its own files: it differs between all runs and says nothing about them.
OWN_FOLDERS = ("train.output_dir", "data.cache_path")


@dataclass(frozen=True, kw_only=True)
class HeldOutPoint:
    """What an evaluation of the model after `step` measured."""

    step: int
    ce_nats: float
    accuracy: float
    num_tokens: int
    teacher_ce_nats: float | None
    by_dataset: Mapping[str, float]
    """Nats per token of each held-out dataset; empty where there is only one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunLog:
    """A run as its `metrics.jsonl` tells it: one array element per training step, from step 1."""

    label: str
    is_kd: NDArray[np.bool_]
    ce_nats: NDArray[np.float64]
    kd_weight: NDArray[np.float64]
    step_time_s: NDArray[np.float64]
    teacher_time_s: NDArray[np.float64]  # NaN where the file says null
    num_tokens: int
    evaluations: tuple[HeldOutPoint, ...]
    settings: Mapping[str, Any]
    """Of config.json, and of deepspeed.json under `deepspeed.`; empty where neither file is."""
    held_out: str | None
    """Fingerprint of the held-out samples; None: no checkpoint is there to say it."""

    @property
    def num_steps(self) -> int:
        return len(self.step_time_s)

    @property
    def num_kd_steps(self) -> int:
        return int(self.is_kd.sum())

    @property
    def final(self) -> HeldOutPoint:
        return self.evaluations[-1]

    @property
    def best(self) -> HeldOutPoint:
        return min(self.evaluations, key=lambda evaluation: evaluation.ce_nats)

    @cached_property
    def summed_s(self) -> NDArray[np.float64]:
        """Training seconds after 0, 1, 2, ... steps, as they were."""
        return np.concatenate([[0.0], np.cumsum(self.step_time_s)])

    @cached_property
    def median_s(self) -> NDArray[np.float64]:
        """Training seconds after 0, 1, 2, ... steps that each take the median of their phase."""
        steady_s = np.empty_like(self.step_time_s)
        for phase in (self.is_kd, ~self.is_kd):
            if phase.any():
                steady_s[phase] = np.median(self.step_time_s[phase])
        return np.concatenate([[0.0], np.cumsum(steady_s)])

    @property
    def held_out_text(self) -> str:
        """On what it was measured: two runs' losses can be compared where these are alike."""
        sizes = sorted({f"{evaluation.num_tokens:,}" for evaluation in self.evaluations})
        return f"{self.held_out or 'fingerprint unknown'}, {' and '.join(sizes)} tokens"

    @property
    def seed(self) -> int | None:
        """The run's train.seed; None without its config.json."""
        seed = self.settings.get("train.seed")
        return seed if isinstance(seed, int) else None

    @property
    def teacher_ce_nats(self) -> float | None:
        """The teacher's held-out loss as this run measured it last; None without a teacher."""
        measured = [e.teacher_ce_nats for e in self.evaluations if e.teacher_ce_nats is not None]
        return measured[-1] if measured else None


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where a run's held-out loss first is at or below a target."""

    step: float
    median_s: float
    summed_s: float
    evaluation_step: int  # the first evaluation at or below the target, which is not interpolated


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The runs of one label: a single one, or several that differ in their seeds."""

    label: str
    runs: tuple[RunLog, ...]

    def name_of(self, run: RunLog) -> str:
        return self.label if len(self.runs) == 1 else f"{self.label}, seed {run.seed}"


def load_run(directory: Path, label: str | None = None) -> RunLog:
    """Reads and checks `metrics.jsonl` (and the settings, if they are there) of a run directory.

    Raises: ValueError with file, line and remedy when a line is torn, a key or a step is missing,
    a step occurs twice, or no evaluation ran.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Name a run's output directory, which holds it.")
    rows = _read_rows(path)
    first_line = 2 if rows[0].get("step") == 0 else 1
    steps = rows[first_line - 1 :]
    if not steps:
        raise ValueError(f"{path}:1: holds no training step, only step 0. Train before comparing.")
    for step, row in enumerate(steps, start=1):
        _check_step(row, step, f"{path}:{step + first_line - 1}")
    read = (_read_evaluation(row, f"{path}:{line}") for line, row in enumerate(rows, start=1))
    evaluations = tuple(found for found in read if found is not None)
    if not evaluations or evaluations[-1].step == 0:
        raise ValueError(
            f"{path}:{len(rows)}: no evaluation ran in {len(steps)} steps (no line has "
            f"'valid_ce_nats'). Train with held-out data and an evaluation interval."
        )
    is_kd = np.array([row["phase"] == "kd" for row in steps])
    if np.any(is_kd[1:] & ~is_kd[:-1]):
        line = int(np.argmax(is_kd[1:] & ~is_kd[:-1])) + 1 + first_line
        raise ValueError(
            f"{path}:{line}: phase 'kd' after phase 'lm'. A run has one KD phase, at its start; "
            f"are these two runs in one file?"
        )
    teacher_time_s = [_number(row, "teacher_time_s", "", nullable=True) for row in steps]
    return RunLog(
        label=label if label is not None else directory.resolve().name,
        is_kd=is_kd,
        ce_nats=np.array([float(row["ce_nats"]) for row in steps]),
        kd_weight=np.array([float(row["kd_weight"]) for row in steps]),
        step_time_s=np.array([float(row["step_time_s"]) for row in steps]),
        teacher_time_s=np.array([math.nan if t is None else t for t in teacher_time_s]),
        num_tokens=int(steps[-1]["tokens"]),
        evaluations=evaluations,
        settings=_read_settings(directory / "config.json")
        | _read_settings(directory / "deepspeed.json", "deepspeed."),
        held_out=_read_held_out(directory),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        raise ValueError(f"{path}:1: the file is empty. Did the run reach its first step?")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            remedy = (
                "The last line is torn, as a killed run leaves it: resume the run or delete it"
                if number == len(lines)
                else "Restore the line from a copy or run again; the steps around it are in doubt"
            )
            raise ValueError(f"{path}:{number}: not JSON ({error}). {remedy}.") from None
        except (ValueError, RecursionError) as error:  # digits or brackets without end
            raise ValueError(f"{path}:{number}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}:{number}: expected one JSON object per line, got {line[:60]!r}."
            )
        rows.append(row)
    return rows


def _check_step(row: Mapping[str, Any], expected_step: int, where: str) -> None:
    """Checks one training step's line: the expected step, all keys, usable numbers."""
    step = _number(row, "step", where)
    if step != expected_step:
        kind = "is missing" if step is not None and step > expected_step else "was expected"
        raise ValueError(
            f"{where}: step {row['step']} where step {expected_step} {kind}. Steps must be 1, 2, "
            f"3, ... each once and in order; a duplicated or decreasing step means that two runs "
            f"wrote into one file, a gap that lines were lost. Use the metrics of one whole run."
        )
    missing = [key for key in STEP_KEYS if key not in row]
    if missing:
        raise ValueError(
            f"{where}: step {expected_step} lacks {', '.join(missing)}. "
            f"Was this file written by another version or edited? Run again."
        )
    if row["phase"] not in ("kd", "lm"):
        raise ValueError(f"{where}: phase is {row['phase']!r}, expected 'kd' or 'lm'.")
    for key in ("ce_nats", "kd_weight", "tokens"):
        _number(row, key, where)
    seconds = _number(row, "step_time_s", where)
    if seconds is None or seconds < 0:
        raise ValueError(f"{where}: step_time_s is {seconds}; a step cannot take negative time.")
    _number(row, "teacher_time_s", where, nullable=True)


def _number(
    row: Mapping[str, Any], key: str, where: str, *, nullable: bool = False
) -> float | None:
    """The finite number under `key`; None where null or nothing may be and is."""
    value = row.get(key)
    if value is None and nullable:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        if key in row and value is None:
            value = math.nan  # metrics.jsonl has null for numbers that JSON cannot hold
        else:
            found = f"{value!r}" if key in row else "missing"
            raise ValueError(f"{where}: '{key}' is {found}, expected a number. Run again.")
    if not math.isfinite(value):
        raise ValueError(
            f"{where}: '{key}' is not finite. The run diverged or overflowed here; compare runs "
            f"that trained to their end, or cut all of them before this step."
        )
    return value


def _read_evaluation(row: Mapping[str, Any], where: str) -> HeldOutPoint | None:
    present = [key for key in VALID_KEYS if key in row]
    if not present:
        if row["step"] == 0:
            raise ValueError(f"{where}: step 0 must hold {', '.join(VALID_KEYS)}. Delete the line.")
        return None
    ce_nats, accuracy, num_tokens = (_number(row, key, where) for key in VALID_KEYS)
    assert ce_nats is not None and accuracy is not None and num_tokens is not None
    return HeldOutPoint(
        step=int(row["step"]), ce_nats=ce_nats, accuracy=accuracy, num_tokens=int(num_tokens),
        teacher_ce_nats=_number(row, "teacher_valid_ce_nats", where, nullable=True),
        by_dataset={
            key.removeprefix(BY_DATASET): value for key in row if key.startswith(BY_DATASET)
            if (value := _number(row, key, where, nullable=True)) is not None
        },
    )  # fmt: skip


def _read_held_out(directory: Path) -> str | None:
    """From the manifest of the newest checkpoint with an evaluation, read as it is: the room that
    knows checkpoints imports torch, and weights need not be there any more."""
    manifests = sorted(directory.glob("checkpoints/step_*/manifest.json"), reverse=True)
    found = (_read_settings(path).get("model.evaluation.data") for path in manifests)
    return next((str(one) for one in found if one is not None), None)


def _read_settings(path: Path, prefix: str = "") -> dict[str, Any]:
    """A JSON file's values by dotted names; nothing where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}. Restore or delete it.") from None
    return dict(_flattened(values, prefix))


def _flattened(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def different_settings(runs: Sequence[RunLog]) -> list[str]:
    """Names of the settings that are not the same in all runs that have their settings."""
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    return [
        name
        for name in names
        if name not in OWN_FOLDERS
        and any(settings.get(name) != known[0].get(name) for settings in known[1:])
    ]


def same_text(run: RunLog, other: RunLog) -> bool:
    """Whether held-out losses of two runs may be compared, as far as the runs say it."""
    if run.held_out is None or other.held_out is None:
        run, other = replace(run, held_out=None), replace(other, held_out=None)
    return run.held_out_text == other.held_out_text


def marked(name: str, run: RunLog, baseline: RunLog) -> str:
    """The run's name, with a dagger where its held-out text is not the baseline's."""
    return name if same_text(run, baseline) else f"{name} †"


def with_labels(runs: Sequence[RunLog], num_baselines: int, labels: Sequence[str]) -> list[RunLog]:
    """The runs with their names: of each run (the baselines' may be left out), of each setting, or,
    without labels, of the first of the runs that differ in nothing but train.seed.

    Raises: ValueError for another number of labels, or for folders of one name in their place.
    """
    settings: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        same = {k: v for k, v in run.settings.items() if k not in (*OWN_FOLDERS, "train.seed")}
        key = "baseline" if place < num_baselines else json.dumps(same, default=str)
        known = [runs[other].seed for other in settings.get(key, [])]
        if place >= num_baselines and (not run.settings or run.seed in known):
            key = f"run {place}"
        settings.setdefault(key, []).append(place)
    by_setting = len(set(labels)) == len(labels) == len(settings) < len(runs)
    if not labels or by_setting:
        names = labels or [runs[places[0]].label for places in settings.values()]
        if alike := [name for name in names if list(names).count(name) > 1]:
            raise ValueError(
                f"folders called {alike[0]} hold runs of different settings, or one seed twice: "
                "name the runs with --label"
            )
        of_run = {p: n for n, places in zip(names, settings.values(), strict=True) for p in places}
        return [replace(run, label=of_run[place]) for place, run in enumerate(runs)]
    if len(labels) == len(runs) - num_baselines:
        labels = [*[runs[0].label] * num_baselines, *labels]
    if len(labels) != len(runs):
        raise ValueError(
            f"{len(labels)} labels for {len(runs)} runs of {len(settings)} settings: give one for "
            f"each run but the {num_baselines} of --baseline, for each run, or for each setting"
        )
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def group_by_label(runs: Sequence[RunLog]) -> list[Arm]:
    """The runs by their labels, in the order in which these first occur.

    Raises: ValueError where runs share a label without having different seeds.
    """
    arms = []
    for label in dict.fromkeys(run.label for run in runs):
        same = tuple(run for run in runs if run.label == label)
        seeds = {run.seed for run in same}
        if len(same) > 1 and (None in seeds or len(seeds) < len(same)):
            raise ValueError(
                f"{len(same)} runs are called {label}: labels must differ, except those of runs "
                f"that differ in train.seed. Name the runs with --label."
            )
        if len(ends := {run.num_steps for run in same}) > 1:
            raise ValueError(
                f"the runs called {label} are of {', '.join(map(str, sorted(ends)))} steps, and no "
                "mean can be taken of them: bring them to one length, or give them labels of their "
                "own"
            )
        arms.append(Arm(label=label, runs=same))
    return arms


def baseline_of(run: RunLog, baseline: Arm) -> RunLog:
    """What `run` is compared with: the only baseline there is, or the one with the same seed.

    Raises: ValueError where none of several baselines has the run's seed.
    """
    if len(baseline.runs) == 1:
        return baseline.runs[0]
    for candidate in baseline.runs:
        if candidate.seed == run.seed:
            return candidate
    seeds = ", ".join(str(candidate.seed) for candidate in baseline.runs)
    raise ValueError(
        f"{run.label} has train.seed {run.seed}, the baselines have {seeds}. Give a baseline of "
        f"the same seed, or a single one for all runs."
    )


def find_crossing(run: RunLog, target_ce_nats: float) -> Crossing | None:
    """Where `run` first has a held-out loss <= target; None when none of its evaluations has.

    The loss is taken as linear in the step between the two evaluations around the crossing; the
    seconds are the training seconds at that (fractional) step. A first evaluation that is already
    there is given as it is: nothing before it is known.
    """
    previous: HeldOutPoint | None = None
    for evaluation in run.evaluations:
        if evaluation.ce_nats <= target_ce_nats:
            step = float(evaluation.step)
            if previous is not None:
                part = (previous.ce_nats - target_ce_nats) / (previous.ce_nats - evaluation.ce_nats)
                step = previous.step + part * (evaluation.step - previous.step)
            steps = np.arange(run.num_steps + 1)
            return Crossing(
                step=step,
                median_s=float(np.interp(step, steps, run.median_s)),
                summed_s=float(np.interp(step, steps, run.summed_s)),
                evaluation_step=evaluation.step,
            )
        previous = evaluation
    return None


def find_teachers(runs: Sequence[RunLog], teacher_run: RunLog | None) -> dict[str, float]:
    """Held-out nats/token of the teachers, by label; runs that share a teacher share an entry.

    A measurement within a run is preferred to the end of the teacher's own run, because it is made
    on the same held-out tokens. On other text than the first run's neither counts.
    """
    distinct: list[tuple[str, float]] = []
    for run in (each for each in runs if same_text(each, runs[0])):
        ce_nats = run.teacher_ce_nats
        if ce_nats is not None and all(abs(ce_nats - seen) > 1e-4 for _, seen in distinct):
            distinct.append((run.label, ce_nats))
    if not distinct and teacher_run is not None and same_text(teacher_run, runs[0]):
        return {"teacher": teacher_run.final.ce_nats}
    if len(distinct) == 1:
        return {"teacher": distinct[0][1]}
    return {f"teacher of {label}": ce_nats for label, ce_nats in distinct}
