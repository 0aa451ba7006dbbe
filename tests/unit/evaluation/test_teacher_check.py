"""What a teacher without a stored score should make of held-out text."""

from __future__ import annotations

import math

import pytest

from megatron_salt.evaluation.teacher_check import check_first_score, expected_ce_nats


@pytest.mark.parametrize(
    ("num_parameters", "nats"), [(1, 408.09), (10**8, 2.4645), (70 * 10**9, 1.7719)]
)
def test_expected_loss_follows_the_law(num_parameters: int, nats: float) -> None:
    """By hand: 10^(8 * 0.34) = 524.8, (7e10)^0.34 = 4,861 and 406.4 over each; plus 1.69."""
    assert expected_ce_nats(num_parameters) == pytest.approx(nats, abs=0.015)


def test_a_teacher_may_be_as_bad_as_guessing_and_no_worse() -> None:
    check_first_score("folder", math.log(509), 509, 1)
    for nats in (math.log(509) + 1e-3, math.inf, math.nan):
        with pytest.raises(ValueError, match="teacher folder: .*worse than guessing among 509"):
            check_first_score("folder", nats, 509, 1)


def test_a_score_far_from_its_size_is_odd() -> None:
    expected = expected_ce_nats(135_000_000)
    assert 2.3 < expected < 2.5
    assert check_first_score("folder", expected + 1.49, 50_000, 135_000_000) == []
    (line,) = check_first_score("folder", expected + 1.51, 50_000, 135_000_000)
    assert "teacher folder" in line and "135,000,000 parameters" in line and "rotary" in line
    assert check_first_score("folder", expected + 1.51, 50_000, 1_000_000) == []  # a small one
