"""Attention: who sees whom, rotary positions, and which of PyTorch's kernels computes it.

Letters: B micro-batch, S sequence, H heads, G groups of heads, C channels of a head.

megatron-core's core attention needs CUDA, and without Transformer Engine its rotation is a dozen
operations in every layer; its rotary cache would keep a released teacher's tensors alive.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_salt.config.fields import ModelConfig


def attention_backends(capability: tuple[int, int] | None) -> list[SDPBackend] | None:
    """PyTorch's kernels for attention, the preferred first; None: PyTorch's own order.

    Args:
        capability: of the CUDA device; None without one.
    Source: on Hopper cuDNN's is reported to be about twice as fast as the FlashAttention-2 that
        PyTorch prefers, and slower elsewhere; not measured here. What cuDNN does not serve (fp32,
        deterministic algorithms) goes to the next.
    """
    if capability is None or capability[0] != 9:
        return None
    return [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]  # fmt: skip


def device_attention_backends() -> list[SDPBackend] | None:
    """`attention_backends` of this process's device."""
    cuda = torch.cuda.is_available()
    return attention_backends(torch.cuda.get_device_capability() if cuda else None)


def repeats_keys(device_type: str, dtype: torch.dtype, masked: bool) -> bool:
    """Whether keys and values of a group are repeated for each of its queries before SDPA.

    Of PyTorch's CUDA kernels those that take a mask or fp32 know no groups; SDPA would fall back to
    the one that writes out all S * S scores. On a CPU the same holds of masks.
    """
    return masked or (device_type == "cuda" and dtype == torch.float32)


class SdpaCoreAttention(nn.Module):
    """Causal attention through `torch.nn.functional.scaled_dot_product_attention`.

    Shapes: query [S, B, H, C], key and value [S, B, G, C] with this rank's heads and groups and
    C channels; result [S, B, H * C]. Under sequence parallelism S is whole here as well. Without a
    mask the causal flag picks flash attention; a mask [B, 1, S, S], which is added to the scores,
    takes its place. A query of one position against more keys is the last of them and sees all.

    Args:
        rotary: turns query and key by their positions first.
        backends: see `attention_backends`.
    """

    def __init__(
        self,
        config: TransformerConfig | None = None,
        rotary: RotaryTable | None = None,
        backends: list[SDPBackend] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.rotary, self.backends = rotary, backends

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        if self.rotary is not None:
            query, key = self.rotary.rotated(query, key)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        causal = attention_mask is None and query.shape[2] == key.shape[2]
        grouped = query.shape[1] != key.shape[1]
        if grouped and repeats_keys(query.device.type, query.dtype, attention_mask is not None):
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
            grouped = False
        backends = self.backends
        with sdpa_kernel(backends, set_priority=True) if backends else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, is_causal=causal, enable_gqa=grouped,
            )  # fmt: skip
        return context.permute(2, 0, 1, 3).flatten(2)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, ...]:
    """Both turned by their positions' angles, or back.

    Math: x cos + (-x2, x1) sin of the halves (x1, x2) of the channels: bit for bit megatron-core's
        `apply_rotary_pos_emb`, where it is not compiled; there each result is rounded once.
    Shapes: query [S, B, H, C], key [S, B, G, C], cos and sin [S, 1, 1, C] as in `RotaryTable`; or
        fewer than C, of the first channels, which alone are turned.
    """
    if back:
        sin = -sin
    return _turned(query, cos, sin), _turned(key, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if (turning := cos.shape[-1]) < x.shape[-1]:
        parts = x.split([turning, x.shape[-1] - turning], dim=-1)
        return torch.cat([_turned(parts[0], cos, sin), parts[1]], dim=-1)
    # In place: on a CPU each new tensor costs as much as the arithmetic.
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1).mul_(sin).add_(x * cos)


# Of any shape: student, teacher, evaluations and tagging all differ, and after eight compilations
# PyTorch runs what comes next uncompiled, with a warning.
compiled_rotate = torch.compile(rotate, dynamic=True)


