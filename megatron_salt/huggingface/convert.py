"""Hugging Face folders to checkpoints, and checkpoints to Hugging Face folders.

Only safetensors and JSON are read and written: no transformers, no pickle. Every weight keeps its
bits and its precision.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_salt.checkpoint.folder import resolve, write_model_manifest
from megatron_salt.checkpoint.manifest import (
    ModelRecord,
    read_checkpoint_manifest,
    tokenizer_folder,
)
from megatron_salt.checkpoint.weights import read_weights, write_weights
from megatron_salt.config.fields import ModelConfig
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_salt.files.disk import atomic_folder, check_new_folder, save_tensors
from megatron_salt.files.json_files import read_object
from megatron_salt.huggingface.families import (
    Family,
    family_of,
    read_config,
    to_ours,
    to_theirs,
)
from megatron_salt.huggingface.teacher_folder import INDEX, SINGLE, weight_files
from megatron_salt.huggingface.tokenizer_export import export_tokenizer
from megatron_salt.model.weights import DTYPES, EMBEDDING, weight_table

CONFIG = "config.json"
PART_BYTES = 4 << 30
"""Weights of this size, or one that is larger, are in memory at a time and in one file."""


class StoredWeights:
    """The tensors of a Hugging Face folder, read one by one. Raises: as `weight_files`."""

    def __init__(self, folder: Path, family: Family, stack: ExitStack) -> None:
        self.folder = folder
        files: dict[str, Any] = {}
        for file_name in weight_files(folder, "--from"):
            try:
                file = stack.enter_context(safe_open(folder / file_name, framework="pt"))
            except SafetensorError as error:
                raise ValueError(
                    f"{folder / file_name}: not a safetensors file: {error}"
                ) from error
            files |= dict.fromkeys(file.keys(), file)
        prefix = family.optional_prefix
        bare = bool(prefix) and not any(name.startswith(prefix) for name in files)
        self._places = {
            (prefix + name if bare and not name.startswith("lm_head") else name): (name, file)
            for name, file in files.items()
            if not re.fullmatch(family.buffers, name)
        }

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def take(self, name: str) -> Tensor:
        """A tensor, once. Raises: ValueError if it is not there, or of a precision unknown here."""
        if name not in self._places:
            raise ValueError(f"{self.folder}: the tensor {name} is missing")
        stored_name, file = self._places.pop(name)
        tensor: Tensor = file.get_tensor(stored_name)
        if tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"{self.folder}: {name} is stored as {tensor.dtype}; only {', '.join(DTYPES)} can "
                "be converted"
            )
        return tensor

    def check_all_taken(self) -> None:
        """Raise ValueError naming tensors that this model has no place for."""
        if self._places:
            names = sorted(self._places)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"{self.folder}: no place for {', '.join(names[:5])}{more}: the model is not what "
                f"its {CONFIG} says"
            )


def import_folder(source: Path, target: Path, ignored: Iterable[str] = ()) -> ModelRecord:
    """Make a checkpoint of a Hugging Face folder: it teaches, tags, is scored and starts students.

    Beside what every checkpoint has it holds `model.yaml`: settings for a student of this shape.

    Args:
        ignored: fields of config.json that change nothing of what the model computes.
    Memory: the weights of one part.
    Raises: ValueError or FileNotFoundError naming file, field or tensor. `target` is there as a
        whole or not at all.
    """
    check_new_folder(target)
    values = read_object(source / CONFIG)
    family, model, rows, longest = read_config(values, str(source / CONFIG), ignored)
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows} rows: it "
            f"cannot read tokens from id {rows} on; take them out of the tokenizer's added_tokens, "
            "or save a model with resized embeddings"
        )
    positions = model.max_position_embeddings or longest
    bos = values.get("bos_token_id")
    with atomic_folder(target) as partial, ExitStack() as stack:
        stored = StoredWeights(source, family, stack)
        if model.num_layers > len(stored):  # before a table is made of all that they would have
            raise ValueError(
                f"{source / CONFIG}: {model.num_layers} layers, {source} has {len(stored)} tensors"
            )
        weights = _imported(stored, family, model, rows, positions)
        num_parts, dtype = 0, torch.float32
        for num_parts, part in enumerate(_in_parts(weights), 1):
            write_weights(partial, num_parts - 1, 0, part)
            dtype = part[EMBEDDING].dtype if EMBEDDING in part else dtype
        stored.check_all_taken()
        tokenizer.save(partial / "tokenizer")
        section = yaml.safe_dump({"model": dataclasses.asdict(model)}, sort_keys=False)
        (partial / "model.yaml").write_text(section, encoding="utf-8")
        record = ModelRecord(
            name=source.resolve().name, step=0, config=model, vocab_size=rows,
            num_positions=positions, seq_length=longest, objective=["causal"],
            tokenizer_fingerprint=tokenizer.fingerprint,
            precision={kind: name for name, kind in DTYPES.items()}[dtype],
            tp_size=1, pp_size=num_parts, evaluation=None,
            bos=bos if isinstance(bos, int) and bos < rows else None,
        )  # fmt: skip
        write_model_manifest(partial, record)
    return record


def _imported(
    stored: StoredWeights, family: Family, model: ModelConfig, rows: int, positions: int
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of ours. A head that a tied model has stored as well must be its embedding."""
    embedding = torch.empty(0)
    for name, spec in weight_table(model, rows, positions).items():
        layout, theirs = family.theirs(name)
        taken = [stored.take(each) for each in theirs]
        try:
            ours = to_ours(layout, taken, model)
        except RuntimeError as error:  # of a reshape
            shapes = [tuple(each.shape) for each in taken]
            raise ValueError(
                f"{stored.folder}: {' and '.join(theirs)} of {shapes} make no {name}: {error}"
            ) from error
        if tuple(ours.shape) != spec.shape:
            raise ValueError(
                f"{stored.folder}: {' and '.join(theirs)} make {tuple(ours.shape)} of {name}, and "
                f"{CONFIG} says {spec.shape}"
            )
        embedding = ours if name == EMBEDDING else embedding
        yield name, ours
    head = f"{family.weights['output_layer'][1]}.weight"
    if not model.untie_embeddings_and_output_weights and head in stored:
        if not torch.equal(stored.take(head), embedding):
            raise ValueError(
                f"{stored.folder}: {head} is not the embedding, though {CONFIG} ties them: set "
                "tie_word_embeddings to false there if the head is a weight of its own"
            )


