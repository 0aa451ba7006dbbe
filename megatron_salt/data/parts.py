"""What held-out text is of, a dataset or one of its sources: each has a loss of its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from numpy.typing import NDArray
from torch import Tensor

from megatron_salt.data.sources import Sources


@dataclass(frozen=True)
class _SourceOfTokens:
    """In place of a GPTDataset's token file: for each token the number of its part."""

    lengths: NDArray[np.int32]
    part_of_documents: NDArray[np.int64]

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[np.int64]:
        size = int(self.lengths[index]) - offset if length is None else length
        return np.full(size, self.part_of_documents[index])


class HeldOutParts:
    """The parts of the held-out samples: names, and which one each label is of.

    Args:
        datasets: the held-out datasets, with their prefixes and sources (None: it has none).
    """

    def __init__(
        self, datasets: Sequence[GPTDataset], prefixes: Sequence[str],
        sources: Sequence[Sources | None],
    ) -> None:  # fmt: skip
        self.names: list[str] = []
        self._parts: list[int | GPTDataset] = []
        for dataset, name, found in zip(datasets, short_names(prefixes), sources, strict=True):
            first = len(self.names)
            if found is None or len(found.names) < 2:
                self.names.append(name)
                self._parts.append(first)
                continue
            inside = "" if len(prefixes) == 1 else f"{name}/"
            self.names += [inside + source for source in found.names]
            view: Any = copy.copy(dataset)
            view.dataset = _SourceOfTokens(
                dataset.dataset.sequence_lengths, first + found.of_documents.astype(np.int64)
            )
            self._parts.append(view)
        if len(self.names) == 1:
            self.names = []  # all there is has its loss already

    def of_labels(self, which: int, index: int, length: int) -> Tensor:
        """The parts of the labels of sample `index` of held-out dataset `which`, int64 [S]."""
        part = self._parts[which]
        if isinstance(part, int):
            return torch.full((length,), part)
        # The same documents by the same indices; the first token is no label.
        return torch.from_numpy(part._query_document_sample_shuffle_indices(index)[0][1:])


def short_names(prefixes: Sequence[str]) -> list[str]:
    """Base names without `_text_document`; whole prefixes where two would be alike."""
    names = [re.sub(r"_[^_]+_document$", "", Path(prefix).name) for prefix in prefixes]
    return names if len(set(names)) == len(names) else [str(prefix) for prefix in prefixes]
