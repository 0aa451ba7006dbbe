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
from typing import Literal

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


def shard(full: Tensor, spec: WeightSpec, tp_rank: int, tp_size: int, padded_vocab: int) -> Tensor:
    """This rank's part of a whole weight; vocabulary padding is zero rows.

    Raises: ValueError if `full` does not have the table's shape.
    """
    if tuple(full.shape) != spec.shape:
        raise ValueError(f"{spec.name}: shape {tuple(full.shape)}, the config says {spec.shape}")
    match spec.sharding:
        case "replicated":
            return full
        case "rows":
            return full.chunk(tp_size, dim=0)[tp_rank]
        case "columns":
            return full.chunk(tp_size, dim=1)[tp_rank].contiguous()
        case "gated_rows":
            # Each rank holds its part of the gate above its part of the up projection.
            gate, up = full.chunk(2, dim=0)
            return torch.cat([gate.chunk(tp_size)[tp_rank], up.chunk(tp_size)[tp_rank]])
        case "vocab_rows":
            width = padded_vocab // tp_size
            part = full.new_zeros((width, *full.shape[1:]))
            real = full[tp_rank * width : (tp_rank + 1) * width]
            part[: real.shape[0]] = real
            return part


def merge(parts: Sequence[Tensor], spec: WeightSpec) -> Tensor:
    """The whole weight from the parts of all tensor-parallel ranks in order; inverse of `shard`."""
    match spec.sharding:
        case "replicated":
            full = parts[0]
        case "rows":
            full = torch.cat(list(parts))
        case "columns":
            full = torch.cat(list(parts), dim=1)
        case "gated_rows":
            halves = [part.chunk(2, dim=0) for part in parts]
            full = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        case "vocab_rows":
            full = torch.cat(list(parts))[: spec.shape[0]]
    if tuple(full.shape) != spec.shape:
        raise ValueError(f"{spec.name}: shape {tuple(full.shape)}, the config says {spec.shape}")
    return full


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
