"""Rotation, choice of kernels and groups of our core attention, and recomputation."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_salt.config.fields import ModelConfig
from megatron_salt.model import attention as module
from megatron_salt.model.attention import (
    PrefixMasks,
    RotaryTable,
    SdpaCoreAttention,
    attention_backends,
    repeats_keys,
    rotate,
)
from megatron_salt.model.layers import DecoderLayer

LENGTH, WIDTH = 24, 16
MODEL = ModelConfig(
    num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=2, rotary_base=500
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class OneRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def table(dtype: torch.dtype, percent: float = 1.0) -> RotaryTable:
    model = dataclasses.replace(MODEL, rotary_percent=percent)
    return RotaryTable(model, LENGTH, OneRank(), dtype, fuse=False)


def angles() -> Tensor:
    """[S, 1, 1, C] in fp64, from the paper: position times base^(-2i/C), twice."""
    exponents = torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH
    half = torch.arange(LENGTH)[:, None] * 500.0**-exponents
    return torch.cat((half, half), dim=1)[:, None, None, :]


def written_out(x: Tensor, length: int) -> Tensor:
    """Each pair of channels (i, i + C / 2) as a complex number, times e^(i angle); fp64."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.exp(1j * angles()[:length, ..., : WIDTH // 2])
    return torch.cat((turned.real, turned.imag), dim=-1)


