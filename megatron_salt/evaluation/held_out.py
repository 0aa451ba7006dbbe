"""Evaluations on held-out data: the student's, and the teacher's, which is made once and kept.

The teacher is frozen and the samples are fixed, so its loss on every token is computed when it is
brought and stays true after it has gone. Letters: N held-out samples, B micro-batch, S sequence,
T = S * B tokens, M micro-batches per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.checkpoint.manifest import CheckpointManifest
from megatron_salt.checkpoint.weights import (
    load_teacher_scores,
    read_teacher_scores,
    write_teacher_scores,
)
from megatron_salt.config.deepspeed import DeepSpeedSettings
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import Batch, DataSource
from megatron_salt.data.logits import HELD_OUT, read_logits_manifest
from megatron_salt.data.order import evaluation_rows
from megatron_salt.evaluation.score_sums import THIRDS, ScoreSums, ThirdCuts, part_sums
from megatron_salt.evaluation.teacher_check import check_first_score
from megatron_salt.kernels import TokenScores
from megatron_salt.model.loss import LossFunction, by_sample, in_order_of_tokens
from megatron_salt.parallel.groups import Groups, from_rank_0
from megatron_salt.teacher.teacher import Teacher


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherScores:
    """What the teacher made of the held-out samples, the same on every rank; on the CPU.

    Memory: 5 N S bytes on every rank's host.
    """

    loss_NS: Tensor
    """Nats, fp32; 0 where the token does not count."""
    counted_NS: Tensor
    """uint8: 1 where the token counts."""
    packed: Tensor
    """`ScoreSums` of all counted tokens, fp64; its thirds are zeros."""

    @classmethod
    def of(cls, found_2NS: Tensor, packed: Tensor) -> TeacherScores:
        """Of what `teacher_losses` returns."""
        return cls(loss_NS=found_2NS[0].clone(), counted_NS=found_2NS[1].byte(), packed=packed)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        return {name: getattr(self, name) for name in TeacherScores.__annotations__}

    @cached_property
    def sums(self) -> ScoreSums:
        return ScoreSums.unpack(self.packed)

    @property
    def ce_nats(self) -> float:
        """Mean over the counted tokens."""
        return self.sums.ce_nats / self.sums.tokens

    @cached_property
    def _counted_losses(self) -> Tensor:
        return self.loss_NS[self.counted_NS.bool()]

    @cached_property
    def cuts(self) -> ThirdCuts:
        """Where the thirds of the held-out tokens begin and end."""
        return ThirdCuts.of(self._counted_losses.numpy())

    @cached_property
    def third_means(self) -> list[float]:
        """The teacher's mean CE of each third in nats; nan for one that ties have left empty."""
        losses = self._counted_losses
        masks_CT = self.cuts.masks(losses)
        return (masks_CT.double() @ losses.double() / masks_CT.double().sum(dim=1)).tolist()

    @property
    def tv_bound(self) -> float:
        """No less than the mean total variation between teacher and data. See docs/metrics.md.

        Math: KL(data || teacher) <= CE_T, since the entropy of the data is not negative; and
            TV <= min(sqrt(KL / 2), sqrt(1 - exp(-KL))), both concave, so they hold of the means.
        Source: Pinsker; Bretagnolle and Huber 1979, in Canonne, arXiv 2202.07198.
        """
        ce_nats = self.ce_nats
        return min(math.sqrt(ce_nats / 2.0), math.sqrt(-math.expm1(-ce_nats)))


