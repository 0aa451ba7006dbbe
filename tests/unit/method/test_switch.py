"""The adaptive switch: its rule against a plain one, its end, and that w goes on without a jump."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest

from megatron_salt.config.fields import SaltConfig, Transition
from megatron_salt.config.problems import ADAPTIVE_ONLY
from megatron_salt.method.salt import kd_weight, phase
from megatron_salt.method.switch import (
    SwitchState,
    carried_over,
    effective,
    end_of_kd,
    has_stopped_helping,
    update,
)

N = 40
WINDOWED: list[Transition] = ["linear_decay", "linear_ratio_decay", "wsd"]
HELPS, HELPS_NOT = (3.0, 2.0, 0.9), (2.0, 3.0, 0.1)


def salt(**settings: Any) -> SaltConfig:
    given: dict[str, Any] = dict(kd_steps=N, switch="adaptive", switch_patience=1)
    return SaltConfig(**(given | settings))


def seen(
    config: SaltConfig, evaluations: list[tuple[int, tuple[float, float, float]]]
) -> SwitchState:
    """The state after evaluations (steps done, (student's CE, teacher's CE, better share))."""
    state = SwitchState()
    for done, (student, teacher, share) in evaluations:
        state = update(
            state, config, done, student_ce_nats=student, teacher_ce_nats=teacher,
            better_share=share,
        )  # fmt: skip
    return state


@pytest.mark.parametrize(
    ("settings", "student", "teacher", "share", "stopped"),
    [
        ({}, 3.0, 2.0, 0.5, False),
        ({}, 2.0, 2.0, 0.5, True),  # the margin itself is no help
        ({}, 1.9, 2.0, 0.5, True),
        ({}, 2.0 + 1e-9, 2.0, 0.5, False),
        ({"switch_margin_nats": 0.5}, 2.5, 2.0, 0.5, True),
        ({"switch_margin_nats": 0.5}, 2.75, 2.0, 0.5, False),
        ({"switch_margin_nats": -0.5}, 1.75, 2.0, 0.5, False),  # wait until it is well ahead
        ({"switch_margin_nats": -0.5}, 1.5, 2.0, 0.5, True),
        ({}, 3.0, 2.0, 0.0, True),  # better nowhere
        ({}, 3.0, 2.0, 1e-6, False),
        ({"switch_better_share": 0.25}, 3.0, 2.0, 0.25, True),
        ({"switch_better_share": 0.25}, 3.0, 2.0, 0.26, False),
        ({"switch_better_share": 0.25}, 2.0, 2.0, 0.9, True),  # either is enough
    ],
)
def test_what_counts_as_no_help(
    settings: dict[str, Any], student: float, teacher: float, share: float, stopped: bool
) -> None:
    assert has_stopped_helping(salt(**settings), student, teacher, share) is stopped


@pytest.mark.parametrize(
    ("settings", "done", "end"),
    [
        ({}, 8, 8),
        ({"min_kd_steps": 12}, 8, 12),
        ({"min_kd_steps": 7}, 8, 8),
        ({"transition_steps": 5}, 8, 13),
        ({"transition_steps": 5, "min_kd_steps": 12}, 8, 13),
        ({"transition_steps": 5, "min_kd_steps": 20}, 8, 20),  # the window ends there too
        ({"transition_steps": 5}, 34, 39),
        ({"transition_steps": 5}, 35, 40),
        ({"transition_steps": 5}, 38, 40),  # the bound's own window has begun: it stands
        ({"transition_steps": 5, "warmup_steps": 10}, 8, 15),  # not while w still rises
        ({"transition_steps": 5, "warmup_steps": 10}, 10, 15),
    ],
)
def test_end_by_hand(settings: dict[str, Any], done: int, end: int) -> None:
    config = salt(**settings)
    assert end_of_kd(config, done) == end
    state = seen(config, [(done, HELPS_NOT)])
    assert state == SwitchState(streak=1, decided_at=done, kd_end=end)
    assert effective(config, state) == dataclasses.replace(config, kd_steps=end)
    assert phase(effective(config, state), end - 1) == "kd"
    assert phase(effective(config, state), end) == "lm"


def test_patience_counts_evaluations_in_a_row() -> None:
    config = salt(switch_patience=3)
    no, yes = HELPS_NOT, HELPS
    assert seen(config, [(2, no), (4, no)]) == SwitchState(streak=2)
    assert seen(config, [(2, no), (4, no), (6, yes)]) == SwitchState()
    interrupted = [(2, no), (4, no), (6, yes), (8, no), (10, no)]
    assert seen(config, interrupted) == SwitchState(streak=2)
    decided = SwitchState(streak=3, decided_at=12, kd_end=12)
    assert seen(config, [*interrupted, (12, no)]) == decided
    # Once decided, neither help nor its absence changes anything.
    assert seen(config, [*interrupted, (12, no), (14, yes), (16, no), (18, no)]) == decided


def test_nothing_is_decided_when_the_phase_is_over_or_the_switch_is_fixed() -> None:
    config = salt()
    assert seen(config, [(N, HELPS_NOT), (N + 1, HELPS_NOT)]) == SwitchState()
    assert seen(config, [(N - 1, HELPS_NOT)]).kd_end == N - 1
    fixed = SaltConfig(kd_steps=N)
    assert seen(fixed, [(done, HELPS_NOT) for done in range(N)]) == SwitchState()
    assert effective(fixed, SwitchState(streak=3, decided_at=5, kd_end=5)) is fixed


def plain_rule(config: SaltConfig, evaluations: list[tuple[int, Any]]) -> int:
    """The end of the KD phase, all evaluations at hand: the first run of bad ones that is long
    enough."""
    within = [(done, *scores) for done, scores in evaluations if done < config.kd_steps]
    for last in range(config.switch_patience - 1, len(within)):
        run = within[last - config.switch_patience + 1 : last + 1]
        if all(
            not (
                student - teacher > config.switch_margin_nats and share > config.switch_better_share
            )
            for _, student, teacher, share in run
        ):
            candidates = [
                run[-1][0] + config.transition_steps,
                config.warmup_steps + config.transition_steps,
                config.min_kd_steps,
            ]
            return min(config.kd_steps, max(candidates))
    return config.kd_steps


def random_cases(number: int) -> Any:
    """Runs of any kind: settings, and what their evaluations will find."""
    rng = random.Random(7)
    for _ in range(number):
        transition = rng.choice([*WINDOWED, "step"])
        window = rng.choice([1, 3, 8]) if transition != "step" else 0
        config = salt(
            transition=transition, transition_steps=window, kd_weight=0.75,
            warmup_steps=rng.choice([0, 2, 9]) if transition == "wsd" else 0,
            min_kd_steps=rng.choice([0, 0, 7, 25, 39]),
            switch_patience=rng.choice([1, 2, 3]),
            switch_margin_nats=rng.choice([-0.2, 0.0, 0.3]),
            switch_better_share=rng.choice([0.0, 0.3]),
        )  # fmt: skip
        interval = rng.choice([1, 3, 5])
        evaluations = []
        for done in range(interval, N + 10, interval):
            lead = rng.choice([-0.5, -0.2, 0.0, 0.1, 0.3, 0.4, 1.0])
            evaluations.append((done, (2.0 + lead, 2.0, rng.choice([0.0, 0.3, 0.5, 0.9]))))
        yield config, evaluations


def test_rule_equals_the_plain_one() -> None:
    ends = []
    for config, evaluations in random_cases(3000):
        state = seen(config, evaluations)
        end = effective(config, state).kd_steps
        assert end == plain_rule(config, evaluations)
        ends.append(end)
        if state.decided_at is not None:
            assert config.min_kd_steps <= end <= N
    assert len(set(ends)) > 20 and ends.count(N) > 50


def test_weight_goes_on_without_a_jump_and_never_rises_again() -> None:
    """w step by step, each by what is known at that step, as training sees it."""
    decisions_in_the_last_window = 0
    for config, evaluations in random_cases(3000):
        state, by_step = SwitchState(), dict(evaluations)
        weights, known = [], []
        for step in range(N + 5):
            if step in by_step:
                state = seen_one(state, config, step, by_step[step])
            weights.append(kd_weight(effective(config, state), step))
            known.append(effective(config, state).kd_steps)
        end, window = known[-1], config.transition_steps
        # The whole of it is the schedule of a run that had this end from the start.
        whole = dataclasses.replace(config, kd_steps=end)
        assert weights == [kd_weight(whole, step) for step in range(N + 5)]
        rising = config.warmup_steps if config.transition == "wsd" else 0
        assert all(a >= b for a, b in itertools.pairwise(weights[rising:]))
        assert all(w > 0 for w in weights[:end]) and not any(weights[end:])
        if config.transition != "step" and state.decided_at is not None:
            assert weights[max(end - window, rising)] == 0.75, "the window begins at w0"
            decisions_in_the_last_window += state.decided_at > N - window
    assert decisions_in_the_last_window > 20


def seen_one(
    state: SwitchState, config: SaltConfig, done: int, scores: tuple[float, float, float]
) -> SwitchState:
    student, teacher, share = scores
    return update(
        state, config, done, student_ce_nats=student, teacher_ce_nats=teacher, better_share=share
    )


STREAK = SwitchState(streak=1)
DECIDED = SwitchState(streak=2, decided_at=6, kd_end=9)


@pytest.mark.parametrize(
    ("settings", "streak_stays"),
    [
        ({}, True),
        ({"switch_patience": 5}, True),
        ({"min_kd_steps": 20}, True),
        ({"kd_steps": 50}, True),
        ({"switch_margin_nats": 0.1}, False),
        ({"switch_better_share": 0.1}, False),
    ],
)
def test_resume_with_changed_settings(settings: dict[str, Any], streak_stays: bool) -> None:
    before, now = salt(), salt(**settings)
    assert carried_over(STREAK, before, now) == (STREAK if streak_stays else SwitchState())
    assert carried_over(DECIDED, before, now) == DECIDED, "a decision stays"
    assert effective(now, DECIDED).kd_steps == 9


def test_resume_with_another_switch() -> None:
    fixed = SaltConfig(kd_steps=N)
    for state in (STREAK, DECIDED):
        assert carried_over(state, salt(), fixed) == SwitchState()
    assert carried_over(SwitchState(), fixed, salt()) == SwitchState()
    assert effective(salt(kd_steps=8), DECIDED).kd_steps == 8, "never after kd_steps"


def test_settings_of_the_rule_are_those_that_only_it_reads() -> None:
    """What `fixed` refuses is what changes an end under `adaptive`."""
    bad = [(done, (2.2, 2.0, 0.4)) for done in range(1, N)]
    plain = effective(salt(), seen(salt(), bad)).kd_steps
    assert plain == N
    changed = {
        "switch_margin_nats": {"switch_margin_nats": 0.25},
        "switch_better_share": {"switch_better_share": 0.5},
        "min_kd_steps": {"switch_margin_nats": 0.25, "min_kd_steps": 17},
        "switch_patience": {"switch_margin_nats": 0.25, "switch_patience": 4},
    }
    ends = {
        name: effective(salt(**s), seen(salt(**s), bad)).kd_steps for name, s in changed.items()
    }
    assert ends == {
        "switch_margin_nats": 1,
        "switch_better_share": 1,
        "min_kd_steps": 17,
        "switch_patience": 4,
    }
    assert set(ADAPTIVE_ONLY) == set(changed)
