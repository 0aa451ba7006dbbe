"""The report itself: its text, and where tables and plots stand in it."""

import io
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from megatron_salt.report import plots, tables
from megatron_salt.report.runs import Arm, RunLog, find_teachers, group_by_label


def write_report(
    runs: Sequence[RunLog], output: Path, *, title: str, teacher_run: RunLog | None = None
) -> str:
    """Writes the Markdown report to `output`, its plots beside it; returns tables and warnings.

    The first of `runs` is the baseline. Runs with the same label are seeds of one arm; each is
    compared with the baseline of its seed. The plots are named after the report, so that several
    reports fit into one directory.
    """
    arms = group_by_label(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    teachers = find_teachers(runs, teacher_run)
    main = tables.results_table(arms, teachers, teacher_run)
    found = (tables.seeds_table(arms), main, tables.datasets_table(arms))
    results = [table for table in found if table is not None]
    notes = tables.held_out_notes(arms, teacher_run)
    crossings = tables.crossing_table(arms)
    images = _write_plots(arms, teachers, output)
    settings = tables.settings_table(arms)
    sections = [
        f"# {title}",
        _what_is_compared(arms),
        _caution(arms),
        *notes,
        "## Results",
        *results,
        f"![Held-out loss against steps]({images['heldout-steps']})",
        "## Steps and seconds to the baseline's final loss",
        _how_crossings_are_found(arms[0]),
        crossings,
        f"![Held-out loss against training time]({images['heldout-time']})",
        "## Step times",
        "In milliseconds. Ratios are medians, divided by the median of all steps of the baseline.",
        tables.step_time_table(arms),
        f"![Step times]({images['step-time']})",
        "## Schedule and training loss",
        f"![Weight of the KL term]({images['kd-weight']})",
        f"![Training cross-entropy]({images['train-ce']})",
        *(["## Settings that differ", settings] if settings is not None else []),
        "## Machine",
        f"This report was written on: {describe_machine()}.",
    ]
    output.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return "\n\n".join([*results, crossings, *notes])


def _write_plots(
    arms: Sequence[Arm], teachers: Mapping[str, float], output: Path
) -> dict[str, str]:
    """Draws the plots beside `output`; returns their file names."""
    with matplotlib.rc_context(plots.PLOT_STYLE):
        figures = {
            "heldout-steps": plots.plot_heldout(arms, teachers, by_time=False),
            "heldout-time": plots.plot_heldout(arms, teachers, by_time=True),
            "kd-weight": plots.plot_kd_weight(arms),
            "train-ce": plots.plot_train_ce(arms),
            "step-time": plots.plot_step_time(arms),
        }
        images = {name: f"{output.stem}-{name}.png" for name in figures}
        for name, figure in figures.items():
            _save(figure, output.parent / images[name])
    return images


def _save(figure: Figure, path: Path) -> None:
    """A PNG with a palette: a third of the size, and reports are committed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as image:
        small = image.convert("RGB").quantize(255, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def _what_is_compared(arms: Sequence[Arm]) -> str:
    return (
        f"The baseline is *{arms[0].label}*. Losses are held-out nats per token, measured on "
        f"{arms[0].runs[0].final.num_tokens:,} tokens. Training seconds are those of the steps: "
        f"the teacher's forwards are in them; evaluations, checkpoints and the teacher's own "
        f"training are not. Each phase is counted as its number of steps times its median step "
        f"time. The plain sum of the step times stands beside it: on a shared machine a few slow "
        f"steps change it. *KD* is the first phase, with the teacher (or, at `salt.kd_weight` 0, "
        f"with its selection of the data alone), *LM* the rest."
    )


def _caution(arms: Sequence[Arm]) -> str:
    fewest = min(len(arm.runs) for arm in arms)
    rows = (
        "Every row is one run with one seed, so small differences may be chance"
        if fewest == 1
        else f"{fewest} seeds give a spread, not a significance; one teacher serves all of them"
    )
    return (
        f"**Read with caution.** {rows}. On a shared machine seconds vary, so trust ratios before "
        f"absolute times."
    )


def _how_crossings_are_found(baseline: Arm) -> str:
    finals = ", ".join(
        f"**{run.final.ce_nats:.4f}** (step {run.final.step}"
        + (f", seed {run.seed})" if len(baseline.runs) > 1 else ")")
        for run in baseline.runs
    )
    whose = "the baseline of the same seed" if len(baseline.runs) > 1 else "the baseline"
    return (
        f"The baseline ends at {finals} nats/token. A run is there at its first evaluation at or "
        f"below this loss. Steps are *interpolated*, linearly in the loss between that evaluation "
        f"and the one before; seconds are the training seconds at that step. Savings are relative "
        f"to {whose}, to which the same rule applies; a negative saving is a loss."
    )


def describe_machine() -> str:
    """Processor or GPU, and versions; neither host names nor paths."""
    import torch  # here, because reading and plotting need no torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model = re.search(r"^model name.*?:(.*)", cpuinfo.read_text(), re.MULTILINE)
        cpu = model[1].strip() if model else cpu
    machine = f"{cpu}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("megatron-core", "deepspeed"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return f"{machine}; {', '.join(versions)}"
