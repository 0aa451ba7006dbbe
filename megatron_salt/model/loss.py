"""From last hidden states to the loss, and the sums that are logged.

Letters: B micro-batch, S sequence, T = S * B tokens, D student width, E teacher width,
W vocabulary columns on this rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.config.fields import SaltConfig
from megatron_salt.kernels import (
    Chunking,
    Distributions,
    KdLoss,
    KeptLogprobs,
    LossBackend,
    TokenScores,
    Truncation,
    VocabShard,
    choose_backend,
    distributions,
    linear_kd_loss,
    token_scores,
)
from megatron_salt.kernels.chunks import all_gathered
from megatron_salt.kernels.token_scores import WantedScores
from megatron_salt.method.routing import keep_taught, share_of_sequences


class Targets(NamedTuple):
    """What a micro-batch is scored against."""

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
    """The teacher's last hidden state; None in the LM phase, and with stored logits."""
    logits_ids_BSK: Tensor | None = None
    """Stored logits, see `kernels.KeptLogprobs`; None without any."""
    logits_logp_BSK: Tensor | None = None
    logits_rest_BS: Tensor | None = None
    teacher_entropy_BS: Tensor | None = None
    """Of the stored teacher's distribution, nats, fp32."""


@dataclass(frozen=True)
class LossSums:
    """Sums over the counted tokens of everything seen since `LossFunction.take_sums`."""

    loss: float
    ce_nats: float
    kl_nats: float
    tokens: float
    taught: float
    """Tokens with a KD weight."""
    ce_counted: float
    """Tokens with a CE weight."""


def counted_sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """Sum over the counted tokens; an inf or nan where the mask is 0 does not spoil it."""
    return torch.where(mask_T > 0, values_T * mask_T, 0.0).sum()


def in_order_of_tokens(values_BS: Tensor) -> Tensor:
    """[B, S, ...] to [T, ...], sequence positions outermost as in the student's hidden states."""
    return values_BS.transpose(0, 1).flatten(0, 1)


def by_sample(values_T: Tensor, num_samples: int) -> Tensor:
    """The way back: [T, ...], sequence positions outermost, to [B, S, ...]."""
    return values_T.unflatten(0, (-1, num_samples)).transpose(0, 1)


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
    stored: KeptLogprobs | None = None
    entropy_T: Tensor | None = None
    """The stored teacher's; of one in memory it is computed."""

    @property
    def has_teacher(self) -> bool:
        return self.teacher_hidden_TE is not None or self.stored is not None


NUM_SUMS = len(dataclasses.fields(LossSums))
HELD_OUT_SCORES: tuple[WantedScores, ...] = ("ce", "confidence", "correct")
LOGITS_DTYPES = {"fp32": torch.float32, "model": None}


