"""Checkpoints made by hand, without a run: their weights and their optimizer's fragments."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_salt.checkpoint.folder import hash_files, list_files, write_model_manifest
from megatron_salt.checkpoint.manifest import CheckpointManifest, Evaluation, ModelRecord, RunRecord
from megatron_salt.checkpoint.optimizer import (
    OptimizerPart,
    optimizer_file,
    write_optimizer_index,
)
from megatron_salt.checkpoint.shards import Cut
from megatron_salt.checkpoint.weights import write_weights
from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.files.disk import save_tensors
from megatron_salt.method.switch import SwitchState
from megatron_salt.model.weights import DTYPES, padded_vocab, shard, weight_table

# Gated, biases, a vocabulary that no number of ranks divides: every way to cut.
MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=4, ffn_hidden_size=24,
    add_bias_linear=True, make_vocab_size_divisible_by=4,
)  # fmt: skip
V = 21
TABLE = weight_table(MODEL, V, 8)
_BEFORE = next(number for number, name in enumerate(TABLE) if name.startswith("layers.1."))
# Names of the weights on each of two stages.
STAGES = list(TABLE)[:_BEFORE], list(TABLE)[_BEFORE:]


def numbered(name: str) -> Tensor:
    spec = TABLE[name]
    start = 10_000 * list(TABLE).index(name)
    return torch.arange(start, start + spec.numel, dtype=torch.float64).reshape(spec.shape)


def record(tp_size: int, pp_size: int = 1) -> ModelRecord:
    return ModelRecord(
        name="m", step=1, config=MODEL, vocab_size=V, num_positions=8, seq_length=8,
        objective=["causal"], tokenizer_fingerprint="t", precision="fp32", tp_size=tp_size,
        pp_size=pp_size, evaluation=None,
    )  # fmt: skip


def cuts(tp_size: int) -> list[Cut]:
    padded = padded_vocab(MODEL, V, tp_size)
    return [Cut(rank, tp_size, padded) for rank in range(tp_size)]


def stored_optimizer(
    folder: Path, tp_size: int, seed: int = 0, values: Callable[[str], Tensor] = numbered
) -> tuple[CheckpointManifest, list[OptimizerPart]]:
    """Fragments of random lengths, over files at random."""
    draws = random.Random(seed)
    files: list[dict[str, Tensor]] = [{} for _ in range(3 * tp_size)]
    parts = [
        OptimizerPart(file=optimizer_file(rank), tp_rank=rank % tp_size, fragments={})
        for rank in range(len(files))
    ]
    for name, spec in TABLE.items():
        for cut in cuts(tp_size)[: 1 if spec.sharding == "replicated" else None]:
            flat = shard(values(name), spec, *cut).flatten()
            ends = sorted({0, len(flat), *draws.sample(range(len(flat) + 1), 2)})
            ranks = draws.sample(range(cut.tp_rank, len(files), tp_size), len(ends) - 1)
            for start, stop, rank in zip(ends[:-1], ends[1:], ranks, strict=True):
                parts[rank].fragments[name] = start, stop - start
                files[rank][f"{name}/fp32"] = flat[start:stop].clone()
                files[rank][f"{name}/exp_avg"] = -flat[start:stop]
    (folder / "optimizer").mkdir(parents=True)
    for part, tensors in zip(parts, files, strict=True):
        save_tensors(folder / part.file, tensors)
    model, num = record(tp_size), len(parts)
    states, scalars = [["fp32", "exp_avg"]] * num, [{"step": 5.0}] * num
    write_optimizer_index(folder, model, parts, states, scalars)
    return manifest_of(folder, model), parts


def manifest_of(folder: Path, model: ModelRecord) -> CheckpointManifest:
    files = hash_files(folder, list_files(folder))
    return CheckpointManifest(model=model, training=None, versions={}, files=files)


def drawn(name: str) -> Tensor:
    """Master weights that 16 bits do not hold."""
    generator = torch.Generator().manual_seed(list(TABLE).index(name))
    return torch.randn(TABLE[name].shape, generator=generator)


def run_record(**values: object) -> RunRecord:
    config = {
        "model": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4},
        "data": {"train_data_path": ["corpus"], "seq_length": 8},
        "train": {"steps": 5, "output_dir": "runs/handmade"},
    }
    known = {
        "config": RunConfig.from_dict(config, source="test"), "step": 1, "phase": "kd",
        "tokens": 64, "data_rows": 8, "data": [], "dp_size": 3, "zero_stage": 1,
        "teacher_valid_ce_nats": 2.5, "teacher_fingerprint": "f", "tags": [], "selection": [],
        "switch": SwitchState(), "loss_scaler": {}, "skipped_steps": 0,
    }  # fmt: skip
    return RunRecord(**{**known, **values})  # type: ignore[arg-type]


def make_checkpoint(
    folder: Path, tp_size: int = 1, precision: str = "fp32",
    values: Callable[[str], Tensor] = drawn, run: RunRecord | None = None, seed: int = 0,
) -> Path:  # fmt: skip
    """A whole checkpoint at tp_size, pp 2 and dp 3."""
    stored_optimizer(folder, tp_size, seed, values)
    for pp_rank, own in enumerate(STAGES):
        for cut in cuts(tp_size):
            rounded = {name: values(name).to(DTYPES[precision]) for name in own}
            shards = {name: shard(rounded[name], TABLE[name], *cut) for name in own}
            write_weights(folder, pp_rank, cut.tp_rank, shards)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.model").write_bytes(b"pieces")
    (folder / "deepspeed.json").write_text(json.dumps({"train_batch_size": 8}), encoding="utf-8")
    score = Evaluation(step=1, ce_nats=3.25, accuracy=0.125, tokens=640, data="d")
    model = replace(record(tp_size, 2), precision=precision, evaluation=score)
    versions = {"torch": "0.1", "safetensors": "0.2"}
    write_model_manifest(folder, model, run or run_record(), versions)
    return folder
