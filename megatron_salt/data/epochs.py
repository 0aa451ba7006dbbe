"""Samples of one dataset, epoch after epoch: of all its documents, or of selected sequences.

A sample is `{"tokens", "labels", "loss_mask"}` of S positions, as megatron-core's `GPTDataset`
gives it, and with tags also `"tag"` and `"reference_loss"`, aligned with the labels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from torch import Tensor

from megatron_salt.data.tags import as_fp16, open_indexed, read_stream, tag_prefix

SampleFields = dict[str, Tensor]


class Epoch(Protocol):
    """One pass over some samples, in an order of its own."""

    index_split: Split
    unique_identifiers: dict[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SampleFields: ...


class Tags:
    """The tag files of one dataset that a run reads, opened."""

    def __init__(self, prefix: str, *, with_loss: bool) -> None:
        self.mask = open_indexed(tag_prefix(prefix, "mask"))
        self.loss = open_indexed(tag_prefix(prefix, "loss")) if with_loss else None

    def of_places(self, start: int, stop: int) -> SampleFields:
        """Tags of tokens `[start, stop)` of the stream."""
        mask = read_stream(self.mask, start, stop)
        loss = None if self.loss is None else read_stream(self.loss, start, stop)
        return tag_fields(mask, loss)


def tag_fields(mask: NDArray[Any], loss_bits: NDArray[Any] | None) -> SampleFields:
    """The fields of a sample that hold its tags: fp32, mask and nats."""
    fields = {"tag": torch.from_numpy(mask.astype(np.float32))}
    if loss_bits is not None:
        fields["reference_loss"] = torch.from_numpy(as_fp16(loss_bits).astype(np.float32))
    return fields


class TaggedDataset(torch.utils.data.Dataset):
    """A `GPTDataset` whose samples carry their tags.

    The tag files have the documents of the data, so a copy of the dataset that reads them through
    the same indices gives the tags of the same tokens. The first is dropped: it is no label.
    """

    def __init__(self, epoch: GPTDataset, tags: Tags) -> None:
        self.epoch = epoch
        self.mask = self._view(tags.mask)
        self.loss = None if tags.loss is None else self._view(tags.loss)
        self.index_split = epoch.index_split
        self.unique_identifiers = epoch.unique_identifiers

    def _view(self, dataset: Any) -> GPTDataset:
        view = copy.copy(self.epoch)
        view.dataset = dataset
        return view

    def __len__(self) -> int:
        return len(self.epoch)

    def __getitem__(self, index: int) -> SampleFields:
        mask = self.mask._query_document_sample_shuffle_indices(index)[0]  # of 2 or, later, 3
        bits = None
        if self.loss is not None:
            bits = self.loss._query_document_sample_shuffle_indices(index)[0][1:]
        return {**self.epoch[index], **tag_fields(mask[1:], bits)}


class _OwnPlaces:
    """Stands for an `IndexedDataset`: every item is its own place in the stream of all tokens."""

    def __init__(self, dataset: Any) -> None:
        ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
        self.bounds = np.concatenate([[0], ends])

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[np.int64]:
        start = int(self.bounds[index]) + offset
        return np.arange(start, self.bounds[index + 1] if length is None else start + length)


class PlacedDataset(torch.utils.data.Dataset):
    """Samples of a `GPTDataset` that also say where in the stream their labels lie: `places`, [S].

    Args:
        epoch: the samples; of `gpt`, in its order.
    """

    def __init__(self, epoch: Epoch, gpt: GPTDataset) -> None:
        self.epoch, self.places = epoch, copy.copy(gpt)
        self.places.dataset = _OwnPlaces(gpt.dataset)
        self.index_split, self.unique_identifiers = epoch.index_split, epoch.unique_identifiers

    def __len__(self) -> int:
        return len(self.epoch)

    def __getitem__(self, index: int) -> SampleFields:
        places = self.places._query_document_sample_shuffle_indices(index)[0]
        return {**self.epoch[index], "places": torch.from_numpy(places[1:])}


@dataclass(eq=False)
class WindowDataset(torch.utils.data.Dataset):
    """One epoch over windows of the token stream, as they were scored, shuffled.

    Window i holds the labels `[i W, (i + 1) W)`; its inputs are the tokens before them, with the
    end-of-document token before the very first.
    """

    dataset: Any
    """The IndexedDataset."""
    numbers: NDArray[np.int64]
    """Of whole windows."""
    window: int
    seed: int
    eod: int
    eod_mask_loss: bool
    tags: Tags | None
    identity: str

    def __post_init__(self) -> None:
        self.index_split = Split.train
        of = self.identity
        self.unique_identifiers = {"class": type(self).__name__, "of": of, "seed": self.seed}

    @cached_property
    def windows(self) -> NDArray[np.int64]:
        """Shuffled when first read: a long run has many epochs, and reads one at a time."""
        # RandomState, because NumPy promises that its numbers never change.
        return np.random.RandomState(self.seed).permutation(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> SampleFields:
        start = int(self.windows[index]) * self.window
        stop = start + self.window
        text = read_stream(self.dataset, max(start - 1, 0), stop).astype(np.int64)
        if start == 0:
            text = np.concatenate([[self.eod], text])
        tokens, labels = torch.from_numpy(text[:-1]), torch.from_numpy(text[1:])
        loss_mask = torch.ones(self.window)
        if self.eod_mask_loss:
            loss_mask[tokens == self.eod] = 0.0
        sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask,
                  "places": torch.arange(start, stop),
                  "window": torch.tensor(start // self.window)}  # fmt: skip
        return sample | ({} if self.tags is None else self.tags.of_places(start, stop))


class EpochedDataset(torch.utils.data.Dataset):
    """An endless order over one dataset: epoch after epoch, each shuffled anew."""

    def __init__(self, epochs: Sequence[Epoch]) -> None:
        self.epochs = list(epochs)
        self.samples_per_epoch = len(self.epochs[0])
        # What `BlendedDataset` asks of its parts.
        self.index_split = self.epochs[0].index_split
        identities = [epoch.unique_identifiers for epoch in self.epochs]
        self.unique_identifiers = {"class": type(self).__name__, "epochs": identities}

    def __len__(self) -> int:
        return self.samples_per_epoch * len(self.epochs)

    def __getitem__(self, row: int) -> SampleFields:
        epoch, offset = divmod(int(row), self.samples_per_epoch)
        return self.epochs[epoch][offset]
