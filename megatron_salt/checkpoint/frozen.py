"""The model of a checkpoint, frozen, on every rank."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_salt.checkpoint.manifest import CheckpointManifest
from megatron_salt.checkpoint.weights import read_weights
from megatron_salt.kernels import VocabShard
from megatron_salt.model.frozen import FrozenModel, broadcast_weights
from megatron_salt.model.weights import weight_table
from megatron_salt.parallel.groups import Groups


def load_frozen(
    folder: Path,
    manifest: CheckpointManifest,
    groups: Groups,
    *,
    seq_length: int,
    dtype: torch.dtype,
    head: VocabShard | None,
    head_columns: int,
) -> FrozenModel:
    """Everything about its shape comes from its own checkpoint, but the length that it reads.

    Args:
        head, head_columns: see `FrozenModel`.
    Collectives: one broadcast per weight over all ranks; rank 0 alone reads.
    Raises: ValueError naming the checkpoint and the weight, if one is missing, of another shape,
        all zeros or not finite. Call `teacher.find.check_teacher_fits` first.
    """
    model, source = manifest.model, f"model {folder}"
    table = weight_table(model.config, model.vocab_size, model.num_positions)
    weights = broadcast_weights(
        table, lambda: read_weights(folder, manifest), groups, dtype, source
    )
    return FrozenModel(
        model.config,
        weights,
        groups,
        source=source,
        vocab_size=model.vocab_size,
        # A learned position table keeps the size that it was trained with.
        num_positions=model.num_positions,
        seq_length=seq_length,
        dtype=dtype,
        head=head,
        head_columns=head_columns,
    )
