"""The specification of the loss in plain PyTorch, with the backward written by hand.

The backward is local: the sums over the vocabulary that it needs were reduced in the forward, so
nothing can be reduced twice (an autograd-derived backward through all-reduce is tp times too large
in several published versions). Letters: T tokens, W columns on this rank, C <= W real columns.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.backend import (
    BackendScores,
    LossBackend,
    LossInputs,
    LossOptions,
    all_reduce,
    arithmetic_dtype,
)
from megatron_salt.kernels.vocab import VocabShard


def _real_columns(logits_TW: Tensor, vocab: VocabShard) -> Tensor:
    """A copy of this rank's real columns in the arithmetic dtype. [T, C]"""
    real_TC = logits_TW[:, : vocab.num_columns]
    return real_TC.to(arithmetic_dtype(logits_TW), copy=True)


def _local_max(x_TC: Tensor) -> Tensor:
    """Each token's maximum; -inf for a shard without real columns. [T]"""
    return x_TC.amax(dim=1) if x_TC.shape[1] else x_TC.new_full(x_TC.shape[:1], -torch.inf)


def _owned_label(labels_T: Tensor, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """Each label's column on this rank, clamped into it, and whether it is here. int64, bool [T]"""
    local_T = labels_T - vocab.start
    owned_T = (local_T >= 0) & (local_T < vocab.num_columns)
    # Not selected by a boolean, which would wait for the GPU.
    return local_T.clamp(0, max(vocab.num_columns - 1, 0)), owned_T


def _centred(logits_TW: Tensor, max_T: Tensor, vocab: VocabShard, temperature: float) -> Tensor:
    """(logits - their maximum) / temperature: <= 0 everywhere. [T, C]"""
    # Before anything is divided or added: with a log-sum-exp of 1e4 in its place, fp32 would leave
    # 3 digits of the KL and of the probabilities.
    x_TC = _real_columns(logits_TW, vocab).sub_(max_T[:, None])
    return x_TC if temperature == 1.0 else x_TC.div_(temperature)


class ReferenceBackend(LossBackend):
    """See `kd_loss` for the contract and `LossBackend` for the methods."""

    name = "reference"
    checks_values = False

    def scores(self, inputs: LossInputs, options: LossOptions) -> BackendScores:
        student_TW, teacher_TW, labels_T = inputs[:3]
        vocab, a, b = options.vocab, options.teacher_temperature, options.student_temperature
        tp_group = options.tp_group
        if inputs.target_TK is not None:
            return _sparse_scores(inputs, options)
        maxima = [_local_max(_real_columns(student_TW, vocab))]
        if teacher_TW is not None:
            maxima.append(_local_max(_real_columns(teacher_TW, vocab)))
        maxima_T = all_reduce(torch.stack(maxima), dist.ReduceOp.MAX, tp_group)

        s1_TC = _centred(student_TW, maxima_T[0], vocab, 1.0)
        label_T = s1_TC.new_zeros(s1_TC.shape[:1])
        if vocab.num_columns:
            column_T, owned_T = _owned_label(labels_T, vocab)
            label_T = torch.where(owned_T, s1_TC.gather(1, column_T[:, None]).squeeze(1), 0.0)
        if teacher_TW is None:
            packed = [s1_TC.exp_().sum(dim=1), label_T]
            sums = all_reduce(torch.stack(packed), dist.ReduceOp.SUM, tp_group)
            ce_T = sums[0].log() - sums[1]
            return _weighted(inputs, ce_T, torch.zeros_like(ce_T), (maxima_T, sums))

        # With b = 1 the student's tempered logits are its logits: one sum serves CE and KL.
        s_TC = s1_TC if b == 1.0 else s1_TC / b
        z_TC = _centred(teacher_TW, maxima_T[1], vocab, a)
        z_exp_TC = z_TC.exp()
        # 0 * (-inf) would be nan where the teacher gives a token no probability at all.
        gap_TC = (z_TC - s_TC).mul_(z_exp_TC).masked_fill_(z_exp_TC == 0, 0.0)
        packed = [s_TC.exp().sum(dim=1), label_T, z_exp_TC.sum(dim=1), gap_TC.sum(dim=1)]
        if b != 1.0:
            packed.append(s1_TC.exp().sum(dim=1))
        sums = all_reduce(torch.stack(packed), dist.ReduceOp.SUM, tp_group)
        s_sum_T, label_T, z_sum_T, gap_T = sums[:4]
        ce_T = (s_sum_T if b == 1.0 else sums[4]).log() - label_T
        if options.divergence == "forward_kl":
            # One logarithm near 0 instead of the difference of two large ones.
            kl_T = gap_T / z_sum_T + (s_sum_T / z_sum_T).log()
            return _weighted(inputs, ce_T, kl_T, (maxima_T, sums))
        terms = [x.sum(dim=1) for x in _divergence_terms(inputs, options, maxima_T, sums)]
        kl_T, slope_T = all_reduce(torch.stack(terms), dist.ReduceOp.SUM, tp_group)
        return _weighted(inputs, ce_T, kl_T, (maxima_T, sums, slope_T))

    def gradient_(
        self,
        inputs: LossInputs,
        options: LossOptions,
        saved: tuple[Tensor, ...],
        upstream: Tensor,
        out_TW: Tensor,
    ) -> None:
        """dL/ds = ce_weight (q1 - onehot) + kd_weight dD/ds, on this rank's columns.

        For the forward KL, dD/ds = (q - p) / b; see `_divergence_terms` for the others.
        """
        student_TW, teacher_TW, labels_T, ce_weight_T, kd_weight_T = inputs[:5]
        vocab, b = options.vocab, options.student_temperature
        maxima_T, sums = saved[:2]
        s1_sum_T = sums[0] if b == 1.0 or not inputs.has_teacher else sums[-1]
        q1_TC = _centred(student_TW, maxima_T[0], vocab, 1.0).exp_().div_(s1_sum_T[:, None])
        if vocab.num_columns:
            column_T, owned_T = _owned_label(labels_T, vocab)
            q1_TC.scatter_add_(1, column_T[:, None], -owned_T[:, None].to(q1_TC.dtype))
        grad_TC = _scaled_(q1_TC, upstream * ce_weight_T, ce_weight_T)
        if teacher_TW is not None:
            q_TC = _centred(student_TW, maxima_T[0], vocab, b).exp_().div_(sums[0][:, None])
            if options.divergence == "forward_kl":
                z_TC = _centred(teacher_TW, maxima_T[1], vocab, options.teacher_temperature)
                slope_TC = q_TC.sub_(z_TC.exp_().div_(sums[2][:, None]))
            elif options.divergence == "mse":
                slope_TC = _difference(inputs, options).mul_(2 / vocab.size)
            else:
                _, r_TC = _divergence_terms(inputs, options, maxima_T, sums)
                slope_TC = r_TC.sub_(q_TC.mul_(saved[2][:, None]))
            grad_TC += _scaled_(slope_TC, upstream * kd_weight_T / b, kd_weight_T)
        elif inputs.target_TK is not None:
            q_TC = _centred(student_TW, maxima_T[0], vocab, b).exp_().div_(sums[0][:, None])
            slope_TC = _sparse_slope(inputs, options, q_TC, saved)
            grad_TC += _scaled_(slope_TC, upstream * kd_weight_T / b, kd_weight_T)
        # Through another tensor, because out_TW may be student_TW.
        out_TW[:, : vocab.num_columns] = grad_TC.to(out_TW.dtype)
        out_TW[:, vocab.num_columns :] = 0.0


def _weighted(
    inputs: LossInputs, ce_T: Tensor, kl_T: Tensor, saved: tuple[Tensor, ...]
) -> BackendScores:
    """A zero weight contributes exactly nothing, even where the value is inf or nan."""
    loss_T = torch.where(inputs.ce_weight_T != 0, inputs.ce_weight_T * ce_T, 0.0)
    loss_T = loss_T + torch.where(inputs.kd_weight_T != 0, inputs.kd_weight_T * kl_T, 0.0)
    return BackendScores(loss_T, ce_T, kl_T, saved)


def _scaled_(x_TC: Tensor, scale_T: Tensor, weight_T: Tensor) -> Tensor:
    """x * scale in place; exactly 0 for a weight of 0, even where x is nan."""
    return x_TC.mul_(scale_T[:, None]).masked_fill_((weight_T == 0)[:, None], 0.0)


def _difference(inputs: LossInputs, options: LossOptions) -> Tensor:
    """s/b - z/a on this rank's columns. [T, C]"""
    assert inputs.teacher_TW is not None
    s_TC = _real_columns(inputs.student_TW, options.vocab).div_(options.student_temperature)
    z_TC = _real_columns(inputs.teacher_TW, options.vocab).div_(options.teacher_temperature)
    return s_TC.sub_(z_TC)


def _divergence_terms(
    inputs: LossInputs, options: LossOptions, maxima_T: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """What a divergence D other than the forward KL sums over columns: its value, and r. [T, C]

    With q = softmax(s / b) and r = q dD/dq:  dD/ds = (r - q sum(r)) / b.
        reverse_kl       D = sum q (log q - log p)               r = q (log q - log p)
        jensen_shannon   D = (KL(p || m) + KL(q || m)) / 2       r = q (log q - log m) / 2
                         with m = (p + q) / 2
        mse              D = sum (s/b - z/a)^2 / V               dD/ds = 2 (s/b - z/a) / (V b)
        mse_probabilities  D = sum (q - p)^2                     r = 2 q (q - p)
    Source: Agarwal et al., arXiv 2306.13649, for the first two; pre-training distillation,
    arXiv 2410.16215, for mse_probabilities, of which it does not say whether it is divided by V.
    """
    student_TW, teacher_TW = inputs.student_TW, inputs.teacher_TW
    assert teacher_TW is not None
    vocab, a, b = options.vocab, options.teacher_temperature, options.student_temperature
    if options.divergence == "mse":
        squared_TC = _difference(inputs, options).square_()
        return squared_TC.div_(vocab.size), torch.zeros_like(squared_TC)
    log_q_TC = _centred(student_TW, maxima_T[0], vocab, b) - sums[0].log()[:, None]
    log_p_TC = _centred(teacher_TW, maxima_T[1], vocab, a) - sums[2].log()[:, None]
    q_TC = log_q_TC.exp()
    if options.divergence == "reverse_kl":
        r_TC = (q_TC * (log_q_TC - log_p_TC)).masked_fill_(q_TC == 0, 0.0)
        return r_TC, r_TC
    p_TC = log_p_TC.exp()
    if options.divergence == "mse_probabilities":
        gap_TC = q_TC - p_TC
        return gap_TC.square(), q_TC.mul_(gap_TC).mul_(2)
    log_m_TC = torch.logaddexp(log_p_TC, log_q_TC) - math.log(2)
    r_TC = (q_TC * (log_q_TC - log_m_TC)).masked_fill_(q_TC == 0, 0.0) / 2
    p_term_TC = (p_TC * (log_p_TC - log_m_TC)).masked_fill_(p_TC == 0, 0.0) / 2
    return p_term_TC + r_TC, r_TC


def _spread_out(inputs: LossInputs, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """A sparse teacher's weights on this rank's columns, [T, C], repeated ids added up; and whether
    a column has an id in its row."""
    ids_TK, target_TK = inputs.ids_TK, inputs.target_TK
    assert ids_TK is not None and target_TK is not None
    local_TK = ids_TK.long() - vocab.start
    here_TK = (local_TK >= 0) & (local_TK < vocab.num_columns) & (target_TK > 0)
    # What is not here goes to a column of its own, which is cut off.
    column_TK = torch.where(here_TK, local_TK, vocab.num_columns)
    target_TC = target_TK.new_zeros((len(target_TK), vocab.num_columns + 1))
    target_TC.scatter_add_(1, column_TK, target_TK)
    known_TC = torch.zeros_like(target_TC, dtype=torch.bool).scatter_(1, column_TK, True)
    return target_TC[:, :-1], known_TC[:, :-1]


def _sparse_gap(inputs: LossInputs, vocab: VocabShard, s_TC: Tensor) -> Tensor:
    """sum of t (log t - s) over this rank's tokens, entry by entry also where ids repeat. [T]"""
    ids_TK, target_TK = inputs.ids_TK, inputs.target_TK
    assert ids_TK is not None and target_TK is not None
    if not vocab.num_columns:
        return s_TC.new_zeros(len(s_TC))
    column_TK, here_TK = _owned_label(ids_TK.long(), vocab)
    gap_TK = target_TK * (target_TK.log() - s_TC.gather(1, column_TK))
    # Where there is no weight the student's logit may be -inf.
    return torch.where(here_TK & (target_TK > 0), gap_TK, 0.0).sum(dim=1)


def _sparse_scores(inputs: LossInputs, options: LossOptions) -> BackendScores:
    """Values with a teacher of K tokens, of weights t; g of all others together, if there is one.

    Math, with q = softmax(s / b), m = sum t, A the tokens of the row:
        forward_kl         D = sum over A of t (log t - log q)  [+ g (log g - log(1 - sum_A q))]
        mse_probabilities  D = sum (q - t)^2
    It is what it is: below 0 where the weights add up to less than 1. Nothing is clamped.
    Collectives: one MAX of 1 and one SUM of 3 numbers a token; 4 with g; 1 more where b != 1.
    """
    target_TK, ghost_T, b = inputs.target_TK, inputs.ghost_T, options.student_temperature
    assert target_TK is not None
    vocab, tp_group = options.vocab, options.tp_group
    max_T = _local_max(_real_columns(inputs.student_TW, vocab))
    maxima_T = all_reduce(max_T[None], dist.ReduceOp.MAX, tp_group)
    s1_TC = _centred(inputs.student_TW, maxima_T[0], vocab, 1.0)
    label_T = s1_TC.new_zeros(s1_TC.shape[:1])
    if vocab.num_columns:
        column_T, owned_T = _owned_label(inputs.labels_T, vocab)
        label_T = torch.where(owned_T, s1_TC.gather(1, column_T[:, None]).squeeze(1), 0.0)
    target_TC, known_TC = _spread_out(inputs, vocab)
    s_TC = s1_TC if b == 1.0 else s1_TC / b
    exp_TC = s_TC.exp()
    packed = [exp_TC.sum(dim=1), label_T, _sparse_gap(inputs, vocab, s_TC)]
    if ghost_T is not None:  # summed, not taken from 1, of which little may be left
        packed.append(exp_TC.masked_fill(known_TC, 0.0).sum(dim=1))
    if b != 1.0:
        packed.append(s1_TC.exp().sum(dim=1))
    sums = all_reduce(torch.stack(packed), dist.ReduceOp.SUM, tp_group)
    ce_T = (sums[0] if b == 1.0 else sums[-1]).log() - sums[1]
    if options.divergence == "mse_probabilities":
        q_TC = exp_TC / sums[0][:, None]
        squared = [(q_TC - target_TC).square().sum(dim=1), (q_TC * (q_TC - target_TC)).sum(dim=1)]
        kl_T, slope_T = all_reduce(torch.stack(squared), dist.ReduceOp.SUM, tp_group)
        return _weighted(inputs, ce_T, kl_T, (maxima_T, sums, slope_T))
    kl_T = sums[2] + target_TK.sum(dim=1) * sums[0].log()
    if ghost_T is not None:
        ghost_kl_T = ghost_T * (ghost_T.log() - (sums[3] / sums[0]).log())
        kl_T = kl_T + torch.where(ghost_T > 0, ghost_kl_T, 0.0)
    return _weighted(inputs, ce_T, kl_T, (maxima_T, sums))


def _sparse_slope(
    inputs: LossInputs, options: LossOptions, q_TC: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    """b dD/ds on this rank's columns; see `_sparse_scores`. [T, C]

    Math: forward_kl: (m + g) q - t, less g q / (1 - sum_A q) outside A;
        mse_probabilities: 2 q (q - t - sum q (q - t)).
    """
    target_TC, known_TC = _spread_out(inputs, options.vocab)
    sums, ghost_T, target_TK = saved[1], inputs.ghost_T, inputs.target_TK
    assert target_TK is not None
    if options.divergence == "mse_probabilities":
        return 2 * q_TC * (q_TC - target_TC - saved[2][:, None])
    mass_T = target_TK.sum(dim=1)
    if ghost_T is None:
        return q_TC.mul_(mass_T[:, None]).sub_(target_TC)
    inside_T1 = (mass_T + ghost_T)[:, None]
    outside_T = torch.where(sums[3] > 0, ghost_T * sums[0] / sums[3], 0.0)
    factor_TC = torch.where(known_TC, inside_T1, inside_T1 - outside_T[:, None])
    return q_TC.mul_(factor_TC).sub_(target_TC)


def vocab_parallel_argmax(
    logits_TW: Tensor, vocab: VocabShard, tp_group: ProcessGroup | None
) -> Tensor:
    """Global id of the largest real logit of each token; the smallest id on a tie. int64 [T]

    Collectives: one MAX and one MIN of one number per token over tp_group.
    """
    real_TC = logits_TW[:, : vocab.num_columns].float()
    best_T = _local_max(real_TC)
    if vocab.num_columns:
        local_T = real_TC.argmax(dim=1) + vocab.start
    else:
        local_T = torch.full_like(best_T, vocab.size, dtype=torch.int64)
    global_T = all_reduce(best_T.clone(), dist.ReduceOp.MAX, tp_group)
    candidate_T = torch.where(best_T == global_T, local_T, vocab.size)
    return all_reduce(candidate_T, dist.ReduceOp.MIN, tp_group)
