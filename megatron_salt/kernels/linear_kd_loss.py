"""`linear_kd_loss`: from last hidden states to the loss, with logits of a few tokens at a time.

The gradients of the hidden states and of the head are computed in the forward, while a chunk's
logits are there: they are never made twice and never kept. Letters: T tokens, D student width,
E teacher width, W vocabulary columns on this rank, N tokens of one chunk (gathered over tp under
sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_salt.kernels.choose import Impl, choose_body
from megatron_salt.kernels.head import Head
from megatron_salt.kernels.kd_loss import (
    KdLoss,
    as_weight,
    check_labels,
    check_options,
    check_values,
)
from megatron_salt.kernels.rows import (
    Body,
    Divergence,
    Options,
    Rows,
    arithmetic_dtype,
    tp_size_of,
)
from megatron_salt.kernels.vocab import VocabShard

DEFAULT_CHUNK_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How logits are made: a piece at a time, in a byte budget, in a dtype.

    A larger budget means larger matrix products and fewer passes over the head's gradient.
    """

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    """For everything that exists per token of a chunk: the logits of student and teacher, their
    gradient, and under sequence parallelism the gathered hidden states."""
    logits_dtype: torch.dtype | None = torch.float32
    """None: that of the hidden states. Rounding logits to bf16 costs the gradient of a student near
    its teacher several per cent."""
    tp_group: ProcessGroup | None = None
    sequence_parallel: bool = False
    """The student's hidden states are this rank's T / tp tokens of the tp group's T."""


