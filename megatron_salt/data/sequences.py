"""Sequences of a token stream, and the rows in which a model reads them.

The stream is a dataset's `.bin`: all its tokens, end to end in file order. A *sequence*, the unit
that is scored and selected, is a document or a window of a fixed number of tokens; either way
sequences cover the stream without gaps. Every token is predicted once, from the tokens before it in
its own row. A sequence longer than a row is cut into several rows. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Shorter rows are filled up to a multiple of this, so that what a row gives depends on the row
# alone, not on its neighbours in a batch, and so that few shapes of matrix products occur.
ROW_MULTIPLE = 64

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """Sequence i of a stream holds its tokens `[bounds[i], bounds[i + 1])`."""

    bounds: Ints
    window: int | None
    """Tokens of a window (the last one may be shorter); None: sequences are documents."""

    @classmethod
    def of(cls, document_lengths: NDArray[np.integer], window: int | None) -> Sequences:
        """Documents of these lengths, or windows laid over them end to end.

        Raises: ValueError for a window below 1.
        """
        ends = np.cumsum(document_lengths, dtype=np.int64)
        if window is None:
            return cls(np.concatenate([[0], ends]).astype(np.int64), None)
        if window < 1:
            raise ValueError(f"--window {window}: must be at least 1")
        num_tokens = int(ends[-1]) if len(ends) else 0
        starts = np.arange(0, num_tokens, window, dtype=np.int64)
        return cls(np.append(starts, num_tokens), window)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])

    def shards(self, tokens_per_shard: int) -> list[tuple[int, int]]:
        """Ranges of whole sequences of about that many tokens; they depend on nothing else."""
        shard_of = self.bounds[:-1] // tokens_per_shard
        cuts = np.flatnonzero(np.diff(shard_of)) + 1
        edges = [0, *cuts.tolist(), len(self)] if len(self) else [0]
        return list(pairwise(edges))


class Windows(NamedTuple):
    """Pieces of sequences, each read by one row of a forward pass."""

    starts: Ints
    """First token to be predicted, in the stream."""
    stops: Ints
    follows: NDArray[np.bool_]
    """Whether the token before `start` is read first; else the end-of-document token stands there:
    at the start of a document, and of the stream."""


def windows_of(sequences: Sequences, first: int, last: int, max_length: int) -> Windows:
    """The rows of sequences `[first, last)`, in order, of at most max_length tokens each."""
    bounds = sequences.bounds[first : last + 1]
    lengths = np.diff(bounds)
    counts = -(-lengths // max_length)
    first_row = np.cumsum(counts) - counts
    index = np.repeat(np.arange(len(lengths)), counts)
    piece = np.arange(len(index)) - first_row[index]
    starts = bounds[index] + piece * max_length
    stops = np.minimum(starts + max_length, bounds[index + 1])
    inside = piece > 0 if sequences.window is None else np.full(len(index), True)
    return Windows(starts, stops, inside & (starts > 0))


def row_length(num_tokens: Ints, max_length: int) -> Ints:
    """Length of the row that reads so many tokens: filled up to ROW_MULTIPLE."""
    return np.minimum(-(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE, max_length)


class ScoringBatch(NamedTuple):
    """Rows of one length that go through the model together. B rows, S positions."""

    inputs_BS: Ints
    labels_BS: Ints
    """0 in filling."""
    predicts_BS: NDArray[np.bool_]
    """Where a token of the stream is predicted; not in filling."""
    places: Ints
    """Places of the predicted tokens in the shard, row by row."""


def batches_of(
    stream: NDArray[np.integer], offset: int, rows: Windows, *, max_length: int, num_rows: int,
    eod: int,
) -> Iterator[ScoringBatch]:  # fmt: skip
    """Rows of equal length together: num_rows of max_length, or as many positions of shorter ones.

    Args:
        stream: tokens of the shard, with the one before it if the shard is not the first.
        offset: place of stream[0] in the whole stream.
    """
    first = int(rows.starts[0]) if len(rows.starts) else 0
    lengths = row_length(rows.stops - rows.starts, max_length)
    for length in np.unique(lengths).tolist():
        alike = np.flatnonzero(lengths == length)
        step = max(1, num_rows * max_length // length)
        for at in range(0, len(alike), step):
            some = alike[at : at + step]
            starts, stops = rows.starts[some], rows.stops[some]
            place_BS = starts[:, None] + np.arange(length)
            predicts_BS = place_BS < stops[:, None]
            # Filling repeats the row's last token, a harmless one: attention is causal.
            held_BS = np.minimum(place_BS, stops[:, None] - 1)
            labels_BS = np.where(predicts_BS, stream[held_BS - offset], 0).astype(np.int64)
            before_BS = np.maximum(held_BS - 1 - offset, 0)
            inputs_BS = stream[before_BS].astype(np.int64)
            inputs_BS[~rows.follows[some], 0] = eod
            yield ScoringBatch(inputs_BS, labels_BS, predicts_BS, place_BS[predicts_BS] - first)
