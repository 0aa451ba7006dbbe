"""Families of Hugging Face models that are ours by another name: fields, weights, layouts.

Letters: D hidden, H query heads, G key/value heads, C channels of a head, F inner MLP width. Our
layouts are megatron-core's: `linear_qkv` holds, for each of G groups, its H/G query heads, then its
key, then its value; `linear_fc1` holds the gate above what it gates. Both sides turn channel i with
channel i + C/2, so nothing is permuted. Source: the classes of transformers 5, against which
tests/unit/huggingface compares logits bit for bit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_salt.config.fields import ModelConfig
from megatron_salt.config.problems import ROPE_FACTORS

# Fields that say nothing about what the model computes from tokens, or only while it trains there.
HARMLESS = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "attn_pdrop",
    "bos_token_id", "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label",
    "initializer_range", "is_decoder", "label2id", "max_window_layers", "model_type", "n_ctx",
    "output_past", "pad_token_id", "pretraining_tp", "resid_pdrop", "return_dict",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "task_specific_params", "torch_dtype", "transformers_version",
    "unk_token_id", "use_cache",
})  # fmt: skip
TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
OTHERWISE = "; as a teacher it may work through teacher.hf, which runs the class itself"


class Fields:
    """A config.json of which every field must be asked for, known to be harmless, or as it should.

    Args:
        defaults: what its class takes for a field that the file leaves out.
        ignored: further fields that somebody has said are harmless.
    """

    def __init__(
        self, values: Mapping[str, Any], source: str, defaults: Mapping[str, Any],
        ignored: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.source, self._defaults = source, defaults
        passed_over = HARMLESS | set(ignored)
        self._left = {name: value for name, value in values.items() if name not in passed_over}

    def take(self, name: str, default: Any = None) -> Any:
        """A field, or what stands for it. Raises: ValueError if nothing does."""
        value = self.take_or_none(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.source}: the field {name} is missing")
        return value

    def take_or_none(self, name: str) -> Any:
        """A field, which may be null; left out, its class's default."""
        return self._left.pop(name, self._defaults.get(name))

    def expect(self, **values: Any) -> None:
        """Raise ValueError where a field has another value than the one that our layers compute."""
        for name, value in values.items():
            found = self._left.pop(name, None)
            if found is not None and found != value:
                self.refuse(name, found, f"only {value!r} can be converted")

    def refuse(self, name: str, value: Any, why: str) -> None:
        raise ValueError(f"{self.source}: {name} = {value!r}: {why}{OTHERWISE}")

    def finish(self) -> None:
        """Raise ValueError naming the fields that nobody has asked for; null is as good as none."""
        left = {name: value for name, value in sorted(self._left.items()) if value is not None}
        if left:
            found = ", ".join(f"{name} = {value!r}" for name, value in left.items())
            raise ValueError(
                f"{self.source}: what {found} would change is not known here. If it changes "
                f"nothing of what the model computes, name it with --ignore-field{OTHERWISE}"
            )


