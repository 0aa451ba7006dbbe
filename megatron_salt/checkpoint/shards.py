"""Tensors of a checkpoint at any layout: of shards cut in one way, parts of shards cut otherwise.

A rank reads the ranges of files that overlap its own part, never the whole. A weight is a matrix of
rows and columns here, a vector one of a single column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_salt.model.weights import WeightSpec, shard_columns, shard_runs, shard_shape

ReadRows = Callable[[int, int, int], Tensor]
"""(tensor-parallel rank, first row, last row) to [rows, columns] of that rank's shard as saved."""


class Cut(NamedTuple):
    """Which shard of the weights a tensor-parallel rank has."""

    tp_rank: int
    tp_size: int
    padded_vocab: int


WHOLE = Cut(0, 1, 0)
"""No cut: a vocabulary has its real rows only."""


def read_range(
    spec: WeightSpec, cut: Cut, part: range, saved_tp_size: int, saved_padded_vocab: int,
    read_rows: ReadRows,
) -> Tensor:  # fmt: skip
    """Elements of a flattened shard, from shards that were cut otherwise; padding is zeros.

    Args:
        part: which elements of the shard that `cut` makes.
    """
    if cut == WHOLE:
        cut = cut._replace(padded_vocab=spec.shape[0])
    columns = shard_columns(spec, cut.tp_rank, cut.tp_size)
    width = columns.stop - columns.start
    first, last = part.start // width, -(-part.stop // width)
    found: Tensor | None = None
    for run in shard_runs(spec, *cut):
        offset = run.whole_start - run.start
        wanted = range(max(run.start, first) + offset, min(run.start + run.num_rows, last) + offset)
        # Every tensor-parallel rank had the same of a weight that is not cut; the first one's is
        # taken.
        for tp_rank in range(1 if spec.sharding == "replicated" else saved_tp_size):
            theirs = shard_columns(spec, tp_rank, saved_tp_size)
            left, right = max(columns.start, theirs.start), min(columns.stop, theirs.stop)
            for start, whole_start, count in shard_runs(
                spec, tp_rank, saved_tp_size, saved_padded_vocab
            ):
                low = max(wanted.start, whole_start)
                high = min(wanted.stop, whole_start + count)
                if low >= high or left >= right:
                    continue
                move = start - whole_start
                rows = read_rows(tp_rank, low + move, high + move)
                if found is None:
                    found = rows.new_zeros((last - first, width))
                place = slice(low - offset - first, high - offset - first)
                into = slice(left - columns.start, right - columns.start)
                found[place, into] = rows[:, left - theirs.start : right - theirs.start]
    if found is None:
        return torch.zeros(len(part))
    return found.flatten()[part.start - first * width :][: len(part)]


def shard_numel(spec: WeightSpec, tp_size: int, padded_vocab: int) -> int:
    return math.prod(shard_shape(spec, tp_size, padded_vocab))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What safetensors has to say about a file, as ValueError with the file's name."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}; use another checkpoint") from error


def open_tensors(path: Path) -> Any:
    """A safetensors file, mapped: what is not read costs nothing.

    Raises: ValueError naming the file.
    """
    with naming(path):
        return safe_open(path, framework="pt")
