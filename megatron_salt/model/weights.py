"""The table of weights: name, full shape, how it is cut over tensor-parallel ranks, how it starts.

Everything that must not depend on the layout goes through this table: initial values (same seed,
same weights whatever tp and pp), checkpoints readable at any tp and pp, the count of parameters.
Names are megatron-core's within a layer. Letters: D hidden, F inner MLP width, V real vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_salt.config.fields import ModelConfig
from megatron_salt.kernels.vocab import padded_vocab_size

Sharding = Literal["replicated", "rows", "columns", "gated_rows", "vocab_rows"]
Init = Literal["normal", "scaled_normal", "ones", "zeros"]

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One weight as a whole, before any cut. `vocab_rows` has V rows here; shards add padding."""

    name: str
    shape: tuple[int, ...]
    sharding: Sharding
    init: Init

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def output_weight_name(model: ModelConfig) -> str:
    """Name of the weight that makes logits: the output layer's, or the tied embedding's."""
    return OUTPUT_LAYER if model.untie_embeddings_and_output_weights else EMBEDDING


def weight_table(
    model: ModelConfig, vocab_size: int, max_position_embeddings: int
) -> dict[str, WeightSpec]:
    """Every weight of the model, in order of use."""
    table: dict[str, WeightSpec] = {}

    def add(name: str, shape: tuple[int, ...], sharding: Sharding, init: Init) -> None:
        table[name] = WeightSpec(name=name, shape=shape, sharding=sharding, init=init)

    def add_norm(name: str, size: int) -> None:
        add(f"{name}.weight", (size,), "replicated", "ones")
        if model.normalization == "LayerNorm":
            add(f"{name}.bias", (size,), "replicated", "zeros")

    def add_linear(
        name: str, rows: int, cols: int, sharding: Sharding, init: Init, has_bias: bool = False
    ) -> None:
        add(f"{name}.weight", (rows, cols), sharding, init)
        if model.add_bias_linear or has_bias:
            bias: Sharding = "replicated" if sharding == "columns" else sharding
            add(f"{name}.bias", (rows,), bias, "zeros")

    d, f, head = model.hidden_size, model.ffn_size, model.head_size
    query_size = model.num_attention_heads * head
    qkv_size = query_size + 2 * model.query_groups * head
    add(EMBEDDING, (vocab_size, d), "vocab_rows", "normal")
    if model.position_embedding_type == "learned_absolute":
        add("position_embedding.weight", (max_position_embeddings, d), "replicated", "normal")
    for layer in (f"layers.{index}" for index in range(model.num_layers)):
        attention = f"{layer}.self_attention"
        add_norm(f"{layer}.input_layernorm", d)
        add_linear(f"{attention}.linear_qkv", qkv_size, d, "rows", "normal", model.add_qkv_bias)
        if model.qk_layernorm:
            add_norm(f"{attention}.q_layernorm", head)
            add_norm(f"{attention}.k_layernorm", head)
        add_linear(f"{attention}.linear_proj", d, query_size, "columns", "scaled_normal")
        add_norm(f"{layer}.pre_mlp_layernorm", d)
        if model.is_gated:
            add_linear(f"{layer}.mlp.linear_fc1", 2 * f, d, "gated_rows", "normal")
        else:
            add_linear(f"{layer}.mlp.linear_fc1", f, d, "rows", "normal")
        add_linear(f"{layer}.mlp.linear_fc2", d, f, "columns", "scaled_normal")
    add_norm("final_layernorm", d)
    if model.untie_embeddings_and_output_weights:
        add(OUTPUT_LAYER, (vocab_size, d), "vocab_rows", "normal")
    return table


def num_parameters(model: ModelConfig, vocab_size: int, max_position_embeddings: int) -> int:
    """Parameters of the whole model, real vocabulary rows only."""
    table = weight_table(model, vocab_size, max_position_embeddings)
    return sum(spec.numel for spec in table.values())