def read_rope(fields: Fields) -> dict[str, Any]:
    """`rotary_base` and `rope_scaling` of a ModelConfig, from the fields of transformers 4 or 5.

    Raises: ValueError for a rule that is not here, or two that contradict each other.
    """
    old = dict(fields.take_or_none("rope_scaling") or {})
    theta = fields.take_or_none("rope_theta") or fields.take_or_none("rotary_emb_base")
    if theta is not None:
        old["rope_theta"] = theta
    new = dict(fields.take_or_none("rope_parameters") or {})
    for rope in (old, new):
        kind = rope.pop("type", rope.get("rope_type"))
        if kind is not None:
            rope["rope_type"] = kind
    for name in set(old) & set(new):
        if old[name] != new[name]:
            fields.refuse(f"rope_parameters.{name}", new[name], f"elsewhere it is {old[name]!r}")
    rope = {**old, **new}
    kind, base = rope.pop("rope_type", "default"), float(rope.pop("rope_theta", 10000.0))
    share = rope.pop("partial_rotary_factor", None)
    names = {"default": (), "linear": ROPE_FACTORS[:1], "llama3": ROPE_FACTORS}.get(kind)
    if names is None or set(rope) != set(names):
        fields.refuse("rope_parameters", {"rope_type": kind, **rope}, "this rule is not known here")
    scaling = {name: float(rope[name]) for name in names or ()}
    found: dict[str, Any] = {"rotary_base": base, "rope_scaling": scaling or None}
    if share is not None:
        found["rotary_percent"] = float(share)
    return found


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The fields for transformers 4 and what reads like it, and those for transformers 5."""
    scaling: dict[str, Any] = dict(model.rope_scaling or {})
    if "original_max_position_embeddings" in scaling:
        name = "original_max_position_embeddings"
        scaling[name] = int(scaling[name])
    kinds = {0: "default", 1: "linear"}
    new = {"rope_type": kinds.get(len(scaling), "llama3"), **scaling}
    return {
        "rope_theta": model.rotary_base,
        "rope_scaling": new if scaling else None,
        "rope_parameters": {"rope_theta": model.rotary_base, **new},
    }


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class of transformers, and how it is ours."""

    architecture: str
    style: Mapping[str, Sequence[Any]]
    """Settings of a ModelConfig with the values that the class can be; the others are sizes."""
    defaults: Mapping[str, Any]
    """Of fields that a config.json may leave out."""
    read: Callable[[Fields], dict[str, Any]]
    """Fields to settings. It also gives `vocab_size` and `longest`, tokens of a sequence."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Settings to fields, without those of the vocabulary."""
    weights: Mapping[str, tuple[str, str]]
    """Our module -> (layout, their modules between spaces); {} is the number of the layer."""
    buffers: str
    """Pattern of stored tensors that are no weights."""
    optional_prefix: str = ""
    """Of their names, which some folders leave out."""

    def differences(self, model: ModelConfig) -> list[str]:
        """What keeps a model from being of this family, setting by setting."""
        wrong = [
            f"model.{name} = {getattr(model, name)!r}, not {' or '.join(map(repr, values))}"
            for name, values in self.style.items()
            if getattr(model, name) not in values
        ]
        if self.weights["layers.{}.self_attention.linear_qkv"][0] != "qkv":
            if model.query_groups != model.num_attention_heads:
                wrong.append(f"model.num_query_groups = {model.query_groups}, not one per head")
            if model.head_size * model.num_attention_heads != model.hidden_size:
                wrong.append(f"model.kv_channels = {model.head_size}, not hidden_size / heads")
        return wrong

    def theirs(self, name: str) -> tuple[str, list[str]]:
        """The layout of one of our weights, and the names of what it is made of."""
        module, _, kind = name.rpartition(".")
        number = re.match(r"layers\.(\d+)\.", module)
        if number:
            module = "layers.{}." + module[number.end() :]
        layout, modules = self.weights[module]
        index = number[1] if number else ""
        return layout, [f"{each.replace('{}', index)}.{kind}" for each in modules.split()]


def _rows_by_group(model: ModelConfig) -> list[int]:
    """Rows of queries, key and value in a group."""
    heads = model.num_attention_heads // model.query_groups
    return [heads * model.head_size, model.head_size, model.head_size]