def _in_parts(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        if part and size + weight.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = weight
        size += weight.nbytes
    yield part


def check_exportable(model: ModelConfig, target: Path) -> tuple[str, Family]:
    """What a model is exported as.

    Raises: ValueError where no class of transformers computes it, or `target` is there already.
    """
    check_new_folder(target)
    return family_of(model)


def export_checkpoint(path: str, target: Path, tokenizer_as_is: bool = False) -> str:
    """Make a Hugging Face folder of a checkpoint, or of a run's newest one. Returns its class.

    Weights keep their precision and the vocabulary its real rows. Beginning and end of a text are
    our end of document.

    Args:
        tokenizer_as_is: copy its file, in place of files that transformers reads.
    Memory: all weights.
    Raises: ValueError naming checkpoint, setting or text of the tokenizer. `target` is there as a
        whole or not at all.
    """
    source = resolve(path, what="--from")
    manifest = read_checkpoint_manifest(source)
    about, model = manifest.model, manifest.model.config
    kind, family = check_exportable(model, target)
    tokenizer = load_tokenizer(tokenizer_folder(source, manifest))
    with atomic_folder(target) as partial:
        if tokenizer_as_is:
            tokenizer.save(partial)
        else:
            export_tokenizer(tokenizer, partial, longest=about.seq_length)
        full = read_weights(source, manifest)
        files: list[dict[str, Tensor]] = list(_in_parts(_exported(full, family, model)))
        index: dict[str, str] = {}
        for number, part in enumerate(files, 1):
            name = SINGLE
            if len(files) > 1:
                name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            save_tensors(partial / name, part, {"format": "pt"})
            index |= dict.fromkeys(part, name)
        if len(files) > 1:
            size = sum(weight.nbytes for part in files for weight in part.values())
            _write_json(partial / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
        dtype = str(full[EMBEDDING].dtype).removeprefix("torch.")
        _write_json(partial / CONFIG, _config(kind, family, about, tokenizer, dtype))
        ends = {name: tokenizer.eod for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(partial / "generation_config.json", {**ends, "_from_model_config": True})
    return family.architecture


def _exported(
    full: Mapping[str, Tensor], family: Family, model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in full.items():
        layout, theirs = family.theirs(name)
        # Halves of a weight share its memory, which safetensors does not write.
        parts = [each.clone() for each in to_theirs(layout, weight, model)]
        yield from zip(theirs, parts, strict=True)


def _config(
    kind: str, family: Family, about: ModelRecord, tokenizer: Tokenizer, dtype: str
) -> dict[str, Any]:
    learned = about.config.position_embedding_type == "learned_absolute"
    longest = about.num_positions if learned else about.seq_length
    return {
        "architectures": [family.architecture],
        "model_type": kind,
        **family.write(about.config, about.vocab_size, longest),
        # The names of transformers 4 and 5.
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": tokenizer.eod,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.eod,
        "use_cache": True,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
