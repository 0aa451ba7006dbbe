"""The weight table: cutting and joining, initial values, the count of parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_salt.config.fields import ModelConfig
from megatron_salt.model.weights import (
    EMBEDDING,
    OUTPUT_LAYER,
    WeightSpec,
    initial_weight,
    merge,
    num_parameters,
    output_weight_name,
    padded_vocab,
    shard,
    shard_shape,
    weight_table,
)

V, S = 123, 16

LLAMA = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=24,
    make_vocab_size_divisible_by=8,
)  # fmt: skip
GPT = ModelConfig(
    num_layers=3, hidden_size=16, num_attention_heads=4, normalization="LayerNorm",
    activation="gelu", add_bias_linear=True, position_embedding_type="learned_absolute",
    untie_embeddings_and_output_weights=False, make_vocab_size_divisible_by=8,
)  # fmt: skip
GATED_WITH_BIAS = ModelConfig(
    num_layers=1, hidden_size=16, num_attention_heads=4, kv_channels=8, add_bias_linear=True
)
MODELS = {"llama": LLAMA, "gpt": GPT, "gated with bias": GATED_WITH_BIAS}


def numbered(spec: WeightSpec) -> torch.Tensor:
    """Every element its own number, so that no two places can be confused. From 1: 0 is padding."""
    return torch.arange(1, spec.numel + 1, dtype=torch.float64).reshape(spec.shape)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_merge_undoes_shard(model: ModelConfig, tp_size: int) -> None:
    padded = padded_vocab(model, V, tp_size)
    kinds = set()
    for spec in weight_table(model, V, S).values():
        full = numbered(spec)
        parts = [shard(full, spec, rank, tp_size, padded) for rank in range(tp_size)]
        assert {tuple(part.shape) for part in parts} == {shard_shape(spec, tp_size, padded)}
        assert torch.equal(merge(parts, spec), full)
        if spec.sharding != "replicated":
            # Each element lies on exactly one rank; the rest is padding.
            values = torch.cat([part.flatten() for part in parts])
            assert torch.equal(values[values != 0].sort().values, full.flatten())
        kinds.add(spec.sharding)
    assert kinds >= {"replicated", "rows", "columns", "vocab_rows"}


def test_gated_rows_hold_gate_above_up() -> None:
    spec = WeightSpec(name="fc1", shape=(8, 1), sharding="gated_rows", init="normal")
    full = torch.arange(8.0)[:, None]  # gate 0 to 3, up projection 4 to 7
    parts = [shard(full, spec, rank, 2, 0).flatten().tolist() for rank in range(2)]
    assert parts == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_vocabulary_padding_is_zero_and_only_at_the_end() -> None:
    spec = weight_table(LLAMA, V, S)[EMBEDDING]
    padded = padded_vocab(LLAMA, V, 4)
    assert padded == 128
    parts = [shard(numbered(spec), spec, rank, 4, padded) for rank in range(4)]
    assert torch.equal(torch.cat(parts)[:V], numbered(spec))
    assert (parts[3][27:] == 0).all() and (parts[3][:27] != 0).all()


def test_shards_without_any_real_row() -> None:
    spec = WeightSpec(name="embedding", shape=(3, 2), sharding="vocab_rows", init="normal")
    parts = [shard(numbered(spec), spec, rank, 4, 16) for rank in range(4)]
    assert [part.abs().sum() > 0 for part in parts] == [True, False, False, False]
    assert torch.equal(merge(parts, spec), numbered(spec))


def test_wrong_shape_is_refused_by_name() -> None:
    spec = weight_table(LLAMA, V, S)[EMBEDDING]
    with pytest.raises(ValueError, match=r"word_embeddings.*\(122, 16\).*\(123, 16\)"):
        shard(torch.zeros(V - 1, 16), spec, 0, 1, 128)
    rows = weight_table(LLAMA, V, S)["layers.0.self_attention.linear_qkv.weight"]
    with pytest.raises(ValueError, match=r"linear_qkv.*\(16, 16\).*\(32, 16\)"):
        merge([torch.zeros(16, 16)], rows)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_initial_weights_depend_on_seed_and_name_alone(model: ModelConfig) -> None:
    table = weight_table(model, V, S)
    torch.manual_seed(0)
    first = {name: initial_weight(spec, model, seed=7) for name, spec in table.items()}
    torch.manual_seed(1)  # neither the global generator nor the order of asking matters
    for name in reversed(table):
        assert torch.equal(initial_weight(table[name], model, seed=7), first[name])
        assert first[name].dtype == torch.float32 and tuple(first[name].shape) == table[name].shape
        if "normal" in table[name].init:
            assert not torch.equal(initial_weight(table[name], model, seed=8), first[name])
    normal = [name for name in table if "normal" in table[name].init]
    starts = {tuple(first[name].flatten()[:4].tolist()) for name in normal}
    assert len(starts) == len(normal), "two weights must not start alike"


def test_initial_weights_have_the_promised_spread() -> None:
    model = ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=4, add_bias_linear=True)
    table = weight_table(model, 500, S)
    stds = {"normal": 0.02, "scaled_normal": 0.02 / math.sqrt(16)}
    for spec in table.values():
        weight = initial_weight(spec, model, seed=1)
        if spec.init in stds:
            assert float(weight.std()) == pytest.approx(stds[spec.init], rel=0.05)
            assert abs(float(weight.mean())) < 4 * stds[spec.init] / math.sqrt(spec.numel)
        else:
            assert (weight == (1.0 if spec.init == "ones" else 0.0)).all()
    assert table["layers.3.self_attention.linear_proj.weight"].init == "scaled_normal"
    assert table["layers.3.mlp.linear_fc2.weight"].init == "scaled_normal"
    assert table["layers.3.mlp.linear_fc1.bias"].init == "zeros"
    assert table["final_layernorm.weight"].init == "ones"


def test_parameters_of_a_llama_by_hand() -> None:
    norms = 2 * 16
    qkv = 16 * (16 + 2 * 4 * 2)  # 8 query heads, 4 key and 4 value heads of size 2
    layer = norms + qkv + 16 * 16 + 3 * 16 * 24
    assert num_parameters(LLAMA, V, S) == 2 * V * 16 + 2 * layer + 16
    assert output_weight_name(LLAMA) == OUTPUT_LAYER


def test_parameters_of_a_gpt_by_hand() -> None:
    norms = 2 * (16 + 16)
    attention = (16 * 48 + 48) + (16 * 16 + 16)
    mlp = (16 * 64 + 64) + (64 * 16 + 16)
    assert num_parameters(GPT, V, S) == V * 16 + S * 16 + 3 * (norms + attention + mlp) + 2 * 16
    assert output_weight_name(GPT) == EMBEDDING


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        # GPT-2 small, as published: 124,439,808.
        (dict(num_layers=12, hidden_size=768, num_attention_heads=12, normalization="LayerNorm",
              activation="gelu", add_bias_linear=True, position_embedding_type="learned_absolute",
              untie_embeddings_and_output_weights=False), 124_439_808),
        # Llama 2 7B, as published: 6,738,415,616.
        (dict(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008),
         6_738_415_616),
    ],
    ids=["GPT-2", "Llama 2 7B"],
)  # fmt: skip
def test_parameters_of_known_models(settings: dict[str, Any], total: int) -> None:
    vocab_size = 50257 if settings["num_layers"] == 12 else 32000
    assert num_parameters(ModelConfig(**settings), vocab_size, 1024) == total