class Chunk(NamedTuple):
    """Some tokens with their logits on this rank."""

    start: int
    stop: int
    """Range of this rank's tokens; under sequence parallelism the same range of every rank."""
    hidden_ND: Tensor
    student_logits_NW: Tensor
    teacher_logits_NW: Tensor | None


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
) -> KdLoss:
    """`kd_loss` of logits = hidden @ weight.T, without ever holding [T, W].

    Math: that of `kd_loss`.
    Shapes: student hidden [T, D], or [T / tp, D] with `chunking.sequence_parallel`: then rank r
        holds tokens [r T / tp, (r + 1) T / tp). Weights [W, D] and [W, E]: this rank's rows,
        padding rows last. Teacher hidden [T, E], labels and weights [T]: all tokens, on every rank
        of tp.
    Dtypes: hidden and weight alike, bf16, fp16 or fp32. Products accumulate in fp32. The weight's
        gradient is summed over chunks in fp32 and rounded once; that of the hidden states is
        rounded on each rank before tp adds it up, as in Megatron, and once more when what is
        upstream of the loss is not a power of two.
    Collectives: per chunk those of `kd_loss`, and over tp an all-reduce of N D numbers; under
        sequence parallelism an all-gather and a reduce-scatter of as many in its place. All in the
        forward, also where the loss is then not differentiated.
    Memory: `chunking.chunk_bytes`; kept for backward: the gradients, [T, D] in the hidden state's
        dtype and [W, D] in fp32.
    Host sync: none on CUDA.
    Raises: ValueError like `kd_loss`, and for a budget too small for one token; RuntimeError when
        differentiated twice.
    Source: the idea of gradients in the forward: Liger kernels, arXiv 2410.10989.
    """
    chunking = chunking or Chunking()
    options = Options(
        vocab=vocab, teacher_temperature=float(teacher_temperature),
        student_temperature=float(student_temperature), divergence=divergence,
    )  # fmt: skip
    check_options(options)
    heads = Heads.of(
        student_hidden_TD, student_weight_WD, teacher_hidden_TE, teacher_weight_WE, vocab, chunking
    )
    device = student_hidden_TD.device
    check_labels(labels_T, heads.num_tokens, device)
    dtype = arithmetic_dtype(student_hidden_TD)
    weights = [
        as_weight(weight, name, heads.num_tokens, dtype, device)
        for weight, name in ((ce_weight_T, "ce_weight_T"), (kd_weight_T, "kd_weight_T"))
    ]
    dtypes = frozenset({heads.logits_dtype} | {heads.gradient_dtype})
    body = choose_body(impl, device=device, dtypes=dtypes, divergence=divergence)
    if not body.checks_values:
        rows = Rows(student_hidden_TD, teacher_hidden_TE, labels_T, *weights)
        check_values(rows, options)
    loss, ce_T, kl_T = _LinearKdLossFunction.apply(
        student_hidden_TD, student_weight_WD, heads, labels_T, *weights, options, body
    )
    return KdLoss(loss=loss, ce_T=ce_T.detach(), kl_T=kl_T.detach())


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Hidden states and heads of student and teacher, checked, and how they are cut into chunks."""

    student_hidden_TD: Tensor
    student: Head
    teacher_hidden_TE: Tensor | None
    teacher: Head | None
    chunking: Chunking

    @classmethod
    def of(
        cls,
        student_hidden_TD: Tensor,
        student_weight_WD: Tensor,
        teacher_hidden_TE: Tensor | None,
        teacher_weight_WE: Tensor | None,
        vocab: VocabShard,
        chunking: Chunking,
    ) -> Heads:
        """Raises: ValueError for what does not fit together."""
        _check_head("student", student_hidden_TD, student_weight_WD, vocab)
        if (teacher_hidden_TE is None) != (teacher_weight_WE is None):
            missing = "teacher_hidden_TE" if teacher_hidden_TE is None else "teacher_weight_WE"
            raise ValueError(f"{missing} is None, the teacher's other tensor is not")
        teacher = None
        if teacher_hidden_TE is not None and teacher_weight_WE is not None:
            _check_head("teacher", teacher_hidden_TE, teacher_weight_WE, vocab)
            teacher = Head(teacher_weight_WE.detach(), chunking.chunk_bytes)
        heads = cls(
            student_hidden_TD=student_hidden_TD,
            student=Head(student_weight_WD.detach(), chunking.chunk_bytes),
            teacher_hidden_TE=teacher_hidden_TE,
            teacher=teacher,
            chunking=chunking,
        )
        if teacher_hidden_TE is not None:
            if teacher_hidden_TE.shape[0] != heads.num_tokens:
                raise ValueError(
                    f"teacher_hidden_TE has {teacher_hidden_TE.shape[0]} tokens, the student "
                    f"{heads.num_tokens}: the tokens must be the same"
                )
            if teacher_hidden_TE.device != student_hidden_TD.device:
                raise ValueError(
                    f"teacher_hidden_TE is on {teacher_hidden_TE.device}, the student's tensors "
                    f"on {student_hidden_TD.device}"
                )
        return heads

    @property
    def num_parts(self) -> int:
        """Ranks whose tokens make up a chunk."""
        chunking = self.chunking
        return tp_size_of(chunking.tp_group) if chunking.sequence_parallel else 1

    @property
    def num_tokens(self) -> int:
        return self.student_hidden_TD.shape[0] * self.num_parts

    @property
    def logits_dtype(self) -> torch.dtype:
        hidden = self.student_hidden_TD.dtype
        wanted = self.chunking.logits_dtype or hidden
        return torch.promote_types(wanted, hidden) if hidden == torch.float64 else wanted

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the logits' gradient: the operand that the head's matrix products want."""
        return self.student.operand_dtype(self.logits_dtype)

    def bytes_per_token(self) -> int:
        """Everything that exists once per token of a chunk."""
        weight_WD = self.student.weight_WD
        elements = self.logits_dtype.itemsize * (1 if self.teacher is None else 2)
        if self.gradient_dtype != self.logits_dtype:
            elements += self.gradient_dtype.itemsize
        num_bytes = elements * weight_WD.shape[0]
        # One head is multiplied at a time.
        num_bytes += max(head.scratch_bytes_per_token() for head in self._both())
        if self.num_parts > 1:
            # Gathered states, and the gradients of this chunk and of the one still under way.
            num_bytes += 3 * weight_WD.shape[1] * weight_WD.element_size()
        return num_bytes

    def tokens_per_chunk(self) -> int:
        """This rank's tokens per chunk."""
        return tokens_per_chunk(
            self.student_hidden_TD.shape[0],
            self.bytes_per_token() * self.num_parts,
            self.chunking.chunk_bytes - max(head.block_bytes for head in self._both()),
        )

    def _both(self) -> list[Head]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def of_all_parts(self, x: Tensor, start: int, stop: int) -> Tensor:
        """A chunk's rows of something that has all T tokens; a view with one part. [N, ...]"""
        if self.num_parts == 1:
            return x[start:stop]
        return x.unflatten(0, (self.num_parts, -1))[:, start:stop].flatten(0, 1)

    def chunks(self) -> Iterator[Chunk]:
        """All tokens, chunk by chunk. The logits of a chunk are overwritten by the next one's.

        Collectives: under sequence parallelism an all-gather of N D numbers over tp per chunk.
        """
        num_local, step = self.student_hidden_TD.shape[0], self.tokens_per_chunk()
        rows = min(step, num_local) * self.num_parts
        shape = (rows, self.student.weight_WD.shape[0])
        student_buffer = self.student_hidden_TD.new_empty(shape, dtype=self.logits_dtype)
        teacher_buffer = None if self.teacher is None else torch.empty_like(student_buffer)
        for start in range(0, num_local, step):
            stop = min(start + step, num_local)
            hidden_ND = self.student_hidden_TD[start:stop]
            if self.num_parts > 1:
                hidden_ND = _all_gathered(hidden_ND, self.chunking.tp_group)
            student_NW = student_buffer[: len(hidden_ND)]
            self.student.logits_(hidden_ND, student_NW)
            teacher_NW = None
            if self.teacher is not None:
                assert teacher_buffer is not None and self.teacher_hidden_TE is not None
                teacher_NW = teacher_buffer[: len(hidden_ND)]
                hidden_NE = self.of_all_parts(self.teacher_hidden_TE, start, stop)
                self.teacher.logits_(hidden_NE, teacher_NW)
            yield Chunk(start, stop, hidden_ND, student_NW, teacher_NW)


