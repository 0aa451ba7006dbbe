"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megatron_salt.config.fields import TrainConfig


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
