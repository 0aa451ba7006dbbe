"""What `--dry_run` says of the loss's memory is what the loss takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA, make_config, make_deepspeed

from megatron_salt.deepspeed_config import load_deepspeed_config
from megatron_salt.dry_run import loss_bytes
from megatron_salt.kernels import Chunking, Heads, VocabShard

VOCAB_SIZE, WIDTH, TOKENS = 509, LLAMA["hidden_size"], 2 * 16


def predicted(folder: Path, *, teacher: bool, **settings: Any) -> float:
    config = make_config("data", folder / "run", **settings)
    deepspeed = load_deepspeed_config(make_deepspeed(folder), 1)
    return loss_bytes(config, deepspeed, VOCAB_SIZE, teacher=teacher)


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_bytes_of_the_loss_are_those_of_its_chunks(
    tmp_path: Path, teacher: bool, tp_size: int
) -> None:
    columns = 512 // tp_size
    head, hidden = torch.zeros(columns, WIDTH), torch.zeros(TOKENS, WIDTH)
    of_teacher = (hidden, head) if teacher else (None, None)
    heads = Heads.of(
        hidden, head, *of_teacher, VocabShard(size=512, start=0, stop=columns), Chunking()
    )
    logits = TOKENS * (heads.bytes_per_token() - heads.student.scratch_bytes_per_token())
    results = 4 * (hidden.numel() + head.numel())
    found = predicted(tmp_path, teacher=teacher, parallel__tensor_model_parallel_size=tp_size)
    assert found == logits + results


def test_a_budget_limits_it(tmp_path: Path) -> None:
    model = {**LLAMA, "make_vocab_size_divisible_by": 65536}
    free, limited = (
        predicted(tmp_path, teacher=True, model=model, salt__loss_chunk_mib=mib) for mib in (99, 3)
    )
    assert free - limited == TOKENS * 65536 * 8 - 3 * 2**20