def tokens_per_chunk(num_tokens: int, bytes_per_token: int, budget_bytes: int) -> int:
    """Size of the fewest chunks, nearly equal, that fit into the budget; at least 1.

    Rounded up to a multiple of 64 where the budget allows, for the matrix products.
    Args:
        num_tokens: of this rank; bytes_per_token: for one of them on this rank, whose logits are
            those of one token of every rank under sequence parallelism.
    Raises: ValueError if the budget holds no token.
    """
    largest = budget_bytes // bytes_per_token
    if largest < 1:
        raise ValueError(
            f"chunk_bytes = {budget_bytes} cannot hold the smallest chunk of logits, which takes "
            f"{bytes_per_token} bytes: raise it (salt.loss_chunk_mib)"
        )
    num_chunks = max(1, -(-num_tokens // largest))
    even = max(1, -(-num_tokens // num_chunks))
    rounded = -(-even // 64) * 64
    return rounded if rounded <= largest else even


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
        options: Options,
        body: Body,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        tp_group = heads.chunking.tp_group
        values_3T = ce_weight_T.new_empty((3, heads.num_tokens))
        unit = _power_of_two_above(ce_weight_T, kd_weight_T)
        gradients = _Gradients(heads, wants_hidden=wants_hidden, wants_weight=wants_weight)
        for chunk in heads.chunks():
            start, stop = chunk.start, chunk.stop
            labels_N, ce_weight_N, kd_weight_N = (
                heads.of_all_parts(x, start, stop) for x in (labels_T, ce_weight_T, kd_weight_T)
            )
            rows = Rows(
                chunk.student_logits_NW, chunk.teacher_logits_NW, labels_N, ce_weight_N, kd_weight_N
            )
            if wants_hidden or wants_weight:
                out_NW = gradients.logits_target(chunk)
                scores = body.scores_and_gradient_(rows, options, tp_group, 1 / unit, out_NW)
                gradients.add_(chunk, out_NW)
            else:
                scores = body.scores(rows, options, tp_group)
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
        # Multiplied in fp32 and rounded once; a scalar would first be rounded to bf16.
        if hidden is not None:
            torch.mul(hidden, factor, out=hidden)
        if weight is not None:
            weight = weight.mul_(factor).to(ctx.weight_dtype)
        return (hidden, weight, *([None] * 6))


def _power_of_two_above(ce_weight_T: Tensor, kd_weight_T: Tensor) -> Tensor:
    """A power of two above every weight, as a scalar on their device; 1 if they are all 0.

    The chunks' gradients are made for weights divided by it: with weights of one over millions of
    tokens they would vanish in fp16 before the loss scale can reach them.
    """
    if not len(ce_weight_T):
        return ce_weight_T.new_ones(())
    largest = torch.maximum(ce_weight_T.abs().amax(), kd_weight_T.abs().amax())
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent)


class _Gradients:
    """Gradients of the student's hidden states and head, added up over chunks."""

    def __init__(self, heads: Heads, *, wants_hidden: bool, wants_weight: bool) -> None:
        self._heads = heads
        hidden_TD, weight_WD = heads.student_hidden_TD, heads.student.weight_WD
        self._hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
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
            work = dist.reduce_scatter_tensor(
                target_TD, grad_ND, group=chunking.tp_group, async_op=True
            )
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


def _all_gathered(hidden: Tensor, group: ProcessGroup | None) -> Tensor:
    gathered = hidden.new_empty((hidden.shape[0] * tp_size_of(group), hidden.shape[1]))
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
    return gathered


def _check_head(who: str, hidden: Tensor, weight: Tensor, vocab: VocabShard) -> None:
    names = ("student_hidden_TD", "student_weight_WD")
    if who == "teacher":
        names = ("teacher_hidden_TE", "teacher_weight_WE")
    for name, tensor in zip(names, (hidden, weight), strict=True):
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have two axes, has shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, is {tensor.dtype}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{names[0]} is {hidden.shape[1]} wide, {names[1]} {weight.shape[1]}: they must agree"
        )
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"{names[0]} is {hidden.dtype} on {hidden.device}, {names[1]} {weight.dtype} on "
            f"{weight.device}: they must agree"
        )
    if weight.shape[0] == 0:
        raise ValueError(
            f"{names[1]} has no rows: an empty shard; pad the vocabulary to a row on every rank "
            "(padded_vocab_size)"
        )
    if weight.shape[0] < vocab.num_columns:
        raise ValueError(f"{names[1]} has {weight.shape[0]} rows, fewer than this rank's {vocab}")
