"""Routes as pure functions of weights: which tokens are taken, what their weights become."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_salt.method.routing import keep_taught, share_of_sequences


def test_untaught_tokens_keep_their_total_weight_or_not() -> None:
    ce, kd = torch.tensor([0.25, 0.25, 0.0]), torch.tensor([0.75, 0.75, 0.0])
    taught = torch.tensor([1.0, 0.0, 0.0])
    full = keep_taught(ce, kd, taught, "full")
    assert full[0].tolist() == [0.25, 1.0, 0.0] and full[1].tolist() == [0.75, 0.0, 0.0]
    mixed = keep_taught(ce, kd, taught, "mixed")
    assert mixed[0].tolist() == [0.25, 0.25, 0.0] and mixed[1].tolist() == [0.75, 0.0, 0.0]
    assert ce.tolist() == [0.25, 0.25, 0.0] and kd.tolist() == [0.75, 0.75, 0.0]


def test_share_is_taken_within_each_sequence() -> None:
    values = torch.tensor([[5.0, 1.0, 4.0, 2.0], [50.0, 40.0, 30.0, 20.0]])
    everything = torch.ones(2, 4)
    taken = share_of_sequences(values, everything, 0.5)
    assert taken.tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert share_of_sequences(values, everything, 0.01).sum(dim=1).tolist() == [1, 1]


def test_tokens_that_do_not_count_are_not_taken() -> None:
    values = torch.tensor([[9.0, 1.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    counted = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    taken = share_of_sequences(values, counted, 2 / 3)
    assert taken.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]


def test_equal_values_are_taken_in_order_and_nan_last() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [math.nan, -math.inf, 2.0, math.nan]])
    taken = share_of_sequences(values, torch.ones(2, 4), 0.5)
    assert taken.tolist()[0] == [1, 1, 0, 0]
    assert taken.tolist()[1][2] == 1 and taken[1].sum() == 2


@given(
    rows=st.lists(
        st.lists(st.tuples(st.floats(-9, 9, width=32), st.booleans()), min_size=5, max_size=5),
        min_size=1, max_size=4,
    ),
    share=st.floats(0.01, 1.0),
)  # fmt: skip
def test_share_equals_plain_python(rows: list[list[tuple[float, bool]]], share: float) -> None:
    values = torch.tensor([[value for value, _ in row] for row in rows])
    counted = torch.tensor([[float(counts) for _, counts in row] for row in rows])
    taken = share_of_sequences(values, counted, share)
    for row, got in zip(rows, taken.tolist(), strict=True):
        candidates = [place for place, (_, counts) in enumerate(row) if counts]
        ranked = sorted(candidates, key=lambda place: (-row[place][0], place))
        expected = set(ranked[: math.ceil(len(candidates) * share - 1e-9)])
        assert {place for place, one in enumerate(got) if one} == expected
