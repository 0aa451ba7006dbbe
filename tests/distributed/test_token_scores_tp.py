"""`token_scores` with the head cut over 2 and 4 gloo ranks equals that of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_salt.kernels import Chunking, VocabShard, padded_vocab_size, token_scores

T, E = 48, 12


def _scores(
    vocab_size: int, group: dist.ProcessGroup | None, sequence_parallel: bool = False
) -> dict[str, np.ndarray]:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
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
    chunking = Chunking(chunk_bytes=6_000, tp_group=group, sequence_parallel=sequence_parallel)
    scores = token_scores(
        hidden, mine, labels, vocab=vocab, chunking=chunking,
        want=("ce", "likelier", "entropy", "confidence", "correct"),
    )  # fmt: skip
    return {name: value.numpy() for name, value in scores._asdict().items()}  # type: ignore[union-attr]


VOCAB_SIZES = (251, 123)  # 123: the last of 4 ranks has padding only
WAYS = [(2, False), (4, False), (2, True)]


def _all_scores() -> dict[tuple[int, int, bool], dict[str, np.ndarray]]:
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    return {
        (vocab_size, tp, sequence_parallel): _scores(vocab_size, groups[tp], sequence_parallel)
        for vocab_size in VOCAB_SIZES
        for tp, sequence_parallel in WAYS
    }


def test_shards_give_what_the_whole_gives() -> None:
    expected: dict[int, Any] = {size: _scores(size, None) for size in VOCAB_SIZES}
    for found in run_ranks(4, _all_scores):
        for way, got in found.items():
            wanted = expected[way[0]]
            for name in ("likelier_T", "correct_T"):
                np.testing.assert_array_equal(got[name], wanted[name], err_msg=f"{name}, {way}")
            for name in ("ce_T", "entropy_T", "confidence_T"):
                np.testing.assert_allclose(
                    got[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=f"{name}, {way}"
                )
    for wanted in expected.values():  # ranks of all kinds were compared
        assert len(set(wanted["likelier_T"].tolist())) > 20
