"""What one model says about every token: loss, rank, entropy, its guess; no gradient.

Letters: T tokens, E width, W vocabulary columns on this rank, N tokens of a chunk of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.backend import all_reduce
from megatron_salt.kernels.choose import Impl
from megatron_salt.kernels.chunks import Chunking, Heads
from megatron_salt.kernels.kd_loss import KdLoss, kd_loss
from megatron_salt.kernels.reference import vocab_parallel_argmax
from megatron_salt.kernels.vocab import VocabShard

WantedScores = Literal["ce", "likelier", "entropy", "confidence", "correct"]


class TokenScores(NamedTuple):
    """Per token, fp32; None where not wanted. Equal on all ranks of the tensor-parallel group."""

    ce_T: Tensor | None = None
    """-log p of the label, nats."""
    likelier_T: Tensor | None = None
    """How many tokens have a larger logit than the label; below k: it is among the k likeliest."""
    entropy_T: Tensor | None = None
    """Of the distribution over the vocabulary, nats."""
    confidence_T: Tensor | None = None
    """Probability of the likeliest token."""
    correct_T: Tensor | None = None
    """1 where the label has the largest logit (of equals the smallest id counts), else 0."""


@torch.no_grad()
def token_scores(
    hidden_TE: Tensor,
    weight_WE: Tensor,
    labels_T: Tensor,
    *,
    vocab: VocabShard,
    chunking: Chunking | None = None,
    want: Collection[WantedScores] = frozenset({"ce"}),
    impl: Impl = "auto",
) -> TokenScores:
    """Scores of labels y under one model, logits made a chunk of tokens at a time:

        z = hidden @ weight.T
        ce = F.cross_entropy(z, y, reduction="none")
        likelier = (z > z.gather(1, y[:, None])).sum(dim=1)
        entropy = torch.distributions.Categorical(logits=z).entropy()
        confidence, best = F.softmax(z, dim=1).max(dim=1)
        correct = best == y

    There is neither mask nor temperature: every token is scored, at temperature 1.
    Shapes: hidden [T, E], or [T / tp, E] under chunking.sequence_parallel; weight [W, E]; labels
        [T], global ids; results [T].
    Collectives: those of `kd_loss` over chunking.tp_group, once each for ce, entropy and
        confidence; for likelier two SUMs of 1 float a token, for confidence and correct those of
        `vocab_parallel_argmax`; under sequence parallelism an all-gather per chunk.
    Memory: a chunk's logits; for entropy as much again.
    Raises: ValueError as `linear_kd_loss` does.
    """
    chunking = chunking or Chunking()
    heads = Heads.of(hidden_TE, weight_WE, None, None, vocab, chunking)
    # Last what overwrites the logits.
    names = sorted(want, key=lambda name: name == "likelier")
    found = {name: labels_T.new_empty(len(labels_T), dtype=torch.float32) for name in names}
    uniform_NW: Tensor | None = None
    for chunk in heads.chunks():
        logits_NW = chunk.student_logits_NW
        labels_N = heads.of_all_parts(labels_T, chunk.start, chunk.stop)
        if "entropy" in names and uniform_NW is None:  # the first chunk is the largest
            uniform_NW = torch.zeros_like(logits_NW)
        best_N: Tensor | None = None
        if "confidence" in names or "correct" in names:
            best_N = vocab_parallel_argmax(logits_NW, vocab, chunking.tp_group)
            best_N.clamp_(max=vocab.size - 1)  # logits that are nan have no largest one
        for name, value_T in found.items():
            if name == "likelier":
                value_N = _count_likelier_(logits_NW, labels_N, vocab, chunking.tp_group)
            elif name == "ce":
                value_N = _kd_loss(logits_NW, None, labels_N, vocab, chunking, impl).ce_T
            elif name == "confidence":
                assert best_N is not None  # exp(-ce) of the likeliest token
                value_N = _kd_loss(logits_NW, None, best_N, vocab, chunking, impl).ce_T.neg().exp()
            elif name == "correct":
                assert best_N is not None
                value_N = (best_N == labels_N).float()
            else:  # log V - KL(p || uniform), which the loss computes in one pass
                assert uniform_NW is not None
                uniform = uniform_NW[: len(logits_NW)]
                divergence_N = _kd_loss(uniform, logits_NW, labels_N, vocab, chunking, impl).kl_T
                value_N = math.log(vocab.size) - divergence_N
            parts = value_T.unflatten(0, (heads.num_parts, -1))
            parts[:, chunk.start : chunk.stop] = value_N.unflatten(0, (heads.num_parts, -1))
    return TokenScores(**{f"{name}_T": value_T for name, value_T in found.items()})


def _kd_loss(
    student_NW: Tensor, teacher_NW: Tensor | None, labels_N: Tensor, vocab: VocabShard,
    chunking: Chunking, impl: Impl,
) -> KdLoss:  # fmt: skip
    return kd_loss(
        student_NW, teacher_NW, labels_N, ce_weight_T=1.0, kd_weight_T=0.0, vocab=vocab,
        tp_group=chunking.tp_group, impl=impl,
    )  # fmt: skip


def _count_likelier_(
    logits_NW: Tensor, labels_N: Tensor, vocab: VocabShard, group: ProcessGroup | None
) -> Tensor:
    """Columns of the real vocabulary, over all ranks, whose logit is larger than the label's.

    Mutates: logits_NW, which saves an array of truth values and its slow sum.
    """
    real_NW = logits_NW[:, : vocab.num_columns]
    mine_N = (labels_N >= vocab.start) & (labels_N < vocab.stop)
    own_N = torch.zeros_like(labels_N, dtype=logits_NW.dtype)
    if vocab.num_columns:
        column_N = torch.where(mine_N, labels_N - vocab.start, 0)
        own_N = torch.where(mine_N, real_NW.gather(1, column_N[:, None])[:, 0], 0.0)
    own_N = all_reduce(own_N, dist.ReduceOp.SUM, group)
    larger_N = real_NW.gt_(own_N[:, None]).sum(dim=1, dtype=torch.float32)
    return all_reduce(larger_N, dist.ReduceOp.SUM, group)
