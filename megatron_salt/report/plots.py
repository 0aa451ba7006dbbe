"""The report's plots. A label has the same colour, line and marker in all of them.

Figures are made without pyplot: nothing global changes, and saving uses the Agg backend.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megatron_salt.files.markdown import TIME_UNITS, unit_for
from megatron_salt.report.runs import Arm, RunLog, baseline_of, find_crossing, marked, same_text

# Okabe and Ito's colours, told apart with any kind of colour vision, and two of Tol's; the baseline
# is always grey.
BASELINE_COLOUR = "#555555"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
PLOT_STYLE: dict[Any, Any] = {
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": "medium", "figure.constrained_layout.use": True, "figure.dpi": 110,
    "font.size": 10, "grid.alpha": 0.25, "legend.frameon": False,
    "lines.linewidth": 1.7, "lines.markersize": 4,
}  # fmt: skip


def _styled(arms: Sequence[Arm]) -> Iterator[tuple[RunLog, dict[str, Any]]]:
    """Every run with its style; of an arm's seeds the first has the label, for the legend."""
    for index, arm in enumerate(arms):
        for number, run in enumerate(arm.runs):
            name = marked(arm.label, run, baseline_of(run, arms[0]))
            label = name if number == 0 else "_nolegend_"
            width = {} if len(arm.runs) == 1 else {"linewidth": 1.1}
            yield run, _style(index) | width | {"label": label}


def _style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the arm at `index`, the same in all plots; 0 is the baseline."""
    if index == 0:
        return {"color": BASELINE_COLOUR, "linestyle": "-", "marker": MARKERS[0]}
    lap, place = divmod(index - 1, len(COLOURS))
    return {
        "color": COLOURS[place],
        "linestyle": ("-", "--", "-.", ":")[lap % 4],
        "marker": MARKERS[1 + place],
    }


def plot_heldout(arms: Sequence[Arm], teachers: Mapping[str, float], *, by_time: bool) -> Figure:
    """Held-out nats/token against steps or training time: the whole of it, and the end enlarged."""
    runs = [run for arm in arms for run in arm.runs]
    targets = [run.final.ce_nats for run in arms[0].runs]
    scale, unit = unit_for(max(run.median_s[-1] for run in runs), TIME_UNITS)
    figure = Figure(figsize=(10, 4.6))
    axes = figure.subplots(1, 2)
    for run, style in _styled(arms):
        x = [run.median_s[e.step] / scale if by_time else e.step for e in run.evaluations]
        y = [e.ce_nats for e in run.evaluations]
        baseline = baseline_of(run, arms[0])
        crossing = find_crossing(run, baseline.final.ce_nats)
        for ax in axes:
            ax.plot(x, y, **style)
            _mark_phase_end(ax, run, style, run.median_s / scale if by_time else None)
        if crossing is not None and run is not baseline and same_text(run, baseline):
            at = crossing.median_s / scale if by_time else crossing.step
            axes[1].scatter(
                at, baseline.final.ce_nats, s=170 if len(targets) == 1 else 90, marker="*",
                color=style["color"], edgecolor="white", zorder=5,
            )  # fmt: skip
    for ax in axes:
        for number, target in enumerate(targets):
            label = "baseline's final loss" if number == 0 else "_nolegend_"
            ax.axhline(target, color=BASELINE_COLOUR, linewidth=0.9, label=label, zorder=1)
        for index, (label, ce_nats) in enumerate(teachers.items()):
            dashes = (0, (5, 2 + 2 * index))
            ax.axhline(
                ce_nats, color="black", linestyle=dashes, linewidth=1.2, label=label, zorder=1
            )
        ax.set_xlabel(f"training time, teacher included ({unit})" if by_time else "training steps")
        ax.set_ylabel("held-out loss (nats/token)")
    axes[0].set_title("whole run")
    axes[1].set_title("the end enlarged")
    _enlarge_end(axes[1], runs, scale if by_time else None, [*targets, *teachers.values()])
    star = Line2D([], [], marker="*", markersize=11, color="black", linestyle="none")
    star.set_label("baseline's final loss reached (interpolated)")
    crossed = len(axes[1].collections) > 0
    _legend_below(figure, axes[0], runs, [star] if crossed else [])
    return figure


def _mark_phase_end(
    ax: Axes, run: RunLog, style: Mapping[str, Any], seconds: NDArray[np.float64] | None = None
) -> None:
    """A dotted line in the run's colour after its last KD step, on an axis of steps or seconds."""
    if 0 < run.num_kd_steps < run.num_steps:
        end = run.num_kd_steps if seconds is None else seconds[run.num_kd_steps]
        ax.axvline(end, color=style["color"], linestyle=":", linewidth=1.2)