def to_ours(layout: str, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """One of our weights from what it is made of; see `Family.weights` for the layouts."""
    if layout.startswith("conv"):  # [in, out]
        theirs = [each.T if each.ndim == 2 else each for each in theirs]
    if layout == "conv_qkv":
        theirs = theirs[0].chunk(3)
    if layout.endswith("qkv"):
        grouped = [each.reshape(model.query_groups, -1, *each.shape[1:]) for each in theirs]
        return torch.cat(grouped, dim=1).flatten(0, 1).contiguous()
    return torch.cat(list(theirs)) if layout == "stacked" else theirs[0].contiguous()


def to_theirs(layout: str, ours: Tensor, model: ModelConfig) -> list[Tensor]:
    """The inverse of `to_ours`."""
    parts = [ours]
    if layout == "stacked":
        parts = list(ours.chunk(2))
    elif layout.endswith("qkv"):
        grouped = ours.reshape(model.query_groups, -1, *ours.shape[1:])
        parts = [each.flatten(0, 1) for each in grouped.split(_rows_by_group(model), dim=1)]
    if layout == "conv_qkv":
        parts = [torch.cat(parts)]
    if layout.startswith("conv"):
        parts = [each.T if each.ndim == 2 else each for each in parts]
    return [each.contiguous() for each in parts]


def _read_llama(fields: Fields, *, has_window: bool = False) -> dict[str, Any]:
    """Llama, Mistral, Qwen2 and Qwen3, which differ in their style alone."""
    fields.expect(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
    kinds = set(fields.take_or_none("layer_types") or ())
    if kinds - {"full_attention"}:
        fields.refuse("layer_types", sorted(kinds), "here every token sees all before it")
    # Within its window attention sees all, so longer sequences are what has to be refused.
    longest, window = fields.take("max_position_embeddings"), fields.take_or_none("sliding_window")
    if has_window and window is not None:
        longest = min(longest, window)
    rope = read_rope(fields)
    if rope.pop("rotary_percent", 1.0) != 1.0:
        fields.refuse("partial_rotary_factor", "below 1", "in this class all channels turn")
    heads = fields.take("num_attention_heads")
    return {
        "num_layers": fields.take("num_hidden_layers"),
        "hidden_size": fields.take("hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": fields.take("num_key_value_heads", heads),
        "kv_channels": fields.take_or_none("head_dim"),
        "ffn_hidden_size": fields.take("intermediate_size"),
        "layernorm_epsilon": fields.take("rms_norm_eps"),
        "untie_embeddings_and_output_weights": not fields.take("tie_word_embeddings"),
        "vocab_size": fields.take("vocab_size"),
        "longest": longest,
        **rope,
    }


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn_size,
        "rms_norm_eps": model.layernorm_epsilon,
        "hidden_act": "silu",
        **write_rope(model),
    }


def _read_gelu(fields: Fields, name: str) -> str:
    value = fields.take(name)
    if value not in ("gelu", *TANH_GELUS):
        fields.refuse(name, value, f"known are gelu, {', '.join(TANH_GELUS)}")
    return "gelu" if value == "gelu" else "gelu_tanh"


def _write_gelu(model: ModelConfig) -> str:
    return "gelu" if model.activation == "gelu" else TANH_GELUS[0]


def _read_gpt2(fields: Fields) -> dict[str, Any]:
    fields.expect(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
        reorder_and_upcast_attn=False,
    )  # fmt: skip
    positions = fields.take("n_positions")
    return {
        "num_layers": fields.take("n_layer"),
        "hidden_size": fields.take("n_embd"),
        "num_attention_heads": fields.take("n_head"),
        "ffn_hidden_size": fields.take_or_none("n_inner"),
        "max_position_embeddings": positions,
        "activation": _read_gelu(fields, "activation_function"),
        "layernorm_epsilon": fields.take("layer_norm_epsilon"),
        "untie_embeddings_and_output_weights": not fields.take("tie_word_embeddings"),
        "vocab_size": fields.take("vocab_size"),
        "longest": positions,
    }


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "activation_function": _write_gelu(model),
        "layer_norm_epsilon": model.layernorm_epsilon,
    }


def _read_neox(fields: Fields) -> dict[str, Any]:
    fields.expect(attention_bias=True)
    share = fields.take_or_none("rotary_pct")
    rope = read_rope(fields)
    if share is not None and rope.get("rotary_percent", share) != share:
        fields.refuse("rotary_pct", share, f"rope_parameters has {rope['rotary_percent']}")
    rope.setdefault("rotary_percent", 0.25 if share is None else float(share))
    return {
        "num_layers": fields.take("num_hidden_layers"),
        "hidden_size": fields.take("hidden_size"),
        "num_attention_heads": fields.take("num_attention_heads"),
        "ffn_hidden_size": fields.take("intermediate_size"),
        "activation": _read_gelu(fields, "hidden_act"),
        "layernorm_epsilon": fields.take("layer_norm_eps"),
        "parallel_residual": fields.take("use_parallel_residual"),
        "untie_embeddings_and_output_weights": not fields.take("tie_word_embeddings"),
        "vocab_size": fields.take("vocab_size"),
        "longest": fields.take("max_position_embeddings"),
        **rope,
    }


def _write_neox(model: ModelConfig) -> dict[str, Any]:
    rope = write_rope(model)
    rope["rope_parameters"]["partial_rotary_factor"] = model.rotary_percent
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "hidden_act": _write_gelu(model),
        "layer_norm_eps": model.layernorm_epsilon,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
        "rotary_pct": model.rotary_percent,
        "rotary_emb_base": model.rotary_base,
        **rope,
    }


