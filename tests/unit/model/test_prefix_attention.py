"""Attention with a prefix: who may attend to whom, against softmax written out in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_salt.model.attention import PrefixMasks, SdpaCoreAttention

CPU = torch.device("cpu")


def allowed(seq_length: int, prefix: int) -> list[list[bool]]:
    places = range(seq_length)
    return [[column <= row or column < prefix for column in places] for row in places]


def mask_of(prefixes: list[int], seq_length: int) -> Tensor | None:
    masks = PrefixMasks(seq_length, torch.float64)
    with masks.of_step([torch.tensor(prefixes)]):
        masks.advance(CPU)
        return masks.mask_B1SS


def test_mask_is_the_prefix_and_what_lies_before() -> None:
    mask_B1SS = mask_of([0, 1, 3, 5], 5)
    assert mask_B1SS is not None and mask_B1SS.shape == (4, 1, 5, 5)
    assert (mask_B1SS[:, 0] == 0).tolist() == [allowed(5, prefix) for prefix in (0, 1, 3, 5)]
    assert ((mask_B1SS == 0) | (mask_B1SS == -math.inf)).all()
    assert mask_of([0, 0], 5) is None  # flash attention stays


def test_each_forward_takes_the_mask_of_its_micro_batch() -> None:
    masks = PrefixMasks(4, torch.float32)
    masks.advance(CPU)
    assert masks.mask_B1SS is None  # outside of a step all is causal
    with masks.of_step([torch.tensor([2]), None, torch.tensor([0]), torch.tensor([3])]):
        seen = []
        for _ in range(4):
            masks.advance(CPU)
            mask = masks.mask_B1SS
            seen.append(None if mask is None else (mask[0, 0] == 0).tolist())
        with pytest.raises(AssertionError, match="more forward passes"):
            masks.advance(CPU)
    assert seen == [allowed(4, 2), None, None, allowed(4, 3)]
    masks.advance(CPU)
    assert masks.mask_B1SS is None
    with pytest.raises(AssertionError, match="1 micro-batches were not run"):
        with masks.of_step([None, None]):
            masks.advance(CPU)


def explicit(query: Tensor, key: Tensor, value: Tensor, prefixes: list[int]) -> Tensor:
    """[S, B, H * C] from softmax written out; key and value are repeated for their groups."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = torch.einsum("sbhc,tbhc->bhst", query, key) / math.sqrt(query.shape[-1])
    mask = torch.tensor([allowed(query.shape[0], prefix) for prefix in prefixes])
    chances = torch.softmax(scores.masked_fill(~mask[:, None], -math.inf), dim=-1)
    return torch.einsum("bhst,tbhc->sbhc", chances, value).flatten(2)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("prefixes", [[0, 0, 0], [0, 1, 4], [7, 3, 2]], ids=str)
def test_values_and_gradients_are_those_of_written_out_softmax(
    num_groups: int, prefixes: list[int]
) -> None:
    torch.manual_seed(1)
    shapes = [(7, 3, 4, 8), (7, 3, num_groups, 8), (7, 3, num_groups, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(7, 3, 32, dtype=torch.float64)
    attention: Any = SdpaCoreAttention(None)  # type: ignore[arg-type]
    results = []
    for output in (attention(*inputs, mask_of(prefixes, 7)), explicit(*inputs, prefixes)):
        results.append((output, *torch.autograd.grad((output * weight).sum(), inputs)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_layers_share_one_mask() -> None:
    """What the backward keeps is the mask itself, in 16 bits too, and no copy of it."""
    masks = PrefixMasks(8, torch.bfloat16)
    with masks.of_step([torch.tensor([3])]):
        masks.advance(CPU)
        mask_B1SS = masks.mask_B1SS
    assert mask_B1SS is not None and mask_B1SS.dtype == torch.bfloat16
    inputs = [torch.randn(8, 1, 2, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != mask_B1SS.data_ptr():
            kept.append(tuple(tensor.shape))
        return tensor

    attention: Any = SdpaCoreAttention(None)  # type: ignore[arg-type]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(*inputs, mask_B1SS)
    assert kept and not any(shape[-2:] == (8, 8) for shape in kept)