def _enlarge_end(
    ax: Axes, runs: Sequence[RunLog], time_scale: float | None, levels: Sequence[float]
) -> None:
    """Limits `ax` to where the runs come near their final losses, levels within reach included."""
    finals = [run.final.ce_nats for run in runs]
    lowest = min(run.best.ce_nats for run in runs)
    highest = max(run.evaluations[0].ce_nats for run in runs)
    top = max(finals) + 0.07 * max(highest - lowest, 1e-3)
    near = [(run, e) for run in runs for e in run.evaluations if e.ce_nats <= top]
    x = [run.median_s[e.step] / time_scale if time_scale is not None else e.step for run, e in near]
    y = [e.ce_nats for _, e in near]
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
    # Its rows, but for one, are added to the figure: the axes stay as they are.
    figure.set_figheight(figure.get_figheight() + 0.2 * ((len(handles) - 1) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def plot_kd_weight(arms: Sequence[Arm]) -> Figure:
    """The weight of the KL term in every step; a dotted line where a KD phase ends."""
    figure = Figure(figsize=(8, 3.8))
    ax = figure.subplots()
    for run, style in _styled(arms):
        # Schedules often coincide: the arms' markers take turns, so that all of them show.
        turn = next(place for place, arm in enumerate(arms) if run in arm.runs) / len(arms)
        every = max(1, run.num_steps // 5)
        style |= {"markevery": (int(turn * every), every), "markersize": 6}
        x = np.arange(run.num_steps + 1)
        ax.plot(x, [*run.kd_weight, run.kd_weight[-1]], drawstyle="steps-post", **style)
        _mark_phase_end(ax, run, style)
    ax.set_xlabel("training step")
    ax.set_ylabel("weight w of the KL term")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=-0.02 * max(1.0, ax.get_ylim()[1]))
    _legend_below(figure, ax, [run for arm in arms for run in arm.runs], [])
    return figure


def plot_train_ce(arms: Sequence[Arm]) -> Figure:
    """Training cross-entropy, as a running mean over the last steps."""
    window = max(1, min(run.num_steps for arm in arms for run in arm.runs) // 40)
    figure = Figure(figsize=(8, 4.4))
    ax = figure.subplots()
    for run, style in _styled(arms):
        y = np.convolve(run.ce_nats, np.full(window, 1 / window), mode="valid")
        x = np.arange(window, run.num_steps + 1)
        ax.plot(x, y, **style | {"marker": "", "linewidth": 1.0})
        _mark_phase_end(ax, run, style)
    ax.set_xlabel("training step")
    mean = f"mean of the last {window} steps, " if window > 1 else ""
    ax.set_ylabel(f"training cross-entropy\n({mean}nats/token)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, ax, [run for arm in arms for run in arm.runs], [])
    return figure


def plot_step_time(arms: Sequence[Arm]) -> Figure:
    """Median step time of each arm's phases, with the middle half of the steps as error bars."""
    names, bars = [], []
    for index, arm in enumerate(arms):
        is_kd = np.concatenate([run.is_kd for run in arm.runs])
        times_ms = 1000 * np.concatenate([run.step_time_s for run in arm.runs])
        for phase, mask in (("KD", is_kd), ("LM", ~is_kd)):
            if mask.any():
                names.append(f"{arm.label}, {phase}")
                bars.append((_style(index)["color"], phase, times_ms[mask]))
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
