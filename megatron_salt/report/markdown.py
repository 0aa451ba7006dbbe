"""The report itself: its text, and where tables and plots stand in it."""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import matplotlib

from megatron_salt.report import plots
from megatron_salt.report.runs import RunLog, find_teachers
from megatron_salt.report.tables import config_table, crossing_table, results_table, step_time_table


def write_report(
    runs: Sequence[RunLog], output: Path, *, title: str, teacher_run: RunLog | None = None
) -> str:
    """Writes the Markdown report to `output` and its plots beside it; returns the two main tables.

    The first of `runs` is the baseline. The plots are named after the report, so that several
    reports fit into one directory.
    """
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"labels must differ, got {', '.join(labels)}. Name the runs with --label."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    teachers = find_teachers(runs, teacher_run)
    results = results_table(runs, teachers, teacher_run)
    crossings = crossing_table(runs)
    with matplotlib.rc_context(plots.PLOT_STYLE):
        figures = {
            "heldout-steps": plots.plot_heldout(runs, teachers, by_time=False),
            "heldout-time": plots.plot_heldout(runs, teachers, by_time=True),
            "kd-weight": plots.plot_kd_weight(runs),
            "train-ce": plots.plot_train_ce(runs),
            "step-time": plots.plot_step_time(runs),
        }
        images = {}
        for name, figure in figures.items():
            images[name] = f"{output.stem}-{name}.png"
            figure.savefig(output.parent / images[name], metadata={"Software": None})

    baseline = runs[0]
    settings = config_table(runs)
    sections = [
        f"# {title}",
        f"The baseline is *{baseline.label}*. Losses are held-out nats per token, measured on "
        f"{_describe_heldout(runs)}. Training seconds are the sum of the step times: the "
        f"teacher's forwards are in them; evaluations, checkpoints and the teacher's own training "
        f"are not. *KD* is the first phase, with the teacher (or, at "
        f"`salt.kd_weight` 0, with its selection of the data alone), *LM* the rest.",
        "**Read with caution.** Every row is one run with one seed, so small differences may be "
        "chance; on a shared machine seconds vary, so trust ratios before absolute times.",
        "## Results",
        results,
        f"![Held-out loss against steps]({images['heldout-steps']})",
        "## Steps and seconds to the baseline's final loss",
        f"The baseline ends at **{baseline.final.ce_nats:.4f}** nats/token (step "
        f"{baseline.final.step}). A run is there at its first evaluation at or below this loss; "
        f"steps are *interpolated*, linearly in the loss between that evaluation and the one "
        f"before, and seconds are the training seconds at that step. Savings are relative to the "
        f"baseline, to which the same rule applies; a negative saving is a loss.",
        crossings,
        f"![Held-out loss against training time]({images['heldout-time']})",
        "## Step times",
        "Means, in milliseconds; ratios are medians, divided by the median of all steps of the "
        "baseline.",
        step_time_table(runs),
        f"![Step times]({images['step-time']})",
        "## Schedule and training loss",
        f"![Weight of the KL term]({images['kd-weight']})",
        f"![Training cross-entropy]({images['train-ce']})",
        *(["## Settings", settings] if settings is not None else []),
        "## Machine",
        f"This report was written on: {describe_machine()}.",
    ]
    output.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return f"{results}\n\n{crossings}"


def _describe_heldout(runs: Sequence[RunLog]) -> str:
    """How many held-out tokens were used; loud when the runs were not measured on equally many."""
    sizes = {run.label: sorted({e.num_tokens for e in run.evaluations}) for run in runs}
    if (
        len({tuple(size) for size in sizes.values()} | {(s,) for ss in sizes.values() for s in ss})
        == 1
    ):
        return f"{runs[0].final.num_tokens:,} tokens"
    listed = "; ".join(
        f"{label}: {', '.join(f'{size:,}' for size in some)}" for label, some in sizes.items()
    )
    return f"**unequal numbers of tokens ({listed}), so the losses may not be comparable**"


def describe_machine() -> str:
    """Processor or GPU, and versions; neither host names nor paths."""
    import torch  # here, because reading and plotting need no torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0].partition(":")[2].strip() if models else cpu
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
