"""The layers of student and teacher, from megatron-core's parts.

Letters: B micro-batch, S sequence, D width, H heads, V vocabulary, W its columns on this rank.
Between layers the hidden state is `[S, B, D]`, or `[S/tp, B, D]` under sequence parallelism.

Where megatron-core's local spec stops short this file and `attention.py` fill in: its torch norm
refuses sequence parallelism, its attention wants Transformer Engine.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_salt.config.fields import ModelConfig
from megatron_salt.kernels.vocab import VocabShard
from megatron_salt.model import attention
from megatron_salt.model.weights import padded_vocab
from megatron_salt.parallel.machine import fuses_operations

if not torch.cuda.is_available():
    # megatron-core allocates its sequence-parallel buffers and moves its rotary frequencies with
    # `device=torch.cuda.current_device()`. Without CUDA that call can only raise, so nothing that
    # works today changes; with this the same code runs on the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


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
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=model.is_gated,
        activation_func=ACTIVATIONS[model.activation],
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
        # megatron-core's fused GELU is a tanh approximation with constants of its own.
        bias_activation_fusion=fuse and model.is_gated,
        bias_dropout_fusion=fuse,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
    )


class Norm(nn.Module):
    """Factory with megatron-core's signature for torch's fused RMSNorm or LayerNorm.

    Under sequence parallelism each tensor-parallel rank normalises its own tokens, so its weight
    gradient is partial; by the mark `training/gradients.py` or a hook adds them up.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> nn.Module:
        kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for weight in norm.parameters():
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class HeadNorm(Norm):
    """`Norm` of the channels of a head, whose weight all heads share.

    Each tensor-parallel rank sees its own heads only, so the weight's gradient is partial even
    without sequence parallelism.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> nn.Module:
        norm = super().__new__(cls, config, hidden_size, eps)
        for weight in norm.parameters():
            weight.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]
        return norm


def layer_submodules(parts: ModelParts) -> TransformerLayerSubmodules:
    """megatron-core's local layer spec with our core attention and norm."""
    column, row = tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear
    backends = attention.device_attention_backends()
    head_norm = HeadNorm if parts.model.qk_layernorm else IdentityOp
    linears = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    if hasattr(MLP, "as_mlp_submodule"):  # megatron-core with it warns of a spec, at every layer
        mlp = partial(MLP.as_mlp_submodule, submodules=linears)
    else:
        mlp = ModuleSpec(module=MLP, submodules=linears)
    return TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=column,
                core_attention=ModuleSpec(
                    module=attention.SdpaCoreAttention,
                    params={"rotary": parts.rotary, "backends": backends},
                ),
                linear_proj=row,
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=Norm,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
    )


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
        num_positions: int,
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
        self.num_positions = num_positions
        self.rotary: attention.RotaryTable | None = None
        if model.position_embedding_type == "rope":
            fuse = self.config.bias_dropout_fusion
            self.rotary = attention.RotaryTable(model, seq_length, groups.cp, dtype, fuse=fuse)
        self.prefix_masks = attention.PrefixMasks(seq_length, dtype)
        self.cache: StaticInferenceContext | None = None
        """Keys and values of the positions before those at hand; only to generate text."""

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
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
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
        shape = (parts.num_positions, parts.model.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=parts.config.params_dtype))
        self.weight.sequence_parallel = parts.sequence_parallel  # type: ignore[attr-defined]
        self.parts = parts
        self.tp_rank = parts.tp_rank if parts.sequence_parallel else 0

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        length = hidden_SBD.shape[0]
        cache = self.parts.cache
        start = self.tp_rank * length if cache is None else cache.sequence_len_offset
        return hidden_SBD + self.weight[start : start + length, None, :]


class DecoderLayer(TransformerLayer):
    """One megatron-core transformer layer that takes and returns only the hidden state."""

    def __init__(self, parts: ModelParts, index: int) -> None:
        super().__init__(
            parts.config, layer_submodules(parts), layer_number=index + 1,
            pg_collection=parts.groups,
        )  # fmt: skip
        self.canonical_name = f"layers.{index}"
        self.parts, self.prefix_masks = parts, parts.prefix_masks
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
        if self.parts.model.parallel_residual:
            return self._parallel(hidden_SBD, mask_B1SS)
        try:
            output_SBD, _ = super().forward(
                hidden_SBD, attention_mask=mask_B1SS, inference_context=self.parts.cache
            )
        finally:
            # megatron-core 0.19 keeps the MLP's input here and drops it at its end, which a
            # recomputation does not reach: PyTorch stops it by an exception when it has enough. All
            # that it has made of the attention would stay until the layer's next forward.
            self.mlp_norm_manager = None
        return output_SBD

    def _parallel(self, hidden_SBD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        """Math: x + attention(norm_1(x)) + mlp(norm_2(x)); megatron-core has no such layer."""
        attended, attention_bias = self.self_attention(
            self.input_layernorm(hidden_SBD), mask_B1SS, inference_context=self.parts.cache
        )
        inner, mlp_bias = self.mlp(self.pre_mlp_layernorm(hidden_SBD))
        for part, bias in ((attended, attention_bias), (inner, mlp_bias)):
            hidden_SBD = hidden_SBD + (part if bias is None else part + bias)
        return hidden_SBD


class FinalNorm(nn.Module):
    """The normalisation before the output head, in and out `[S, B, D]`."""

    canonical_name = "final_layernorm"

    def __new__(cls, parts: ModelParts) -> nn.Module:  # type: ignore[misc]
        norm = Norm(parts.config, parts.model.hidden_size, eps=parts.model.layernorm_epsilon)
        norm.canonical_name = cls.canonical_name  # type: ignore[assignment]
        return norm


def transformer_layers(parts: ModelParts) -> list[tuple[type[nn.Module], tuple[Any, ...]]]:
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
