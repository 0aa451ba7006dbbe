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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_salt.config.fields import ModelConfig
from megatron_salt.config.problems import ROPE_FACTORS, check_model
from megatron_salt.config.records import record_of

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
# Theirs -> ours. Of names for the same function the first one is written.
GELUS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
         "gelu_fast": "gelu_tanh"}  # fmt: skip
# Settings that may be null: what they are then follows from others.
DERIVED = ("num_query_groups", "kv_channels", "ffn_hidden_size")
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


def _object(fields: Fields, name: str) -> dict[str, Any]:
    found = fields.take_or_none(name) or {}
    if not isinstance(found, dict):
        fields.refuse(name, found, "an object is expected")
    return dict(found)


def read_rope(fields: Fields, share: float) -> dict[str, Any]:
    """Rotary settings of a ModelConfig, from the fields of transformers 4 or 5.

    Args:
        share: of the channels that turn, where the file does not say.
    Raises: ValueError for a rule that is not here, or two that contradict each other.
    """
    old = _object(fields, "rope_scaling")
    for name, before in (
        ("rope_theta", "rotary_emb_base"),
        ("partial_rotary_factor", "rotary_pct"),
    ):
        values = [each for each in map(fields.take_or_none, (name, before)) if each is not None]
        if len(set(values)) > 1:
            fields.refuse(before, values[1], f"{name} is {values[0]!r}")
        old |= {name: each for each in values}  # noqa: B035  one, or none
    new = _object(fields, "rope_parameters")
    for rope in (old, new):
        if (kind := rope.pop("type", None)) is not None:
            rope["rope_type"] = kind
    for name in set(old) & set(new):
        if old[name] != new[name]:
            fields.refuse(f"rope_parameters.{name}", new[name], f"elsewhere it is {old[name]!r}")
    rope = {**old, **new}
    kind, base = rope.pop("rope_type", "default"), rope.pop("rope_theta", 10000.0)
    share = rope.pop("partial_rotary_factor", share)
    names = {"default": (), "linear": ROPE_FACTORS[:1], "llama3": ROPE_FACTORS}.get(kind)
    if names is None or set(rope) != set(names):
        fields.refuse("rope_parameters", {"rope_type": kind, **rope}, "this rule is not known here")
    scaling = {name: float(rope[name]) for name in names or ()} or None
    return {"rotary_base": float(base), "rope_scaling": scaling, "rotary_percent": float(share)}


