"""The specification of `kd_loss` in plain PyTorch, with the backward written by hand.

The backward is local: the sums over the vocabulary that it needs were reduced in the forward, so
nothing can be reduced twice (an autograd-derived backward through all-reduce is tp times too large
in several published versions). Letters: T tokens, W columns on this rank, C <= W real columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.vocab import VocabShard


def _all_reduce(packed: Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(packed, op=op, group=group)
    return packed


def _real_columns(logits_TW: Tensor, vocab: VocabShard, temperature: float) -> Tensor:
    """This rank's real columns in the arithmetic dtype, divided by the temperature. [T, C]"""
    dtype = torch.float64 if logits_TW.dtype == torch.float64 else torch.float32
    return logits_TW[:, : vocab.num_columns].to(dtype) / temperature


def _local_max(x_TC: Tensor) -> Tensor:
    """Row maximum; -inf for a shard without real columns. [T]"""
    return x_TC.amax(dim=1) if x_TC.shape[1] else x_TC.new_full(x_TC.shape[:1], -torch.inf)


def _at_label(x_TC: Tensor, local_label_T: Tensor, owned_T: Tensor) -> Tensor:
    """Each row's value at its label, 0 where another rank has that column. [T]

    By clamped index and not by boolean selection, which would wait for the GPU.
    """
    if not x_TC.shape[1]:
        return x_TC.new_zeros(x_TC.shape[:1])
    index_T1 = local_label_T.clamp(0, x_TC.shape[1] - 1)[:, None]
    return torch.where(owned_T, x_TC.gather(1, index_T1).squeeze(1), 0.0)


