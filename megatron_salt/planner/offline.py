"""What the teacher's stored logits would cost in place of the teacher itself."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.model.costs import layer_costs
from megatron_salt.planner.estimate import Estimate
from megatron_salt.planner.hardware import Machine

TOP_K = 50  # the paper's, arXiv 2410.16215


@dataclass(frozen=True, kw_only=True)
class OfflineCosts:
    """For the tokens of the KD phase, each read once. GPU seconds."""

    capture_gpu_s: float
    """One forward pass of the teacher over them, head included."""
    online_gpu_s: float
    """What the teacher in the run adds to its KD steps."""
    num_bytes: float
    """Of the 50 likeliest tokens at each place, as fp16."""
    kd_step_s: float
    """A KD step reads them at its own pace: `num_bytes / kd_steps` in this time."""


def stored_bytes_per_token(vocab_size: int) -> float:
    """Of TOP_K entries in fp16, their count, three numbers, and a share of a block's offset.

    Source: `data.logits.LogitsSettings`; in words here, since that module loads PyTorch.
    """
    id_bytes = 2 if vocab_size <= 1 << 16 else 3
    return TOP_K * (id_bytes + 2) + 1 + 3 * 2 + 8 / 1024


def offline_costs(own: Estimate, machine: Machine) -> OfflineCosts | None:
    """None without a teacher, or where a plain step is not known."""
    sizes, teacher = own.sizes, own.sizes.teacher
    if teacher is None or own.lm_s != own.lm_s:
        return None
    config = sizes.config
    tokens = config.salt.kd_steps * sizes.settings.global_batch_size * config.data.seq_length
    costs = layer_costs(teacher.model, sizes.vocab_size, config.data.seq_length)
    seconds = 2.0 * sum(costs) / machine.flops_s(sizes.settings.precision)
    extra = config.salt.kd_steps * (own.kd_s - own.lm_s) * sizes.layout.world_size
    return OfflineCosts(
        capture_gpu_s=tokens * seconds, online_gpu_s=extra, kd_step_s=own.lm_s,
        num_bytes=tokens * stored_bytes_per_token(sizes.vocab_size),
    )  # fmt: skip