def write_rope(model: ModelConfig, share: float) -> dict[str, Any]:
    """The fields for transformers 4 and what reads like it, and those for transformers 5.

    Args:
        share: of the channels that turn, where the file does not say.
    """
    scaling: dict[str, Any] = dict(model.rope_scaling or {})
    if len(scaling) > 1:
        scaling[ROPE_FACTORS[-1]] = int(scaling[ROPE_FACTORS[-1]])  # a number of positions
    new = {"rope_type": {0: "default", 1: "linear"}.get(len(scaling), "llama3"), **scaling}
    old = {"rope_theta": model.rotary_base, "rope_scaling": new if scaling else None}
    if share != 1.0:
        old |= {"rotary_pct": model.rotary_percent, "rotary_emb_base": model.rotary_base}
        new = {"partial_rotary_factor": model.rotary_percent, **new}
    return {**old, "rope_parameters": {"rope_theta": model.rotary_base, **new}}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class of transformers, and how it is ours."""

    architecture: str
    style: Mapping[str, Sequence[Any]]
    """Settings of a ModelConfig with the values that the class can be; the others are sizes."""
    fields: Mapping[str, str]
    """Setting -> field, of the same meaning."""
    fixed: Mapping[str, Any]
    """Fields with the only value that our layers compute."""
    defaults: Mapping[str, Any]
    """Of fields that a config.json may leave out: what the class then takes."""
    rotary_percent: float = 1.0
    """Share of the channels that turn, where the file does not say."""
    longest: str = "max_position_embeddings"
    """Field with the longest sequence, in tokens."""
    weights: Mapping[str, tuple[str, str]]
    """Our module -> (layout, their modules between spaces); {} is the number of the layer."""
    buffers: str
    """Pattern of stored tensors that are no weights."""
    optional_prefix: str = ""
    """Of their names, which some folders leave out."""

    def read(self, fields: Fields) -> tuple[ModelConfig, int, int]:
        """Settings, rows of the vocabulary and longest sequence.

        Raises: ValueError naming a field that cannot be converted.
        """
        fields.expect(**self.fixed)
        found = {
            ours: fields.take_or_none(theirs) if ours in DERIVED else fields.take(theirs)
            for ours, theirs in self.fields.items()
        }
        found["untie_embeddings_and_output_weights"] = not fields.take("tie_word_embeddings")
        rows, longest = fields.take("vocab_size"), fields.take(self.longest)
        if (kind := found.get("activation")) is not None:
            if kind not in GELUS:
                fields.refuse(self.fields["activation"], kind, f"known are {', '.join(GELUS)}")
            found["activation"] = GELUS[kind]
        if set(fields.take_or_none("layer_types") or ()) - {"full_attention"}:
            fields.refuse("layer_types", "not full_attention", "here a token sees all before it")
        # Within its window attention sees all, so longer sequences are what has to be refused. With
        # use_sliding_window, which Qwen has, there is none.
        if {"sliding_window", "use_sliding_window"} & {*self.defaults, *self.fixed}:
            window = fields.take_or_none("sliding_window")
            if "use_sliding_window" not in self.fixed:
                longest = min(longest, window or longest)
        if "rope" in self.style["position_embedding_type"]:
            found |= read_rope(fields, self.rotary_percent)
        else:
            found["max_position_embeddings"] = longest
        fields.finish()
        only = {name: values[0] for name, values in self.style.items()}
        model = ModelConfig(**{**only, **found})
        if wrong := self.differences(model):
            raise ValueError(f"{fields.source}: {'; '.join(wrong)}{OTHERWISE}")
        return model, rows, longest

    def write(self, model: ModelConfig, rows: int, longest: int) -> dict[str, Any]:
        """The fields of a config.json, the inverse of `read`."""
        values = model.sizes()
        values["activation"] = {ours: kind for kind, ours in reversed(GELUS.items())}.get(
            model.activation
        )
        return {
            "vocab_size": rows,
            self.longest: longest,
            **{theirs: values[ours] for ours, theirs in self.fields.items()},
            **self.fixed,
            **({} if self.longest == "n_positions" else write_rope(model, self.rotary_percent)),
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "initializer_range": model.init_method_std,
        }

    def differences(self, model: ModelConfig) -> list[str]:
        """What keeps a model from being of this family, setting by setting."""
        wrong = [
            f"model.{name} = {getattr(model, name)!r}, not {' or '.join(map(repr, values))}"
            for name, values in self.style.items()
            if getattr(model, name) not in values
        ]
        if "num_query_groups" not in self.fields:
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


def _llama(
    architecture: str, fixed: Mapping[str, Any], defaults: Mapping[str, Any], **style: bool
) -> Family:
    return Family(
        architecture=architecture,
        style={
            "normalization": ["RMSNorm"], "activation": ["swiglu"],
            "position_embedding_type": ["rope"], "rotary_percent": [1.0],
            **{name: [style.get(name, False)] for name in ("add_qkv_bias", "qk_layernorm")},
            "add_bias_linear": [False], "parallel_residual": [False],
        },
        fields={
            **_COMMON, "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim",
            "layernorm_epsilon": "rms_norm_eps",
        },
        fixed={"hidden_act": "silu", **fixed},
        defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-6, **defaults},
        weights=_LLAMA_WEIGHTS, buffers=r".*rotary_emb\.inv_freq",
    )  # fmt: skip


_COMMON = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads", "ffn_hidden_size": "intermediate_size",
}  # fmt: skip
_GELU_STYLE: dict[str, list[Any]] = {
    "normalization": ["LayerNorm"], "activation": ["gelu", "gelu_tanh"], "add_bias_linear": [True],
    "add_qkv_bias": [False], "qk_layernorm": [False],
}  # fmt: skip
# By `model_type`. Of two that fit a model the first one is what it is exported as.
FAMILIES: dict[str, Family] = {
    "llama": _llama("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}, {}),
    "mistral": _llama(
        "MistralForCausalLM", {}, {"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2": _llama(
        "Qwen2ForCausalLM", {"use_sliding_window": False}, {"num_key_value_heads": 32},
        add_qkv_bias=True,
    ),
    "qwen3": _llama(
        "Qwen3ForCausalLM", {"use_sliding_window": False, "attention_bias": False},
        {"num_key_value_heads": 32, "head_dim": 128}, qk_layernorm=True,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        style={**_GELU_STYLE, "position_embedding_type": ["learned_absolute"],
               "parallel_residual": [False]},
        fields={
            "num_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
            "ffn_hidden_size": "n_inner", "activation": "activation_function",
            "layernorm_epsilon": "layer_norm_epsilon",
        },
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
               "add_cross_attention": False, "reorder_and_upcast_attn": False},
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                  "tie_word_embeddings": True},
        longest="n_positions", weights=_GPT2_WEIGHTS,
        buffers=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", optional_prefix="transformer.",
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        style={**_GELU_STYLE, "position_embedding_type": ["rope"], "rope_scaling": [None]},
        fields={
            **_COMMON, "activation": "hidden_act", "layernorm_epsilon": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
        },
        fixed={"attention_bias": True},
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
                  "use_parallel_residual": True},
        rotary_percent=0.25, weights=_NEOX_WEIGHTS,
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
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{source}: model_type = {kind!r}: only {', '.join(FAMILIES)} can be "
            f"converted{OTHERWISE}"
        )
    family = FAMILIES[kind]
    fields = Fields(values, source, family.defaults, ignored)
    for name in ("quantization_config", "auto_map"):
        if (found := fields.take_or_none(name)) is not None:
            fields.refuse(name, found, "quantised weights and code of their own are not here")
    try:
        model, rows, longest = family.read(fields)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{source}: a field has another type than it should: {error}") from error
    if not all(type(each) is int and 1 <= each < 1 << 32 for each in (rows, longest)):
        raise ValueError(f"{source}: {rows} rows of the vocabulary, sequences of {longest} tokens")
    record_of(ModelConfig, dataclasses.asdict(model), source)
    try:
        check_model(model, longest)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return family, model, rows, longest


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