class _Rotation(torch.autograd.Function):
    """`rotate`, whose gradient is the rotation back; so nothing of query and key is kept."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, turn: Callable[..., Any]
    ) -> tuple[Tensor, ...]:
        ctx.cos, ctx.sin, ctx.turn = cos, sin, turn
        return turn(query, key, cos, sin, False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.turn(query, key, ctx.cos, ctx.sin, True), None, None, None)


class RotaryTable:
    """Cosine and sine of the rotary angles [S, 1, 1, C] of the channels that turn, in the model's
    precision, one pair shared by all layers of a model on this rank; the first half of the sine is
    negated (see `rotate`).

    A plain object, not a module with buffers: it has no place in checkpoints.
    """

    def __init__(
        self, model: ModelConfig, seq_length: int, group: Any, dtype: torch.dtype, *, fuse: bool
    ) -> None:
        rotary = RotaryEmbedding(
            kv_channels=model.head_size,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,  # type: ignore[arg-type]  # any number, raised to a power
            use_cpu_initialization=True,
            cp_group=group,
        )
        scaling = model.rope_scaling or {}
        if len(scaling) > 1:
            # Its constructor takes the factor only, and has the other three of Llama 3.1.
            rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)
        elif scaling:
            rotary.inv_freq /= scaling["factor"]
        angles = rotary.get_emb(seq_length)
        sin = angles.sin()
        sin[..., : sin.shape[-1] // 2].neg_()
        self.cos, self.sin = angles.cos().to(dtype), sin.to(dtype)
        self._rotate = compiled_rotate if fuse else rotate

    def rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key [S', B, ., C] of the first S' positions; or, without a gradient, a shorter
        query, which is of the last of them."""
        length, device = key.shape[0], query.device
        if self.cos.device != device:
            self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        cos, sin = self.cos[:length], self.sin[:length]
        if (shorter := query.shape[0]) != length:
            return _turned(query, cos[-shorter:], sin[-shorter:]), _turned(key, cos, sin)
        return _Rotation.apply(query, key, cos, sin, self._rotate)


class PrefixMasks:
    """Who may attend to whom in the micro-batch at hand; causal unless a prefix says otherwise.

    The prefixes of a step wait here instead of travelling through the pipeline: every rank has read
    them, and every stage runs its forward passes in the order of the micro-batches.
    """

    def __init__(self, seq_length: int, dtype: torch.dtype) -> None:
        self.mask_B1SS: Tensor | None = None
        """0 where a row may attend to a column, else -inf, in the model's precision; None: causal.
        Of a boolean mask SDPA would make this in every layer, and keep each for the backward."""
        self._seq_length, self._dtype = seq_length, dtype
        self._waiting: deque[Tensor | None] | None = None

    @contextlib.contextmanager
    def of_step(self, prefixes: Sequence[Tensor | None]) -> Iterator[None]:
        """Within it each `advance` takes the next of these prefixes [B] (on the CPU); at its end
        none may be left."""
        self._waiting = deque(prefixes)
        try:
            yield
            assert not self._waiting, f"{len(self._waiting)} micro-batches were not run"
        finally:
            self._waiting = self.mask_B1SS = None

    def advance(self, device: torch.device) -> None:
        """Start the forward pass of the next micro-batch. Outside of a step all is causal."""
        if self._waiting is None:
            return
        assert self._waiting, "more forward passes than micro-batches"
        self.use(self._waiting.popleft(), device)

    def use(self, prefix_B: Tensor | None, device: torch.device) -> None:
        """Make the mask of the rows at hand, from how much of each is read in both directions."""
        self.mask_B1SS = None
        if prefix_B is not None and prefix_B.any():
            column_S = torch.arange(self._seq_length, device=device)
            causal_SS = column_S <= column_S[:, None]
            inside_BS = column_S < prefix_B.to(device, non_blocking=True)[:, None]
            barred_BSS = ~(causal_SS | inside_BS[:, None, :])
            mask_BSS = torch.zeros(barred_BSS.shape, dtype=self._dtype, device=device)
            self.mask_B1SS = mask_BSS.masked_fill_(barred_BSS, -math.inf)[:, None]
