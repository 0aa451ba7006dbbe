"""From last hidden states to the loss, and the sums that are logged.

Letters: B micro-batch, S sequence, T = S * B tokens, D student width, E teacher width,
W vocabulary columns on this rank.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.config import SaltConfig
from megatron_salt.kernels import (
    Body,
    Chunking,
    Heads,
    KdLoss,
    VocabShard,
    choose_body,
    kd_loss,
    linear_kd_loss,
    vocab_parallel_argmax,
)


class Targets(NamedTuple):
    """What a micro-batch is scored against; a tuple, because DeepSpeed moves tuples of tensors."""

    labels_BS: Tensor
    """Token to predict at each position, int64."""
    mask_BS: Tensor
    """1 where the position counts, fp32."""
    ce_weight_BS: Tensor
    """Weight of each token's cross-entropy in the loss, fp32, normaliser included."""
    kd_weight_BS: Tensor
    """Weight of each token's KL in the loss, fp32, normaliser included."""
    teacher_hidden_BSE: Tensor | None = None
    """The teacher's last hidden state; None in the LM phase."""


@dataclass(frozen=True)
class LossSums:
    """Sums over the counted tokens of everything seen since `LossFunction.take_sums`."""

    loss: float
    ce_nats: float
    kl_nats: float
    tokens: float
    correct: float
    teacher_ce_nats: float

    def __add__(self, other: LossSums) -> LossSums:
        mine, theirs = astuple(self), astuple(other)
        return LossSums(*(a + b for a, b in zip(mine, theirs, strict=True)))


def _counted_sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """Sum over the counted tokens; an inf or nan where the mask is 0 does not spoil it."""
    return torch.where(mask_T > 0, values_T * mask_T, 0.0).sum()


class Tokens(NamedTuple):
    """A micro-batch as the loss takes it: T = S * B tokens in that order."""

    hidden_TD: Tensor
    """[T / tp, D] under sequence parallelism."""
    head_WD: Tensor
    teacher_hidden_TE: Tensor | None
    labels_T: Tensor
    mask_T: Tensor
    ce_weight_T: Tensor
    kd_weight_T: Tensor


LOGITS_DTYPES = {"fp32": torch.float32, "model": None}


def loss_body(salt: SaltConfig, model_dtype: torch.dtype, device: torch.device) -> Body:
    """The implementation that a run's loss will use on this rank; built if need be.

    Raises: ValueError or RuntimeError where salt.loss_impl cannot be had.
    """
    return choose_body(
        salt.loss_impl,
        device=device,
        dtypes=frozenset({LOGITS_DTYPES[salt.logits_dtype] or model_dtype}),
        divergence=salt.divergence,
    )


