"""A teacher known by K of its tokens: the likeliest of its logits, and the weights they teach with.

Letters: T tokens, K kept tokens of each, W vocabulary columns on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.backend import all_reduce, arithmetic_dtype, tp_size_of
from megatron_salt.kernels.vocab import VocabShard

LostMass = Literal["renormalise", "raw", "to_label", "ghost"]


class KeptLogprobs(NamedTuple):
    """The K likeliest tokens of each position, likeliest first; of equals the smaller id."""

    ids_TK: Tensor
    """Ids in the whole vocabulary, int32; anything where the log-probability is -inf."""
    logp_TK: Tensor
    """Log-probabilities at temperature 1, not renormalised, nats; -inf fills up."""
    rest_T: Tensor
    """Log of the probability of all other tokens; -inf if there is none."""


class SparseTeacher(NamedTuple):
    """What a position is taught: weights t of K tokens, and g of all others together."""

    ids_TK: Tensor
    """int32; anything where the weight is 0."""
    target_TK: Tensor
    """t, fp32 (fp64 with fp64 logits); not negative."""
    ghost_T: Tensor | None = None
    """g: the weight of one bucket of all tokens that have no id in the row; None: there is none."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How a distribution of which K tokens are known becomes a target.

    Math, with p the teacher's probabilities at temperature 1 and A the kept tokens:
      renormalise   t = p^(1/a) / sum over A of p^(1/a)
      raw           t = p: the weights add up to less than 1
      to_label      t = p, and the label gets what is missing besides
      ghost         t = p, and one bucket of all other tokens has what is missing, on both sides
    Source: top-p, then top-k, then the softmax: pre-training distillation, arXiv 2410.16215.
    """

    top_k: int | None = None
    """At most so many tokens; None: all that are known."""
    top_p: float | None = None
    """The likeliest tokens that have this probability together, at temperature 1, and one more at
    most; None: all."""
    temperature: float = 1.0
    """a. Other than 1 only with renormalise: the mass of the others is not known at another one."""
    lost_mass: LostMass = "renormalise"

    def check(self) -> None:
        """Raises: ValueError."""
        if self.lost_mass not in get_args(LostMass):
            known = ", ".join(get_args(LostMass))
            raise ValueError(f"lost_mass = {self.lost_mass!r}: choose one of {known}")
        if self.temperature != 1.0 and self.lost_mass != "renormalise":
            raise ValueError(
                f"lost_mass = {self.lost_mass} needs a teacher temperature of 1, not "
                f"{self.temperature}: how probable the other tokens are at another temperature is "
                "not known"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p}: must be above 0, at most 1")

    def target(self, kept: KeptLogprobs, labels_T: Tensor) -> SparseTeacher:
        """The weights that these tokens teach with.

        Shapes: labels [T], global ids. to_label gives K + 1 tokens.
        """
        ids_TK, logp_TK = kept.ids_TK[:, : self.top_k], kept.logp_TK[:, : self.top_k]
        if self.top_p is not None:
            logp_TK = most_probable(logp_TK, self.top_p)
        if self.lost_mass == "renormalise":
            return SparseTeacher(ids_TK, torch.softmax(logp_TK / self.temperature, dim=1))
        target_TK = logp_TK.exp()
        if self.lost_mass == "raw":
            return SparseTeacher(ids_TK, target_TK)
        # Not 1 - sum: what is missing may be far smaller than that sum's rounding.
        missing_T = kept.rest_T.exp()
        dropped_T = kept.logp_TK[:, target_TK.shape[1] :].exp().sum(dim=1)
        known_TK = kept.logp_TK[:, : target_TK.shape[1]].exp()
        missing_T = missing_T + dropped_T + (known_TK - target_TK).sum(dim=1)
        if self.lost_mass == "ghost":
            return SparseTeacher(ids_TK, target_TK, missing_T)
        labels_T1 = labels_T[:, None].to(ids_TK.dtype)
        is_label_TK = (ids_TK == labels_T1) & (target_TK > 0)
        absent_T1 = ~is_label_TK.any(dim=1, keepdim=True)
        more_T1 = missing_T[:, None]
        target_TK = torch.where(is_label_TK, target_TK + more_T1, target_TK)
        return SparseTeacher(
            torch.cat([ids_TK, labels_T1], dim=1),
            torch.cat([target_TK, torch.where(absent_T1, more_T1, 0.0)], dim=1),
        )


def sparse_bytes(
    truncation: Truncation | None, stored: KeptLogprobs | None, num_columns: int
) -> int:
    """Most bytes that a token takes between its logits, or what is stored, and its target."""
    if stored is not None:
        return 32 * stored.ids_TK.shape[1]
    if truncation is None:
        return 0
    num_kept = min(truncation.top_k or num_columns, num_columns)
    return 8 * num_columns + 64 * num_kept


@torch.no_grad()
def top_logprobs(
    logits_TW: Tensor, num_kept: int, vocab: VocabShard, tp_group: ProcessGroup | None
) -> KeptLogprobs:
    """The K likeliest tokens of logits that are sharded over tp: the same at every tp.

        logp = F.log_softmax(z, dim=1)
        logp_TK, ids_TK = logp.sort(dim=1, descending=True, stable=True)  # cut after K

    K is num_kept, at most the vocabulary.
    Collectives: over tp_group those of `likeliest`, and two SUMs of 1 number a token.
    Host sync: one.
    """
    dtype = arithmetic_dtype(logits_TW)
    real_TC = logits_TW[:, : vocab.num_columns]
    z_TK, ids_TK = likeliest(real_TC, min(num_kept, vocab.size), vocab, tp_group)
    z_TK, max_T = z_TK.to(dtype), z_TK[:, 0].to(dtype)
    exp_TC = (real_TC.to(dtype) - max_T[:, None]).exp_()
    sum_T = all_reduce(exp_TC.sum(dim=1), dist.ReduceOp.SUM, tp_group)
    logp_TK = (z_TK - max_T[:, None]) - sum_T.log()[:, None]
    exp_TC = torch.nn.functional.pad(exp_TC, (0, 1))
    return with_rest_(ids_TK, logp_TK, exp_TC, sum_T, vocab, tp_group)


def most_probable(logp_TK: Tensor, top_p: float) -> Tensor:
    """-inf for all but the likeliest that have this probability together; they are sorted."""
    p_TK = logp_TK.exp().double()
    before_TK = p_TK.cumsum(dim=1) - p_TK
    # The likeliest one stays, whatever rounding says.
    before_TK[:, 0] = 0.0
    return logp_TK.masked_fill(before_TK >= top_p, -torch.inf)


def with_rest_(
    ids_TK: Tensor, logp_TK: Tensor, exp_TC: Tensor, sum_T: Tensor, vocab: VocabShard,
    tp_group: ProcessGroup | None,
) -> KeptLogprobs:  # fmt: skip
    """These tokens with the log-probability of all others. The others are summed, not taken from 1:
    they may be far less likely than its rounding.

    Args:
        exp_TC: of all logits on this rank, unnormalised, and at least one column of zeros behind.
        sum_T: over all ranks.
    Collectives: a SUM of 1 number a token over tp_group. Mutates: exp_TC.
    """
    here_TK = (ids_TK >= vocab.start) & (ids_TK < vocab.stop) & (logp_TK > -torch.inf)
    # What is another rank's falls on a column of zeros.
    exp_TC.scatter_(1, torch.where(here_TK, ids_TK - vocab.start, vocab.num_columns), 0.0)
    rest_T = all_reduce(exp_TC.sum(dim=1), dist.ReduceOp.SUM, tp_group)
    return KeptLogprobs(ids_TK.int(), logp_TK, (rest_T / sum_T).log())


def likeliest(
    z_TC: Tensor, num_kept: int, vocab: VocabShard, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The num_kept largest logits of each token, largest first, and their ids in the whole
    vocabulary, int64; of equals the smaller id.

    Collectives: over tp_group an all-gather of K ids and one of K logits.
    """
    z_TK, ids_TK = _likeliest_here(z_TC, min(num_kept, vocab.num_columns))
    ids_TK = ids_TK + vocab.start
    if tp_size_of(tp_group) > 1:
        lacking = num_kept - z_TK.shape[1]
        z_TK = torch.nn.functional.pad(z_TK, (0, lacking), value=-torch.inf)
        ids_TK = torch.nn.functional.pad(ids_TK, (0, lacking), value=vocab.size)
        z_TK, ids_TK = (_gathered(x_TK, tp_group) for x_TK in (z_TK, ids_TK))
        # Ranks in their order: of equals the first is the smaller id.
        z_TK, order_TK = z_TK.sort(dim=1, descending=True, stable=True)
        z_TK, ids_TK = z_TK[:, :num_kept], ids_TK.gather(1, order_TK)[:, :num_kept]
    return z_TK, ids_TK


