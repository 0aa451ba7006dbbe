"""The report's plots. A run has the same colour, line and marker in all of them.

Figures are made without pyplot: nothing global changes, and saving uses the Agg backend.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megatron_salt.report.runs import RunLog, find_crossing

# Okabe and Ito's colours, told apart with any kind of colour vision; the baseline is always grey.
BASELINE_COLOUR = "#555555"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PLOT_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
}


def _style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the run at `index`, the same in all plots; 0 is the baseline."""
    if index == 0:
        return {"color": BASELINE_COLOUR, "linestyle": "-", "marker": MARKERS[0]}
    lap, place = divmod(index - 1, len(COLOURS))
    return {
        "color": COLOURS[place],
        "linestyle": ("-", "--", "-.", ":")[lap % 4],
        "marker": MARKERS[1 + place],
    }


def _time_unit(longest_s: float) -> tuple[float, str]:
    if longest_s <= 600:
        return 1.0, "s"
    return (60.0, "min") if longest_s <= 4 * 3600 else (3600.0, "h")


def plot_heldout(runs: Sequence[RunLog], teachers: Mapping[str, float], *, by_time: bool) -> Figure:
    """Held-out nats/token against steps or training time: the whole of it, and the end enlarged."""
    target = runs[0].final.ce_nats
    scale, unit = _time_unit(max(run.train_s[-1] for run in runs))
    figure = Figure(figsize=(10, 4.6))
    axes = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        style = _style(index)
        x = [e.train_s / scale if by_time else e.step for e in run.evaluations]
        y = [e.ce_nats for e in run.evaluations]
        crossing = find_crossing(run, target)
        for ax in axes:
            ax.plot(x, y, label=run.label, **style)
            _mark_phase_end(ax, run, index, run.train_s / scale if by_time else None)
        if crossing is not None and index > 0:
            at = crossing.train_s / scale if by_time else crossing.step
            axes[1].scatter(
                at, target, s=170, marker="*", color=style["color"], edgecolor="white", zorder=5
            )
    for ax in axes:
        ax.axhline(
            target, color=BASELINE_COLOUR, linewidth=0.9, label="baseline's final loss", zorder=1
        )
        for index, (label, ce_nats) in enumerate(teachers.items()):
            dashes = (0, (5, 2 + 2 * index))
            ax.axhline(
                ce_nats, color="black", linestyle=dashes, linewidth=1.2, label=label, zorder=1
            )
        ax.set_xlabel(f"training time, teacher included ({unit})" if by_time else "training steps")
        ax.set_ylabel("held-out loss (nats/token)")
    axes[0].set_title("whole run")
    axes[1].set_title("the end enlarged")
    _enlarge_end(axes[1], runs, scale if by_time else None, [target, *teachers.values()])
    star = Line2D([], [], marker="*", markersize=11, color="black", linestyle="none")
    star.set_label("baseline's final loss reached (interpolated)")
    crossed = len(axes[1].collections) > 0
    _legend_below(figure, axes[0], runs, [star] if crossed else [])
    return figure


def _mark_phase_end(
    ax: Axes, run: RunLog, index: int, train_s: NDArray[np.float64] | None = None
) -> None:
    """A dotted line in the run's colour after its last KD step, on an axis of steps or seconds."""
    if 0 < run.num_kd_steps < run.num_steps:
        end = run.num_kd_steps if train_s is None else train_s[run.num_kd_steps]
        ax.axvline(end, color=_style(index)["color"], linestyle=":", linewidth=1.2)


def _enlarge_end(
    ax: Axes, runs: Sequence[RunLog], time_scale: float | None, levels: Sequence[float]
) -> None:
    """Limits `ax` to where the runs come near their final losses, levels within reach included."""
    finals = [run.final.ce_nats for run in runs]
    lowest = min(run.best.ce_nats for run in runs)
    highest = max(run.evaluations[0].ce_nats for run in runs)
    top = max(finals) + 0.07 * max(highest - lowest, 1e-3)
    near = [e for run in runs for e in run.evaluations if e.ce_nats <= top]
    x = [e.train_s / time_scale if time_scale is not None else e.step for e in near]
    y = [e.ce_nats for e in near]
    y += [level for level in levels if lowest - (top - lowest) <= level <= top]
    x_margin = 0.04 * (max(x) - min(x)) or 1.0
    y_margin = 0.06 * (max(y) - min(y)) or 0.01
    ax.set_xlim(min(x) - x_margin, max(x) + x_margin)
    ax.set_ylim(min(y) - y_margin, max(y) + y_margin)