def loss_backend(salt: SaltConfig, model_dtype: torch.dtype, device: torch.device) -> LossBackend:
    """The implementation that a run's loss will use on this rank; built if need be.

    Raises: ValueError or RuntimeError where salt.loss_impl cannot be had.
    """
    return choose_backend(
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
        self.vocab, self.salt = vocab, salt
        self.chunking = Chunking(
            chunk_bytes=salt.loss_chunk_mib << 20,
            logits_dtype=LOGITS_DTYPES[salt.logits_dtype],
            tp_group=tp_group,
            sequence_parallel=sequence_parallel,
        )
        self.truncation = Truncation(
            top_k=salt.truncate_k, top_p=salt.truncate_p, lost_mass=salt.lost_mass,
            temperature=salt.teacher_temperature,
        )  # fmt: skip
        self.teacher_head_WE: Tensor | None = None
        # While an evaluation runs, the scores of its micro-batches so far.
        self.scored: list[TokenScores] | None = None
        self.capture_top_k: int | None = None
        """So many likeliest tokens of the student's own are kept of every training forward."""
        self._captured: list[Distributions] = []
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)

    def __call__(self, hidden_SBD: Tensor, head_WD: Tensor, targets: Targets) -> Tensor:
        """Scalar loss of one micro-batch: sum over its tokens of ce_weight CE + kd_weight KL.

        In an evaluation, while `scored` is a list: the CE alone, and `scored` gets what was found
        per token. Nothing is added to the sums.
        Collectives: those of `linear_kd_loss` over tp.
        """
        tokens = self._tokens(hidden_SBD, head_WD, targets)
        if self.scored is not None:
            scores = self._student_scores(tokens, *HELD_OUT_SCORES)
            self.scored.append(scores)
            assert scores.ce_T is not None
            return counted_sum(scores.ce_T, tokens.mask_T)
        # In the LM phase there is neither a teacher nor a reference, and nothing is routed.
        asks = tokens.has_teacher or tokens.reference_loss_T is not None
        if self._routes_by_model and asks:
            tokens = self._routed(tokens, len(targets.labels_BS))
        salt, teacher_TE = self.salt, tokens.teacher_hidden_TE
        result = linear_kd_loss(
            tokens.hidden_TD, tokens.head_WD, teacher_TE,
            None if teacher_TE is None else self.teacher_head_WE, tokens.labels_T,
            vocab=self.vocab, ce_weight_T=tokens.ce_weight_T, kd_weight_T=tokens.kd_weight_T,
            teacher_temperature=salt.teacher_temperature,
            student_temperature=salt.student_temperature, divergence=salt.divergence,
            chunking=self.chunking, impl=salt.loss_impl, stored=tokens.stored,
            truncation=self.truncation if self._knows_some(tokens) else None,
        )  # fmt: skip
        self._add(tokens, result)
        if self.capture_top_k is not None:
            self._captured.append(self._own_distributions(tokens, self.capture_top_k))
        return result.loss

    def _own_distributions(self, tokens: Tokens, top_k: int) -> Distributions:
        """Collectives: those of `distributions` over tp; a gather under sequence parallelism."""
        hidden_TD = tokens.hidden_TD.detach()
        if self.chunking.sequence_parallel:
            hidden_TD = all_gathered(hidden_TD, self.chunking.tp_group)
        # In fp32 whatever the loss has: sums of 16-bit exponentials would be 1 % off.
        chunking = dataclasses.replace(
            self.chunking, sequence_parallel=False, logits_dtype=torch.float32
        )
        return distributions(
            hidden_TD, tokens.head_WD.detach(), tokens.labels_T, vocab=self.vocab, top_k=top_k,
            chunking=chunking,
        )  # fmt: skip

    def take_captured(self) -> list[Distributions]:
        """Of the micro-batches since the last call, in their order."""
        taken, self._captured = self._captured, []
        return taken

    def _tokens(self, hidden_SBD: Tensor, head_WD: Tensor, targets: Targets) -> Tokens:
        reference_BS, entropy_BS = targets.reference_loss_BS, targets.teacher_entropy_BS
        labels_T, mask_T, ce_weight_T, kd_weight_T = map(in_order_of_tokens, targets[:4])
        stored = (targets.logits_ids_BSK, targets.logits_logp_BSK, targets.logits_rest_BS)
        given = [in_order_of_tokens(x) for x in stored if x is not None]
        return Tokens(
            hidden_SBD.flatten(0, 1), head_WD, self._teacher_hidden(targets.teacher_hidden_BSE),
            labels_T, mask_T, ce_weight_T, kd_weight_T,
            in_order_of_tokens(reference_BS) if reference_BS.numel() else None,
            KeptLogprobs(given[0].int(), given[1].float(), given[2]) if given else None,
            None if entropy_BS is None else in_order_of_tokens(entropy_BS),
        )  # fmt: skip

    def _knows_some(self, tokens: Tokens) -> bool:
        """Whether the teacher is known by some tokens: a stored one, or one cut by truncate_k."""
        cuts = tokens.teacher_hidden_TE is not None and self.salt.truncate_k is not None
        return tokens.stored is not None or cuts

    @property
    def _routes_by_model(self) -> bool:
        """Whether weights depend on what the models say about a token."""
        salt = self.salt
        by_model = ("low_entropy", "high_entropy", "teacher_better")
        return salt.kd_tokens in by_model or salt.ce_tokens == "excess_loss"

    @torch.no_grad()
    def _routed(self, tokens: Tokens, num_rows: int) -> Tokens:
        """The weights after the routes that need losses or entropies (see `routing`).

        A token's weight must be known before its gradient is made, so the heads that are asked are
        evaluated once more.
        Collectives: those of `token_scores` over tp.
        """
        salt = self.salt
        counted_BS, ce_weight_BS, kd_weight_BS = (
            by_sample(x_T, num_rows)
            for x_T in (tokens.mask_T, tokens.ce_weight_T, tokens.kd_weight_T)
        )
        better = salt.kd_tokens == "teacher_better"
        gap_BS = None  # student loss - teacher's
        if better or salt.ce_tokens == "excess_loss":
            gap_BS = by_sample(self._loss_gap(tokens), num_rows)
        taught_BS = None
        if better:
            assert gap_BS is not None
            taught_BS = (gap_BS > 0).float()
        elif salt.kd_tokens in ("low_entropy", "high_entropy"):
            entropy_T, hidden_TE = tokens.entropy_T, tokens.teacher_hidden_TE
            if hidden_TE is not None:
                entropy_T = self._teacher_scores(hidden_TE, tokens.labels_T, "entropy").entropy_T
            assert entropy_T is not None
            sign = 1.0 if salt.kd_tokens == "high_entropy" else -1.0
            entropy_BS = by_sample(entropy_T, num_rows) * sign
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
            ce_weight_T=in_order_of_tokens(ce_weight_BS),
            kd_weight_T=in_order_of_tokens(kd_weight_BS),
        )

    def _loss_gap(self, tokens: Tokens) -> Tensor:
        """Student loss - that of the teacher in memory, or else the one stored by the model that
        tagged the data or whose logits are read, [T]."""
        student_ce_T = self._student_scores(tokens, "ce").ce_T
        teacher_ce_T, hidden_TE = tokens.reference_loss_T, tokens.teacher_hidden_TE
        if hidden_TE is not None:
            teacher_ce_T = self._teacher_scores(hidden_TE, tokens.labels_T, "ce").ce_T
        assert student_ce_T is not None and teacher_ce_T is not None
        return student_ce_T - teacher_ce_T

    def _student_scores(self, tokens: Tokens, *want: WantedScores) -> TokenScores:
        return token_scores(
            tokens.hidden_TD, tokens.head_WD, tokens.labels_T, vocab=self.vocab,
            chunking=self.chunking, want=want, impl=self.salt.loss_impl,
        )  # fmt: skip

    def _teacher_scores(
        self, hidden_TE: Tensor, labels_T: Tensor, *want: WantedScores
    ) -> TokenScores:
        """The teacher's states are whole on every rank, whatever the student's."""
        assert self.teacher_head_WE is not None
        return token_scores(
            hidden_TE, self.teacher_head_WE, labels_T, vocab=self.vocab,
            chunking=dataclasses.replace(self.chunking, sequence_parallel=False), want=want,
            impl=self.salt.loss_impl,
        )  # fmt: skip

    def score_teacher(self, hidden_BSE: Tensor, labels_BS: Tensor) -> TokenScores:
        """What the teacher says about held-out tokens, in the order of `in_order_of_tokens`.

        Collectives: those of `token_scores` over tp.
        Raises: RuntimeError after the teacher has gone.
        """
        hidden_TE = self._teacher_hidden(hidden_BSE)
        assert hidden_TE is not None
        return self._teacher_scores(hidden_TE, in_order_of_tokens(labels_BS), *HELD_OUT_SCORES)

    def _teacher_hidden(self, hidden_BSE: Tensor | None) -> Tensor | None:
        """The teacher's states in the student's order of tokens, [T, E]."""
        if hidden_BSE is None:
            return None
        if self.teacher_head_WE is None:
            raise RuntimeError("teacher hidden states arrived, but the teacher's head is released")
        return hidden_BSE.transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def _add(self, tokens: Tokens, result: KdLoss) -> None:
        mask_T = tokens.mask_T
        values = (
            result.loss, counted_sum(result.ce_T, mask_T), counted_sum(result.kl_T, mask_T),
            mask_T.sum(), torch.count_nonzero(tokens.kd_weight_T),
            torch.count_nonzero(tokens.ce_weight_T),
        )  # fmt: skip
        self._sums += torch.stack([value.double() for value in values])

    def take_sums(self) -> Tensor:
        """The sums so far, on the device (see `LossSums` for their order), and start from zero."""
        taken = self._sums.clone()
        self._sums.zero_()
        return taken
