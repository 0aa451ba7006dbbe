"""Checkpoints of one model with more rows in its vocabulary, and tokenizers with more tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from edited import edit_manifest
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.model.weights import EMBEDDING, OUTPUT_LAYER


def add_tokens(path: Path, count: int) -> None:
    """Append control symbols to a sentencepiece model; without them it cuts text as before."""
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for number in range(count):
        model.pieces.add(piece=f"<more_{number}>", score=0.0, type=model.SentencePiece.CONTROL)
    path.write_bytes(model.SerializeToString())


def enlarged(
    run: Path, folder: Path, *, tokens: int = 0, rows: int = 0, tied: bool = False
) -> Path:
    """A checkpoint without a run: `run`'s newest, with so many tokens and random rows more. What
    the rows make of a hidden state outweighs all else. `tied`: without its output layer."""
    shutil.copytree(list_checkpoints(run)[-1], folder)
    model = json.loads((folder / "manifest.json").read_text())["model"]
    (weights,) = folder.glob("weights/*")
    add_tokens(folder / "tokenizer" / "tokenizer.model", tokens)
    content, size = load_file(weights), model["vocab_size"]
    more = torch.randn((rows, model["config"]["hidden_size"]), generator=torch.Generator())
    for name in (EMBEDDING, OUTPUT_LAYER):
        content[name] = torch.cat([content[name][:size], 9.0 * more.to(content[name].dtype)])
    if tied:
        del content[OUTPUT_LAYER]
    save_file(content, weights)
    model["vocab_size"] = size + rows
    model["config"]["untie_embeddings_and_output_weights"] = not tied
    model["evaluation"] = None
    edit_manifest(folder, lambda values: values.update(model=model, training=None))
    return folder
