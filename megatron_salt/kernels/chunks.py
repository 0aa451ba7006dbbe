"""Logits a chunk at a time: how many tokens fit into a byte budget, and how logits are made.

In this folder a chunk is some tokens; in `teacher/` it is some of the teacher's layers. Letters:
T tokens, D student width, E teacher width, W vocabulary columns on this rank, N tokens of one chunk
(gathered over tp under sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.backend import tp_size_of
from megatron_salt.kernels.head import Head
from megatron_salt.kernels.vocab import VocabShard

DEFAULT_CHUNK_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How logits are made: a chunk of tokens at a time, in a byte budget, in a dtype.

    A larger budget means larger matrix products and fewer passes over the head's gradient.
    """

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    """For everything that is made for one chunk: the logits of student and teacher, the gradient of
    the student's, operands converted to fp32 on the CPU, and under sequence parallelism the
    gathered hidden states and gradients on their way."""
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


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Hidden states and heads of student and teacher, checked, and how they are cut into chunks."""

    student_hidden_TD: Tensor
    student: Head
    teacher_hidden_TE: Tensor | None
    teacher: Head | None
    chunking: Chunking
    sparse_bytes: int = 0
    """Of a token's sparse teacher, and of what makes it."""

    @classmethod
    def of(
        cls,
        student_hidden_TD: Tensor,
        student_weight_WD: Tensor,
        teacher_hidden_TE: Tensor | None,
        teacher_weight_WE: Tensor | None,
        vocab: VocabShard,
        chunking: Chunking,
        sparse_bytes: int = 0,
    ) -> Heads:
        """Raises: ValueError for what does not fit together."""
        _check_head("student", student_hidden_TD, student_weight_WD, vocab)
        if chunking.logits_dtype not in (None, torch.float32, student_hidden_TD.dtype):
            raise ValueError(
                f"logits_dtype = {chunking.logits_dtype}: choose torch.float32, or None for "
                f"{student_hidden_TD.dtype}, which the hidden states have"
            )
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
            sparse_bytes=sparse_bytes,
        )
        if teacher_hidden_TE is not None:
            # A product gives its operands' dtype, or fp32 from 16-bit operands; nothing else.
            dtype, wanted = teacher_hidden_TE.dtype, heads.logits_dtype
            if dtype != wanted and (wanted != torch.float32 or dtype.itemsize > 2):
                raise ValueError(
                    f"teacher_hidden_TE is {dtype}, from which no logits in {wanted} are made: "
                    "convert the teacher, or set logits_dtype to torch.float32"
                )
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
        return hidden if hidden == torch.float64 else wanted

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
        num_bytes = elements * weight_WD.shape[0] + self.sparse_bytes
        # One head is multiplied at a time.
        num_bytes += max(head.scratch_bytes_per_token() for head in self._both())
        if self.num_parts > 1:
            # Gathered states, and the gradients of this chunk and of the one still under way.
            num_bytes += 3 * weight_WD.shape[1] * weight_WD.element_size()
        return num_bytes

    def tokens_per_chunk(self) -> int:
        """This rank's tokens per chunk."""
        return even_chunk(
            self.student_hidden_TD.shape[0],
            self.bytes_per_token() * self.num_parts,
            self.chunking.chunk_bytes,
            fixed_bytes=max(head.block_bytes for head in self._both()),
        )

    def _both(self) -> list[Head]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def of_all_parts(self, x: Tensor, start: int, stop: int) -> Tensor:
        """A chunk's tokens of something that has all T tokens; a view with one part. [N, ...]"""
        if self.num_parts == 1:
            return x[start:stop]
        return x.unflatten(0, (self.num_parts, -1))[:, start:stop].flatten(0, 1)

    def chunks(self) -> Iterator[Chunk]:
        """All tokens, chunk by chunk. The logits of a chunk are overwritten by the next one's.

        Collectives: under sequence parallelism an all-gather of N D numbers over tp per chunk.
        """
        num_local, step = self.student_hidden_TD.shape[0], self.tokens_per_chunk()
        most_tokens = min(step, num_local) * self.num_parts
        shape = (most_tokens, self.student.weight_WD.shape[0])
        student_buffer = self.student_hidden_TD.new_empty(shape, dtype=self.logits_dtype)
        teacher_buffer = None if self.teacher is None else torch.empty_like(student_buffer)
        for start in range(0, num_local, step):
            stop = min(start + step, num_local)
            hidden_ND = self.student_hidden_TD[start:stop]
            if self.num_parts > 1:
                hidden_ND = all_gathered(hidden_ND, self.chunking.tp_group)
            student_NW = student_buffer[: len(hidden_ND)]
            self.student.logits_(hidden_ND, student_NW)
            teacher_NW = None
            if self.teacher is not None:
                assert teacher_buffer is not None and self.teacher_hidden_TE is not None
                teacher_NW = teacher_buffer[: len(hidden_ND)]
                hidden_NE = self.of_all_parts(self.teacher_hidden_TE, start, stop)
                self.teacher.logits_(hidden_NE, teacher_NW)
            yield Chunk(start, stop, hidden_ND, student_NW, teacher_NW)


def even_chunk(
    num_tokens: int, bytes_per_token: int, budget_bytes: int, *, fixed_bytes: int = 0
) -> int:
    """Tokens per chunk of the fewest chunks, nearly equal, that fit into the budget; at least 1.

    Rounded up to a multiple of 64 where the budget allows, for the matrix products.
    Args:
        num_tokens: all of this rank's.
        bytes_per_token: what one of them adds to a chunk.
        fixed_bytes: what a chunk takes however few they are.
    Raises: ValueError if the budget holds no token.
    """
    largest = (budget_bytes - fixed_bytes) // bytes_per_token
    if largest < 1:
        raise ValueError(
            f"chunk_bytes = {budget_bytes} cannot hold the smallest chunk of logits, which takes "
            f"{bytes_per_token + fixed_bytes} bytes: raise it (salt.loss_chunk_mib)"
        )
    num_chunks = max(1, -(-num_tokens // largest))
    even = max(1, -(-num_tokens // num_chunks))
    rounded = -(-even // 64) * 64
    return rounded if rounded <= largest else even


def all_gathered(hidden: Tensor, group: ProcessGroup | None) -> Tensor:
    """Every rank's tokens, in the order of ranks: [T, D] of [T / tp, D]."""
    gathered = hidden.new_empty((hidden.shape[0] * tp_size_of(group), hidden.shape[1]))
    # torch 2.13 has a new name for it.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(gathered, hidden.contiguous(), group=group)
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
