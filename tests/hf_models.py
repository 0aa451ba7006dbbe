"""Tiny models of transformers with random weights, far enough from zero to tell rounding apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 509
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "gemma2": _GROUPED,
    "cohere": _COMMON,
    "granite": {**_GROUPED, "logits_scaling": 3.0},
    "phi": _COMMON,
    "gptj": {**_GPT, "rotary_dim": 4, "n_embd": 36},
    "gpt2": _GPT,
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "olmo2": _COMMON,
    "gemma": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gpt_neox": _COMMON,
    "falcon": _COMMON,
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def make_hf_model(family: str, **changes: Any) -> Any:
    """In fp32 and evaluation mode; no weight, of norms and biases either, is left as it starts."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0).add_(torch.randn_like(weight) * (0.1 if weight.ndim == 1 else 0.0))
    return model


def save_hf_model(model: Any, folder: Path, tokenizer: Path | None = None) -> Path:
    """As `save_pretrained` does, with a sentencepiece tokenizer beside it."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder
