"""Tiny random models of transformers, a folder each, with a tokenizer: what everybody publishes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
ROWS = 517  # of the vocabulary: more than the tokenizer's 509 tokens
SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
# Products this short are added up in one go, so that it is no matter whether the bias comes first,
# as in PyTorch's linear layer, or last, as in megatron-core's.
NEOX: dict[str, Any] = {**SIZES, "num_key_value_heads": None}
GPT2: dict[str, Any] = {"vocab_size": ROWS, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.5,
    "high_freq_factor": 3.0, "original_max_position_embeddings": 64,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
# name -> (class of transformers, fields of its config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "rms_norm_eps": 1e-5}),
    "llama-tied": ("Llama", {**SIZES, **TIED, "head_dim": 24}),
    "llama3": ("Llama", {**SIZES, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("Llama", {**SIZES, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 12345.5, "factor": 4.0}}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 96}),
    "qwen2": ("Qwen2", {**SIZES, **TIED}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 24}),
    "gpt2": ("GPT2", {**GPT2, "activation_function": "gelu_new", "n_positions": 128}),
    "gpt2-tanh": ("GPT2", {**GPT2, "activation_function": "gelu_pytorch_tanh", "n_positions": 128}),
    "gpt2-untied": ("GPT2", {**GPT2, "activation_function": "gelu", "n_positions": 128,
                             "tie_word_embeddings": False}),
    "pythia": ("GPTNeoX", {**NEOX, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    "neox-sequential": ("GPTNeoX", {**NEOX, **TIED, "use_parallel_residual": False,
                                    "rope_parameters": {"rope_type": "default",
                                                        "rope_theta": 10000.0,
                                                        "partial_rotary_factor": 1.0}}),
}  # fmt: skip


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of MODELS with random weights, none of which is what it is at initialisation."""
    import transformers

    family, fields = MODELS[name]
    given = {key: value for key, value in fields.items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**given)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(7)
    model = getattr(transformers, family + head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.05 * noise)
    return model.to(dtype).eval()


def save_model(model: Any, tokenizer: Path, folder: Path, **changes: Any) -> Path:
    """A folder as transformers saves it, with a tokenizer; `changes` to the fields of config.json,
    of which None takes one out."""
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    values = json.loads((folder / "config.json").read_text())
    values |= changes
    kept = {key: value for key, value in values.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def logits_of(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_BS).logits
