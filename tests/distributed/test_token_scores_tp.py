"""`token_scores` with the head cut over 2 and 4 gloo ranks equals that of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_salt.kernels import Chunking, VocabShard, padded_vocab_size, token_scores

T, E = 48, 12


def _scores(vocab_size: int, sequence_parallel: bool) -> dict[str, np.ndarray]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, E, generator=rng) * 2
    weight = torch.randn(vocab_size, E, generator=rng)
    labels = torch.randint(vocab_size, (T,), generator=rng)
    labels[::4] = (hidden @ weight.T).argmax(dim=1)[::4]
    padded = padded_vocab_size(vocab_size, 64, size)
    vocab = VocabShard.of_rank(size=vocab_size, padded_size=padded, tp_rank=rank, tp_size=size)
    mine = torch.full((padded // size, E), 50.0)  # padding is larger than any logit
    mine[: vocab.num_columns] = weight[vocab.start : vocab.stop]
    if sequence_parallel:
        hidden = hidden.chunk(size)[rank]
    chunking = Chunking(
        chunk_bytes=6_000, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel
    )
    scores = token_scores(
        hidden, mine, labels, vocab=vocab, chunking=chunking,
        want=("ce", "likelier", "entropy", "confidence", "correct"),
    )  # fmt: skip
    return {name: value.numpy() for name, value in scores._asdict().items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("vocab_size", [251, 123])  # 123: the last of 4 ranks has padding only
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(2, False), (4, False), (2, True)])
def test_shards_give_what_the_whole_gives(
    tp: int, sequence_parallel: bool, vocab_size: int
) -> None:
    expected: dict[str, Any] = run_ranks(1, _scores, vocab_size, False)[0]
    for got in run_ranks(tp, _scores, vocab_size, sequence_parallel):
        np.testing.assert_array_equal(got["likelier_T"], expected["likelier_T"])
        np.testing.assert_array_equal(got["correct_T"], expected["correct_T"])
        for name in ("ce_T", "entropy_T", "confidence_T"):
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-5)
    assert len(set(expected["likelier_T"].tolist())) > 20  # ranks of all kinds were compared