class ReferenceKdLoss(torch.autograd.Function):
    """See `kd_loss` for the contract; differentiable in student_logits_TW only."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits_TW: Tensor,
        teacher_logits_TW: Tensor | None,
        labels_T: Tensor,
        ce_weight_T: Tensor,
        kd_weight_T: Tensor,
        vocab: VocabShard,
        teacher_temperature: float,
        student_temperature: float,
        tp_group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Logits are centred on their maximum before anything is added up, in both directions: with
        # a log-sum-exp of 1e4 in its place fp32 would leave 3 digits of the KL and of p and q.
        a, b = teacher_temperature, student_temperature
        s1_TC = _real_columns(student_logits_TW, vocab, 1.0)
        local_label_T = labels_T - vocab.start
        owned_T = (local_label_T >= 0) & (local_label_T < vocab.num_columns)

        if teacher_logits_TW is None:
            max_T = _all_reduce(_local_max(s1_TC), dist.ReduceOp.MAX, tp_group)
            s1_TC.sub_(max_T[:, None])
            label_T = _at_label(s1_TC, local_label_T, owned_T)
            sums = [s1_TC.exp_().sum(dim=1), label_T]
            sum_T, label_T = _all_reduce(torch.stack(sums), dist.ReduceOp.SUM, tp_group)
            ce_T = sum_T.log() - label_T
            kl_T = torch.zeros_like(ce_T)
            ctx.save_for_backward(
                student_logits_TW, None, local_label_T, owned_T, ce_weight_T, kd_weight_T,
                max_T, sum_T,
            )  # fmt: skip
        else:
            z_TC = _real_columns(teacher_logits_TW, vocab, a)
            # With b = 1 the student's tempered logits are its logits: one sum serves CE and KL.
            s_TC = s1_TC if b == 1.0 else s1_TC / b
            packed = torch.stack([_local_max(z_TC), _local_max(s_TC)])
            z_max_T, s_max_T = _all_reduce(packed, dist.ReduceOp.MAX, tp_group)
            z_TC.sub_(z_max_T[:, None])
            s_TC.sub_(s_max_T[:, None])  # with b = 1 this is s1_TC too
            if b != 1.0:
                s1_TC.sub_(s_max_T[:, None] * b)
            p_TC = z_TC.exp()
            # 0 * (-inf) would be nan where the teacher gives a token no probability at all.
            gap_TC = z_TC.sub_(s_TC).mul_(p_TC).masked_fill_(p_TC == 0, 0.0)
            sums = [
                p_TC.sum(dim=1),
                s_TC.exp().sum(dim=1),
                gap_TC.sum(dim=1),
                _at_label(s1_TC, local_label_T, owned_T),
            ]
            if b != 1.0:
                sums.append(s1_TC.exp().sum(dim=1))
            packed = _all_reduce(torch.stack(sums), dist.ReduceOp.SUM, tp_group)
            z_sum_T, s_sum_T, gap_T, label_T = packed[:4]
            s1_sum_T = s_sum_T if b == 1.0 else packed[4]
            kl_T = gap_T / z_sum_T - z_sum_T.log() + s_sum_T.log()
            ce_T = s1_sum_T.log() - label_T
            ctx.save_for_backward(
                student_logits_TW, teacher_logits_TW, local_label_T, owned_T, ce_weight_T,
                kd_weight_T, s_max_T, s1_sum_T, z_max_T, z_sum_T, s_sum_T,
            )  # fmt: skip
        ctx.vocab, ctx.temperatures = vocab, (a, b)
        ctx.mark_non_differentiable(ce_T, kl_T)
        # A zero weight contributes exactly nothing, even where the value is inf or nan.
        loss_T = torch.where(ce_weight_T != 0, ce_weight_T * ce_T, 0.0)
        loss_T = loss_T + torch.where(kd_weight_T != 0, kd_weight_T * kl_T, 0.0)
        return loss_T.sum(), ce_T, kl_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dL/ds = ce_weight (q1 - onehot) + kd_weight (q - p) / b, on this rank's columns."""
        grad_loss = grad_outputs[0]
        saved = ctx.saved_tensors
        student_TW, teacher_TW, local_label_T, owned_T, ce_weight_T, kd_weight_T = saved[:6]
        s_max_T, s1_sum_T = saved[6:8]
        vocab, (a, b) = ctx.vocab, ctx.temperatures
        num_columns = vocab.num_columns
        s1_TC = _real_columns(student_TW, vocab, 1.0)
        # Without a teacher there is no tempered maximum: s_max_T is that of the logits themselves.
        shift_T = s_max_T if teacher_TW is None else s_max_T * b
        q1_TC = (s1_TC - shift_T[:, None]).exp_().div_(s1_sum_T[:, None])
        if num_columns:
            index_T1 = local_label_T.clamp(0, num_columns - 1)[:, None]
            q1_TC.scatter_add_(1, index_T1, -owned_T[:, None].to(q1_TC.dtype))
        ce_scale_T1 = (grad_loss * ce_weight_T)[:, None]
        # A zero weight sends exactly nothing, even where the probabilities are nan.
        grad_TC = q1_TC.mul_(ce_scale_T1).masked_fill_(ce_scale_T1 == 0, 0.0)
        if teacher_TW is not None:
            z_max_T, z_sum_T, s_sum_T = saved[8:]
            z_TC = _real_columns(teacher_TW, vocab, a)
            p_TC = z_TC.sub_(z_max_T[:, None]).exp_().div_(z_sum_T[:, None])
            s_TC = s1_TC if b == 1.0 else s1_TC.div_(b)
            q_TC = s_TC.sub_(s_max_T[:, None]).exp_().div_(s_sum_T[:, None])
            kd_scale_T1 = (grad_loss * kd_weight_T / b)[:, None]
            kd_grad_TC = q_TC.sub_(p_TC).mul_(kd_scale_T1)
            grad_TC += kd_grad_TC.masked_fill_(kd_scale_T1 == 0, 0.0)
        grad_TW = torch.zeros_like(student_TW)
        grad_TW[:, :num_columns] = grad_TC.to(student_TW.dtype)
        return (grad_TW, *([None] * 8))


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
    global_T = _all_reduce(best_T.clone(), dist.ReduceOp.MAX, tp_group)
    candidate_T = torch.where(best_T == global_T, local_T, vocab.size)
    return _all_reduce(candidate_T, dist.ReduceOp.MIN, tp_group)
