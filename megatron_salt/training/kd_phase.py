"""The KD phase of a run: what phase a step is in, what its teacher weighs, when the phase ends."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_salt.config.fields import SaltConfig
from megatron_salt.method.salt import Phase, kd_weight, phase
from megatron_salt.method.switch import SwitchState, effective, update
from megatron_salt.parallel.groups import from_rank_0


class KdPhase:
    """The method's settings, with the end of the KD phase as far as it is known by now."""

    def __init__(self, configured: SaltConfig, state: SwitchState) -> None:
        self.configured, self.state = configured, state

    @property
    def salt(self) -> SaltConfig:
        """The settings with `kd_steps` as decided; all that depends on a step follows from them."""
        return effective(self.configured, self.state)

    def phase(self, step: int) -> Phase:
        return phase(self.salt, step)

    def weight(self, step: int) -> float:
        """w of (1-w) CE + w KL."""
        return kd_weight(self.salt, step)

    def update(self, done: int, values: Mapping[str, float]) -> str | None:
        """Take an evaluation into the adaptive switch; at its decision, a line for people.

        Collectives: one broadcast from rank 0, so that no last bit can part the ranks.
        """
        undecided, share = self.state.kd_end is None, values["teacher_better_share"]
        student, teacher = values["valid_ce_nats"], values["teacher_valid_ce_nats"]
        state = update(
            self.state, self.configured, done, student_ce_nats=student, teacher_ce_nats=teacher,
            better_share=share,
        )  # fmt: skip
        self.state = from_rank_0(state)
        if not undecided or self.state.kd_end is None:
            return None
        return (
            f"step {done}: the teacher has not helped at {self.state.streak} evaluations in a row "
            f"(held-out CE {student:.4f}, the teacher's {teacher:.4f}, better on {share:.1%} of "
            f"the tokens): the KD phase ends after step {self.state.kd_end}"
        )
