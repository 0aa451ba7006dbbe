"""SALT's schedule: phase, KD weight and learning rate as pure functions of the step.

Because nothing is remembered, a resumed run cannot disagree with the run it resumes. Steps are
counted from 0 here: step t is the one that turns the weights after t updates into those after t+1.

Source: SALT, arXiv 2410.18779 (phases, linear_decay, linear_ratio_decay); Knowledge Inheritance,
arXiv 2105.13880; pre-training distillation, arXiv 2410.16215 (wsd). docs/method.md says how sure
each formula is.
"""

from __future__ import annotations

import math
from typing import Literal

from megatron_salt.config import SaltConfig, TrainConfig

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
    The difference of `constant` and `step`: none in w. `constant` is meant for kd_steps = steps,
    a teacher for the whole run (the paper's RKD).
    """
    n, w0 = salt.kd_steps, salt.kd_weight
    if phase(salt, step) == "lm":
        return 0.0
    left = min(1.0, (n - step) / salt.transition_steps) if salt.transition_steps else 1.0
    match salt.transition:
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


def learning_rate(train: TrainConfig, peak: float, step: int) -> float:
    """Learning rate of this step.

    Math: linear warm-up peak * (t + 1) / warmup; then
      constant   peak
      cosine     from peak to min_lr_ratio * peak over lr_decay_steps (null: to the last step)
      wsd        peak, then the same cosine over the last lr_decay_steps (null: 10 % of steps)
    After a cosine shorter than the run the rate stays at its floor. A wsd decay longer than what
    the warm-up leaves begins right after it and is cut off by the end of the run.
    """
    warmup, floor = train.lr_warmup_steps, train.min_lr_ratio * peak
    if step < warmup:
        return peak * ((step + 1) / warmup)
    if train.lr_schedule == "constant":
        return peak
    if train.lr_schedule == "cosine":
        length = train.lr_decay_steps or train.steps - warmup
        start = warmup
    else:
        length = train.lr_decay_steps or max(1, train.steps // 10)
        start = max(warmup, train.steps - length)
    done = min(1.0, max(0.0, (step - start) / max(1, length)))
    return floor + (peak - floor) * (1.0 + math.cos(math.pi * done)) / 2.0
