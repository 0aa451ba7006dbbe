"""The layers of student and teacher, from megatron-core's parts.

Letters: B micro-batch, S sequence, D width, H heads, V vocabulary, W its columns on this rank.
Between layers the hidden state is `[S, B, D]`, or `[S/tp, B, D]` under sequence parallelism.

Where megatron-core's local spec stops short this file fills in: its core attention needs CUDA (ours
is PyTorch's SDPA), its torch norm refuses sequence parallelism, its rotary cache would keep a
released teacher's tensors alive, and its rotation is a dozen operations without Transformer Engine.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from megatron_salt.config import ModelConfig
from megatron_salt.kernels.vocab import VocabShard
from megatron_salt.machine import fuses_operations
from megatron_salt.model.weights import padded_vocab

if not torch.cuda.is_available():
    # megatron-core allocates its sequence-parallel buffers and moves its rotary frequencies with
    # `device=torch.cuda.current_device()`. Without CUDA that call can only raise, so nothing that
    # works today changes; with this the same code runs on the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def transformer_config(
    model: ModelConfig,
    *,
    tp_size: int,
    sequence_parallel: bool,
    dtype: torch.dtype,
    gradient_accumulation_fusion: bool = False,
) -> TransformerConfig:
    """megatron-core's config of one model. Pipeline stages are DeepSpeed's: always 1 here."""
    # Whether compiled functions are used, the rotation too. Not worth their start-up on a CPU.
    fuse = fuses_operations()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
        normalization=model.normalization,
        layernorm_epsilon=model.layernorm_epsilon,
        add_bias_linear=model.add_bias_linear,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=F.silu if model.activation == "swiglu" else F.gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # Weights come from model/weights.py, the same for every layout.
        perform_initialization=False,
        use_cpu_initialization=True,
        # Not for gelu: megatron-core's fused one is the tanh approximation, another function.
        bias_activation_fusion=fuse and model.activation == "swiglu",
        bias_dropout_fusion=fuse,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
    )


class Norm(nn.Module):
    """Factory with megatron-core's signature for torch's fused RMSNorm or LayerNorm.

    Under sequence parallelism each tensor-parallel rank normalises its own tokens, so its weight
    gradient is partial; the mark makes `sum_sequence_parallel_gradients` add them up.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> nn.Module:
        kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for weight in norm.parameters():
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


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
    takes its place.

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
        grouped = query.shape[1] != key.shape[1]
        if grouped and repeats_keys(query.device.type, query.dtype, attention_mask is not None):
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
            grouped = False
        with self._order():
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None,
                enable_gqa=grouped,
            )  # fmt: skip
        return context.permute(2, 0, 1, 3).flatten(2)

    def _order(self) -> contextlib.AbstractContextManager[Any]:
        if self.backends is None:
            return contextlib.nullcontext()
        return sdpa_kernel(self.backends, set_priority=True)


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


def layer_submodules(parts: ModelParts) -> TransformerLayerSubmodules:
    """megatron-core's local layer spec with our core attention and norm."""
    return TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=ModuleSpec(
                    module=SdpaCoreAttention,
                    params={"rotary": parts.rotary, "backends": device_attention_backends()},
                ),
                linear_proj=RowParallelLinear,
                q_layernorm=IdentityOp,
                k_layernorm=IdentityOp,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=Norm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
    )


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, ...]:
    """Both turned by their positions' angles, or back.

    Math: x cos + (-x2, x1) sin of the halves (x1, x2) of the channels: bit for bit megatron-core's
        `apply_rotary_pos_emb`, where it is not compiled; there each result is rounded once.
    Shapes: query [S, B, H, C], key [S, B, G, C], cos and sin [S, 1, 1, C] as in `RotaryTable`.
    """
    if back:
        sin = -sin
    # In place: on a CPU each new tensor costs as much as the arithmetic.
    return tuple(
        torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1).mul_(sin).add_(x * cos) for x in (query, key)
    )


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
    """Cosine and sine of the rotary angles [S, 1, 1, C] in the model's precision, one pair shared
    by all layers of a model on this rank; the first half of the sine is negated (see `rotate`).

    A plain object, not a module with buffers: it has no place in checkpoints.
    """

    def __init__(
        self, model: ModelConfig, seq_length: int, group: Any, dtype: torch.dtype, *, fuse: bool
    ) -> None:
        rotary = RotaryEmbedding(
            kv_channels=model.head_size,
            rotary_percent=1.0,
            rotary_base=model.rotary_base,
            use_cpu_initialization=True,
            cp_group=group,
        )
        angles = rotary.get_emb(seq_length)
        sin = angles.sin()
        sin[..., : model.head_size // 2].neg_()
        self.cos, self.sin = angles.cos().to(dtype), sin.to(dtype)
        self._rotate = compiled_rotate if fuse else rotate

    def rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key [S', B, ., C] of the first S' positions."""
        length, device = query.shape[0], query.device
        if self.cos.device != device:
            self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return _Rotation.apply(query, key, self.cos[:length], self.sin[:length], self._rotate)


class ModelParts:
    """What the layers of one model share on this rank: config, groups, rotary table, vocabulary,
    and the attention mask of the micro-batch at hand.

    Args:
        groups: `tp` and `cp` process groups; the teacher's are this rank alone.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        vocab_size: int,
        seq_length: int,
        position_rows: int,
        groups: ProcessGroupCollection,
        sequence_parallel: bool,
        dtype: torch.dtype,
        recompute: bool = False,
        gradient_accumulation_fusion: bool = False,
    ) -> None:
        self.model = model
        self.seq_length = seq_length
        self.groups = groups
        self.tp_size, self.tp_rank = groups.tp.size(), groups.tp.rank()
        self.sequence_parallel = sequence_parallel
        self.recompute = recompute
        self.config = transformer_config(
            model,
            tp_size=self.tp_size,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            gradient_accumulation_fusion=gradient_accumulation_fusion,
        )
        self.vocab_size = vocab_size
        self.padded_vocab = padded_vocab(model, vocab_size, self.tp_size)
        self.position_rows = position_rows
        uses_rope = model.position_embedding_type == "rope"
        self.rotary = (
            RotaryTable(model, seq_length, groups.cp, dtype, fuse=self.config.bias_dropout_fusion)
            if uses_rope
            else None
        )
        self.prefix_masks = PrefixMasks(seq_length, dtype)

    @property
    def vocab(self) -> VocabShard:
        return VocabShard.of_rank(
            size=self.vocab_size,
            padded_size=self.padded_vocab,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
        )


class Embedding(nn.Module):
    """tokens [B, S] -> hidden [S, B, D], or this rank's [S/tp, B, D] under sequence parallelism."""

    canonical_name = "embedding"

    def __init__(self, parts: ModelParts) -> None:
        super().__init__()
        self.sequence_parallel = parts.sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            parts.padded_vocab,
            parts.model.hidden_size,
            init_method=lambda weight: None,
            reduce_scatter_embeddings=parts.sequence_parallel,
            config=parts.config,
            tp_group=parts.groups.tp,
        )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        hidden: Tensor = self.word_embeddings(tokens_BS)
        return hidden if self.sequence_parallel else hidden.transpose(0, 1).contiguous()


