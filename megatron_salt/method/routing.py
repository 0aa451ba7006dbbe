"""Which tokens are taught and which count in the cross-entropy, as changes of their two weights.

Every token comes with `ce_weight = (1 - w) n` and `kd_weight = w n`, n its mask over the step's
number of counted tokens. No route changes that number, so the loss does not depend on how a batch
is cut.

Sources: Rho-1, arXiv 2404.07965 (CE where student loss - reference loss is largest; there the share
is of a batch); docs/method.md for the others.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

UntaughtCe = Literal["full", "mixed"]


def keep_taught(
    ce_weight: Tensor, kd_weight: Tensor, taught: Tensor, untaught_ce: UntaughtCe
) -> tuple[Tensor, Tensor]:
    """Weights after the KL of tokens with taught = 0 is taken away. Any shape, fp32."""
    kept = kd_weight * taught
    if untaught_ce == "full":
        # What their KL weighed goes to their CE, so every token keeps its total weight.
        # Not (1 - w) n + w n, which need not be n to the last bit where w is 0.
        ce_weight = torch.where(taught > 0, ce_weight, ce_weight + kd_weight)
    return ce_weight, kept


def share_of_sequences(values_BS: Tensor, counted_BS: Tensor, share: float) -> Tensor:
    """1.0 for the share of each sequence's counted tokens with the largest values, [B, S].

    Of n counted tokens ceil(share n) are taken.
    """
    # Within each sequence: no other set of tokens is the same for every number of micro-batches,
    # ranks and stages.
    counted = counted_BS > 0
    lowest = torch.full_like(values_BS, -torch.inf)
    # What is nan is taken last.
    ranked_BS = torch.where(counted & ~values_BS.isnan(), values_BS, lowest)
    # Stable: of equal values the earlier ones are taken.
    order_BS = torch.argsort(ranked_BS, dim=1, descending=True, stable=True)
    # An -inf of a counted token must come before one that stands for a token that does not count.
    order_BS = order_BS.gather(
        1, torch.argsort(counted.gather(1, order_BS).int(), dim=1, descending=True, stable=True)
    )
    # A product that rounding lifts above a whole number must not take one token more.
    num_taken_B1 = torch.ceil(counted.sum(dim=1, keepdim=True).double() * share - 1e-9)
    place_S = torch.arange(values_BS.shape[1], device=values_BS.device)
    taken_BS = torch.zeros_like(values_BS)
    return taken_BS.scatter(1, order_BS, (place_S < num_taken_B1).to(values_BS.dtype))
