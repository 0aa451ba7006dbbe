"""The optimizer's state in a checkpoint, under the names of the weights: no layout is in it.

Every rank writes the fragments that it holds, and rank 0 an index of all of them:

    optimizer/rank_00012.safetensors    NAME/STATE: a run of elements of a flattened shard, STATE
                                        being fp32 (the master weights) or the optimizer's own word
    optimizer/index.json                which elements of which shard lie in which file; the step

A weight that is not cut over tensor-parallel ranks is written by the first of them alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_salt.checkpoint.manifest import CheckpointManifest, ModelRecord
from megatron_salt.checkpoint.shards import Cut, naming, open_tensors, read_range, shard_numel
from megatron_salt.config.records import record_of
from megatron_salt.files.json_files import read_object
from megatron_salt.model.weights import padded_vocab, weight_table

OPTIMIZER_INDEX = "optimizer/index.json"
MASTER = "fp32"


def optimizer_file(rank: int) -> str:
    return f"optimizer/rank_{rank:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class OptimizerPart:
    """What one rank has written."""

    file: str
    tp_rank: int
    fragments: dict[str, tuple[int, int]]
    """Name of a weight -> first element in its flattened shard, and how many."""


@dataclass(frozen=True, kw_only=True)
class OptimizerIndex:
    """What all ranks have written."""

    states: list[str]
    """Of every weight: fp32, and what the optimizer keeps of the same shape."""
    scalars: dict[str, float]
    """The optimizer's numbers, the same for all weights: its step."""
    parts: list[OptimizerPart]


class _Fragment(NamedTuple):
    start: int
    numel: int
    file: str


def _fragments(index: OptimizerIndex, model: ModelRecord, source: Path | str) -> dict[Any, Any]:
    """(weight, tensor-parallel rank) -> its fragments in order.

    Raises: ValueError naming the weight of which elements are missing or twice there.
    """
    table = weight_table(model.config, model.vocab_size, model.num_positions)
    padded = padded_vocab(model.config, model.vocab_size, model.tp_size)
    found: dict[tuple[str, int], list[_Fragment]] = {
        (name, tp_rank): []
        for name, spec in table.items()
        for tp_rank in range(1 if spec.sharding == "replicated" else model.tp_size)
    }
    for part in index.parts:
        for name, fragment in part.fragments.items():
            if len(fragment) != 2:
                raise ValueError(
                    f"{source}: {part.file}: {name} = {fragment}: expected two numbers"
                )
            start, numel = fragment
            if (name, part.tp_rank) not in found:
                raise ValueError(f"{source}: {part.file}: {name} is not a weight of this model")
            found[name, part.tp_rank].append(_Fragment(start, numel, part.file))
    for (name, tp_rank), fragments in found.items():
        fragments.sort()
        end, size = 0, shard_numel(table[name], model.tp_size, padded)
        for start, numel, file in [*fragments, _Fragment(size, 1, "the end")]:
            if start != end or numel < 1:
                what = "are in no file" if start > end else "overlap others"
                raise ValueError(
                    f"{source}: optimizer state of {name}, tensor-parallel rank {tp_rank}: "
                    f"elements {min(start, end)} to {max(start, end)} before {file} {what}"
                )
            end = start + numel
    return found


def write_optimizer_index(
    partial: Path, model: ModelRecord, parts: Sequence[OptimizerPart],
    states: Sequence[Sequence[str]], scalars: Sequence[Mapping[str, float]],
) -> None:  # fmt: skip
    """Write the index of what all ranks have written.

    Args: parts, states, scalars: of every rank.
    Raises: RuntimeError where ranks do not agree or something is missing: nothing to resume from.
    """
    for what, values in (("states", states), ("numbers", scalars)):
        for rank, value in enumerate(values):
            if value != values[0]:
                raise RuntimeError(
                    f"{partial}: the optimizer's {what} differ: {values[0]} on rank 0, {value} on "
                    f"rank {rank}; no checkpoint is made of it"
                )
    index = OptimizerIndex(states=list(states[0]), scalars=dict(scalars[0]), parts=list(parts))
    try:
        _fragments(index, model, partial)
    except ValueError as error:
        raise RuntimeError(f"{error}; no checkpoint is made of it") from error
    (partial / OPTIMIZER_INDEX).write_text(json.dumps(asdict(index)), encoding="utf-8")


class StoredOptimizer:
    """The optimizer's state of a checkpoint, to be read in parts, at any layout."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        """Raises: ValueError naming the file and what is missing or damaged."""
        self.folder, self.model, source = folder, manifest.model, folder / OPTIMIZER_INDEX
        if OPTIMIZER_INDEX not in manifest.files:
            raise ValueError(
                f"{folder} has no optimizer state (stripped?): it cannot be resumed; "
                "train.init_from starts a new run from its weights"
            )
        self.index = record_of(OptimizerIndex, read_object(source), str(source))
        self._fragments = _fragments(self.index, self.model, source)
        for part in self.index.parts:
            if part.file not in manifest.files:
                raise ValueError(f"{source}: {part.file} is not in the manifest")
        self._table = weight_table(
            self.model.config, self.model.vocab_size, self.model.num_positions
        )
        self._padded = padded_vocab(self.model.config, self.model.vocab_size, self.model.tp_size)
        self._open: dict[str, Any] = {}

    def read(self, name: str, state: str, cut: Cut, part: range) -> Tensor:
        """Elements of a weight's flattened shard that `cut` makes.

        Raises: ValueError naming the file that is damaged.
        """
        spec = self._table[name]
        columns = spec.numel // spec.shape[0]
        if spec.sharding == "columns":
            columns //= self.model.tp_size

        def read_rows(tp_rank: int, first: int, last: int) -> Tensor:
            elements = self._elements(name, state, tp_rank, first * columns, last * columns)
            return elements.view(-1, columns)

        return read_range(spec, cut, part, self.model.tp_size, self._padded, read_rows)

    def fragments(self) -> Iterator[tuple[Path, str, Tensor]]:
        """(file, NAME/STATE, elements) of all that ranks have written, padding too.

        Raises: ValueError naming the file that is damaged.
        """
        for (name, tp_rank), fragments in self._fragments.items():
            for start, numel, file in fragments:
                for state in self.index.states:
                    elements = self._elements(name, state, tp_rank, start, start + numel)
                    yield self.folder / file, f"{name}/{state}", elements

    def _elements(self, name: str, state: str, tp_rank: int, first: int, last: int) -> Tensor:
        """A run of elements of a flattened shard as saved."""
        found = []
        for start, numel, file in self._fragments[name, tp_rank]:
            low, high = max(start, first), min(start + numel, last)
            if low >= high:
                continue
            path = self.folder / file
            if file not in self._open:
                self._open[file] = open_tensors(path)
            with naming(path):
                stored = self._open[file].get_slice(f"{name}/{state}")
                if stored.get_shape() != [numel]:
                    raise ValueError(
                        f"{path}: {name}/{state} has shape {stored.get_shape()}, the index says "
                        f"{[numel]}; use another checkpoint"
                    )
                found.append(stored[low - start : high - start])
        return torch.cat(found)
