"""`kd_loss`: cross-entropy and KL(teacher || student) of one batch of tokens, summed with weights.

Letters: T tokens, W vocabulary columns on this rank (padding included), V real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_salt.kernels.backend import (
    SPARSE_DIVERGENCES,
    Divergence,
    LossBackend,
    LossInputs,
    LossOptions,
    arithmetic_dtype,
)
from megatron_salt.kernels.choose import Impl, choose_backend
from megatron_salt.kernels.sparse import SparseTeacher
from megatron_salt.kernels.vocab import VocabShard


@dataclass(frozen=True, kw_only=True)
class KdLoss:
    """Result of `kd_loss`: what to differentiate, and what to log."""

    loss: Tensor
    """Scalar fp32, sum over tokens of ce_weight * ce + kd_weight * kl; equal on all tp ranks."""
    ce_T: Tensor
    """Cross-entropy per token at temperature 1, nats, fp32, detached."""
    kl_T: Tensor
    """KL(teacher || student) per token (or the divergence asked for), nats, fp32, detached; zeros
    without a teacher."""


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
    divergence: Divergence = "forward_kl",
    tp_group: ProcessGroup | None = None,
    impl: Impl = "auto",
    sparse_teacher: SparseTeacher | None = None,
) -> KdLoss:
    """Weighted cross-entropy and KL of student logits s and teacher logits z, over tp shards:

        ce = F.cross_entropy(s, y, reduction="none")
        log_q, log_p = F.log_softmax(s / b, dim=1), F.log_softmax(z / a, dim=1)
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        loss = (ce_weight * ce + kd_weight * kl).sum()

    Masked tokens have both weights 0: they add exactly nothing to loss and gradient, even where
        logits are inf or nan. `ce_T` and `kl_T` have their values all the same.
    A sparse teacher stands in place of teacher logits: weights t of K tokens, over which the KL is
        summed (ids that repeat add up in the gradient, and their t log t stay apart in the value).
        It may come out below 0 if they add up to less than 1. A ghost g adds
        g log(g / (1 - sum of q over the row's ids)). The teacher's temperature is in the weights.
    Temperatures a (teacher) and b (student) act on the KL alone. No tau^2 factor; the weight can
        carry one. Other divergences: `reference._divergence_terms`; only the reference has them.
    Shapes: both logits [T, W], this rank's columns; labels [T], global ids; weights [T] or scalars.
    Dtypes: logits bf16, fp16 or fp32 (each its own); arithmetic fp32; gradient as the logits.
        fp64 logits are computed in fp64 by the reference, for tests.
    Collectives: over tp_group one MAX of 2 and one SUM of 4 floats per token (5 if b != 1; 1 and 2
        without a teacher; 1 and 3 with a sparse one, 1 and 4 with a ghost, one more if b != 1;
        other divergences one more SUM of 2), none in backward.
    Memory: saved for backward: both logits, 6 floats a token (7 if b != 1). native and cuda make no
        [T, W] array but the gradient; the reference makes a few.
    Host sync: none on CUDA.
    Raises: ValueError for shapes, dtypes, devices, strides, temperatures or labels that do not fit,
        for a kd_weight other than 0 without a teacher, and where an impl other than auto cannot
        do what is asked. Labels and weights on CUDA are asserted there.
    Source: SALT, arXiv 2410.18779, for the mix of CE and KL; docs/method.md for the conventions.
    """
    options = LossOptions(
        vocab=vocab, teacher_temperature=float(teacher_temperature),
        student_temperature=float(student_temperature), divergence=divergence,
        tp_group=tp_group,
    )  # fmt: skip
    options.check()
    inputs = checked_inputs(
        student_logits_TW, teacher_logits_TW, labels_T, ce_weight_T, kd_weight_T, vocab
    )
    dtypes = {x.dtype for x in inputs[:2] if x is not None}
    backend = choose_backend(
        impl, device=inputs.student_TW.device, dtypes=frozenset(dtypes), divergence=divergence
    )
    if sparse_teacher is not None:
        if teacher_logits_TW is not None:
            raise ValueError("there are teacher_logits_TW and a sparse_teacher: give one of them")
        inputs = with_sparse(inputs, sparse_teacher, options, backend)
    if not backend.checks_values:
        check_values(inputs.labels_T, inputs.kd_weight_T, vocab, has_teacher=inputs.has_teacher)
    loss, ce_T, kl_T = _KdLossFunction.apply(inputs.student_TW, inputs, options, backend)
    return KdLoss(loss=loss, ce_T=ce_T.detach(), kl_T=kl_T.detach())


class _KdLossFunction(torch.autograd.Function):
    """Differentiable in the student's logits only; the two passes are the backend's."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits_TW: Tensor,
        inputs: LossInputs,
        options: LossOptions,
        backend: LossBackend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss_T, ce_T, kl_T, saved = backend.scores(inputs, options)
        ctx.save_for_backward(student_logits_TW, *inputs[1:], *saved)
        ctx.options, ctx.backend = options, backend
        ctx.mark_non_differentiable(ce_T, kl_T)
        return loss_T.sum(), ce_T, kl_T

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        num_inputs = len(LossInputs._fields)
        inputs = LossInputs(*ctx.saved_tensors[:num_inputs])
        saved = ctx.saved_tensors[num_inputs:]
        grad_TW = torch.empty_like(inputs.student_TW, memory_format=torch.contiguous_format)
        ctx.backend.gradient_(inputs, ctx.options, saved, upstream[0], grad_TW)
        return (grad_TW, None, None, None)


def checked_inputs(
    student_TW: Tensor,
    teacher_TW: Tensor | None,
    labels_T: Tensor,
    ce_weight_T: Tensor | float,
    kd_weight_T: Tensor | float,
    vocab: VocabShard,
) -> LossInputs:
    """The tensors of a call as the backends want them. Looks at no value of a tensor.

    Raises: ValueError.
    """
    check_logits("student_logits_TW", student_TW, vocab)
    if teacher_TW is not None:
        check_logits("teacher_logits_TW", teacher_TW, vocab)
        if teacher_TW.shape[0] != student_TW.shape[0]:
            raise ValueError(f"teacher_logits_TW has shape {tuple(teacher_TW.shape)}, student's is "
                             f"{tuple(student_TW.shape)}: the tokens must be the same")  # fmt: skip
        if teacher_TW.dtype == torch.float64 != student_TW.dtype:
            raise ValueError("teacher_logits_TW is fp64, which only fp64 students may learn from")
        if teacher_TW.device != student_TW.device:
            raise ValueError(
                f"teacher_logits_TW is on {teacher_TW.device}, the student's on {student_TW.device}"
            )
    check_labels(labels_T, student_TW.shape[0], student_TW.device)
    weights = as_weights(ce_weight_T, kd_weight_T, student_TW.shape[0], student_TW)
    return LossInputs(student_TW, teacher_TW, labels_T, *weights)


def with_sparse(
    inputs: LossInputs, sparse: SparseTeacher, options: LossOptions, backend: LossBackend
) -> LossInputs:
    """The inputs of a call with a sparse teacher, checked as far as that needs no waiting for a
    device. Raises: ValueError."""
    divergence = options.divergence
    if divergence not in SPARSE_DIVERGENCES:
        raise ValueError(
            f"divergence = {divergence!r} needs the teacher's probability of every token; one of "
            f"which only some are known has {' or '.join(map(repr, SPARSE_DIVERGENCES))}"
        )
    if sparse.ghost_T is not None and divergence != "forward_kl":
        raise ValueError(f"divergence = {divergence!r} has no ghost bucket: take forward_kl")
    ids_TK, target_TK = sparse.ids_TK, sparse.target_TK
    num_tokens, dtype = len(inputs.labels_T), inputs.ce_weight_T.dtype
    if (
        ids_TK.shape != target_TK.shape or ids_TK.dim() != 2 or len(ids_TK) != num_tokens
        or ids_TK.shape[1] == 0
    ):  # fmt: skip
        raise ValueError(
            f"a sparse teacher's ids {tuple(ids_TK.shape)} and weights {tuple(target_TK.shape)} "
            f"must both be [{num_tokens}, K], K at least 1"
        )
    if ids_TK.dtype != torch.int32:
        raise ValueError(f"a sparse teacher's ids must be int32, are {ids_TK.dtype}")
    if sparse.ghost_T is not None and sparse.ghost_T.shape != (num_tokens,):
        raise ValueError(f"ghost_T must be [{num_tokens}], is {tuple(sparse.ghost_T.shape)}")
    if any(x is not None and x.device != inputs.labels_T.device for x in sparse):
        raise ValueError(f"a sparse teacher must be on {inputs.labels_T.device}, as the student")
    if not backend.checks_values:
        outside_TK = (ids_TK < 0) | (ids_TK >= options.vocab.size)
        wrong_TK = (target_TK > 0) & outside_TK | (target_TK < 0)
        message = "a sparse teacher has an id outside the vocabulary, or a weight below 0"
        if ids_TK.is_cuda:
            torch._assert_async(~wrong_TK.any(), f"kd_loss: {message}")
        elif wrong_TK.any():
            id_and_weight = f"id {ids_TK[wrong_TK][0]}, weight {target_TK[wrong_TK][0]}"
            raise ValueError(f"{message}: {id_and_weight}")
    ghost_T = None if sparse.ghost_T is None else sparse.ghost_T.to(dtype).contiguous()
    return inputs._replace(
        ids_TK=ids_TK.contiguous(), target_TK=target_TK.to(dtype).contiguous(), ghost_T=ghost_T
    )


def check_logits(name: str, logits: Tensor, vocab: VocabShard) -> None:
    if logits.dim() != 2:
        raise ValueError(f"{name} must be [T, W], has shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"{name} must be floating point, is {logits.dtype}")
    if logits.shape[1] == 0:
        raise ValueError(f"{name} has no columns: an empty shard; pad the vocabulary to a column "
                         "on every rank (padded_vocab_size)")  # fmt: skip
    if logits.shape[1] < vocab.num_columns:
        raise ValueError(f"{name} has {logits.shape[1]} columns, fewer than this rank's {vocab}")
    if logits.numel() and logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"{name} has strides {logits.stride()}: a row's columns must be adjacent in memory; "
            "call .contiguous() if a copy is affordable"
        )


def check_labels(labels_T: Tensor, num_tokens: int, device: torch.device) -> None:
    if labels_T.shape != (num_tokens,) or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels_T must be int64 of shape ({num_tokens},), is {labels_T.dtype} of shape "
            f"{tuple(labels_T.shape)}"
        )
    if labels_T.device != device:
        raise ValueError(f"labels_T is on {labels_T.device}, the student's tensor on {device}")


def as_weights(
    ce_weight_T: Tensor | float, kd_weight_T: Tensor | float, num_tokens: int, student: Tensor
) -> tuple[Tensor, Tensor]:
    """Both per token, in the student's arithmetic dtype; a scalar holds for every token. [T] each

    Raises: ValueError.
    """
    dtype, device = arithmetic_dtype(student), student.device

    def as_weight(weight: Tensor | float, name: str) -> Tensor:
        if not isinstance(weight, Tensor):
            return torch.full((num_tokens,), float(weight), dtype=dtype, device=device)
        if weight.shape not in ((), (num_tokens,)):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected ({num_tokens},)")
        if weight.device != device:
            raise ValueError(f"{name} is on {weight.device}, the student's tensors on {device}")
        return weight.detach().to(dtype).expand(num_tokens)

    return as_weight(ce_weight_T, "ce_weight_T"), as_weight(kd_weight_T, "kd_weight_T")


def check_values(
    labels_T: Tensor, kd_weight_T: Tensor, vocab: VocabShard, *, has_teacher: bool
) -> None:
    """Labels inside the vocabulary, and no KD weight without a teacher.

    Host sync: none on CUDA, where the error comes from a device-side assertion.
    Raises: ValueError on the CPU.
    """
    inside = ((labels_T >= 0) & (labels_T < vocab.size)).all()
    if labels_T.is_cuda:
        torch._assert_async(inside, "kd_loss: a label lies outside the vocabulary")
    elif not inside:
        wrong = labels_T[(labels_T < 0) | (labels_T >= vocab.size)][0].item()
        raise ValueError(f"label {wrong} lies outside the vocabulary of {vocab.size} tokens")
    if not has_teacher:
        # Plain training in place of the distillation that was asked for must not pass in silence.
        message = "kd_weight_T is not 0 but there is no teacher to learn from"
        if kd_weight_T.is_cuda:
            torch._assert_async((kd_weight_T == 0).all(), f"kd_loss: {message}")
        elif kd_weight_T.any():
            raise ValueError(message)
