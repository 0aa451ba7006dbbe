"""`kd_loss`: cross-entropy and KL(teacher || student) of one batch of tokens, summed with weights.

Letters: T tokens, W vocabulary columns on this rank (padding included), V real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.reference import ReferenceKdLoss
from megatron_salt.kernels.vocab import VocabShard

Impl = Literal["auto", "reference"]


@dataclass(frozen=True, kw_only=True)
class KdLoss:
    """Result of `kd_loss`: what to differentiate, and what to log."""

    loss: Tensor
    """Scalar fp32, sum over tokens of ce_weight * ce + kd_weight * kl; equal on all tp ranks."""
    ce_T: Tensor
    """Cross-entropy per token at temperature 1, nats, fp32, detached."""
    kl_T: Tensor
    """KL(teacher || student) per token, nats, fp32, detached; zeros without a teacher."""


def kd_loss(
    student_logits_TW: Tensor,
    teacher_logits_TW: Tensor | None,
    labels_T: Tensor,
    *,
    ce_weight_T: Tensor | float,
    kd_weight_T: Tensor | float,
    vocab: VocabShard,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> KdLoss:
    """Weighted sum over tokens of cross-entropy and forward KL, over a sharded vocabulary.

    Math: loss = sum_t ce_weight_t * CE_t + kd_weight_t * KL_t, with student logits s, teacher
        logits z, label y, temperatures a (teacher) and b (student):
        CE_t = logsumexp(s_t) - s_t[y];   KL_t = sum_v p_v (log p_v - log q_v),
        p = softmax(z_t / a), q = softmax(s_t / b). No tau^2 factor; the weight can carry one.
    Shapes: both logits [T, W], this rank's columns; labels [T], global ids; weights [T] or scalars.
    Dtypes: logits bf16, fp16 or fp32 (each its own); arithmetic fp32; gradient as the logits.
        fp64 logits are computed in fp64, for tests.
    Collectives: over tp_group one MAX of 2 and one SUM of 4 floats per token (5 if b != 1; 1 and 2
        without a teacher), none in backward.
    Memory: reference: a few [T, W] temporaries; saved for backward: both logits, 4 floats a token
        (5 if b != 1).
    Host sync: none on CUDA.
    Raises: ValueError for shapes, dtypes, devices, temperatures or labels that do not fit, and for
        a kd_weight other than 0 without a teacher. Labels and weights on CUDA are asserted there.
    Source: SALT, arXiv 2410.18779, for the mix of CE and KL; docs/method.md for the conventions.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl = {impl!r}: available here are 'auto' and 'reference'")
    _check(student_logits_TW, teacher_logits_TW, labels_T, vocab)
    if not (teacher_temperature > 0 and student_temperature > 0):
        raise ValueError(
            f"temperatures must be above 0: teacher {teacher_temperature}, "
            f"student {student_temperature}"
        )
    ce_weight_T = _as_weight(ce_weight_T, student_logits_TW, "ce_weight_T")
    kd_weight_T = _as_weight(kd_weight_T, student_logits_TW, "kd_weight_T")
    if teacher_logits_TW is None:
        # Plain training in place of the distillation that was asked for must not pass in silence.
        message = "kd_weight_T is not 0 but there are no teacher_logits_TW to learn from"
        if kd_weight_T.is_cuda:
            torch._assert_async((kd_weight_T == 0).all(), f"kd_loss: {message}")
        elif kd_weight_T.any():
            raise ValueError(message)
    loss, ce_T, kl_T = ReferenceKdLoss.apply(
        student_logits_TW, teacher_logits_TW, labels_T, ce_weight_T, kd_weight_T, vocab,
        float(teacher_temperature), float(student_temperature), tp_group,
    )  # fmt: skip
    return KdLoss(loss=loss, ce_T=ce_T.detach(), kl_T=kl_T.detach())


def _as_weight(weight: Tensor | float, logits_TW: Tensor, name: str) -> Tensor:
    dtype = torch.float64 if logits_TW.dtype == torch.float64 else torch.float32
    num_tokens = logits_TW.shape[0]
    if not isinstance(weight, Tensor):
        return torch.full((num_tokens,), float(weight), dtype=dtype, device=logits_TW.device)
    if weight.shape not in ((), (num_tokens,)):
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected ({num_tokens},)")
    if weight.device != logits_TW.device:
        raise ValueError(f"{name} is on {weight.device}, logits on {logits_TW.device}")
    return weight.detach().to(dtype).expand(num_tokens)


def _check(
    student_TW: Tensor, teacher_TW: Tensor | None, labels_T: Tensor, vocab: VocabShard
) -> None:
    if student_TW.dim() != 2:
        raise ValueError(f"student_logits_TW must be [T, W], has shape {tuple(student_TW.shape)}")
    for name, logits in (("student_logits_TW", student_TW), ("teacher_logits_TW", teacher_TW)):
        if logits is None:
            continue
        if not logits.is_floating_point():
            raise ValueError(f"{name} must be floating point, is {logits.dtype}")
        if logits.shape[-1] < vocab.num_columns:
            raise ValueError(
                f"{name} has {logits.shape[-1]} columns, fewer than this rank's {vocab}"
            )
        if logits.dim() != 2 or logits.shape[0] != student_TW.shape[0]:
            raise ValueError(f"{name} has shape {tuple(logits.shape)}, student's is "
                             f"{tuple(student_TW.shape)}: the tokens must be the same")  # fmt: skip
        if logits.device != student_TW.device:
            raise ValueError(f"{name} is on {logits.device}, the student's on {student_TW.device}")
    if labels_T.shape != student_TW.shape[:1] or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels_T must be int64 of shape ({student_TW.shape[0]},), is {labels_T.dtype} of "
            f"shape {tuple(labels_T.shape)}"
        )
    inside = ((labels_T >= 0) & (labels_T < vocab.size)).all()
    if labels_T.is_cuda:
        torch._assert_async(inside, "kd_loss: a label lies outside the vocabulary")
    elif not inside:
        wrong = labels_T[(labels_T < 0) | (labels_T >= vocab.size)][0].item()
        raise ValueError(f"label {wrong} lies outside the vocabulary of {vocab.size} tokens")