_LAYER, _ATTENTION = "layers.{}.", "layers.{}.self_attention."
_LLAMA_WEIGHTS = {
    "embedding.word_embeddings": ("copy", "model.embed_tokens"),
    _LAYER + "input_layernorm": ("copy", "model.layers.{}.input_layernorm"),
    _ATTENTION + "linear_qkv": ("qkv", " ".join(
        f"model.layers.{{}}.self_attn.{each}_proj" for each in "qkv")),
    _ATTENTION + "q_layernorm": ("copy", "model.layers.{}.self_attn.q_norm"),
    _ATTENTION + "k_layernorm": ("copy", "model.layers.{}.self_attn.k_norm"),
    _ATTENTION + "linear_proj": ("copy", "model.layers.{}.self_attn.o_proj"),
    _LAYER + "pre_mlp_layernorm": ("copy", "model.layers.{}.post_attention_layernorm"),
    _LAYER + "mlp.linear_fc1": (
        "stacked", "model.layers.{}.mlp.gate_proj model.layers.{}.mlp.up_proj"),
    _LAYER + "mlp.linear_fc2": ("copy", "model.layers.{}.mlp.down_proj"),
    "final_layernorm": ("copy", "model.norm"),
    "output_layer": ("copy", "lm_head"),
}  # fmt: skip
_GPT2_WEIGHTS = {
    "embedding.word_embeddings": ("copy", "transformer.wte"),
    "position_embedding": ("copy", "transformer.wpe"),
    _LAYER + "input_layernorm": ("copy", "transformer.h.{}.ln_1"),
    _ATTENTION + "linear_qkv": ("conv_qkv", "transformer.h.{}.attn.c_attn"),
    _ATTENTION + "linear_proj": ("conv", "transformer.h.{}.attn.c_proj"),
    _LAYER + "pre_mlp_layernorm": ("copy", "transformer.h.{}.ln_2"),
    _LAYER + "mlp.linear_fc1": ("conv", "transformer.h.{}.mlp.c_fc"),
    _LAYER + "mlp.linear_fc2": ("conv", "transformer.h.{}.mlp.c_proj"),
    "final_layernorm": ("copy", "transformer.ln_f"),
    "output_layer": ("copy", "lm_head"),
}
_NEOX_WEIGHTS = {
    "embedding.word_embeddings": ("copy", "gpt_neox.embed_in"),
    _LAYER + "input_layernorm": ("copy", "gpt_neox.layers.{}.input_layernorm"),
    # Head by head already: query, key, value.
    _ATTENTION + "linear_qkv": ("copy", "gpt_neox.layers.{}.attention.query_key_value"),
    _ATTENTION + "linear_proj": ("copy", "gpt_neox.layers.{}.attention.dense"),
    _LAYER + "pre_mlp_layernorm": ("copy", "gpt_neox.layers.{}.post_attention_layernorm"),
    _LAYER + "mlp.linear_fc1": ("copy", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    _LAYER + "mlp.linear_fc2": ("copy", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "final_layernorm": ("copy", "gpt_neox.final_layer_norm"),
    "output_layer": ("copy", "embed_out"),
}


def _llama_style(*, add_qkv_bias: bool = False, qk_layernorm: bool = False) -> dict[str, Any]:
    return {
        "normalization": ["RMSNorm"], "activation": ["swiglu"], "position_embedding_type": ["rope"],
        "rotary_percent": [1.0], "add_bias_linear": [False], "add_qkv_bias": [add_qkv_bias],
        "qk_layernorm": [qk_layernorm], "parallel_residual": [False],
    }  # fmt: skip


def _gelu_style(position: str, **style: Sequence[Any]) -> dict[str, Any]:
    return {
        "normalization": ["LayerNorm"], "activation": ["gelu", "gelu_tanh"],
        "position_embedding_type": [position], "add_bias_linear": [True], "add_qkv_bias": [False],
        "qk_layernorm": [False], **style,
    }  # fmt: skip


def _llama(architecture: str, style: dict[str, Any], **others: Any) -> Family:
    return Family(
        architecture=architecture, style=style, read=_read_llama, write=_write_llama,
        weights=_LLAMA_WEIGHTS, buffers=r".*rotary_emb\.inv_freq", **others,
    )  # fmt: skip


_UNTIED = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}
# By `model_type`. Of two that fit a model the first one is what it is exported as.
FAMILIES: dict[str, Family] = {
    "llama": _llama("LlamaForCausalLM", _llama_style(), defaults=_UNTIED),
    "mistral": dataclasses.replace(
        _llama(
            "MistralForCausalLM", _llama_style(),
            defaults={**_UNTIED, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        read=partial(_read_llama, has_window=True),
    ),
    "qwen2": _llama(
        "Qwen2ForCausalLM", _llama_style(add_qkv_bias=True),
        defaults={**_UNTIED, "num_key_value_heads": 32},
    ),
    "qwen3": _llama(
        "Qwen3ForCausalLM", _llama_style(qk_layernorm=True),
        defaults={**_UNTIED, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        style=_gelu_style("learned_absolute", parallel_residual=[False]),
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                  "tie_word_embeddings": True},
        read=_read_gpt2, write=_write_gpt2, weights=_GPT2_WEIGHTS,
        buffers=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", optional_prefix="transformer.",
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM", style=_gelu_style("rope", rope_scaling=[None]),
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
                  "use_parallel_residual": True},
        read=_read_neox, write=_write_neox, weights=_NEOX_WEIGHTS,
        buffers=r".*attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    ),
}  # fmt: skip


def read_config(
    values: Mapping[str, Any], source: str, ignored: Iterable[str] = ()
) -> tuple[Family, ModelConfig, int, int]:
    """A config.json's family, our settings, rows of its vocabulary and longest sequence in tokens.

    Raises: ValueError naming the field that cannot be converted, and what it is.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{source}: model_type = {kind!r}: only {', '.join(FAMILIES)} can be "
            f"converted{OTHERWISE}"
        )
    family = FAMILIES[kind]
    fields = Fields(values, source, family.defaults, ignored)
    for name in ("quantization_config", "auto_map"):
        if (found := fields.take_or_none(name)) is not None:
            fields.refuse(name, found, "quantised weights and code of their own are not here")
    found = family.read(fields)
    fields.finish()
    rows, longest = found.pop("vocab_size"), found.pop("longest")
    only = {name: allowed[0] for name, allowed in family.style.items() if len(allowed) == 1}
    return family, ModelConfig(**{**only, **found}), rows, longest


def family_of(model: ModelConfig) -> tuple[str, Family]:
    """The family of Hugging Face models that a model is exported as.

    Raises: ValueError where there is none, naming the settings that keep it from the nearest one.
    """
    wrong = {kind: family.differences(model) for kind, family in FAMILIES.items()}
    position = model.position_embedding_type
    nearest = min(
        wrong,
        key=lambda kind: (
            len(wrong[kind]), position not in FAMILIES[kind].style["position_embedding_type"]
        ),
    )  # fmt: skip
    if wrong[nearest]:
        raise ValueError(
            "no class of transformers computes this model, so it cannot be exported: the nearest "
            f"is {FAMILIES[nearest].architecture}, but {'; '.join(wrong[nearest])}"
        )
    return nearest, FAMILIES[nearest]
