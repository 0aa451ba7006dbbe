"""What every token of a step weighs in the loss: the normaliser, and the routes of the tags.

Letters: R rows (sequences) of a data-parallel rank's step, S sequence.
"""

from __future__ import annotations

from torch import Tensor

from megatron_salt.config.fields import SaltConfig
from megatron_salt.method.routing import keep_taught


def token_weights(
    mask_RS: Tensor, kd_weight: float, num_counted: Tensor, num_means: int
) -> tuple[Tensor, Tensor]:
    """Weights of CE and KL of every token, [R, S] each; masked tokens weigh 0.

    Math: (1 - w) / N and w / N, times what the engine will divide by. So the loss is a sum over
        tokens, divided once by the counted tokens of the whole step, whatever its cut into
        micro-batches and ranks. An empty step has weights of 0.

    Args:
        num_counted: N over all micro-batches and data-parallel ranks, one number.
        num_means: micro-batches times ranks, over which DeepSpeed averages.
    """
    scale = num_means / num_counted.clamp(min=1.0)
    return mask_RS * ((1.0 - kd_weight) * scale), mask_RS * (kd_weight * scale)


def route_by_tags(
    ce_weight_RS: Tensor, kd_weight_RS: Tensor, tag_RS: Tensor | None, salt: SaltConfig
) -> tuple[Tensor, Tensor]:
    """The weights after the routes that the masks of data.tags decide, as new tensors; N stays."""
    masks = {} if tag_RS is None else {"tagged": tag_RS, "untagged": 1.0 - tag_RS}
    if salt.kd_tokens in masks:
        ce_weight_RS, kd_weight_RS = keep_taught(
            ce_weight_RS, kd_weight_RS, masks[salt.kd_tokens], salt.untaught_ce
        )
    if salt.ce_tokens in masks:
        ce_weight_RS = ce_weight_RS * masks[salt.ce_tokens]
    return ce_weight_RS, kd_weight_RS
