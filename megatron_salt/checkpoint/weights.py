"""Tensors in a checkpoint: the model's weights by canonical name, which a frozen model is built of,
and the teacher's held-out losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_salt.checkpoint.manifest import CheckpointManifest, verify_hashes
from megatron_salt.checkpoint.shards import WHOLE, Cut, naming, open_tensors, read_range
from megatron_salt.files.disk import save_tensors
from megatron_salt.kernels import VocabShard
from megatron_salt.model.frozen import FrozenModel, broadcast_weights
from megatron_salt.model.weights import as_matrix, check_shard_shape, weight_table
from megatron_salt.parallel.groups import Groups

TEACHER_SCORES = "held_out/teacher.safetensors"


def weights_file(pp_rank: int, tp_rank: int) -> str:
    return f"weights/stage_{pp_rank:03d}_tp_{tp_rank:03d}.safetensors"


def write_weights(
    directory: Path, pp_rank: int, tp_rank: int, weights: Mapping[str, Tensor]
) -> None:
    """Write one rank's part of the weights, by canonical name."""
    target = directory / weights_file(pp_rank, tp_rank)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(target, weights)


class WeightFiles:
    """The weights of a checkpoint, to be read whole or in parts, at any layout."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        """Look at all files' headers.

        Raises: ValueError naming checkpoint and weight, if one is missing, twice there, unknown or
            of another shape than the config says.
        """
        self.model = model = manifest.model
        self.table = weight_table(model.config, model.vocab_size, model.num_positions)
        shards: dict[str, dict[int, tuple[Path, Any]]] = {name: {} for name in self.table}
        for pp_rank in range(model.pp_size):
            for tp_rank in range(model.tp_size):
                path = folder / weights_file(pp_rank, tp_rank)
                if weights_file(pp_rank, tp_rank) not in manifest.files:
                    raise ValueError(f"{path} is missing from the manifest")
                stored = open_tensors(path)
                for name in stored.keys():  # noqa: SIM118  not a dict
                    if name not in shards:
                        raise ValueError(f"{path}: unknown weight {name}")
                    if tp_rank in shards[name]:
                        raise ValueError(f"{path}: weight {name} is also in {shards[name][0][0]}")
                    shards[name][tp_rank] = path, stored.get_slice(name)
        self._padded: dict[str, int] = {}
        for name, parts in shards.items():
            if len(parts) != model.tp_size:
                raise ValueError(
                    f"{folder}: weight {name} has {len(parts)} of {model.tp_size} parts"
                )
            for path, stored in parts.values():
                shape = tuple(stored.get_shape())
                self._padded[name] = shape[0] * model.tp_size if shape else 0
                try:
                    check_shard_shape(shape, self.table[name], model.tp_size, self._padded[name])
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
        self._shards = shards

    def read(self, name: str, cut: Cut, part: range) -> Tensor:
        """Elements of a weight's flattened shard that `cut` makes, in the dtype that was saved.

        Raises: ValueError naming the file that is damaged.
        """

        def read_rows(tp_rank: int, first: int, last: int) -> Tensor:
            path, stored = self._shards[name][tp_rank]
            with naming(path):
                return as_matrix(stored[first:last])

        spec, tp_size = self.table[name], self.model.tp_size
        return read_range(spec, cut, part, tp_size, self._padded[name], read_rows)

    def file_of(self, name: str) -> Path:
        """Where the first part of a weight is."""
        return self._shards[name][0][0]

    def whole(self, name: str) -> Tensor:
        """A weight as a whole, real rows of the vocabulary only."""
        spec = self.table[name]
        return self.read(name, WHOLE, range(spec.numel)).view(spec.shape)


def read_weights(path: Path, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """The whole model's weights on the CPU, merged from the parts of any tp and pp.

    Raises: ValueError as `WeightFiles`, or if a file's content does not match its hash.
    """
    names = sorted(name for name in manifest.files if name.startswith("weights/"))
    verify_hashes(path, manifest, names)
    stored = WeightFiles(path, manifest)
    return {name: stored.whole(name) for name in stored.table}


def load_frozen(
    folder: Path,
    manifest: CheckpointManifest,
    groups: Groups,
    *,
    seq_length: int,
    dtype: torch.dtype,
    head: VocabShard | None,
    head_columns: int,
    tensor_parallel: bool = False,
) -> FrozenModel:
    """The model of a checkpoint, frozen, on every rank.

    Everything about its shape comes from its own checkpoint, but the length that it reads.

    Args:
        head, head_columns, tensor_parallel: see `FrozenModel`.
    Collectives: one broadcast per weight over all ranks; rank 0 alone reads.
    Raises: ValueError naming the checkpoint and the weight, if one is missing, of another shape,
        all zeros or not finite. Call `teacher.find.check_teacher_fits` first.
    """
    model, source = manifest.model, f"model {folder}"
    table = weight_table(model.config, model.vocab_size, model.num_positions)
    weights = broadcast_weights(
        table, lambda: read_weights(folder, manifest), groups, dtype, source
    )
    # A learned position table keeps the size that it was trained with.
    return FrozenModel(
        model.config, weights, groups, source=source, vocab_size=model.vocab_size,
        num_positions=model.num_positions, seq_length=seq_length, dtype=dtype, head=head,
        head_columns=head_columns, tensor_parallel=tensor_parallel,
    )  # fmt: skip


def write_teacher_scores(directory: Path, tensors: Mapping[str, Tensor], samples: str) -> None:
    """Write what the teacher made of the held-out samples, of this fingerprint; see `held_out`."""
    target = directory / TEACHER_SCORES
    target.parent.mkdir()
    save_teacher_scores(target, tensors, samples)


def save_teacher_scores(path: Path, tensors: Mapping[str, Tensor], samples: str) -> None:
    save_tensors(path, tensors, {"samples": samples})


def load_teacher_scores(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors and the fingerprint of the samples."""
    stored = open_tensors(path)
    tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    return tensors, stored.metadata()["samples"]


def read_teacher_scores(
    path: Path, manifest: CheckpointManifest
) -> tuple[dict[str, Tensor], str] | None:
    """The tensors and the fingerprint that `write_teacher_scores` wrote; None where it did not.

    Raises: ValueError if the content does not match its hash.
    """
    if TEACHER_SCORES not in manifest.files:
        return None
    verify_hashes(path, manifest, [TEACHER_SCORES])
    return load_teacher_scores(path / TEACHER_SCORES)
