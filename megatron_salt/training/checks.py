"""What ends a run instead of training on: a loss that is not finite, a weight without gradient."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_salt.checkpoint.folder import checkpoints_dir
from megatron_salt.parallel.groups import same_error_everywhere
from megatron_salt.training.engine import StudentEngine

# With a loss scale that starts at 2^16 and halves every second overflow, more is no search.
MAX_SKIPPED_FP16_STEPS = 64


class Diverged(RuntimeError):
    """Seen by all ranks after the same step."""


class StepChecks:
    """Looks at every step's loss and gradient norm, before anything of it is saved."""

    def __init__(self, student: StudentEngine, output_dir: Path) -> None:
        self.student, self.output_dir = student, output_dir
        self.is_fp16 = student.settings.precision == "fp16"
        self.skipped_steps = 0

    def look(self, done: int, loss: float, grad_norm: float | None) -> None:
        """Raises: RuntimeError on all ranks, saying after how many steps and what was found."""
        self._stop_if_untrained(done, loss, grad_norm)
        self._stop_if_diverged(done, loss, grad_norm)

    def _stop_if_diverged(self, done: int, loss: float, grad_norm: float | None) -> None:
        """DeepSpeed's 16-bit optimisers skip such a step without a word, and fp32 applies it. Only
        fp16 may skip a few in a row, while it looks for its loss scale."""
        finite = grad_norm is None or math.isfinite(grad_norm)
        self.skipped_steps = 0 if finite else self.skipped_steps + 1
        allowed = MAX_SKIPPED_FP16_STEPS if self.is_fp16 else 0
        if math.isfinite(loss) and self.skipped_steps <= allowed:
            return
        raise Diverged(
            f"step {done}: the loss is {loss}, the gradient norm {grad_norm}, "
            f"{self.skipped_steps} steps in a row without an update; stopping instead of training "
            f"on. The last checkpoint is the newest in {checkpoints_dir(self.output_dir)}"
        )

    def _stop_if_untrained(self, done: int, loss: float, grad_norm: float | None) -> None:
        """See that the optimizer is given every weight's gradient.

        Once in a process: in its first step that has something to learn (not all tokens masked or
        routed away, no loss of 0) and, in fp16, whose gradients have not overflowed.
        """
        check = self.student.gradient_check
        overflown = self.is_fp16 and grad_norm is not None and not math.isfinite(grad_norm)
        if check is None or loss == 0.0 or not math.isfinite(loss) or overflown:
            return
        self.student.gradient_check = None
        with same_error_everywhere("checking the gradients"):
            problem = check.problem()
            if problem:
                raise RuntimeError(
                    f"step {done}: {problem}: the model would not train as a whole. If that is "
                    "meant, set train.check_gradients to false"
                )
