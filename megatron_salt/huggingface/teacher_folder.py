"""A Hugging Face folder that is to teach: what it holds, and whether it can teach this run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_salt.checkpoint.manifest import CheckpointManifest, ModelRecord, installed_versions
from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.data.tokenizer import Tokenizer, check_reads, load_tokenizer
from megatron_salt.files.disk import sha256_of
from megatron_salt.files.json_files import read_object
from megatron_salt.teacher.find import check_same_teacher, check_teacher_fits, find_teacher

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What transformers' configs call the longest sequence that the model was made for.
LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def transformers_package() -> Any:
    """The package, imported when a run first needs it: that takes seconds.

    Raises: ValueError saying how to install it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"teacher.hf needs transformers ({error}): pip install megatron_salt[hf]"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def find_teacher_of(
    config: RunConfig, tokenizer: Tokenizer, resumed: CheckpointManifest | None
) -> tuple[Path, CheckpointManifest]:
    """The teacher that a run's settings name, of either kind: `find_teacher`, `find_hf_teacher`."""
    teacher, length = config.teacher, config.data.seq_length
    if teacher.hf is not None:
        return find_hf_teacher(teacher.hf, tokenizer, length, resumed)
    assert teacher.checkpoint is not None  # problems.teacher_problems
    return find_teacher(teacher.checkpoint, tokenizer, length, resumed, config.teacher_tp_size)


def find_hf_teacher(
    name: str, tokenizer: Tokenizer, seq_length: int, resumed: CheckpointManifest | None
) -> tuple[Path, CheckpointManifest]:
    """The folder, and a manifest that says of it what a checkpoint's own says.

    For rank 0 alone, which tells the others. Reads every byte of the weights, for their hashes.
    Raises: ValueError or FileNotFoundError naming the folder and what does not fit.
    """
    folder = Path(name)
    record = describe(folder, seq_length, tokenizer.vocab_size)
    names = weight_files(folder)
    theirs = load_tokenizer(folder)
    try:
        check_reads(f"teacher {folder}", theirs, "the student's data", tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}\ntake another teacher, or its tokenizer for the data") from None
    manifest = CheckpointManifest(
        model=replace(record, tokenizer_fingerprint=theirs.fingerprint), training=None,
        versions=installed_versions(), files={},
    )  # fmt: skip
    check_teacher_fits(folder, manifest, tokenizer.vocab_size, seq_length)
    for path in (folder / each for each in names):
        size, digest = path.stat().st_size, sha256_of(path)
        manifest.files[f"weights/{path.name}"] = {"bytes": size, "sha256": digest}
    check_same_teacher(folder, manifest, resumed)
    return folder, manifest


def weight_files(folder: Path, what: str = "teacher.hf") -> list[str]:
    """Names of the safetensors files that transformers would read.

    Args:
        what: has named the folder.
    Raises: ValueError if there are none, or one is missing.
    """
    if (folder / INDEX).is_file():
        places = read_object(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or any("/" in str(name) for name in places.values()):
            raise ValueError(f"{folder / INDEX}: weight_map must say for each weight which file")
        names = sorted(set(map(str, places.values())))
    else:
        names = [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    pickled = sorted(each.name for each in folder.glob("*.bin"))
    if missing and pickled:
        raise ValueError(
            f"{what} = {folder} has {pickled[0]}, a pickle, which can run any code when it is "
            "read: load it with transformers where you trust it, and save_pretrained writes "
            "safetensors"
        )
    if missing:
        raise ValueError(f"{what} = {folder}: {missing[0]} is missing")
    return names


def read_hf_config(folder: Path) -> Any:
    """The folder's config; code that lies in the folder is never run.

    Raises: ValueError naming the folder and what is wrong.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"teacher.hf = {folder}: no config.json there; name a Hugging Face folder")
    package = transformers_package()
    try:
        config = package.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"teacher.hf = {folder}: transformers cannot read it: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"teacher.hf = {folder}: its weights are quantised (quantization_config in "
            "config.json); save them dequantised, as bf16 or fp32"
        )
    return config


def describe(folder: Path, seq_length: int, vocab_size: int) -> ModelRecord:
    """What the folder's config says of its model; no weight is read.

    Args:
        seq_length: what the run reads, the longest length of a model that knows no longest.
        vocab_size: the student's, whose columns of the head are used.
    Raises: ValueError as `read_hf_config`, or if transformers has no causal model of this kind.
    """
    config = read_hf_config(folder)
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = transformers_package().AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise ValueError(f"teacher.hf = {folder}: no causal language model: {error}") from error
    longest = [value for name in LONGEST if isinstance(value := getattr(text, name, None), int)]
    bos = getattr(text, "bos_token_id", None)
    return ModelRecord(
        name=folder.name, step=0, config=config_of_cost(model, text), vocab_size=vocab_size,
        num_positions=seq_length, seq_length=longest[0] if longest else seq_length,
        objective=["causal"], tokenizer_fingerprint="", precision=str(text.dtype), tp_size=1,
        pp_size=1, evaluation=None, bos=bos if isinstance(bos, int) and bos < vocab_size else None,
        parameters=sum(each.numel() for each in model.parameters()),
    )  # fmt: skip


def config_of_cost(model: Any, text: Any) -> ModelConfig:
    """A model of ours whose layers have as many weights as this one's, and so cost as much.

    Of a mixture of experts all weights count, though a token passes a few of them only.
    """
    body = model.base_model
    embeddings = sum(e.weight.numel() for e in body.modules() if isinstance(e, nn.Embedding))
    weights = sum(each.numel() for each in body.parameters()) - embeddings
    width, heads = text.hidden_size, getattr(text, "num_attention_heads", 1)
    head_size = getattr(text, "head_dim", None) or max(1, width // heads)
    attention = 4 * width * heads * head_size
    inner = (weights / text.num_hidden_layers - attention) / (2 * width)
    return ModelConfig(
        num_layers=text.num_hidden_layers, hidden_size=width, num_attention_heads=heads,
        kv_channels=head_size, ffn_hidden_size=max(1, round(inner)), activation="gelu",
        untie_embeddings_and_output_weights=not text.tie_word_embeddings,
    )  # fmt: skip
