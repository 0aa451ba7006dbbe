"""Batches read ahead: each step's own, also after what was read became wrong."""

from __future__ import annotations

import pytest
import torch

from megatron_salt.data.dataset import Batch
from megatron_salt.data.read_ahead import ReadAhead


def batch_of(number: int) -> Batch:
    tokens_RS = torch.full((2, 3), number)
    return Batch(tokens_RS=tokens_RS, labels_RS=tokens_RS, mask_RS=torch.ones(2, 3))


def number_of(batch: Batch) -> int:
    return int(batch.tokens_RS[0, 0])


def test_every_step_gets_its_batch_and_none_is_read_twice() -> None:
    read: list[int] = []

    def reader(step: int) -> Batch:
        read.append(step)
        return batch_of(step)

    batches = ReadAhead(reader, 3, 9, torch.device("cpu"))
    for step in range(3, 9):
        if step + 1 < 9:
            assert number_of(batches.peek(step + 1)) == step + 1
        assert number_of(batches.take(step)) == step
    batches.close()
    assert read == list(range(3, 9))


@pytest.mark.parametrize("peeked", [False, True])
def test_restart_forgets_what_was_read_by_the_old_rule(peeked: bool) -> None:
    """Whether it still waits, or has been looked at (the teacher works on it) already."""
    offset = 0
    batches = ReadAhead(lambda step: batch_of(offset + step), 0, 8, torch.device("cpu"))
    for step in range(4):
        assert number_of(batches.take(step)) == step
        if peeked:
            assert number_of(batches.peek(step + 1)) == step + 1
    offset = 100
    batches.restart(4)
    for step in range(4, 8):
        assert number_of(batches.take(step)) == 100 + step
    batches.close()


def test_an_error_of_the_reader_reaches_the_step_that_wants_the_batch() -> None:
    def reader(step: int) -> Batch:
        if step == 1:
            raise OSError("the disk is gone")
        return batch_of(step)

    batches = ReadAhead(reader, 0, 3, torch.device("cpu"))
    assert number_of(batches.take(0)) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        batches.take(1)
    batches.close()
