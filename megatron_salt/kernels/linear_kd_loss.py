"""`linear_kd_loss`: from last hidden states to the loss, with logits of a few tokens at a time.

The gradients of the hidden states and of the head are computed in the forward, while the logits of
a chunk of tokens are there: they are never made twice and never kept. Letters: T tokens, D student
width, E teacher width, W vocabulary columns on this rank, N tokens of one chunk (gathered over tp
under sequence parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_salt.kernels.backend import (
    Divergence,
    LossBackend,
    LossInputs,
    LossOptions,
    arithmetic_dtype,
    tp_size_of,
)
from megatron_salt.kernels.choose import Impl, choose_backend
from megatron_salt.kernels.chunks import Chunk, Chunking, Heads
from megatron_salt.kernels.kd_loss import (
    KdLoss,
    as_weights,
    check_labels,
    check_values,
    with_sparse,
)
from megatron_salt.kernels.sparse import (
    KeptLogprobs,
    SparseTeacher,
    Truncation,
    sparse_bytes,
    top_logprobs,
)
from megatron_salt.kernels.vocab import VocabShard


def linear_kd_loss(
    student_hidden_TD: Tensor,
    student_weight_WD: Tensor,
    teacher_hidden_TE: Tensor | None,
    teacher_weight_WE: Tensor | None,
    labels_T: Tensor,
    *,
    ce_weight_T: Tensor | float,
    kd_weight_T: Tensor | float,
    vocab: VocabShard,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    chunking: Chunking | None = None,
    impl: Impl = "auto",
    truncation: Truncation | None = None,
    stored: KeptLogprobs | None = None,
) -> KdLoss:
    """`kd_loss` of both heads' logits, without ever holding [T, W]:

        s, z = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T

    Differentiable in the student's hidden states and head; the teacher gets no gradient.
    Masked tokens, temperatures: as `kd_loss`; but masked hidden states must be finite (nan * 0).
    Truncation: the teacher's logits are cut to their likeliest tokens (`top_logprobs`), or `stored`
        ones of all T tokens stand in place of the teacher's hidden states and head.
    Shapes: student hidden [T, D], or [T / tp, D] with `chunking.sequence_parallel`: then rank r
        holds tokens [r T / tp, (r + 1) T / tp). Weights [W, D] and [W, E]: this rank's columns of
        the vocabulary, padding last. Teacher hidden [T, E], labels and loss weights [T]: all
        tokens, on every rank of tp.
    Dtypes: hidden and weight alike, bf16, fp16 or fp32 (fp64 for tests). Products accumulate in
        fp32. The weight's gradient is summed over chunks in fp32 and rounded once. That of the
        hidden states is rounded on each rank before tp adds it up, as in Megatron.
    Collectives: over `chunking.tp_group`, all in the forward. Per chunk those of `kd_loss` and an
        all-reduce of N D numbers; under sequence parallelism an all-gather and a reduce-scatter of
        as many in its place.
    Memory: `chunking.chunk_bytes`; kept for backward: the gradients, [T, D] in the hidden state's
        dtype and [W, D] in fp32.
    Host sync: none on CUDA.
    Raises: ValueError like `kd_loss`, and for a budget too small for one token; RuntimeError when
        differentiated twice.
    Source: the idea of gradients in the forward: Liger kernels, arXiv 2410.10989.
    """
    chunking = chunking or Chunking()
    options = LossOptions(
        vocab=vocab, teacher_temperature=float(teacher_temperature),
        student_temperature=float(student_temperature), divergence=divergence,
        tp_group=chunking.tp_group,
    )  # fmt: skip
    options.check()
    heads = Heads.of(
        student_hidden_TD, student_weight_WD, teacher_hidden_TE, teacher_weight_WE, vocab, chunking,
        sparse_bytes(truncation, stored, student_weight_WD.shape[0]),
    )  # fmt: skip
    device, cut = student_hidden_TD.device, _Cut.of(truncation, stored, heads, options)
    check_labels(labels_T, heads.num_tokens, device)
    weights = as_weights(ce_weight_T, kd_weight_T, heads.num_tokens, student_hidden_TD)
    dtypes = frozenset({heads.logits_dtype, heads.gradient_dtype})
    backend = choose_backend(impl, device=device, dtypes=dtypes, divergence=divergence)
    if not backend.checks_values:
        has_teacher = cut is not None or teacher_hidden_TE is not None
        check_values(labels_T, weights[1], vocab, has_teacher=has_teacher)
    # Autocast would round operands of the products behind their backs.
    with torch.autocast(device.type, enabled=False):
        loss, ce_T, kl_T = _LinearKdLossFunction.apply(
            student_hidden_TD, student_weight_WD, heads, labels_T, *weights, options, backend,
            cut, torch.is_grad_enabled(),
        )  # fmt: skip
    return KdLoss(loss=loss, ce_T=ce_T.detach(), kl_T=kl_T.detach())


@dataclass(frozen=True, eq=False)
class _Cut:
    """From a chunk's tokens to the sparse teacher that they are taught by."""

    truncation: Truncation
    stored: KeptLogprobs | None
    heads: Heads
    options: LossOptions

    @classmethod
    def of(
        cls, truncation: Truncation | None, stored: KeptLogprobs | None, heads: Heads,
        options: LossOptions,
    ) -> _Cut | None:  # fmt: skip
        """None: no teacher, or one of which every token is known. Raises: ValueError."""
        if stored is not None and heads.teacher is not None:
            raise ValueError("there are teacher_hidden_TE and stored log-probabilities: give one")
        if stored is None and (truncation is None or heads.teacher is None):
            return None
        truncation = truncation or Truncation(temperature=options.teacher_temperature)
        truncation.check()
        if options.teacher_temperature not in (1.0, truncation.temperature):
            raise ValueError(
                f"teacher_temperature = {options.teacher_temperature}, the truncation's is "
                f"{truncation.temperature}: give one of them"
            )
        return cls(truncation, stored, heads, options)

    def __call__(self, chunk: Chunk, labels_N: Tensor) -> SparseTeacher:
        """Collectives: those of `top_logprobs`, unless they are stored."""
        if self.stored is not None:
            of_chunk = (self.heads.of_all_parts(x, chunk.start, chunk.stop) for x in self.stored)
            return self.truncation.target(KeptLogprobs(*of_chunk), labels_N)
        logits_NW, options = chunk.teacher_logits_NW, self.options
        assert logits_NW is not None  # `of`
        num_kept = self.truncation.top_k or options.vocab.size
        kept = top_logprobs(logits_NW, num_kept, options.vocab, options.tp_group)
        return self.truncation.target(kept, labels_N)


class _LinearKdLossFunction(torch.autograd.Function):
    """Differentiable in the student's hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_TD: Tensor,
        student_weight_WD: Tensor,
        heads: Heads,
        labels_T: Tensor,
        ce_weight_T: Tensor,
        kd_weight_T: Tensor,
        options: LossOptions,
        backend: LossBackend,
        cut: _Cut | None,
        grad_enabled: bool,  # the caller's: in here gradients are always off
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (grad_enabled and x for x in ctx.needs_input_grad[:2])
        values_3T = ce_weight_T.new_empty((3, heads.num_tokens))
        unit = _unit_of_weights(ce_weight_T, kd_weight_T, heads.gradient_dtype)
        gradients = _Gradients(heads, wants_hidden=wants_hidden, wants_weight=wants_weight)
        for chunk in heads.chunks():
            start, stop = chunk.start, chunk.stop
            labels_N, ce_weight_N, kd_weight_N = (
                heads.of_all_parts(x, start, stop) for x in (labels_T, ce_weight_T, kd_weight_T)
            )
            inputs = LossInputs(
                chunk.student_logits_NW, chunk.teacher_logits_NW, labels_N, ce_weight_N, kd_weight_N
            )
            if cut is not None:
                whole = inputs._replace(teacher_TW=None)
                inputs = with_sparse(whole, cut(chunk, labels_N), options, backend)
            if wants_hidden or wants_weight:
                out_NW = gradients.logits_target(chunk)
                scores = backend.scores_and_gradient_(inputs, options, 1 / unit, out_NW)
                gradients.add_(chunk, out_NW)
            else:
                scores = backend.scores(inputs, options)
            for value_T, value_N in zip(values_3T, scores[:3], strict=True):
                parts = value_T.unflatten(0, (heads.num_parts, -1))
                parts[:, start:stop] = value_N.unflatten(0, (heads.num_parts, -1))
        ctx.gradients = gradients.finished()
        ctx.unit, ctx.weight_dtype = unit, student_weight_WD.dtype
        loss_T, ce_T, kl_T = values_3T
        ctx.mark_non_differentiable(ce_T, kl_T)
        return loss_T.sum(), ce_T, kl_T

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_kd_loss was differentiated twice: it hands its gradients over and keeps no "
                "copy; call it again, or use kd_loss on logits"
            )
        (hidden, weight), ctx.gradients = ctx.gradients, None
        factor = (upstream[0] * ctx.unit).view(1, 1)
        # Multiplied in fp32 and rounded once; a scalar would first be rounded to bf16. Hidden
        # states' gradients stay as they are where the factor is a power of two.
        if hidden is not None:
            torch.mul(hidden, factor, out=hidden)
        if weight is not None:
            weight = weight.mul_(factor).to(ctx.weight_dtype)
        return (hidden, weight, *([None] * 8))


FP16_HEADROOM = 256
"""How far above 1 the weights of an fp16 gradient may lie. What is left below 65504 is for the
hidden states' gradient: sums over the vocabulary with heads of some tens."""


