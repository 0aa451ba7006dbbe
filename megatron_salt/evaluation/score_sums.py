"""Held-out scores of tokens, added up: accuracy, calibration, thirds by the teacher's loss.

Everything is a sum over tokens, so micro-batches and ranks add up, in any cut. Letters: T tokens,
B samples, S sequence, C thirds, K bins of confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_salt.kernels import TokenScores
from megatron_salt.model.loss import counted_sum

THIRDS = ("easy", "medium", "hard")
CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True)
class ThirdCuts:
    """The held-out tokens in three parts by the teacher's loss, as fp32 numbers.

    easy: loss <= first;  medium: first < loss <= second;  hard: second < loss.
    """

    first: float
    second: float

    @classmethod
    def of(cls, losses: np.ndarray) -> ThirdCuts:
        """The cuts nearest to equal thirds that leave equal losses together.

        Math: with n losses in ascending order, a cut after i of them (0 <= i <= n) is possible
            where the next one is larger; taken are the possible i nearest to n/3 and to 2n/3, the
            smaller of two that are equally near. Without ties no third is a token off.
        Args:
            losses: of all counted tokens, at least one, finite.
        """
        ordered = np.sort(np.asarray(losses, dtype=np.float32))
        changes = np.flatnonzero(ordered[1:] > ordered[:-1]) + 1
        possible = np.concatenate([[0], changes, [len(ordered)]])
        values = []
        for part in (1, 2):
            count = possible[np.argmin(np.abs(3 * possible - part * len(ordered)))]
            values.append(float(ordered[count - 1]) if count else -math.inf)
        return cls(first=values[0], second=values[1])

    def masks(self, losses: Tensor) -> Tensor:
        """[3, ...]: 1 where a token is of this third, fp32."""
        above_first, above_second = losses > self.first, losses > self.second
        return torch.stack([~above_first, above_first & ~above_second, above_second]).float()


@dataclass(frozen=True)
class ScoreSums:
    """Sums over counted held-out tokens; without a teacher's losses some are zeros."""

    ce_nats: float
    tokens: float
    correct: float
    teacher_better: float
    """Tokens on which the teacher's loss is the smaller one."""
    third_tokens: tuple[float, ...]
    third_ce_nats: tuple[float, ...]
    bin_tokens: tuple[float, ...]
    """By confidence p, the probability of the likeliest token: bin k holds k/15 <= p < (k+1)/15,
    the last one p = 1 too."""
    bin_confidence: tuple[float, ...]
    bin_correct: tuple[float, ...]

    @staticmethod
    def pack(
        scores: TokenScores,
        mask_T: Tensor,
        teacher_loss_T: Tensor | None = None,
        cuts: ThirdCuts | None = None,
    ) -> Tensor:
        """The sums of one micro-batch as one vector, to be added over micro-batches and ranks.

        Args:
            scores: ce, confidence and correct.
            teacher_loss_T: the teacher's loss on the same tokens, nats; with it the cuts.
        Dtypes: fp32 within the micro-batch, as a step's sums; the vector is fp64.
        """
        ce_T, confidence_T, correct_T = scores.ce_T, scores.confidence_T, scores.correct_T
        assert ce_T is not None and confidence_T is not None and correct_T is not None
        zero = mask_T.new_zeros(())
        better, third_tokens, third_ce = zero, zero.expand(len(THIRDS)), zero.expand(len(THIRDS))
        if teacher_loss_T is not None and cuts is not None:
            better = counted_sum((teacher_loss_T < ce_T).float(), mask_T)
            in_third_CT = cuts.masks(teacher_loss_T) * mask_T
            third_tokens, third_ce = in_third_CT.sum(dim=1), _sums_of(ce_T, in_third_CT)
        # One row per bin: adding into bins by index is not deterministic on a GPU.
        bins_T = (confidence_T * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
        in_bin_KT = (
            bins_T == torch.arange(CALIBRATION_BINS, device=bins_T.device)[:, None]
        ) * mask_T
        parts = [
            counted_sum(ce_T, mask_T), mask_T.sum(), counted_sum(correct_T, mask_T), better,
            third_tokens, third_ce,
            in_bin_KT.sum(dim=1), _sums_of(confidence_T, in_bin_KT), _sums_of(correct_T, in_bin_KT),
        ]  # fmt: skip
        return torch.cat([part.reshape(-1).double() for part in parts])

    @staticmethod
    def zeros(device: torch.device) -> Tensor:
        """The packed sums of no tokens."""
        size = 4 + 2 * len(THIRDS) + 3 * CALIBRATION_BINS
        return torch.zeros(size, dtype=torch.float64, device=device)

    @classmethod
    def unpack(cls, packed: Tensor) -> ScoreSums:
        """Host sync: one."""
        values = iter(packed.tolist())
        sizes = [1] * 4 + [len(THIRDS)] * 2 + [CALIBRATION_BINS] * 3
        parts = [tuple(next(values) for _ in range(size)) for size in sizes]
        given = (part[0] if size == 1 else part for part, size in zip(parts, sizes, strict=True))
        return cls(*given)  # type: ignore[arg-type]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the likeliest token.

        Math: sum over bins k of n_k / n |correct_k / n_k - confidence_k / n_k|, from 0 to 1.
        Source: Guo et al., arXiv 1706.04599, eq. 3.
        """
        gaps = zip(self.bin_correct, self.bin_confidence, strict=True)
        return sum(abs(correct - confidence) for correct, confidence in gaps) / self.tokens

    @property
    def third_means(self) -> list[float]:
        """Mean CE of each third in nats; nan for one that ties have left empty."""
        pairs = zip(self.third_ce_nats, self.third_tokens, strict=True)
        return [ce / tokens if tokens else math.nan for ce, tokens in pairs]


def part_sums(losses: Sequence[Tensor], mask_T: Tensor, part_T: Tensor, num_parts: int) -> Tensor:
    """[1 + N, P] fp64: counted tokens of each of P parts, and sums of N losses [T] over them."""
    of_part_PT = (part_T == torch.arange(num_parts, device=part_T.device)[:, None]) * mask_T
    rows = [of_part_PT.sum(dim=1), *(_sums_of(loss_T, of_part_PT) for loss_T in losses)]
    return torch.stack(rows).double()


def _sums_of(values_T: Tensor, rows_RT: Tensor) -> Tensor:
    """One `counted_sum` per row of masks."""
    return torch.where(rows_RT > 0, values_T * rows_RT, 0.0).sum(dim=1)