def teacher_losses(
    data: DataSource, groups: Groups, num_samples: int, micro_batch_size: int,
    score: Callable[[Tensor, Tensor], TokenScores | None], first: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A teacher's loss on every held-out token.

    Args:
        score: what the teacher says of tokens and labels [B, S], as `LossFunction.score_teacher`;
            None on ranks that do not know.
        first: a token to put in front of each sequence; its last token is then not read, and
            the tokens themselves are the labels, of which the first does not count.
    Returns: on the CPU, loss and mask [2, N, S], 0 where a token does not count; and
        `ScoreSums`, packed.
    Collectives: those of `score` per micro-batch; one all-reduce of 8 N S bytes and one of a few
        hundred over all ranks.
    """
    device, layout = groups.device, groups.layout
    packed = ScoreSums.zeros(device)
    # Loss and mask, from the rank that has them; 0 + x is x bit by bit.
    found_2NS = torch.zeros((2, num_samples, data.data.seq_length), device=device)
    for rows in evaluation_rows(num_samples, micro_batch_size, groups.dp_rank, layout.dp_size):
        batch = data.read_held_out(rows).to(device)
        tokens_BS, labels_BS, mask_BS = batch.tokens_RS, batch.labels_RS, batch.mask_RS
        if first is not None:
            shifted_BS = torch.full_like(tokens_BS, first), torch.zeros_like(mask_BS)
            shifted_BS[0][:, 1:], shifted_BS[1][:, 1:] = tokens_BS[:, :-1], mask_BS[:, :-1]
            labels_BS, (tokens_BS, mask_BS) = tokens_BS, shifted_BS
        scores = score(tokens_BS, labels_BS)
        if scores is None or groups.tp_rank != 0:  # the tp ranks have found the same
            continue
        packed += ScoreSums.pack(scores, in_order_of_tokens(mask_BS))
        assert scores.ce_T is not None
        loss_BS = by_sample(scores.ce_T, len(rows))
        counts_BS = mask_BS > 0
        real = [place for place, row in enumerate(rows) if row >= 0]
        here = [rows[place] for place in real]
        found_2NS[0, here] = torch.where(counts_BS, loss_BS, 0.0)[real]
        found_2NS[1, here] = counts_BS.float()[real]
    dist.all_reduce(packed)
    dist.all_reduce(found_2NS)
    return found_2NS.cpu(), packed.cpu()


class ScoredStudent(Protocol):
    """What is asked of the student that trains; `training.engine.StudentEngine`."""

    settings: DeepSpeedSettings
    groups: Groups
    loss_function: LossFunction

    def scoring_batch(self, batch: Batch) -> Any: ...

    def evaluate(self, micro_batches: Sequence[Any]) -> list[TokenScores]: ...


class HeldOut:
    """The held-out samples of a run, and who is scored on them."""

    def __init__(self, config: RunConfig, data: DataSource, student: ScoredStudent) -> None:
        settings, groups = student.settings, student.groups
        self.groups, self.data, self.student = groups, data, student
        self.max_gap_nats = config.teacher.max_valid_ce_gap_nats
        self.batches_per_forward = settings.num_micro_batches
        self.num_samples = min(config.train.eval_samples, data.num_held_out())
        self.seq_length = config.data.seq_length
        self.fingerprint = data.evaluation_fingerprint(config.train.eval_samples)
        self.rounds = evaluation_rows(
            self.num_samples, settings.micro_batch_size, groups.dp_rank, groups.layout.dp_size
        )
        self.teacher: TeacherScores | None = None

    def score_teacher(self, teacher: Teacher) -> tuple[str, list[str]]:
        """Score the teacher on every held-out token; its loss beside the one stored with it, as a
        line for people, and warnings.

        Collectives: those of `_teacher_losses`, twice for a teacher without a stored loss.
        Raises: ValueError on all ranks if the loss is not finite, has moved, or is worse than
            guessing.
        """
        found_2NS, packed = self._teacher_losses(teacher)
        self.teacher = scores = TeacherScores.of(found_2NS, packed)
        if teacher.record.evaluation is None:
            return self._without_stored(teacher, scores)
        return self._compared_with_stored(teacher, scores.ce_nats), []

    def _teacher_losses(self, teacher: Teacher, first: int | None = None) -> tuple[Tensor, Tensor]:
        """Collectives: those of `Teacher.hidden_states` and `teacher_losses`."""

        def score(tokens_BS: Tensor, labels_BS: Tensor) -> TokenScores | None:
            hidden_BSE = teacher.hidden_states(tokens_BS)
            if hidden_BSE is None:
                return None
            return self.student.loss_function.score_teacher(hidden_BSE, labels_BS)

        size = self.student.settings.micro_batch_size
        return teacher_losses(self.data, self.groups, self.num_samples, size, score, first)

    def _without_stored(self, teacher: Teacher, scores: TeacherScores) -> tuple[str, list[str]]:
        """The loss of a teacher that brings none, as a line, and warnings about it."""
        source, record, ce_nats = teacher.source, teacher.record, scores.ce_nats
        vocab_size = self.student.loss_function.vocab.size
        warnings = check_first_score(source, ce_nats, vocab_size, record.num_parameters)
        line = f"teacher {source}: held-out CE {ce_nats:.4f} nats/token; none was stored with it"
        bos = self.data.tokenizer.eod if record.bos is None else record.bos
        (bos_NS, counted_NS), _ = self._teacher_losses(teacher, bos)
        if counted_NS.any():
            # A label that both passes have scored stands one place further behind the token.
            plain_NS = scores.loss_NS[:, :-1] * counted_NS[:, 1:]
            plain, of_bos = (x.double().sum() / counted_NS.sum() for x in (plain_NS, bos_NS))
            line += (
                f"; with token {bos} in front of each sequence {of_bos:.4f}, without {plain:.4f} "
                "on the same labels"
            )
        return line, warnings

    def _compared_with_stored(self, teacher: Teacher, now: float) -> str:
        stored = teacher.record.evaluation
        assert stored is not None  # score_teacher
        line = f"teacher {teacher.source}: held-out CE {now:.4f} nats/token"
        if not math.isfinite(now):
            raise ValueError(f"{line}: it cannot teach; name another teacher")
        same = stored.data == self.fingerprint
        if same and not abs(now - stored.ce_nats) <= self.max_gap_nats:
            raise ValueError(
                f"{line}, but {stored.ce_nats:.4f} was stored with it for the same text, more than "
                f"teacher.max_valid_ce_gap_nats = {self.max_gap_nats} away: its weights did not "
                "load as saved"
            )
        note = "the same text" if same else "other text, so only a rough comparison"
        return f"{line}; stored when it was saved: {stored.ce_nats:.4f} ({note})"

    def score_student(self) -> tuple[ScoreSums, Tensor]:
        """Sums over the held-out samples, M micro-batches at a time: the memory of a step.

        Returns: of all, and [3, P] of the parts: tokens, the student's CE, the teacher's (or 0).
        Collectives: those of forward passes; one all-reduce of a few hundred bytes over all ranks.
        """
        device, num_parts = self.groups.device, len(self.data.valid_parts.names)
        packed = ScoreSums.zeros(device)
        parts = torch.zeros((3, num_parts), dtype=torch.float64, device=device)
        for start in range(0, len(self.rounds), self.batches_per_forward):
            rounds = self.rounds[start : start + self.batches_per_forward]
            batches = [self.data.read_held_out(rows).to(device) for rows in rounds]
            scored = self.student.evaluate([self.student.scoring_batch(b) for b in batches])
            if self.groups.tp_rank != 0:
                continue
            for rows, batch, scores in zip(rounds, batches, scored, strict=bool(scored)):
                mask_T, teacher_T, cuts = in_order_of_tokens(batch.mask_RS), None, None
                if self.teacher is not None:
                    # Row -1 fills up and counts for nothing, whatever loss it is given.
                    teacher_T = in_order_of_tokens(self.teacher.loss_NS[rows].to(device))
                    cuts = self.teacher.cuts
                packed += ScoreSums.pack(scores, mask_T, teacher_T, cuts)
                if batch.part_RS is not None:
                    assert scores.ce_T is not None
                    theirs_T = torch.zeros_like(mask_T) if teacher_T is None else teacher_T
                    part_T = in_order_of_tokens(batch.part_RS)
                    parts += part_sums([scores.ce_T, theirs_T], mask_T, part_T, num_parts)
        every = torch.cat([packed, parts.flatten()])
        dist.all_reduce(every)
        return ScoreSums.unpack(every[: len(packed)]), every[len(packed) :].view(3, num_parts)

    def evaluate(self) -> dict[str, float]:
        """Score the student as it is, beside the teacher as far as it is known; docs/metrics.md."""
        (sums, parts), teacher = self.score_student(), self.teacher
        values = {
            "valid_ce_nats": sums.ce_nats / sums.tokens,
            "valid_accuracy": sums.correct / sums.tokens,
            "valid_tokens": int(sums.tokens),
            "valid_ece": sums.calibration_error,
        }
        by_part = zip(self.data.valid_parts.names, parts.T.tolist(), strict=True)
        for name, (tokens, mine, theirs) in ((n, sums) for n, sums in by_part if sums[0]):
            values[f"valid_ce_nats/{name}"] = mine / tokens
            if teacher is not None:
                values[f"teacher_valid_ce_nats/{name}"] = theirs / tokens
        if teacher is None:
            return values
        values["teacher_valid_ce_nats"] = teacher.ce_nats
        values["teacher_lead_nats"] = values["valid_ce_nats"] - teacher.ce_nats
        values["teacher_better_share"] = sums.teacher_better / sums.tokens
        for third, mine, theirs in zip(THIRDS, sums.third_means, teacher.third_means, strict=True):
            values[f"valid_ce_{third}_nats"] = mine
            values[f"teacher_valid_ce_{third}_nats"] = theirs
        values["teacher_valid_ece"] = teacher.sums.calibration_error
        values["teacher_tv_bound"] = teacher.tv_bound
        return values

    def take_stored(self, prefixes: Sequence[str]) -> str | None:
        """Take the held-out losses that were stored with a teacher's logits, of whichever dataset;
        what is wrong, if they cannot be had. Read by rank 0.

        Collectives: a broadcast of them over all ranks.
        """
        tensors: dict[str, Tensor] = {}
        if self.groups.rank == 0:
            for prefix in prefixes:
                if read_logits_manifest(prefix).held_out == self.fingerprint:
                    tensors = load_teacher_scores(Path(f"{prefix}{HELD_OUT}"))[0]
        tensors = from_rank_0(tensors)
        if not tensors:
            return (
                f"{' and '.join(prefixes)}: no losses of this run's held-out samples; "
                "`cache-logits` writes them, with --held-out and this run's config"
            )
        self.teacher = TeacherScores(**tensors)
        return None

    def write(self, directory: Path) -> None:
        """Put the teacher's scores, if there are any, into a checkpoint that is being written."""
        if self.teacher is not None:
            write_teacher_scores(directory, self.teacher.tensors, self.fingerprint)

    def resume(self, path: Path, manifest: CheckpointManifest) -> list[str]:
        """Take the teacher's scores from a checkpoint of after the KD phase; warnings, if any.

        Scores of other samples than this run's are of no use.
        """
        stored = read_teacher_scores(path, manifest)
        if stored is None:  # there has been no teacher, or its scores were of no use
            return []
        tensors, fingerprint = stored
        if fingerprint != self.fingerprint:
            return [
                f"{path}: its teacher was scored on other held-out samples than this run's, and is "
                "gone: evaluations go on without its numbers (they need the same data, "
                "train.eval_samples and data.seq_length)"
            ]
        self.teacher = TeacherScores(**tensors)
        return []