def _unit_of_weights(
    ce_weight_T: Tensor, kd_weight_T: Tensor, gradient_dtype: torch.dtype
) -> Tensor:
    """A power of two by which the weights are divided while gradients are made; a scalar."""
    # With weights of one over millions of tokens the logits' gradient would vanish in fp16 before
    # the loss scale can reach it. So the unit lies just above the largest weight; 1 if all are 0.
    if not len(ce_weight_T):
        return ce_weight_T.new_ones(())
    largest = torch.maximum(ce_weight_T.abs().amax(), kd_weight_T.abs().amax())
    _, exponent = torch.frexp(largest)
    # So that neither it nor its inverse leaves fp32, for weights at the ends of its range.
    unit = torch.ldexp(torch.ones_like(largest), exponent.clamp(-100, 100))
    # Most of the gradient is far smaller than its weight.
    return unit / FP16_HEADROOM if gradient_dtype == torch.float16 else unit


# torch 2.13 has a new name for it.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gradients:
    """Gradients of the student's hidden states and head, added up over chunks."""

    def __init__(self, heads: Heads, *, wants_hidden: bool, wants_weight: bool) -> None:
        self._heads = heads
        hidden_TD, weight_WD = heads.student_hidden_TD, heads.student.weight_WD
        self._hidden_TD = None
        if wants_hidden:  # contiguous, so that a range of tokens can be sent
            self._hidden_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
        self._weight_WD = None
        if wants_weight:
            dtype = arithmetic_dtype(weight_WD)
            self._weight_WD = torch.zeros(weight_WD.shape, dtype=dtype, device=weight_WD.device)
        self._buffer: Tensor | None = None
        self._under_way: tuple[Any, Tensor] | None = None

    def logits_target(self, chunk: Chunk) -> Tensor:
        """Where the gradient of a chunk's logits goes: over the logits if it has their dtype."""
        logits_NW, dtype = chunk.student_logits_NW, self._heads.gradient_dtype
        if dtype == logits_NW.dtype:
            return logits_NW
        if self._buffer is None:  # the first chunk is the largest
            self._buffer = torch.empty_like(logits_NW, dtype=dtype)
        return self._buffer[: len(logits_NW)]

    def add_(self, chunk: Chunk, grad_NW: Tensor) -> None:
        """Collectives: see `linear_kd_loss`; they run beside the next products."""
        head = self._heads.student
        if self._hidden_TD is not None:
            self._reduce_(head.hidden_gradient(grad_NW), self._hidden_TD[chunk.start : chunk.stop])
        if self._weight_WD is not None:
            head.add_weight_gradient_(grad_NW, chunk.hidden_ND, self._weight_WD)

    def _reduce_(self, grad_ND: Tensor, target_TD: Tensor) -> None:
        """Sum over the ranks' columns, each rank receiving its own tokens."""
        chunking = self._heads.chunking
        if self._heads.num_parts > 1:
            self._wait()
            work = _reduce_scatter(target_TD, grad_ND, group=chunking.tp_group, async_op=True)
            self._under_way = (work, grad_ND)  # the input must live until it has been sent
            return
        target_TD.copy_(grad_ND)
        if tp_size_of(chunking.tp_group) > 1:
            self._wait()
            work = dist.all_reduce(target_TD, group=chunking.tp_group, async_op=True)
            self._under_way = (work, target_TD)

    def _wait(self) -> None:
        if self._under_way is not None:
            self._under_way[0].wait()
            self._under_way = None

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        self._wait()
        return self._hidden_TD, self._weight_WD