class LossFunction:
    """Scores the student's last hidden state; callable the way DeepSpeed's pipeline expects.

    Holds the teacher's head shard while there is a teacher, and adds up what is to be logged on the
    device, so that a step needs one transfer to the host however many micro-batches it has.

    Args:
        sequence_parallel: the hidden state is [S/tp, B, D] and is gathered for the head.
    """

    def __init__(
        self,
        *,
        vocab: VocabShard,
        salt: SaltConfig,
        tp_group: ProcessGroup,
        sequence_parallel: bool,
        device: torch.device,
    ) -> None:
        self.vocab = vocab
        self.salt = salt
        self.tp_group = tp_group
        self.chunking = Chunking(
            chunk_bytes=salt.loss_chunk_mib << 20,
            logits_dtype=LOGITS_DTYPES[salt.logits_dtype],
            tp_group=tp_group,
            sequence_parallel=sequence_parallel,
        )
        self.teacher_head_WE: Tensor | None = None
        self.evaluating = False
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    def __call__(self, hidden_SBD: Tensor, head_WD: Tensor, targets: Targets) -> Tensor:
        """Scalar loss of one micro-batch: sum over its tokens of ce_weight CE + kd_weight KL.

        Collectives: those of `linear_kd_loss` over tp.
        """
        tokens = Tokens(
            hidden_SBD.flatten(0, 1),
            head_WD,
            self._teacher_hidden(targets.teacher_hidden_BSE),
            *(field.transpose(0, 1).reshape(-1) for field in targets[:4]),
        )
        if self.evaluating:
            return self._evaluate(tokens)
        result = linear_kd_loss(
            tokens.hidden_TD,
            tokens.head_WD,
            tokens.teacher_hidden_TE,
            None if tokens.teacher_hidden_TE is None else self.teacher_head_WE,
            tokens.labels_T,
            ce_weight_T=tokens.ce_weight_T,
            kd_weight_T=tokens.kd_weight_T,
            chunking=self.chunking,
            **self._options,
        )
        self._add(tokens.mask_T, result)
        return result.loss

    @property
    def _options(self) -> dict[str, Any]:
        salt = self.salt
        return {
            "vocab": self.vocab,
            "teacher_temperature": salt.teacher_temperature,
            "student_temperature": salt.student_temperature,
            "divergence": salt.divergence,
            "impl": salt.loss_impl,
        }

    def _teacher_hidden(self, hidden_BSE: Tensor | None) -> Tensor | None:
        """The teacher's states in the student's order of tokens, [T, E]."""
        if hidden_BSE is None:
            return None
        if self.teacher_head_WE is None:
            raise RuntimeError("teacher hidden states arrived, but the teacher's head is released")
        return hidden_BSE.transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def _evaluate(self, tokens: Tokens) -> Tensor:
        """The loss; adds right guesses and the teacher's CE to the sums, which need the logits."""
        teacher_head_WE = None if tokens.teacher_hidden_TE is None else self.teacher_head_WE
        heads = Heads.of(
            tokens.hidden_TD, tokens.head_WD, tokens.teacher_hidden_TE, teacher_head_WE, self.vocab,
            self.chunking,
        )  # fmt: skip
        loss = torch.zeros((), device=tokens.hidden_TD.device)
        for chunk in heads.chunks():
            labels_N, mask_N, ce_weight_N, kd_weight_N = (
                heads.of_all_parts(x, chunk.start, chunk.stop) for x in tokens[3:]
            )
            result = kd_loss(
                chunk.student_logits_NW, chunk.teacher_logits_NW, labels_N,
                ce_weight_T=ce_weight_N, kd_weight_T=kd_weight_N, tp_group=self.tp_group,
                **self._options,
            )  # fmt: skip
            best_N = vocab_parallel_argmax(chunk.student_logits_NW, self.vocab, self.tp_group)
            correct = _counted_sum((best_N == labels_N).float(), mask_N)
            teacher_ce = torch.zeros_like(correct)
            if chunk.teacher_logits_NW is not None:
                scored = kd_loss(
                    chunk.teacher_logits_NW, None, labels_N, ce_weight_T=1.0, kd_weight_T=0.0,
                    vocab=self.vocab, tp_group=self.tp_group, impl=self.salt.loss_impl,
                )  # fmt: skip
                teacher_ce = _counted_sum(scored.ce_T, mask_N)
            self._add(mask_N, result, correct, teacher_ce)
            loss += result.loss
        return loss

    @torch.no_grad()
    def _add(
        self,
        mask_T: Tensor,
        result: KdLoss,
        correct: Tensor | None = None,
        teacher_ce: Tensor | None = None,
    ) -> None:
        zero = self._sums.new_zeros(())
        values = (
            result.loss, _counted_sum(result.ce_T, mask_T), _counted_sum(result.kl_T, mask_T),
            mask_T.sum(), zero if correct is None else correct,
            zero if teacher_ce is None else teacher_ce,
        )  # fmt: skip
        self._sums += torch.stack([value.double() for value in values])

    def take_sums(self) -> Tensor:
        """The sums so far, on the device (see `LossSums` for their order), and start from zero."""
        taken = self._sums.clone()
        self._sums.zero_()
        return taken

    def add_sums(self, sums: Tensor) -> None:
        """Put back what `take_sums` took, so that an evaluation leaves a step's sums alone."""
        self._sums += sums
