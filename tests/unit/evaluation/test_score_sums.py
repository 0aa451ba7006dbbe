"""Sums over held-out tokens against loops over single tokens; thirds by trying every cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_salt.evaluation.held_out import TeacherScores
from megatron_salt.evaluation.score_sums import CALIBRATION_BINS, ScoreSums, ThirdCuts
from megatron_salt.kernels import TokenScores
from megatron_salt.model.loss import by_sample, in_order_of_tokens


def thirds_by_trying(losses: list[float]) -> list[int]:
    """The sizes of the thirds: each cut in turn, every place that parts no equal losses."""
    ordered = sorted(losses)
    count = len(ordered)
    allowed = [
        place for place in range(count + 1)
        if place in (0, count) or ordered[place - 1] != ordered[place]
    ]  # fmt: skip
    first, second = (
        min(allowed, key=lambda place: (abs(place - part * count / 3), place)) for part in (1, 2)
    )
    return [first, second - first, count - second]


def test_thirds_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    ties = 0
    for _ in range(500):
        count, values = int(rng.integers(1, 30)), int(rng.integers(1, 40))
        losses = rng.integers(0, values, count).astype(np.float32) / 8
        cuts = ThirdCuts.of(losses)
        masks = cuts.masks(torch.from_numpy(losses))
        assert masks.sum(dim=0).tolist() == [1.0] * count, "every token is in one third"
        sizes = masks.sum(dim=1).int().tolist()
        assert sizes == thirds_by_trying(losses.tolist())
        easy, medium, hard = (losses[mask.numpy() > 0] for mask in masks)
        pairs = ((easy, medium), (medium, hard), (easy, hard))
        assert all(a.max() < b.min() for a, b in pairs if len(a) and len(b))
        if len(set(losses.tolist())) == count:
            assert max(abs(size - count / 3) for size in sizes) < 1
        else:
            ties += 1
    assert ties > 50


def test_thirds_of_equal_losses() -> None:
    """All alike: they stay together, and the other thirds are empty."""
    cuts = ThirdCuts.of(np.full(9, 2.5, dtype=np.float32))
    assert cuts.masks(torch.full((9,), 2.5)).sum(dim=1).tolist() == [0.0, 9.0, 0.0]


def make_case(num_samples: int = 6, length: int = 9) -> tuple[TokenScores, Any, Any]:
    """Scores [B, S] with every edge of confidence, equal losses, masks; nan where none counts."""
    rng = np.random.default_rng(1)
    shape = (num_samples, length)
    ce = rng.exponential(2.0, shape).astype(np.float32)
    teacher = np.round(rng.exponential(2.0, shape) * 4).astype(np.float32) / 4
    teacher[0, :3] = ce[0, :3]  # equal is not better
    confidence = rng.random(shape).astype(np.float32)
    confidence[1, :4] = [0.0, 1.0, 1 / 3, 0.99999]
    correct = (rng.random(shape) < 0.4).astype(np.float32)
    mask = (rng.random(shape) < 0.7).astype(np.float32)
    mask[0, :4], mask[1, :4] = 1, 1
    ce[mask == 0] = np.nan
    scores = TokenScores(*(None,) * 5)._replace(
        ce_T=torch.from_numpy(ce),
        confidence_T=torch.from_numpy(confidence),
        correct_T=torch.from_numpy(correct),
    )
    return scores, torch.from_numpy(mask), torch.from_numpy(teacher)


def packed(scores: Any, mask: Any, teacher: Any, cuts: Any, rows: slice) -> torch.Tensor:
    """Of some samples, as one micro-batch."""
    flat = {
        name: None if value is None else in_order_of_tokens(value[rows])
        for name, value in scores._asdict().items()
    }
    teacher_T = None if teacher is None else in_order_of_tokens(teacher[rows])
    return ScoreSums.pack(TokenScores(**flat), in_order_of_tokens(mask[rows]), teacher_T, cuts)


def token_by_token(scores: Any, mask: Any, teacher: Any, cuts: ThirdCuts) -> dict[str, Any]:
    sums: dict[str, Any] = dict.fromkeys(("ce_nats", "tokens", "correct", "teacher_better"), 0.0)
    sums |= {name: [0.0] * 3 for name in ("third_tokens", "third_ce_nats")}
    sums |= {name: [0.0] * 15 for name in ("bin_tokens", "bin_confidence", "bin_correct")}
    for place in np.ndindex(*mask.shape):
        if mask[place] == 0:
            continue
        ce, confidence, correct, reference = (
            float(x[place]) for x in (scores.ce_T, scores.confidence_T, scores.correct_T, teacher)
        )
        third = 0 if reference <= cuts.first else 1 if reference <= cuts.second else 2
        which = min(14, math.floor(np.float32(confidence) * np.float32(15)))
        for name, value in (("ce_nats", ce), ("tokens", 1), ("correct", correct),
                            ("teacher_better", reference < ce)):  # fmt: skip
            sums[name] += value
        for name, value in (("third_tokens", 1), ("third_ce_nats", ce)):
            sums[name][third] += value
        for name, value in (("bin_tokens", 1), ("bin_confidence", confidence),
                            ("bin_correct", correct)):  # fmt: skip
            sums[name][which] += value
    return sums


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_sums_equal_single_tokens_in_every_cut(size: int) -> None:
    scores, mask, teacher = make_case()
    cuts = ThirdCuts.of(teacher[mask > 0].numpy())
    total = ScoreSums.zeros(torch.device("cpu"))
    for start in range(0, len(mask), size):
        total += packed(scores, mask, teacher, cuts, slice(start, start + size))
    sums = ScoreSums.unpack(total)
    for name, value in token_by_token(scores, mask, teacher, cuts).items():
        assert getattr(sums, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert 0 < sums.teacher_better < sums.tokens
    assert sum(sums.third_tokens) == sum(sums.bin_tokens) == sums.tokens
    assert sums.third_means == pytest.approx(
        [ce / n for ce, n in zip(sums.third_ce_nats, sums.third_tokens, strict=True)]
    )
    # Calibration from its definition, with means.
    error = 0.0
    for n, confidence, correct in zip(
        sums.bin_tokens, sums.bin_confidence, sums.bin_correct, strict=True
    ):
        if n:
            error += n / sums.tokens * abs(correct / n - confidence / n)
    assert sums.calibration_error == pytest.approx(error)


def test_without_a_teacher_its_sums_are_zero() -> None:
    scores, mask, _ = make_case()
    sums = ScoreSums.unpack(packed(scores, mask, None, None, slice(None)))
    assert sums.teacher_better == 0 and sums.third_tokens == (0.0,) * 3
    assert sums.tokens == mask.sum() and all(math.isnan(mean) for mean in sums.third_means)


@pytest.mark.parametrize(
    ("confidence", "correct", "error"),
    [
        ([0.5, 0.5], [1, 0], 0.0),  # right as often as it says
        ([1.0, 1.0], [1, 1], 0.0),
        ([0.9, 0.9], [0, 0], 0.9),
        ([0.9, 0.1], [0, 1], 0.9),  # errors of two bins do not cancel
        ([0.51, 0.49], [1, 0], 0.0),  # within a bin they do
    ],
)
def test_calibration_error_by_hand(
    confidence: list[float], correct: list[float], error: float
) -> None:
    scores = TokenScores(*(None,) * 5)._replace(
        ce_T=torch.zeros(2), confidence_T=torch.tensor(confidence), correct_T=torch.tensor(correct)
    )
    sums = ScoreSums.unpack(ScoreSums.pack(scores, torch.ones(2)))
    assert sums.calibration_error == pytest.approx(error, abs=1e-6)


def test_order_of_tokens_and_back() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert torch.equal(by_sample(in_order_of_tokens(x), 3), x)


def teacher_scores() -> TeacherScores:
    scores, mask, teacher = make_case()
    own = scores._replace(ce_T=teacher)
    return TeacherScores(
        loss_NS=teacher * mask,
        counted_NS=mask.byte(),
        packed=packed(own, mask, None, None, slice(None)),
    )


def test_thirds_of_the_teacher_are_its_own_means() -> None:
    found, (_, mask, teacher) = teacher_scores(), make_case()
    counted = sorted(teacher[mask > 0].tolist())
    sizes = thirds_by_trying(counted)
    starts = np.cumsum([0, *sizes])
    for start, stop, mean in zip(starts, starts[1:], found.third_means, strict=False):
        assert mean == pytest.approx(np.mean(counted[start:stop]))
    assert found.ce_nats == pytest.approx(np.mean(counted))


def test_bounds_hold_where_the_data_are_known() -> None:
    """Random data and teachers over a small vocabulary: TV between the two bounds, exactly."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        data, model = rng.dirichlet(np.full(6, rng.choice([0.2, 1.0])), (2, 40))
        tv = np.abs(data - model).sum(axis=1).mean() / 2
        ce = -(data * np.log(np.maximum(model, 1e-30))).sum(axis=1).mean()
        zeros = torch.zeros(3 * CALIBRATION_BINS + 10, dtype=torch.float64)
        zeros[:2] = torch.tensor([ce, 1.0])
        scores = TeacherScores(loss_NS=zeros, counted_NS=zeros, packed=zeros)
        assert tv <= scores.tv_bound <= 1.0
        # The calibration error of infinitely many tokens: right with the probability of the data.
        best = model.argmax(axis=1)
        bins = np.minimum((model.max(axis=1) * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        gap = data[range(40), best] - model.max(axis=1)
        ece = sum(abs(gap[bins == which].sum()) for which in range(CALIBRATION_BINS)) / 40
        assert ece <= tv + 1e-12