def inputs(dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The product that query and key are cut from as megatron-core cuts them, and both."""
    torch.manual_seed(3)
    mixed = torch.randn(length, 3, 2, 4 * WIDTH).to(dtype).requires_grad_()
    query, key, _ = mixed.split([2 * WIDTH, WIDTH, WIDTH], dim=3)
    return mixed, query.reshape(length, 3, 4, WIDTH), key


@pytest.mark.parametrize(("length", "percent"), [(LENGTH, 1.0), (7, 1.0), (LENGTH, 0.25)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_is_megatron_cores_bit_for_bit(
    dtype: torch.dtype, length: int, percent: float
) -> None:
    """Values and, through autograd of its formula, gradients; whole and shorter lengths, all
    channels and some."""
    results = []
    frequencies = RotaryEmbedding(
        WIDTH, percent, rotary_base=500, use_cpu_initialization=True, cp_group=OneRank()
    ).get_emb(length)
    for ours in (True, False):
        mixed, query, key = inputs(dtype, length)
        if ours:
            turned = table(dtype, percent).rotated(query, key)
        else:
            turned = tuple(
                rope_utils._apply_rotary_pos_emb_bshd(x, frequencies) for x in (query, key)
            )
        upstream = [torch.randn_like(x) for x in turned]
        results.append((*turned, *torch.autograd.grad(turned, [mixed], upstream)))
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == dtype and torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_is_that_of_the_paper(dtype: torch.dtype) -> None:
    """Positions, signs and both gradients; as exact as the formula in the same precision is."""
    mixed, query, key = inputs(dtype, LENGTH)
    turned = table(dtype).rotated(query, key)
    expected = [written_out(x, LENGTH) for x in (query, key)]
    upstream = [torch.randn_like(x) for x in turned]
    (mine,) = torch.autograd.grad(turned, [mixed], upstream, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, [mixed], [x.double() for x in upstream])
    # Of results up to 4; and angles up to 23, which megatron-core makes in fp32.
    tolerance = 8 * torch.finfo(dtype).eps + 4e-6
    for ours, theirs in zip((*turned, mine), (*expected, wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)
    assert torch.equal(turned[0][0], query[0])  # the first position stays
    assert not torch.equal(turned[1][1], key[1])


def test_attention_turns_both_query_and_key() -> None:
    """And the value not; the scores then depend on the distance alone."""
    _, query, key = inputs(torch.float32, LENGTH)
    value = torch.randn_like(key)
    mine = SdpaCoreAttention(rotary=table(torch.float32))(query, key, value, attention_mask=None)
    turned = [written_out(x, LENGTH).float() for x in (query, key)]
    expected = SdpaCoreAttention()(*turned, value, attention_mask=None)
    torch.testing.assert_close(mine, expected)


def test_nothing_is_kept_for_the_gradient_of_a_rotation() -> None:
    _, query, key = inputs(torch.float32, LENGTH)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        table(torch.float32).rotated(query, key)
    assert not kept


def test_one_compiled_rotation_serves_every_shape() -> None:
    """Without it PyTorch would stop compiling after eight shapes, and only warn."""
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(rotate, backend=counted, dynamic=True, fullgraph=True)
    try:
        for length, rows, heads in itertools.product((24, 17), (3, 5), (4, 6)):
            for back in (False, True):
                query = torch.randn(length, rows, heads, WIDTH)
                key = torch.randn(length, rows, 2, 4 * WIDTH)[..., :WIDTH]
                cos, sin = table(torch.float32).cos[:length], table(torch.float32).sin[:length]
                expected = rotate(query, key, cos, sin, back)
                for mine, theirs in zip(
                    compiled(query, key, cos, sin, back), expected, strict=True
                ):
                    assert torch.equal(mine, theirs)
        assert counted.frame_count <= 6
    finally:
        torch._dynamo.reset()


def test_fused_rotation_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def stand_in(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return rotate(*arguments)

    monkeypatch.setattr(module, "compiled_rotate", stand_in)
    mixed, query, key = inputs(torch.float32, LENGTH)
    fused = RotaryTable(MODEL, LENGTH, OneRank(), torch.float32, fuse=True)
    turned = fused.rotated(query, key)
    torch.autograd.grad(turned, [mixed], [torch.ones_like(x) for x in turned])
    table(torch.float32).rotated(query, key)
    assert seen == [False, True]


def test_cudnn_comes_first_on_hopper_alone() -> None:
    backends = attention_backends((9, 0))
    assert backends is not None and backends[0] == SDPBackend.CUDNN_ATTENTION
    assert set(backends[1:]) == {
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    }  # fmt: skip
    assert backends[-1] == SDPBackend.MATH
    for capability in (None, (8, 0), (8, 9), (10, 0), (12, 0)):
        assert attention_backends(capability) is None


def test_order_of_kernels_holds_within_the_attention_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orders: list[list[int]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, **options: Any) -> Tensor:
        orders.append(list(torch._C._get_sdp_priority_order()))
        return real(*tensors, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", watched)
    before = list(torch._C._get_sdp_priority_order())
    backends = attention_backends((9, 0))
    assert backends is not None
    tensors = [torch.randn(5, 2, 4, 8) for _ in range(3)]
    results = [
        SdpaCoreAttention(backends=order)(*tensors, attention_mask=None)
        for order in (backends, None)
    ]
    assert orders[0][:4] == [int(each) for each in backends]
    assert orders[1] == before == list(torch._C._get_sdp_priority_order())
    assert torch.equal(*results)


def test_keys_are_repeated_where_no_kernel_knows_groups() -> None:
    repeated = {
        case
        for case in itertools.product(("cpu", "cuda"), DTYPES, (False, True))
        if repeats_keys(*case)
    }
    assert repeated == {
        *itertools.product(("cpu", "cuda"), DTYPES, (True,)),
        ("cuda", torch.float32, False),
    }


@pytest.mark.parametrize("num_groups", [1, 2])
def test_repeated_keys_give_what_groups_give(
    num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 and causal, as on CUDA: values, and gradients summed over a group's queries."""
    torch.manual_seed(5)
    shapes = [(9, 3, 4, 8), (9, 3, num_groups, 8), (9, 3, num_groups, 8)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(9, 3, 32)
    attention, results, groups = SdpaCoreAttention(), [], []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, enable_gqa: bool, **options: Any) -> Tensor:
        groups.append((tensors[1].shape[1], tensors[2].shape[1], enable_gqa))
        return real(*tensors, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", watched)
    for device_type in ("cpu", "cuda"):
        with monkeypatch.context() as patch:
            patch.setattr(
                module,
                "repeats_keys",
                lambda _, *rest, kind=device_type: repeats_keys(kind, *rest),
            )
            output = attention(*tensors, attention_mask=None)
        results.append((output, *torch.autograd.grad((output * weight).sum(), tensors)))
    assert groups == [(num_groups, num_groups, True), (4, 4, False)]
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


def test_recomputation_keeps_no_state_of_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing draws any; saving the state would read it from the device in every layer."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the state of random numbers was saved")

    class Layer(DecoderLayer):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.recompute, self.prefix_masks = True, PrefixMasks(4, torch.float32)

        __call__ = DecoderLayer.forward

        def _layer(self, hidden_SBD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
            return hidden_SBD.sin()

    monkeypatch.setattr(torch, "get_rng_state", forbidden)
    hidden = torch.randn(4, 1, 2, requires_grad=True)
    Layer()(hidden).sum().backward()
    assert hidden.grad is not None and torch.allclose(hidden.grad, hidden.detach().cos())