class PositionEmbedding(nn.Module):
    """Adds the learned position rows; under sequence parallelism the rows of this rank's tokens."""

    canonical_name = "position_embedding"

    def __init__(self, parts: ModelParts) -> None:
        super().__init__()
        shape = (parts.position_rows, parts.model.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=parts.config.params_dtype))
        self.weight.sequence_parallel = parts.sequence_parallel  # type: ignore[attr-defined]
        self.tp_rank = parts.tp_rank if parts.sequence_parallel else 0

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        length = hidden_SBD.shape[0]
        start = self.tp_rank * length
        return hidden_SBD + self.weight[start : start + length, None, :]


class DecoderLayer(TransformerLayer):
    """One megatron-core transformer layer that takes and returns only the hidden state."""

    def __init__(self, parts: ModelParts, index: int) -> None:
        super().__init__(
            parts.config, layer_submodules(parts), layer_number=index + 1,
            pg_collection=parts.groups,
        )  # fmt: skip
        self.canonical_name = f"layers.{index}"
        self.prefix_masks = parts.prefix_masks
        self.recompute = parts.recompute

    def forward(self, hidden_SBD: Tensor) -> Tensor:  # type: ignore[override]
        mask_B1SS = self.prefix_masks.mask_B1SS
        if self.recompute and torch.is_grad_enabled():
            # The mask is an argument: when the backward runs the layer again, later micro-batches
            # have been forward and prefix_masks holds theirs. Nothing here draws random numbers.
            return checkpoint(
                self._layer, hidden_SBD, mask_B1SS, use_reentrant=False, preserve_rng_state=False
            )
        return self._layer(hidden_SBD, mask_B1SS)

    def _layer(self, hidden_SBD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        output_SBD, _ = super().forward(hidden_SBD, attention_mask=mask_B1SS)
        return output_SBD


class FinalNorm(nn.Module):
    """The normalisation before the output head, in and out `[S, B, D]`."""

    canonical_name = "final_layernorm"

    def __new__(cls, parts: ModelParts) -> nn.Module:  # type: ignore[misc]
        norm = Norm(parts.config, parts.model.hidden_size, eps=parts.model.layernorm_epsilon)
        norm.canonical_name = cls.canonical_name  # type: ignore[assignment]
        return norm


def body_layers(parts: ModelParts) -> list[tuple[type[nn.Module], tuple[Any, ...]]]:
    """Every layer between the word embedding and the output head, as (class, arguments)."""
    layers: list[tuple[type[nn.Module], tuple[Any, ...]]] = []
    if parts.model.position_embedding_type == "learned_absolute":
        layers.append((PositionEmbedding, (parts,)))
    layers += [(DecoderLayer, (parts, index)) for index in range(parts.model.num_layers)]
    return [*layers, (FinalNorm, (parts,))]


def canonical_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """This rank's parameters under the names of `model/weights.py`.

    DeepSpeed numbers the layers of a stage; here every layer carries its name, so that weights are
    found whatever the pipeline split. A tied weight appears once.
    """
    found: dict[str, nn.Parameter] = {}
    for layer in module.modules():
        prefix = getattr(layer, "canonical_name", None)
        if prefix is not None:
            for name, parameter in layer.named_parameters():
                found[f"{prefix}.{name}"] = parameter
    return found
