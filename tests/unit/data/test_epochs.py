"""Samples of windows: the labels of a window are its tokens, the inputs what is before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_salt.data.epochs import EpochedDataset, Tags, WindowDataset
from megatron_salt.data.tags import open_indexed, tag_prefix

EOD = 7
W = 4
# Two documents, of 6 and 5 tokens; the first ends with an end-of-document token.
DOCUMENTS = [[10, 11, 12, 13, 14, EOD], [20, 21, 22, 23, 24]]


def write(prefix: str, documents: list[list[int]], dtype: Any) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """The data, with a mask that is 1 for even tokens and a loss of token / 4."""
    data = str(tmp_path / "data")
    write(data, DOCUMENTS, np.uint16)
    write(tag_prefix(data, "mask"), [[1 - t % 2 for t in d] for d in DOCUMENTS], np.uint8)
    losses = [(np.array(d) / 4).astype(np.float16).view(np.uint16).tolist() for d in DOCUMENTS]
    write(tag_prefix(data, "loss"), losses, np.uint16)
    return data


def make(prefix: str, windows: list[int], **changes: Any) -> WindowDataset:
    arguments = {
        "window": W, "seed": 1, "eod": EOD, "eod_mask_loss": False, "tags": None, "identity": "x",
        **changes,
    }  # fmt: skip
    return WindowDataset(open_indexed(prefix), np.array(windows), **arguments)


def test_window_holds_its_tokens_as_labels(prefix: str) -> None:
    first, second = make(prefix, [0])[0], make(prefix, [1])[0]
    assert first["tokens"].tolist() == [EOD, 10, 11, 12]
    assert first["labels"].tolist() == [10, 11, 12, 13]
    assert second["tokens"].tolist() == [13, 14, EOD, 20]
    assert second["labels"].tolist() == [14, EOD, 20, 21]
    assert second["loss_mask"].tolist() == [1, 1, 1, 1]
    assert second["tokens"].dtype == second["labels"].dtype == torch.int64


def test_end_of_document_as_input_has_no_loss_if_so_set(prefix: str) -> None:
    assert make(prefix, [1], eod_mask_loss=True)[0]["loss_mask"].tolist() == [1, 1, 0, 1]
    assert make(prefix, [0], eod_mask_loss=True)[0]["loss_mask"].tolist() == [0, 1, 1, 1]


def test_tags_are_of_the_labels(prefix: str) -> None:
    sample = make(prefix, [1], tags=Tags(prefix, with_loss=True))[0]
    assert sample["tag"].tolist() == [1, 0, 1, 0]  # of 14, 7, 20, 21
    assert sample["reference_loss"].tolist() == [3.5, 1.75, 5.0, 5.25]
    assert "reference_loss" not in make(prefix, [1], tags=Tags(prefix, with_loss=False))[0]


def test_epochs_shuffle_anew_and_read_every_window_once(prefix: str) -> None:
    big = [[token % 50 for token in range(400)]]
    write(f"{prefix}_big", big, np.uint16)
    epochs = [make(f"{prefix}_big", list(range(0, 100, 2)), seed=seed) for seed in (1, 2)]
    order = EpochedDataset(epochs)
    assert len(order) == 100 and order.samples_per_epoch == 50
    first = [int(epochs[0].windows[index]) for index in range(50)]
    second = [int(epochs[1].windows[index]) for index in range(50)]
    assert sorted(first) == sorted(second) == list(range(0, 100, 2))
    assert first != second and first != sorted(first)
    for row in range(100):
        assert order[row]["labels"].equal(epochs[row // 50][row % 50]["labels"])
