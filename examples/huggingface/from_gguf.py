"""A Hugging Face folder of a GGUF file: Llama's layers, and the tokenizer of SmolLM2.

    pip install -e ".[example-hf]"
    python examples/huggingface/from_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2/

A GGUF file holds weights, sizes and tokens under names of llama.cpp. What quantised weights mean is
computed in fp32 and written as fp32, so that no bit is lost: bf16 would round four in five of them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

# Modules of llama.cpp -> of transformers; {} is the number of the layer.
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
SPECIAL = 3  # the kind of tokens that no text is cut into


def their_name(name: str) -> str:
    """The name in transformers of a tensor. Raises: SystemExit for one that Llama has not."""
    number = re.match(r"blk\.(\d+)\.", name)
    module = name.removesuffix(".weight")
    if number:
        module = "blk.{}." + module[number.end() :]
    if module not in MODULES or not name.endswith(".weight"):
        raise SystemExit(f"from_gguf: error: no place for the tensor {name}: not a plain Llama")
    return MODULES[module].replace("{}", number[1] if number else "") + ".weight"


def unpermuted(weight_OD: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries or keys in the order of transformers.

    llama.cpp turns channels 2i and 2i + 1 of a head together, transformers i and i + C/2, C being
    its channels. So llama.cpp's converter lays the halves of a head's rows into each other.
    """
    pairs = weight_OD.reshape(heads, -1, 2, weight_OD.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight_OD.shape)


def make_config(values: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json. Raises: SystemExit for what is not a plain Llama."""
    kind = values["general.architecture"]
    scaled = [name for name in values if ".rope.scaling" in name]
    if kind != "llama" or scaled:
        raise SystemExit(f"from_gguf: error: {', '.join([kind, *scaled])}: not a plain Llama")

    def of(name: str) -> Any:
        return values[f"llama.{name}"]

    # The file has 32 bits of it; the shortest decimal that gives these is what was meant.
    epsilon = float(str(np.float32(of("attention.layer_norm_rms_epsilon"))))
    heads = of("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(values["tokenizer.ggml.tokens"]),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("embedding_length") // heads,
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": epsilon,
        "rope_theta": of("rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def make_tokenizer(values: dict[str, Any]) -> Any:
    """A `tokenizers.Tokenizer`: byte-level BPE in which each digit stands alone.

    Raises: SystemExit for one that cuts text in another way.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    way = values["tokenizer.ggml.model"], values.get("tokenizer.ggml.pre")
    if way != ("gpt2", "smollm"):
        raise SystemExit(f"from_gguf: error: the tokenizer is {way}: only SmolLM2's is known here")
    tokens, merges = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.merges"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    kinds = values["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return made


def write_folder(source: Path, target: Path) -> Path:
    """Make the folder. Raises: SystemExit naming what of the file cannot be converted."""
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    values = {name: field.contents() for name, field in reader.fields.items()}
    by_name = {their_name(tensor.name): tensor for tensor in reader.tensors}
    config = make_config(values, tied="lm_head.weight" not in by_name)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for name, tensor in by_name.items():
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if module := next((each for each in heads if each in name), None):
            weight = unpermuted(weight, heads[module])
        weights[name] = torch.from_numpy(weight.copy())  # of a file that is mapped read-only
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(values).save(str(target / "tokenizer.json"))
    text = json.dumps(config, indent=2) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="FILE.gguf")
    parser.add_argument("target", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    print(write_folder(arguments.source, arguments.target))


if __name__ == "__main__":
    main()
