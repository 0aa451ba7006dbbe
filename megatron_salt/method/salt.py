"""SALT's schedule: phase and KD weight as pure functions of the step.

Because nothing is remembered, a resumed run cannot disagree with the run it resumes. Steps are
counted from 0 here: step t is the one that turns the weights after t updates into those after t+1.

Source: SALT, arXiv 2410.18779 (phases, linear_decay, linear_ratio_decay); Knowledge Inheritance,
arXiv 2105.13880; pre-training distillation, arXiv 2410.16215 (wsd). docs/method.md says how sure
each formula is.
"""

from __future__ import annotations

import math
from typing import Literal

from megatron_salt.config.fields import SaltConfig

Phase = Literal["kd", "lm"]


def phase(salt: SaltConfig, step: int) -> Phase:
    """`kd` for the first kd_steps steps, `lm` from then on."""
    return "kd" if step < salt.kd_steps else "lm"


def kd_weight(salt: SaltConfig, step: int) -> float:
    """w in `(1-w) CE + w KL` at this step; exactly 0 in the LM phase.

    Math, with w0 = kd_weight, n = kd_steps, d = transition_steps, t = step:
      constant, step          w0
      linear_decay            w0 * min(1, (n - t) / d): falls over the last d steps
      linear_ratio_decay      r = w0/(1-w0) * min(1, (n - t) / d);  w = r / (1 + r)
      knowledge_inheritance   max(w0 - slope * t / n, 0)
      wsd                     w0 * min(1, (t + 1) / warmup) while warming up, then w0, then
                              w0 * (1 + cos(pi * x)) / 2, x in [0, 1) over the last d steps
    """
    n, w0 = salt.kd_steps, salt.kd_weight
    if phase(salt, step) == "lm":
        return 0.0
    left = min(1.0, (n - step) / salt.transition_steps) if salt.transition_steps else 1.0
    match salt.transition:
        # One w, two names: `constant` is meant for kd_steps = steps (the paper's RKD).
        case "constant" | "step":
            return w0
        case "linear_decay":
            return w0 * left
        case "linear_ratio_decay":
            ratio = w0 / (1.0 - w0) * left
            return min(w0, ratio / (1.0 + ratio))  # rounding may pass w0 by a last bit
        case "knowledge_inheritance":
            return max(w0 - salt.inheritance_slope * step / n, 0.0)
        case "wsd":
            if step < salt.warmup_steps:
                return w0 * ((step + 1) / salt.warmup_steps)
            return w0 * (1.0 + math.cos(math.pi * (1.0 - left))) / 2.0
    raise ValueError(f"salt.transition = {salt.transition!r} is not known")
