"""Histogram of the scores of sequences, the selected ones in colour. Made without pyplot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_salt.data.selection import SequenceTable
from megatron_salt.files.disk import atomic_path
from megatron_salt.report.plots import BASELINE_COLOUR, COLOURS, PLOT_STYLE

HISTOGRAM_BINS = 80
IN_WORDS = {
    "median": "median loss", "mean": "mean loss", "entropy": "mean entropy", "drop": "kept tokens",
    "zero": "all tokens, those not kept as 0", "all": "all tokens",
}  # fmt: skip


def write_score_histogram(path: Path, tables: Mapping[str, SequenceTable], score: str) -> None:
    """Draw the tables of a selection by their sources' names into a PNG, whole or not at all."""
    with matplotlib.rc_context(PLOT_STYLE):
        figure = plot_scores(tables, score)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


def plot_scores(tables: Mapping[str, SequenceTable], score: str) -> Figure:
    """A panel for each source, all with the same bins; selected and other sequences are stacked."""
    edges, cut = _bin_edges([table.columns["score"] for table in tables.values()])
    figure = Figure(figsize=(8, 1.0 + 2.6 * len(tables)))
    panels = figure.subplots(len(tables), sharex=True, squeeze=False)[:, 0]
    for ax, (name, table) in zip(panels, tables.items(), strict=True):
        scores, selected = table.columns["score"], table.columns["selected"]
        below = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
        for side, colour, label in (
            (selected, COLOURS[0], "selected"),
            (~selected, BASELINE_COLOUR, "not selected"),
        ):
            present = scores[side & ~np.isnan(scores)]
            counts = np.histogram(np.clip(present, edges[0], edges[-1]), edges)[0]
            ax.bar(
                edges[:-1], counts, np.diff(edges), bottom=below, align="edge", color=colour,
                alpha=1.0 if label == "selected" else 0.4,
                label=f"{label}: {np.count_nonzero(side)}",
            )  # fmt: skip
            below += counts
        missing = int(np.count_nonzero(np.isnan(scores)))
        ax.set_title(f"{name}: {len(table)} sequences, {missing} of them without a score")
        ax.set_axisbelow(True)  # the grid behind the bars
        ax.set_ylabel("sequences")
        ax.legend()
    kind, masked = score.removeprefix("difference of ").split("_")
    words = f"{IN_WORDS[kind]} of {IN_WORDS[masked]} (nats)"
    if score.startswith("difference"):
        words = f"reference model's less the tagging model's {words}"
    panels[-1].set_xlabel(words + ("; the outermost bars hold the rest" if cut else ""))
    return figure


def _bin_edges(scores: list[NDArray[np.float32]]) -> tuple[NDArray[np.float64], bool]:
    """Edges of equal bins, and whether scores lie beyond: a few far ones would flatten the rest."""
    present = np.concatenate(scores)
    present = present[np.isfinite(present)]
    if not len(present):
        return np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1), False
    low, high = float(present.min()), float(present.max())
    near_low, near_high = np.percentile(present, [0.1, 99.9])
    cut = high - low > 2.0 * (near_high - near_low) > 0.0
    if cut:
        low, high = float(near_low), float(near_high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, HISTOGRAM_BINS + 1), cut
