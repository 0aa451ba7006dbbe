"""Where a run's weights come from when they are not random, and where they go at its end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_salt.checkpoint.folder import list_checkpoints, resolve
from megatron_salt.checkpoint.manifest import (
    CheckpointManifest,
    read_checkpoint_manifest,
    tokenizer_folder,
)
from megatron_salt.checkpoint.weights import read_weights
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.tokenizer import Tokenizer, check_reads, load_tokenizer
from megatron_salt.huggingface.convert import check_exportable, export_checkpoint
from megatron_salt.huggingface.tokenizer_export import export_tokenizer
from megatron_salt.model.frozen import broadcast_weights
from megatron_salt.model.weights import weight_table
from megatron_salt.parallel.groups import Groups
from megatron_salt.training.console import Console

# Settings of a model that its weights do not depend on: how others were drawn, padding; how fast
# positions turn, which is changed to go on with longer sequences.
FREE = ("init_method_std", "make_vocab_size_divisible_by", "max_position_embeddings",
        "rotary_base", "rope_scaling")  # fmt: skip


@dataclass(frozen=True)
class Initial:
    """The checkpoint that train.init_from names."""

    folder: Path
    manifest: CheckpointManifest
    notes: list[str]
    """What is not as it was there, for people."""


def find_initial(config: RunConfig, tokenizer: Tokenizer) -> Initial | None:
    """The checkpoint that a new run starts from; None: random weights. For one rank.

    Raises: ValueError naming the checkpoint and what does not fit.
    """
    if config.train.init_from is None:
        return None
    folder = resolve(config.train.init_from, what="train.init_from")
    manifest = read_checkpoint_manifest(folder)
    own, name = manifest.model, f"train.init_from = {folder}"
    theirs = load_tokenizer(tokenizer_folder(folder, manifest))
    check_reads(name, theirs, "the run's data", tokenizer)
    before, now = own.config.sizes(), config.model.sizes()
    before["positions"] = now["positions"] = None
    if own.config.position_embedding_type == "learned_absolute":
        before["positions"], now["positions"] = own.num_positions, config.num_positions
    changed = [key for key, value in before.items() if now[key] != value]
    if wrong := [f"{key} {before[key]}, not {now[key]}" for key in changed if key not in FREE]:
        raise ValueError(
            f"{name} is another model: it has {'; '.join(wrong)}: give its settings (a converted "
            "checkpoint has them in model.yaml), or start from another one"
        )
    notes = [
        f"model.{key}: {before[key]} -> {now[key]}"
        for key in changed
        if key in ("rotary_base", "rope_scaling")
    ]
    if config.data.seq_length > own.seq_length:
        notes.append(f"data.seq_length: {own.seq_length} -> {config.data.seq_length}")
    return Initial(folder, manifest, notes)


def initial_weights(
    initial: Initial | None, groups: Groups, console: Console
) -> Iterator[tuple[str, Tensor]] | None:
    """Every weight of the checkpoint on this rank, in fp32, one at a time; None: random ones.

    Collectives: one broadcast per weight over all ranks, while they are taken.
    """
    if initial is None:
        return None
    model = initial.manifest.model
    console.say(f"the student starts from {initial.folder} ({model.precision})")
    for note in initial.notes:
        console.say(f"  changed since then: {note}")
    table = weight_table(model.config, model.vocab_size, model.num_positions)
    return broadcast_weights(
        table, lambda: read_weights(initial.folder, initial.manifest), groups, torch.float32,
        str(initial.folder),
    )  # fmt: skip


def check_export(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError where train.export_hf could not be made at the end. For one rank."""
    if config.train.export_hf is not None:
        check_exportable(config.model, Path(config.train.export_hf))
        with tempfile.TemporaryDirectory() as scratch:
            export_tokenizer(tokenizer, Path(scratch), longest=config.data.seq_length)


def export_last(config: RunConfig) -> str:
    """Make the Hugging Face folder of the run's last checkpoint; a line for people."""
    assert config.train.export_hf is not None
    newest = list_checkpoints(config.train.output_dir)[-1]
    kind = export_checkpoint(str(newest), Path(config.train.export_hf))
    return f"exported {newest} to {config.train.export_hf} as {kind}"