def shard_shape(spec: WeightSpec, tp_size: int, padded_vocab: int) -> tuple[int, ...]:
    """Shape of one rank's part of a weight."""
    match spec.sharding:
        case "replicated":
            return spec.shape
        case "rows" | "gated_rows":
            return (spec.shape[0] // tp_size, *spec.shape[1:])
        case "columns":
            return (spec.shape[0], spec.shape[1] // tp_size)
        case "vocab_rows":
            return (padded_vocab // tp_size, *spec.shape[1:])


class RowRun(NamedTuple):
    """Rows that lie together in a shard and in the whole weight."""

    start: int
    """First of them in the shard."""
    whole_start: int
    """The same row in the whole weight."""
    num_rows: int


def shard_runs(spec: WeightSpec, tp_rank: int, tp_size: int, padded_vocab: int) -> list[RowRun]:
    """Which rows of the whole weight a rank's shard holds, and where; padding is in none."""
    rows = spec.shape[0]
    match spec.sharding:
        case "replicated" | "columns":
            return [RowRun(0, 0, rows)]
        case "rows":
            part = rows // tp_size
            return [RowRun(0, tp_rank * part, part)]
        case "gated_rows":
            # Each rank holds its part of the gate above its part of the up projection.
            part, up = rows // 2 // tp_size, rows // 2
            return [RowRun(0, tp_rank * part, part), RowRun(part, up + tp_rank * part, part)]
        case "vocab_rows":
            part = padded_vocab // tp_size
            return [RowRun(0, tp_rank * part, max(0, min(part, rows - tp_rank * part)))]


def shard_columns(spec: WeightSpec, tp_rank: int, tp_size: int) -> slice:
    """Which columns of the whole weight a rank's shard holds; a vector has one."""
    width = math.prod(spec.shape[1:])
    if spec.sharding != "columns":
        return slice(0, width)
    return slice(tp_rank * (width // tp_size), (tp_rank + 1) * (width // tp_size))


def as_matrix(weight: Tensor) -> Tensor:
    """The weight itself, a vector as one column."""
    return weight if weight.dim() > 1 else weight[:, None]


def shard(full: Tensor, spec: WeightSpec, tp_rank: int, tp_size: int, padded_vocab: int) -> Tensor:
    """This rank's part of a whole weight; vocabulary padding is zero rows.

    Raises: ValueError if `full` does not have the table's shape.
    """
    if tuple(full.shape) != spec.shape:
        raise ValueError(f"{spec.name}: shape {tuple(full.shape)}, the config says {spec.shape}")
    part = full.new_zeros(shard_shape(spec, tp_size, padded_vocab))
    columns = shard_columns(spec, tp_rank, tp_size)
    for start, whole_start, count in shard_runs(spec, tp_rank, tp_size, padded_vocab):
        rows = as_matrix(full)[whole_start : whole_start + count, columns]
        as_matrix(part)[start : start + count] = rows
    return part


def merge(parts: Sequence[Tensor], spec: WeightSpec) -> Tensor:
    """The whole weight from the parts of all tensor-parallel ranks in order; inverse of `shard`.

    Raises: ValueError if a part does not have the shape that the table gives it.
    """
    tp_size, full = len(parts), parts[0].new_empty(spec.shape)
    padded = parts[0].shape[0] * tp_size  # of a vocabulary; of others it is not read
    for tp_rank, part in enumerate(parts):
        check_shard_shape(tuple(part.shape), spec, tp_size, padded)
        columns = shard_columns(spec, tp_rank, tp_size)
        for start, whole_start, count in shard_runs(spec, tp_rank, tp_size, padded):
            rows = as_matrix(part)[start : start + count]
            as_matrix(full)[whole_start : whole_start + count, columns] = rows
    return full


def check_shard_shape(
    shape: tuple[int, ...], spec: WeightSpec, tp_size: int, padded_vocab: int
) -> None:
    """Raise ValueError if a shard of this shape is not one of the weight's."""
    expected = shard_shape(spec, tp_size, padded_vocab)
    if shape != expected or (spec.sharding == "vocab_rows" and padded_vocab < spec.shape[0]):
        raise ValueError(
            f"{spec.name}: shape {shape} over {tp_size} tensor-parallel ranks, the config says "
            f"{expected} of {spec.shape}"
        )


def initial_weight(spec: WeightSpec, model: ModelConfig, seed: int) -> Tensor:
    """The whole weight at step 0, fp32 on the CPU: a function of seed and name alone."""
    if spec.init == "ones":
        return torch.ones(spec.shape)
    if spec.init == "zeros":
        return torch.zeros(spec.shape)
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = model.init_method_std
    if spec.init == "scaled_normal":
        std /= math.sqrt(2.0 * model.num_layers)
    return torch.randn(spec.shape, generator=generator) * std


def padded_vocab(model: ModelConfig, vocab_size: int, tp_size: int) -> int:
    """Vocabulary rows of the student's embedding and head over all tensor-parallel ranks."""
    return padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, tp_size)
