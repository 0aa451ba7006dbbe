"""Pictures of simulated steps: one row for each stage, time to the right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_salt.report.plots import PLOT_STYLE
from megatron_salt.teacher.simulator import OpKind, Timeline

# Okabe and Ito's, told apart with any kind of colour vision; idle time is the background.
OP_COLOURS: dict[OpKind, str] = {"forward": "#56B4E9", "backward": "#0072B2", "teacher": "#E69F00"}
LABELS: dict[OpKind, str] = {
    "forward": "student, forward",
    "backward": "student, backward",
    "teacher": "teacher, next batch or this one",
}
IDLE_COLOUR = "#EEEEEE"
UPDATE_COLOUR = "#009E73"


def draw_timelines(
    timelines: Mapping[str, Timeline], path: str | Path, *, unit: str = "s", scale: float = 1.0
) -> None:
    """Write a PNG with the timelines below each other, in their order, on one axis of time.

    Args:
        timelines: title -> a simulated step.
        unit: of the axis; scale: what the simulator's unit is multiplied by to get there.
    """
    longest = max(timeline.step_time for timeline in timelines.values()) * scale
    rows = [len(timeline.spans) for timeline in timelines.values()]
    with rc_context(PLOT_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(12, 1.1 + sum(0.55 + 0.26 * number for number in rows)))
        parts = figure.subplots(
            len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows}
        )
        for ax, (title, timeline) in zip(parts[:, 0], timelines.items(), strict=True):
            _draw(ax, timeline, scale)
            ax.set_title(f"{title}: {timeline.step_time * scale:.4g} {unit}", loc="left")
            ax.set_xlim(0, longest)
        parts[-1, 0].set_xlabel(f"time of one step ({unit})")
        handles = [Patch(color=OP_COLOURS[kind], label=label) for kind, label in LABELS.items()]
        handles.append(Patch(color=UPDATE_COLOUR, label="gradient reduction and optimizer"))
        handles.append(Patch(color=IDLE_COLOUR, label="idle, or sending and receiving"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        figure.savefig(path)


def _draw(ax: Axes, timeline: Timeline, scale: float) -> None:
    for stage, spans in enumerate(timeline.spans):
        ax.broken_barh(
            [(0, timeline.backward_end * scale)], (stage - 0.42, 0.84), color=IDLE_COLOUR
        )
        for kind, colour in OP_COLOURS.items():
            some = [span for span in spans if span.op.kind == kind]
            bars = [(span.start * scale, (span.stop - span.start) * scale) for span in some]
            ax.broken_barh(
                bars, (stage - 0.42, 0.84), facecolor=colour, edgecolor="white", linewidth=0.3
            )
        for span in spans:
            if span.op.kind == "reduce_tied" and span.stop > span.start:
                bar = (span.start * scale, (span.stop - span.start) * scale)
                ax.broken_barh([bar], (stage - 0.42, 0.42), color=UPDATE_COLOUR)
    ax.set_yticks(range(len(timeline.spans)), [f"stage {s}" for s in range(len(timeline.spans))])
    ax.set_ylim(len(timeline.spans) - 0.5, -0.5)
