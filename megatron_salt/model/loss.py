"""From last hidden states to the loss: the two output heads and `kd_loss`.

Letters: B micro-batch, S sequence, T = S * B tokens, D student width, E teacher width,
W vocabulary columns on this rank.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.config import SaltConfig
from megatron_salt.kernels import VocabShard, kd_loss, vocab_parallel_argmax


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
        self.sequence_parallel = sequence_parallel
        self.teacher_head_WE: Tensor | None = None
        self.evaluating = False
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    def __call__(self, hidden_SBD: Tensor, head_WD: Tensor, targets: Targets) -> Tensor:
        """Scalar loss of one micro-batch: sum over its tokens of ce_weight CE + kd_weight KL.

        Collectives: those of `kd_loss` over tp; under sequence parallelism the head's all-gather.
        """
        logits_TW = self.student_logits(hidden_SBD, head_WD)
        labels_T, mask_T, ce_weight_T, kd_weight_T = (
            field.transpose(0, 1).reshape(-1) for field in targets[:4]
        )
        teacher_TW = self.teacher_logits(targets.teacher_hidden_BSE)
        result = kd_loss(
            logits_TW,
            teacher_TW,
            labels_T,
            ce_weight_T=ce_weight_T,
            kd_weight_T=kd_weight_T,
            vocab=self.vocab,
            teacher_temperature=self.salt.teacher_temperature,
            student_temperature=self.salt.student_temperature,
            tp_group=self.tp_group,
        )
        with torch.no_grad():
            zero = self._sums.new_zeros(())
            correct, teacher_ce = zero, zero
            if self.evaluating:
                best_T = vocab_parallel_argmax(logits_TW, self.vocab, self.tp_group)
                correct = _counted_sum((best_T == labels_T).float(), mask_T)
                if teacher_TW is not None:
                    teacher_ce = _counted_sum(self._cross_entropy(teacher_TW, labels_T), mask_T)
            self._sums += torch.stack([
                value.double()
                for value in (
                    result.loss, _counted_sum(result.ce_T, mask_T),
                    _counted_sum(result.kl_T, mask_T), mask_T.sum(), correct, teacher_ce,
                )
            ])  # fmt: skip
        return result.loss

    def student_logits(self, hidden_SBD: Tensor, head_WD: Tensor) -> Tensor:
        """This rank's columns of the logits, [T, W] with T = S * B in that order."""
        logits_SBW = linear_with_grad_accumulation_and_async_allreduce(
            input=hidden_SBD,
            weight=head_WD,
            bias=None,
            gradient_accumulation_fusion=False,
            # The gradient of the hidden state is a sum over all ranks' columns.
            allreduce_dgrad=self.tp_group.size() > 1 and not self.sequence_parallel,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )
        return logits_SBW.flatten(0, 1)

    def teacher_logits(self, hidden_BSE: Tensor | None) -> Tensor | None:
        """The teacher's logits in the student's columns, [T, W]; no gradient."""
        if hidden_BSE is None:
            return None
        if self.teacher_head_WE is None:
            raise RuntimeError("teacher hidden states arrived, but the teacher's head is released")
        with torch.no_grad():
            return (hidden_BSE.transpose(0, 1).flatten(0, 1)) @ self.teacher_head_WE.t()

    def _cross_entropy(self, logits_TW: Tensor, labels_T: Tensor) -> Tensor:
        scored = kd_loss(
            logits_TW,
            None,
            labels_T,
            ce_weight_T=1.0,
            kd_weight_T=0.0,
            vocab=self.vocab,
            tp_group=self.tp_group,
        )
        return scored.ce_T

    def take_sums(self) -> Tensor:
        """The sums so far, on the device (see `LossSums` for their order), and start from zero."""
        taken = self._sums.clone()
        self._sums.zero_()
        return taken

    def add_sums(self, sums: Tensor) -> None:
        """Put back what `take_sums` took, so that an evaluation leaves a step's sums alone."""
        self._sums += sums
