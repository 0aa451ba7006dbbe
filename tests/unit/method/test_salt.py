"""Every transition of the KD weight and every learning-rate shape, by hand at their edges."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest

from megatron_salt.config.fields import SaltConfig, TrainConfig, Transition
from megatron_salt.method.salt import kd_weight, phase
from megatron_salt.training.learning_rate import learning_rate

W0 = 0.75
N = 12


def salt(transition: Transition = "step", **settings: Any) -> SaltConfig:
    given: dict[str, Any] = dict(kd_steps=N, kd_weight=W0, transition_steps=4, warmup_steps=3)
    return SaltConfig(transition=transition, **(given | settings))


def half_cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


# Steps 0 to 11 are the KD phase; a window of 4 covers steps 8 to 11.
BY_HAND: dict[str, list[tuple[int, float]]] = {
    "constant": [(0, 0.75), (7, 0.75), (11, 0.75)],
    "step": [(0, 0.75), (7, 0.75), (11, 0.75)],
    "linear_decay": [
        (0, 0.75), (7, 0.75), (8, 0.75), (9, 0.75 * 3 / 4), (10, 0.75 * 2 / 4), (11, 0.75 / 4),
    ],
    # The ratio is 3 at first, then 3 * 3/4, 3 * 2/4, 3 * 1/4.
    "linear_ratio_decay": [
        (0, 3 / 4), (7, 3 / 4), (8, 3 / 4), (9, 9 / 13), (10, 3 / 5), (11, 3 / 7),
    ],
    "knowledge_inheritance": [(0, 0.75), (3, 0.5), (6, 0.25), (9, 0.0), (11, 0.0)],
    "wsd": [
        (0, 0.25), (1, 0.5), (2, 0.75), (3, 0.75), (7, 0.75), (8, 0.75),
        (9, 0.75 * half_cosine(1 / 4)), (10, 0.75 / 2), (11, 0.75 * half_cosine(3 / 4)),
    ],
}  # fmt: skip


def test_every_transition_is_checked_by_hand() -> None:
    assert set(BY_HAND) == set(get_args(Transition))


@pytest.mark.parametrize("transition", BY_HAND)
def test_kd_weight_by_hand(transition: Transition) -> None:
    for step, expected in BY_HAND[transition]:
        assert kd_weight(salt(transition), step) == pytest.approx(expected, abs=1e-12), step


@pytest.mark.parametrize("transition", BY_HAND)
@pytest.mark.parametrize("step", [N, N + 1, 10 * N])
def test_lm_phase_has_exactly_no_kd(transition: Transition, step: int) -> None:
    value = kd_weight(salt(transition), step)
    assert value == 0.0 and isinstance(value, float)
    assert phase(salt(transition), step) == "lm"


def test_phase_switches_after_exactly_kd_steps_steps() -> None:
    phases = [phase(salt(), step) for step in range(N + 3)]
    assert phases == ["kd"] * N + ["lm"] * 3


@pytest.mark.parametrize("transition", BY_HAND)
def test_without_kd_steps_there_is_no_kd(transition: Transition) -> None:
    none = salt(transition, kd_steps=0, transition_steps=0, warmup_steps=0)
    assert [kd_weight(none, step) for step in range(3)] == [0.0] * 3
    assert phase(none, 0) == "lm"


@pytest.mark.parametrize("transition", BY_HAND)
@pytest.mark.parametrize("w0", [0.0, 0.1, 0.312, 1 / 3, 0.5, 2 / 3, 0.667, 0.9, 0.999, 1.0])
def test_weight_stays_in_range_and_never_rises_after_warmup(
    transition: Transition, w0: float
) -> None:
    if transition == "linear_ratio_decay" and w0 == 1.0:
        return  # the ratio is infinite; check_config refuses it
    for n, window, warmup in itertools.product([1, 2, 7, 20], [0, 1, 5], [0, 1, 3]):
        if window + warmup > n or (window == 0 and transition.startswith("linear")):
            continue
        config = salt(
            transition, kd_steps=n, kd_weight=w0, transition_steps=window, warmup_steps=warmup
        )
        weights = [kd_weight(config, step) for step in range(n + 2)]
        assert all(0.0 <= w <= w0 for w in weights)
        falling = weights[warmup:] if transition == "wsd" else weights
        assert all(a >= b for a, b in itertools.pairwise(falling))
        if transition == "wsd" and warmup:
            assert all(a <= b for a, b in itertools.pairwise(weights[:warmup]))
        if w0 > 0 and transition != "knowledge_inheritance":
            assert min(weights[:n]) > 0.0, "the teacher teaches to the last step of its phase"


@pytest.mark.parametrize(("slope", "first_zero"), [(0.0, None), (0.5, None), (1.0, 9), (3.0, 3)])
def test_knowledge_inheritance_falls_with_its_slope(slope: float, first_zero: int | None) -> None:
    config = salt("knowledge_inheritance", inheritance_slope=slope)
    weights = [kd_weight(config, step) for step in range(N)]
    zeros = [step for step, w in enumerate(weights) if w == 0.0]
    assert (zeros[0] if zeros else None) == first_zero
    assert weights[1] == pytest.approx(0.75 - slope / 12)


def test_schedule_remembers_nothing() -> None:
    """Any order of asking gives the same answers: what makes a resume exact."""
    steps = list(range(N + 4))
    run = train(lr_warmup_steps=3)
    for transition in get_args(Transition):
        config = salt(transition)
        forwards = [(kd_weight(config, s), learning_rate(run, 1e-3, s)) for s in steps]
        backwards = [(kd_weight(config, s), learning_rate(run, 1e-3, s)) for s in steps[::-1]]
        assert forwards == backwards[::-1]
        assert config == salt(transition)


def test_unknown_transition_is_refused() -> None:
    with pytest.raises(ValueError, match="salt.transition = 'sudden'"):
        kd_weight(salt("sudden"), 0)  # type: ignore[arg-type]


PEAK, FLOOR = 2.0, 0.5


def train(**settings: Any) -> TrainConfig:
    given: dict[str, Any] = dict(steps=40, output_dir="", min_lr_ratio=FLOOR / PEAK)
    return TrainConfig(**(given | settings))


def decayed(x: float) -> float:
    return FLOOR + (PEAK - FLOOR) * half_cosine(x)


LR_BY_HAND: list[tuple[str, dict[str, Any], list[tuple[int, float]]]] = [
    ("constant", {}, [(0, 2.0), (39, 2.0)]),
    ("constant", dict(lr_warmup_steps=4), [(0, 0.5), (1, 1.0), (3, 2.0), (4, 2.0), (39, 2.0)]),
    ("cosine", {}, [(0, 2.0), (10, decayed(0.25)), (20, 1.25), (39, decayed(39 / 40))]),
    ("cosine", dict(lr_warmup_steps=8), [
        (0, 0.25), (6, 1.75), (7, 2.0), (8, 2.0), (24, 1.25), (39, decayed(31 / 32)),
    ]),
    ("cosine", dict(lr_decay_steps=10, lr_warmup_steps=2), [
        (1, 2.0), (2, 2.0), (7, 1.25), (11, decayed(0.9)), (12, 0.5), (13, 0.5), (39, 0.5),
    ]),
    # A decay longer than the run: a run that is meant to be continued.
    ("cosine", dict(lr_decay_steps=80), [(0, 2.0), (20, decayed(0.25)), (39, decayed(39 / 80))]),
    ("wsd", {}, [(0, 2.0), (35, 2.0), (36, 2.0), (38, 1.25), (39, decayed(0.75))]),
    ("wsd", dict(lr_decay_steps=20, lr_warmup_steps=2), [
        (0, 1.0), (1, 2.0), (19, 2.0), (20, 2.0), (30, 1.25), (39, decayed(19 / 20)),
    ]),
    ("wsd", dict(lr_decay_steps=40, lr_warmup_steps=30), [
        (29, 2.0), (30, 2.0), (39, decayed(9 / 40)),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "settings", "expected"), LR_BY_HAND)
def test_learning_rate_by_hand(
    schedule: str, settings: dict[str, Any], expected: list[tuple[int, float]]
) -> None:
    config = train(lr_schedule=schedule, **settings)
    for step, value in expected:
        assert learning_rate(config, PEAK, step) == pytest.approx(value, abs=1e-12), step


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
@pytest.mark.parametrize("decay", [None, 1, 7, 100])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_learning_rate_rises_to_its_peak_then_falls_to_its_floor(
    schedule: str, warmup: int, decay: int | None, steps: int
) -> None:
    config = train(
        steps=steps, lr_schedule=schedule, lr_warmup_steps=min(warmup, steps), lr_decay_steps=decay
    )
    warmup, peak = config.lr_warmup_steps, 3e-4
    floor = peak * config.min_lr_ratio
    rates = [learning_rate(config, peak, step) for step in range(steps)]
    assert all(0 < rate <= peak for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup:]))
    assert all(rate >= floor for rate in rates[warmup:])
    assert max(rates) == peak


def test_learning_rate_does_not_depend_on_the_phase() -> None:
    """The switch leaves the learning rate alone: it is not even told of it."""
    with pytest.raises(TypeError):
        learning_rate(train(), PEAK, 3, salt())  # type: ignore[call-arg]
