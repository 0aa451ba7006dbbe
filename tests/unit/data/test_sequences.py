"""Sequences cover the stream, and every token is predicted once, after the right one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_salt.data.sequences import ROW_MULTIPLE, Sequences, batches_of, windows_of

EOD = 7


def test_documents_and_windows_are_cut_where_they_should() -> None:
    lengths = np.array([3, 0, 5, 2])
    assert Sequences.of(lengths, None).bounds.tolist() == [0, 3, 3, 8, 10]
    assert Sequences.of(lengths, 4).bounds.tolist() == [0, 4, 8, 10]
    assert Sequences.of(lengths, 5).bounds.tolist() == [0, 5, 10]
    assert Sequences.of(np.array([], dtype=np.int32), 4).bounds.tolist() == [0]
    with pytest.raises(ValueError, match="--window 0"):
        Sequences.of(lengths, 0)


def test_first_token_of_a_document_follows_the_end_of_another() -> None:
    """Documents [10 11 12 13 14] and [20 21]; rows of at most 3 tokens."""
    stream = np.array([10, 11, 12, 13, 14, 20, 21])
    documents = Sequences.of(np.array([5, 2]), None)
    seen = _read(documents, stream, max_length=3)
    assert seen == {0: (EOD, 10), 1: (10, 11), 2: (11, 12), 3: (12, 13), 4: (13, 14),
                    5: (EOD, 20), 6: (20, 21)}  # fmt: skip


def test_first_token_of_a_window_follows_the_token_before_it() -> None:
    stream = np.array([10, 11, 12, 13, 14, 20, 21])
    windows = Sequences.of(np.array([5, 2]), 4)
    seen = _read(windows, stream, max_length=4)
    assert seen == {0: (EOD, 10), 1: (10, 11), 2: (11, 12), 3: (12, 13), 4: (13, 14),
                    5: (14, 20), 6: (20, 21)}  # fmt: skip


def _read(
    sequences: Sequences, stream: np.ndarray, *, max_length: int, num_rows: int = 2,
    tokens_per_shard: int = 100,
) -> dict[int, tuple[int, int]]:  # fmt: skip
    """(input, label) of every token's prediction, by its place in the stream."""
    seen: dict[int, tuple[int, int]] = {}
    for first, last in sequences.shards(tokens_per_shard):
        rows = windows_of(sequences, first, last, max_length)
        start, stop = int(sequences.bounds[first]), int(sequences.bounds[last])
        offset = max(start - 1, 0)
        batches = batches_of(
            stream[offset:stop], offset, rows, max_length=max_length, num_rows=num_rows, eod=EOD
        )
        for batch in batches:
            assert batch.inputs_BS.shape[1] <= max_length
            assert batch.inputs_BS.shape[1] % ROW_MULTIPLE == 0 or (
                batch.inputs_BS.shape[1] == max_length
            )
            inputs = batch.inputs_BS[batch.predicts_BS]
            labels = batch.labels_BS[batch.predicts_BS]
            for place, pair in zip(batch.places, zip(inputs, labels, strict=True), strict=True):
                assert start + place not in seen
                seen[start + int(place)] = (int(pair[0]), int(pair[1]))
    return seen


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    window=st.none() | st.integers(1, 150),
    max_length=st.integers(1, 150),
    num_rows=st.integers(1, 5),
    tokens_per_shard=st.integers(1, 400),
)
def test_every_token_is_predicted_once(
    lengths: list[int], window: int | None, max_length: int, num_rows: int, tokens_per_shard: int
) -> None:
    sequences = Sequences.of(np.array(lengths), window)
    stream = np.arange(sum(lengths)) + 1000
    max_length = max_length if window is None else window
    seen = _read(
        sequences, stream, max_length=max_length, num_rows=num_rows,
        tokens_per_shard=tokens_per_shard,
    )  # fmt: skip
    assert sorted(seen) == list(range(len(stream)))
    starts = {0} | set(np.cumsum(lengths).tolist()) if window is None else {0}
    for place, (before, label) in seen.items():
        assert label == stream[place]
        assert before == (EOD if place in starts else stream[place - 1])


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_shards_are_whole_sequences_in_order(lengths: list[int], tokens_per_shard: int) -> None:
    sequences = Sequences.of(np.array(lengths, dtype=np.int64), None)
    shards = sequences.shards(tokens_per_shard)
    covered = [index for first, last in shards for index in range(first, last)]
    assert covered == list(range(len(lengths)))
    for first, last in shards:
        assert sequences.bounds[last - 1] - sequences.bounds[first] < tokens_per_shard
