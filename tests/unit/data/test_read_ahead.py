"""Batches are read ahead by a thread, in order, once, and anew after a restart."""

from __future__ import annotations

import threading

import pytest
import torch

from megatron_salt.data.dataset import Batch
from megatron_salt.data.read_ahead import DEPTH, ReadAhead

CPU = torch.device("cpu")


def batch_of(value: int) -> Batch:
    row = torch.full((1, 2), value)
    return Batch(tokens_RS=row, labels_RS=row, mask_RS=row.float())


def number(batch: Batch) -> int:
    return int(batch.tokens_RS[0, 0])


def test_each_step_is_read_once_in_order_and_ahead() -> None:
    asked: list[int] = []
    reached = threading.Event()

    def read(step: int) -> Batch:
        asked.append(step)
        if step == 3 + DEPTH:
            reached.set()
        return batch_of(step)

    batches = ReadAhead(read, 3, 9, CPU)
    assert asked == []  # nothing before it is wanted
    assert number(batches.take(3)) == 3
    assert reached.wait(10)  # while step 3 runs the thread reads on
    for step in range(4, 9):
        if step < 8:
            assert number(batches.peek(step + 1)) == step + 1
        assert number(batches.take(step)) == step
    assert asked == list(range(3, 9))
    batches.close()


def test_restart_reads_anew_and_drops_what_was_there() -> None:
    offset = 0
    batches = ReadAhead(lambda step: batch_of(step + offset), 0, 10, CPU)
    assert number(batches.take(0)) == 0
    assert number(batches.peek(1)) == 1
    offset = 100
    batches.restart(1)
    assert [number(batches.take(step)) for step in (1, 2, 3)] == [101, 102, 103]
    batches.close()


def test_an_error_of_reading_reaches_the_step_that_needs_it() -> None:
    def read(step: int) -> Batch:
        if step == 1:
            raise ValueError("row 17 is torn")
        return batch_of(step)

    batches = ReadAhead(read, 0, 3, CPU)
    batches.take(0)
    with pytest.raises(ValueError, match="row 17"):
        batches.take(1)
    batches.close()
