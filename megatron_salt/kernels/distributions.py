"""What one model says about every token, as a student may be taught it later: the likeliest tokens
or draws, the mass outside, entropy and loss. No gradient.

Letters: T tokens, E width, W vocabulary columns on this rank, N tokens of a chunk of tokens, C this
rank's real columns, K kept tokens or draws of each, G blocks of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.backend import all_reduce, tp_size_of
from megatron_salt.kernels.chunks import Chunking, Heads
from megatron_salt.kernels.sparse import likeliest, most_probable, with_rest_
from megatron_salt.kernels.vocab import VocabShard

# Columns whose mass is summed before it is cumulated: a draw looks for its block, then within it.
BLOCK_COLUMNS = 64


class Distributions(NamedTuple):
    """Per token. Equal on all ranks of the tensor-parallel group."""

    ids_TK: Tensor
    """int32; anything where there is no value."""
    values_TK: Tensor
    """Log-probabilities, fp32, -inf: no entry; or how often each was drawn, int32, 0: no entry.
    Largest first; of equals the smaller id."""
    rest_T: Tensor
    """Log of the probability of all other tokens, fp32; of draws -inf."""
    entropy_T: Tensor
    loss_T: Tensor
    """-log p of the label, nats, as the entropy; fp32."""


@torch.no_grad()
def distributions(
    hidden_TE: Tensor,
    weight_WE: Tensor,
    labels_T: Tensor,
    *,
    vocab: VocabShard,
    chunking: Chunking,
    top_k: int,
    top_p: float = 1.0,
    uniforms_TK: Tensor | None = None,
) -> Distributions:
    """The distribution of each token's label, all of it from one product with the head:

        p = F.softmax(hidden @ weight.T, dim=1)
        values, ids = p.log().sort(dim=1, descending=True, stable=True)
        # cut where those before have top_p together, then after top_k

    With uniforms: of each the first token whose cumulative probability is above it, counted. These
    are of fp64 within and over blocks of columns, whose own masses are sums in the logits' dtype.
    Shapes: labels [T], global ids; uniforms [T, K], fp64, in [0, 1).
    Collectives: over chunking.tp_group for a chunk one SUM of 3 numbers a token; also those of
        `likeliest` and a SUM of 1, or with draws a MAX of 1, an all-gather of 1 and a SUM of K.
    Memory: three times a chunk's logits.
    """
    group, parts, buffer_NG = chunking.tp_group, [], None
    heads = Heads.of(hidden_TE, weight_WE, None, None, vocab, chunking)
    for chunk in heads.chunks():
        tokens = slice(chunk.start, chunk.stop)
        z_NC, label_N = chunk.student_logits_NW[:, : vocab.num_columns], labels_T[tokens]
        kept = None
        found: tuple[Tensor, ...]
        if uniforms_TK is None:
            kept = likeliest(z_NC, min(top_k, vocab.size), vocab, group)
            max_N = kept[0][:, 0]
        else:
            max_N = z_NC.new_full(label_N.shape, -torch.inf)
            if vocab.num_columns:
                max_N = z_NC.amax(dim=1)
            all_reduce(max_N, dist.ReduceOp.MAX, group)
        z_NC.sub_(max_N[:, None])
        if buffer_NG is None:  # the first chunk is the largest; a column of zeros at least
            width = (vocab.num_columns // BLOCK_COLUMNS + 1) * BLOCK_COLUMNS
            buffer_NG = z_NC.new_zeros((len(z_NC), width))
        exp_NG = buffer_NG[: len(z_NC)]
        torch.exp(z_NC, out=exp_NG[:, : vocab.num_columns])
        own_N = torch.zeros_like(max_N)
        if vocab.num_columns:
            mine_N = (label_N >= vocab.start) & (label_N < vocab.stop)
            column_N = torch.where(mine_N, label_N - vocab.start, 0)
            own_N = torch.where(mine_N, z_NC.gather(1, column_N[:, None])[:, 0], 0.0)
        gap_N = z_NC.mul_(exp_NG[:, : vocab.num_columns]).sum(dim=1)
        sums_3N = torch.stack([exp_NG.sum(dim=1), gap_N, own_N])
        sum_N, gap_N, own_N = all_reduce(sums_3N, dist.ReduceOp.SUM, group)
        log_sum_N = sum_N.log()
        if kept is not None:
            values_NK = (kept[0] - max_N[:, None]) - log_sum_N[:, None]
            if top_p < 1.0:
                values_NK = most_probable(values_NK, top_p)
            found = with_rest_(kept[1], values_NK, exp_NG, sum_N, vocab, group)
        else:
            assert uniforms_TK is not None
            drawn_NK = _drawn(exp_NG, uniforms_TK[tokens], vocab, group)
            found = (*_counted(drawn_NK, vocab), torch.full_like(sum_N, -torch.inf))
        parts.append((*found, log_sum_N - gap_N / sum_N, log_sum_N - own_N))
    return Distributions(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _drawn(
    exp_NG: Tensor, uniforms_NK: Tensor, vocab: VocabShard, group: ProcessGroup | None
) -> Tensor:
    """The tokens that the uniforms fall on. [N, K]"""
    blocks_NGC = exp_NG.unflatten(1, (-1, BLOCK_COLUMNS))
    masses_NG = blocks_NGC.sum(dim=2).double()
    ends_NG = masses_NG.cumsum(dim=1)
    mass_N1 = ends_NG[:, -1:].contiguous()
    masses, rank = [mass_N1], 0
    if tp_size_of(group) > 1:
        masses = [torch.empty_like(mass_N1) for _ in range(tp_size_of(group))]
        rank = dist.get_rank(group)
        dist.all_gather(masses, mass_N1, group=group)
    edges_NR = torch.cat(masses, dim=1).cumsum(dim=1)
    target_NK = uniforms_NK * edges_NR[:, -1:]
    owner_NK = torch.searchsorted(edges_NR, target_NK, right=True).clamp_(max=len(masses) - 1)
    target_NK -= edges_NR[:, rank : rank + 1] - mass_N1
    block_NK = torch.searchsorted(ends_NG, target_NK, right=True).clamp_(max=ends_NG.shape[1] - 1)
    inside_NKC = blocks_NGC.gather(1, block_NK[:, :, None].expand(-1, -1, BLOCK_COLUMNS))
    cumulated_NKC = inside_NKC.cumsum(dim=2, dtype=torch.float64)
    block_mass_NK = masses_NG.gather(1, block_NK)
    share_NK = (target_NK - ends_NG.gather(1, block_NK) + block_mass_NK) / block_mass_NK
    above_NK1 = (share_NK * cumulated_NKC[:, :, -1])[:, :, None]
    column_NK = torch.searchsorted(cumulated_NKC, above_NK1, right=True)[:, :, 0]
    ids_NK = block_NK * BLOCK_COLUMNS + column_NK
    # Behind the last column only by rounding.
    ids_NK = vocab.start + ids_NK.clamp_(0, max(vocab.num_columns - 1, 0))
    return all_reduce(torch.where(owner_NK == rank, ids_NK, 0), dist.ReduceOp.SUM, group)


def _counted(drawn_NK: Tensor, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """Distinct ids, most often drawn first, of equals the smaller id; and how often, 0 behind."""
    drawn_NK = drawn_NK.sort(dim=1).values
    is_new_NK = torch.ones_like(drawn_NK)
    is_new_NK[:, 1:] = drawn_NK[:, 1:] != drawn_NK[:, :-1]
    place_NK = is_new_NK.cumsum(dim=1) - 1
    ids_NK = torch.zeros_like(drawn_NK).scatter_(1, place_NK, drawn_NK)
    counts_NK = torch.zeros_like(drawn_NK).scatter_add_(1, place_NK, torch.ones_like(drawn_NK))
    counts_NK, order_NK = counts_NK.sort(dim=1, descending=True, stable=True)
    width = min(drawn_NK.shape[1], vocab.size)
    return ids_NK.gather(1, order_NK)[:, :width].int(), counts_NK[:, :width].int()
