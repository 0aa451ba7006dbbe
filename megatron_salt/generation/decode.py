"""Token after token, each read once: megatron-core's cache holds the keys and values of the others.

One prompt at a time: a product's rounding may depend on its number of rows, and a token on that.
"""

from collections.abc import Callable

import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from torch import Tensor

from megatron_salt.model.frozen import FrozenModel


def decode_tokens(
    model: FrozenModel, prompt: list[int], choose: Callable[[Tensor], int], most: int, end: int
) -> list[int]:
    """The new tokens, `most` or up to and with the first `end`; `choose` gets logits [V] in fp32.

    Raises: ValueError if logits are not finite.
    """
    assert model.head_WE is not None
    head_VE, tokens_BS, new = model.head_WE.float(), torch.tensor([prompt]), list[int]()
    cache = model.parts.cache = StaticInferenceContext(1, len(prompt) + most - 1)
    while len(new) < most and end not in new[-1:]:
        hidden_BSE = model.forward(tokens_BS.to(head_VE.device))
        cache.increment_sequence_len_offset(tokens_BS.shape[1])
        logits_V = head_VE @ hidden_BSE[0, -1].float()
        if not logits_V.isfinite().all():
            raise ValueError(f"logits of new token {len(new)} are not finite: try --precision fp32")
        new.append(choose(logits_V))
        tokens_BS = torch.tensor([new[-1:]])
    model.parts.cache = None
    return new
