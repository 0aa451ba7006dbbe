"""What one model says about every token: loss, rank, entropy; no gradient.

Letters: T tokens, E width, W vocabulary columns on this rank, N tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.choose import Impl
from megatron_salt.kernels.chunks import Chunking, Heads
from megatron_salt.kernels.kd_loss import kd_loss
from megatron_salt.kernels.rows import all_reduce
from megatron_salt.kernels.vocab import VocabShard

Wanted = Literal["ce", "likelier", "entropy"]


class TokenScores(NamedTuple):
    """Per token, fp32; None where not wanted. Equal on all ranks of the tensor-parallel group."""

    ce_T: Tensor | None = None
    """-log p of the label, nats."""
    likelier_T: Tensor | None = None
    """How many tokens have a larger logit than the label; below k: it is among the k likeliest."""
    entropy_T: Tensor | None = None
    """Of the distribution over the vocabulary, nats."""


@torch.no_grad()
def token_scores(
    hidden_TE: Tensor,
    weight_WE: Tensor,
    labels_T: Tensor,
    *,
    vocab: VocabShard,
    chunking: Chunking | None = None,
    want: Collection[Wanted] = frozenset({"ce"}),
    impl: Impl = "auto",
) -> TokenScores:
    """Scores of each label under softmax(hidden weight^T), logits made a chunk at a time.

    Math: ce = logsumexp(z) - z[label]; entropy = log V - KL(p || uniform), which the loss's own
        code computes in one pass; both at temperature 1.
    Shapes: hidden [T, E], or [T / tp, E] under chunking.sequence_parallel; weight [W, E]; labels
        [T], global ids; results [T].
    Collectives: those of `kd_loss` over chunking.tp_group, once for ce and once for entropy; for
        likelier two SUMs of 1 float a token; under sequence parallelism an all-gather per chunk.
    Raises: ValueError as `linear_kd_loss` does.
    """
    chunking = chunking or Chunking()
    heads = Heads.of(hidden_TE, weight_WE, None, None, vocab, chunking)
    found = {name: labels_T.new_empty(len(labels_T), dtype=torch.float32) for name in want}
    for chunk in heads.chunks():
        logits_NW = chunk.student_logits_NW
        labels_N = heads.of_all_parts(labels_T, chunk.start, chunk.stop)
        for name, value_T in found.items():
            if name == "likelier":
                value_N = _count_likelier(logits_NW, labels_N, vocab, chunking.tp_group)
            else:
                uniform_NW = torch.zeros_like(logits_NW) if name == "entropy" else None
                result = kd_loss(
                    logits_NW if uniform_NW is None else uniform_NW,
                    None if uniform_NW is None else logits_NW,
                    labels_N, ce_weight_T=1.0, kd_weight_T=0.0, vocab=vocab,
                    tp_group=chunking.tp_group, impl=impl,
                )  # fmt: skip
                value_N = result.ce_T if name == "ce" else math.log(vocab.size) - result.kl_T
            parts = value_T.unflatten(0, (heads.num_parts, -1))
            parts[:, chunk.start : chunk.stop] = value_N.unflatten(0, (heads.num_parts, -1))
    return TokenScores(**{f"{name}_T": value_T for name, value_T in found.items()})


def _count_likelier(
    logits_NW: Tensor, labels_N: Tensor, vocab: VocabShard, group: ProcessGroup | None
) -> Tensor:
    """Columns of the real vocabulary, over all ranks, whose logit is larger than the label's."""
    real_NW = logits_NW[:, : vocab.num_columns]
    mine_N = (labels_N >= vocab.start) & (labels_N < vocab.stop)
    if vocab.num_columns:
        column_N = torch.where(mine_N, labels_N - vocab.start, 0)
        own_N = real_NW.gather(1, column_N[:, None])[:, 0].float()
    else:
        own_N = torch.zeros_like(labels_N, dtype=torch.float32)
    own_N = all_reduce(torch.where(mine_N, own_N, 0.0), dist.ReduceOp.SUM, group)
    larger_N = torch.count_nonzero(real_NW > own_N[:, None], dim=1).float()
    return all_reduce(larger_N, dist.ReduceOp.SUM, group)
