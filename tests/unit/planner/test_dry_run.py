"""What `--dry_run` says of the loss's memory is what the loss takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA, make_config, make_deepspeed

from megatron_salt.config.deepspeed import load_deepspeed_config
from megatron_salt.kernels import Chunking, Heads, VocabShard
from megatron_salt.parallel.layout import Layout
from megatron_salt.planner.memory import loss_bytes
from megatron_salt.planner.sizes import Sizes, TeacherSize

VOCAB_SIZE, WIDTH, TOKENS = 509, LLAMA["hidden_size"], 2 * 16


def sizes_of(
    folder: Path, *, teacher: bool, tp_size: int = 1, precision: str = "fp32", **settings: Any
) -> Sizes:
    """The teacher's shape is the student's."""
    settings["parallel__tensor_model_parallel_size"] = tp_size
    config = make_config("data", folder / "run", **settings)
    size = TeacherSize(model=config.model, vocab_size=VOCAB_SIZE, num_positions=16)
    deepspeed = load_deepspeed_config(make_deepspeed(folder), 1)
    return Sizes(
        config=config,
        settings=dataclasses.replace(deepspeed, precision=precision),
        layout=Layout(tp_size=tp_size, pp_size=1, dp_size=1),
        vocab_size=VOCAB_SIZE,
        teacher=size if teacher else None,
        on_cuda=False,
    )


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_bytes_of_the_loss_are_those_of_its_chunks(
    tmp_path: Path, teacher: bool, tp_size: int, precision: str, dtype: torch.dtype
) -> None:
    columns = 512 // tp_size
    head, hidden = torch.zeros(columns, WIDTH, dtype=dtype), torch.zeros(TOKENS, WIDTH, dtype=dtype)
    of_teacher = (hidden, head) if teacher else (None, None)
    heads = Heads.of(
        hidden, head, *of_teacher, VocabShard(size=512, start=0, stop=columns), Chunking()
    )
    blocks = heads.student.block_bytes
    results = 4 * head.numel() + hidden.nbytes + (hidden.nbytes if teacher else 0)
    sizes = sizes_of(tmp_path, teacher=teacher, tp_size=tp_size, precision=precision)
    assert loss_bytes(sizes) == TOKENS * heads.bytes_per_token() + blocks + results


def test_a_budget_limits_it(tmp_path: Path) -> None:
    model = {**LLAMA, "make_vocab_size_divisible_by": 65536}
    free, limited = (
        loss_bytes(sizes_of(tmp_path, teacher=True, model=model, salt__loss_chunk_mib=mib))
        for mib in (99, 3)
    )
    assert free - limited == TOKENS * (65536 * 8 + WIDTH * 4) - 3 * 2**20
