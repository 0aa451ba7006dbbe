"""From last hidden states to the loss, and the sums that are logged.

Letters: B micro-batch, S sequence, T = S * B tokens, D student width, E teacher width,
W vocabulary columns on this rank.
"""

from __future__ import annotations

import dataclasses
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
    token_scores,
    vocab_parallel_argmax,
)
from megatron_salt.kernels.token_scores import Wanted
from megatron_salt.model.routing import keep_taught, share_of_sequences


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
    reference_loss_BS: Tensor
    """Loss of the tagging model on each label, nats, fp32; empty [0] where no route reads it."""
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
    taught: float
    """Tokens with a KD weight."""
    ce_counted: float
    """Tokens with a CE weight."""

    def __add__(self, other: LossSums) -> LossSums:
        mine, theirs = astuple(self), astuple(other)
        return LossSums(*(a + b for a, b in zip(mine, theirs, strict=True)))


def _counted_sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """Sum over the counted tokens; an inf or nan where the mask is 0 does not spoil it."""
    return torch.where(mask_T > 0, values_T * mask_T, 0.0).sum()


def _in_order_of_tokens(values_BS: Tensor) -> Tensor:
    """[B, S] to [T], sequence positions outermost as in the student's hidden states."""
    return values_BS.transpose(0, 1).reshape(-1)


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
    reference_loss_T: Tensor | None


NUM_SUMS = len(dataclasses.fields(LossSums))
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
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)

    def __call__(self, hidden_SBD: Tensor, head_WD: Tensor, targets: Targets) -> Tensor:
        """Scalar loss of one micro-batch: sum over its tokens of ce_weight CE + kd_weight KL.

        Collectives: those of `linear_kd_loss` over tp.
        """
        reference_BS = targets.reference_loss_BS
        has_reference = reference_BS.numel() > 0
        labels_T, mask_T, ce_weight_T, kd_weight_T = map(_in_order_of_tokens, targets[:4])
        tokens = Tokens(
            hidden_SBD.flatten(0, 1), head_WD, self._teacher_hidden(targets.teacher_hidden_BSE),
            labels_T, mask_T, ce_weight_T, kd_weight_T,
            _in_order_of_tokens(reference_BS) if has_reference else None,
        )  # fmt: skip
        if self.evaluating:
            return self._evaluate(tokens)
        # In the LM phase there is neither a teacher nor a reference, and nothing is routed.
        if self._routes_by_model and (tokens.teacher_hidden_TE is not None or has_reference):
            tokens = self._routed(tokens, targets.labels_BS.shape)
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
        self._add(tokens, result)
        return result.loss

    @property
    def _routes_by_model(self) -> bool:
        """Whether weights depend on what the models say about a token."""
        salt = self.salt
        by_model = ("low_entropy", "high_entropy", "teacher_better")
        return salt.kd_tokens in by_model or salt.ce_tokens == "excess_loss"

    @torch.no_grad()
    def _routed(self, tokens: Tokens, shape_BS: torch.Size) -> Tokens:
        """The weights after the routes that need losses or entropies (see `routing`).

        A token's weight must be known before its gradient is made, so the heads that are asked are
        evaluated once more.
        Collectives: those of `token_scores` over tp.
        """
        salt, (num_rows, length) = self.salt, shape_BS

        def by_row(values_T: Tensor) -> Tensor:
            return values_T.view(length, num_rows).transpose(0, 1)

        counted_BS = by_row(tokens.mask_T)
        ce_weight_BS, kd_weight_BS = by_row(tokens.ce_weight_T), by_row(tokens.kd_weight_T)
        better = salt.kd_tokens == "teacher_better"
        gap_BS = None  # student loss - teacher's
        if better or salt.ce_tokens == "excess_loss":
            gap_BS = by_row(self._student_ce(tokens) - self._teacher_ce(tokens))
        taught_BS = None
        if better:
            assert gap_BS is not None
            taught_BS = (gap_BS > 0).float()
        elif salt.kd_tokens in ("low_entropy", "high_entropy"):
            sign = 1.0 if salt.kd_tokens == "high_entropy" else -1.0
            entropy_BS = by_row(self._teacher_scores(tokens, "entropy")) * sign
            taught_BS = share_of_sequences(entropy_BS, counted_BS, salt.kd_token_share)
        if taught_BS is not None:
            ce_weight_BS, kd_weight_BS = keep_taught(
                ce_weight_BS, kd_weight_BS, taught_BS, salt.untaught_ce
            )
        if salt.ce_tokens == "excess_loss":
            assert gap_BS is not None
            ce_weight_BS = ce_weight_BS * share_of_sequences(
                gap_BS, counted_BS, salt.ce_token_share
            )
        return tokens._replace(
            ce_weight_T=ce_weight_BS.transpose(0, 1).reshape(-1),
            kd_weight_T=kd_weight_BS.transpose(0, 1).reshape(-1),
        )

    def _student_ce(self, tokens: Tokens) -> Tensor:
        scores = token_scores(
            tokens.hidden_TD, tokens.head_WD, tokens.labels_T, vocab=self.vocab,
            chunking=self.chunking, impl=self.salt.loss_impl,
        )  # fmt: skip
        assert scores.ce_T is not None
        return scores.ce_T

    def _teacher_ce(self, tokens: Tokens) -> Tensor:
        """Of the teacher in memory, else of the model that tagged the data."""
        if tokens.teacher_hidden_TE is not None:
            return self._teacher_scores(tokens, "ce")
        assert tokens.reference_loss_T is not None  # `_route`
        return tokens.reference_loss_T

    def _teacher_scores(self, tokens: Tokens, want: Wanted) -> Tensor:
        """ce or entropy. The teacher's states are whole on every rank, whatever the student's."""
        assert tokens.teacher_hidden_TE is not None and self.teacher_head_WE is not None
        scores = token_scores(
            tokens.teacher_hidden_TE, self.teacher_head_WE, tokens.labels_T, vocab=self.vocab,
            chunking=dataclasses.replace(self.chunking, sequence_parallel=False), want=(want,),
            impl=self.salt.loss_impl,
        )  # fmt: skip
        found = scores.ce_T if want == "ce" else scores.entropy_T
        assert found is not None
        return found

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
            part = tokens._replace(
                **{
                    name: heads.of_all_parts(getattr(tokens, name), chunk.start, chunk.stop)
                    for name in ("labels_T", "mask_T", "ce_weight_T", "kd_weight_T")
                }
            )
            labels_N, mask_N = part.labels_T, part.mask_T
            result = kd_loss(
                chunk.student_logits_NW, chunk.teacher_logits_NW, labels_N,
                ce_weight_T=part.ce_weight_T, kd_weight_T=part.kd_weight_T,
                tp_group=self.tp_group,
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
            self._add(part, result, correct, teacher_ce)
            loss += result.loss
        return loss

    @torch.no_grad()
    def _add(
        self,
        tokens: Tokens,
        result: KdLoss,
        correct: Tensor | None = None,
        teacher_ce: Tensor | None = None,
    ) -> None:
        zero = self._sums.new_zeros(())
        mask_T = tokens.mask_T
        values = (
            result.loss, _counted_sum(result.ce_T, mask_T), _counted_sum(result.kl_T, mask_T),
            mask_T.sum(), zero if correct is None else correct,
            zero if teacher_ce is None else teacher_ce,
            torch.count_nonzero(tokens.kd_weight_T), torch.count_nonzero(tokens.ce_weight_T),
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
