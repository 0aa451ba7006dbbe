"""Tensors in a checkpoint: the model's weights by canonical name, which a frozen model is built of,
and the teacher's held-out losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_salt.checkpoint.manifest import CheckpointManifest, verify_hashes
from megatron_salt.files.disk import save_tensors
from megatron_salt.kernels import VocabShard
from megatron_salt.model.frozen import FrozenModel, broadcast_weights
from megatron_salt.model.weights import merge, weight_table
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


def read_weights(path: Path, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """The whole model's weights on the CPU, merged from the parts of any tp and pp.

    Raises: ValueError naming checkpoint and weight, if one is missing, twice there, unknown or of
        another shape than the config says, or if a file's content does not match its hash.
    """
    model = manifest.model
    table = weight_table(model.config, model.vocab_size, model.num_positions)
    parts: dict[str, list[Tensor]] = {name: [] for name in table}
    names = sorted(name for name in manifest.files if name.startswith("weights/"))
    verify_hashes(path, manifest, names)
    for pp_rank in range(model.pp_size):
        for tp_rank in range(model.tp_size):
            name = weights_file(pp_rank, tp_rank)
            if name not in names:
                raise ValueError(f"{path}: {name} is missing from the manifest")
            with safe_open(path / name, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118  not a dict
                    if key not in parts:
                        raise ValueError(f"{path / name}: unknown weight {key}")
                    parts[key].append(stored.get_tensor(key))
    full = {}
    for name, spec in table.items():
        if len(parts[name]) != model.tp_size:
            raise ValueError(
                f"{path}: weight {name} has {len(parts[name])} of {model.tp_size} parts"
            )
        full[name] = merge(parts.pop(name), spec)
    return full


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
    with safe_open(path, framework="pt") as stored:
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
