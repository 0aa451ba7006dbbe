"""The adaptive switch: when the teacher has stopped helping, as pure functions of what was scored.

The rule looks at evaluations on held-out data, one by one. Its state is three numbers, kept in
checkpoints; from them and the settings `effective` makes the settings of a run whose kd_steps was
right from the start. So phase, w and the rows read stay functions of settings and step.

Steps are counted as in `salt.py`: an evaluation after `done` steps comes before step `done`.
docs/method.md has the rule and what it measures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_salt.config.fields import SaltConfig


@dataclass(frozen=True, kw_only=True)
class SwitchState:
    """What the rule has seen so far; all evaluations before this one are in it."""

    streak: int = 0
    """Evaluations in a row, up to the last one, at which the teacher did not help."""
    decided_at: int | None = None
    """Steps done when the end was decided; None: not yet."""
    kd_end: int | None = None
    """Length of the KD phase in steps that was decided."""


def has_stopped_helping(
    salt: SaltConfig, student_ce_nats: float, teacher_ce_nats: float, better_share: float
) -> bool:
    """Whether one evaluation finds the teacher of no more help.

    Args:
        better_share: of held-out tokens, on which the teacher's loss is the smaller one.
    """
    return (
        student_ce_nats - teacher_ce_nats <= salt.switch_margin_nats
        or better_share <= salt.switch_better_share
    )


def end_of_kd(salt: SaltConfig, done: int) -> int:
    """Length of the KD phase, in steps, if its end is decided after `done` steps."""
    # w never jumps and never rises again. The window in which it falls begins at once, but after
    # its warm-up, and late enough for min_kd_steps. Where it would reach beyond kd_steps, the
    # window before kd_steps has begun already (or begins now) and stands.
    begins = max(done, salt.warmup_steps)
    return min(salt.kd_steps, max(salt.min_kd_steps, begins + salt.transition_steps))


def update(
    state: SwitchState,
    salt: SaltConfig,
    done: int,
    *,
    student_ce_nats: float,
    teacher_ce_nats: float,
    better_share: float,
) -> SwitchState:
    """The state after an evaluation that followed `done` steps.

    Nothing changes with switch = fixed, after the decision, or once the KD phase is over.
    """
    if salt.switch == "fixed" or state.kd_end is not None or done >= salt.kd_steps:
        return state
    if not has_stopped_helping(salt, student_ce_nats, teacher_ce_nats, better_share):
        return SwitchState()
    streak = state.streak + 1
    if streak < salt.switch_patience:
        return SwitchState(streak=streak)
    return SwitchState(streak=streak, decided_at=done, kd_end=end_of_kd(salt, done))


def effective(salt: SaltConfig, state: SwitchState) -> SaltConfig:
    """The settings with the length of the KD phase as far as it is known: decided, or kd_steps."""
    if salt.switch == "fixed" or state.kd_end is None:
        return salt
    return dataclasses.replace(salt, kd_steps=min(salt.kd_steps, state.kd_end))


def carried_over(state: SwitchState, before: SaltConfig, now: SaltConfig) -> SwitchState:
    """The state with which a resumed run goes on, whose settings may have changed."""
    # With `fixed`, kd_steps alone counts.
    if now.switch == "fixed":
        return SwitchState()
    rule = ("switch", "switch_margin_nats", "switch_better_share")
    same = all(getattr(before, name) == getattr(now, name) for name in rule)
    # A decision stays (`effective` lets an earlier kd_steps shorten it). A streak counts
    # evaluations by one rule, so with another it starts anew.
    return state if same or state.kd_end is not None else SwitchState()