def _likeliest_here(z_TC: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The num_kept largest of each row and their columns, largest first; of equals the first."""
    if num_kept == z_TC.shape[1]:
        return z_TC.sort(dim=1, descending=True, stable=True)
    # One more shows where equals were left out: which ones topk takes is not defined.
    z_TK, ids_TK = z_TC.topk(num_kept + 1, dim=1)
    ids_TK, order_TK = ids_TK[:, :num_kept].sort(dim=1)
    kept_TK, by_value_TK = z_TK.gather(1, order_TK).sort(dim=1, descending=True, stable=True)
    ids_TK = ids_TK.gather(1, by_value_TK)
    cut_T = z_TK[:, -2] == z_TK[:, -1]
    if cut_T.any():
        z_all, ids_all = z_TC[cut_T].sort(dim=1, descending=True, stable=True)
        kept_TK[cut_T], ids_TK[cut_T] = z_all[:, :num_kept], ids_all[:, :num_kept]
    return kept_TK, ids_TK


def _gathered(x_TK: Tensor, group: ProcessGroup | None) -> Tensor:
    """Every rank's columns side by side, in the order of ranks."""
    parts = [torch.empty_like(x_TK) for _ in range(tp_size_of(group))]
    dist.all_gather(parts, x_TK.contiguous(), group=group)
    return torch.cat(parts, dim=1)