def _legend_below(figure: Figure, ax: Axes, runs: Sequence[RunLog], more: Sequence[Line2D]) -> None:
    """One legend for all panels; phase ends share an entry, as their colour names the run."""
    handles = [*ax.get_legend_handles_labels()[0], *more]
    if any(0 < run.num_kd_steps < run.num_steps for run in runs):
        label = "end of the KD phase (run's colour)"
        handles.append(Line2D([], [], color="black", linestyle=":", linewidth=1.2, label=label))
    longest = max(len(str(handle.get_label())) for handle in handles)
    characters = 11 * figure.get_figwidth()
    columns = min(len(handles), max(1, int(characters // (longest + 7))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def plot_kd_weight(runs: Sequence[RunLog]) -> Figure:
    """The weight of the KL term in every step; a dotted line where a KD phase ends."""
    figure = Figure(figsize=(8, 3.8))
    ax = figure.subplots()
    for index, run in enumerate(runs):
        # Schedules often coincide: earlier runs are wider, so that they show beneath later ones.
        width = 1.5 + 1.0 * (len(runs) - 1 - index)
        style = _style(index) | {"marker": "", "linewidth": min(width, 5.0)}
        x = np.arange(1, run.num_steps + 1)
        ax.plot(x, run.kd_weight, label=run.label, **style)
        _mark_phase_end(ax, run, index)
    ax.set_xlabel("training step")
    ax.set_ylabel("kd_weight (share of the KL term)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=-0.02 * max(1.0, ax.get_ylim()[1]))
    _legend_below(figure, ax, runs, [])
    return figure


def plot_train_ce(runs: Sequence[RunLog]) -> Figure:
    """Training cross-entropy, as a running mean over the last steps."""
    window = max(1, min(run.num_steps for run in runs) // 40)
    figure = Figure(figsize=(8, 4.4))
    ax = figure.subplots()
    for index, run in enumerate(runs):
        style = _style(index) | {"marker": "", "linewidth": 1.2}
        y = np.convolve(run.ce_nats, np.full(window, 1 / window), mode="valid")
        ax.plot(np.arange(window, run.num_steps + 1), y, label=run.label, **style)
        _mark_phase_end(ax, run, index)
    ax.set_xlabel("training step")
    mean = f"mean of the last {window} steps, " if window > 1 else ""
    ax.set_ylabel(f"training cross-entropy\n({mean}nats/token)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, ax, runs, [])
    return figure


def plot_step_time(runs: Sequence[RunLog]) -> Figure:
    """Median step time of each run's phases, with the middle half of the steps as error bars."""
    names, bars = [], []
    for index, run in enumerate(runs):
        for phase, mask in (("KD", run.is_kd), ("LM", ~run.is_kd)):
            if mask.any():
                names.append(f"{run.label}, {phase}")
                bars.append((_style(index)["color"], phase, 1000 * run.step_time_s[mask]))
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(bars)))
    ax = figure.subplots()
    for place, (colour, phase, times_ms) in enumerate(bars):
        low, median, high = np.percentile(times_ms, [25, 50, 75])
        hatch: dict[str, Any] = {"hatch": "///", "edgecolor": "white"} if phase == "KD" else {}
        ax.barh(place, median, height=0.65, color=colour, **hatch)
        ax.errorbar(median, place, xerr=[[median - low], [high - median]], color="black", capsize=3)
        ax.annotate(
            f"{median:.1f}", (high, place), xytext=(6, 0), textcoords="offset points", va="center"
        )
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.set_xlabel("step time (ms): median, and the middle half of the steps")
    return figure
