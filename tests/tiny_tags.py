"""Tags without a model: their files and tables, made of numbers that a test chooses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_salt.data.manifest import bin_path, idx_path, read_dataset_manifest
from megatron_salt.data.scores import MASKED, SCORES, column, sequence_scores
from megatron_salt.data.selection import Rule, SequenceTable, read_table, select, write_table
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import (
    DataIdentity,
    FileRecord,
    ModelIdentity,
    TagManifest,
    TagOrigin,
    TagSettings,
    sequence_lengths,
    table_path,
    tag_manifest_path,
    tag_prefix,
)


def make_origin(
    *, data: DataIdentity | str = "corpus", tokenizer: str = "tok", model: str = "slm",
    window: int | None = None, top_k: int = 10, store: tuple[str, ...] = ("loss", "entropy"),
    sequences: int = 0, tokens: int = 0,
) -> TagOrigin:  # fmt: skip
    """An origin whose dataset, if it is a name, has hashes of that name."""
    if isinstance(data, str):
        data = DataIdentity(
            name=data, sequences=sequences, tokens=tokens, bin_bytes=2 * tokens,
            bin_sampled_sha256=f"bin of {data}", bin_sha256=None, idx_sha256=f"idx of {data}",
        )  # fmt: skip
    return TagOrigin(
        data=data,
        tokenizer_fingerprint=tokenizer,
        model=ModelIdentity(fingerprint=f"weights of {model}", step=7, name=f"{model}/step_7"),
        settings=TagSettings(
            window=window, max_length=16, top_k=top_k, store=store, precision="fp32",
            loss_impl="reference",
        ),
    )  # fmt: skip


def write_scores(prefix: Path, scores: Any, **origin: Any) -> Path:
    """A table whose sequences, of 10 tokens each, have these scores in every column."""
    values = np.asarray(scores, dtype=np.float32)
    number = np.arange(len(values), dtype=np.int64)
    columns = {
        "sequence": number,
        "start": 10 * number,
        "tokens": np.full_like(number, 10),
        "kept": np.where(np.isnan(values), 0, 5).astype(np.int64),
        **{column(score, masked): values for score in SCORES for masked in MASKED},
    }
    made = make_origin(sequences=len(values), tokens=10 * len(values), **origin)
    _write(prefix, SequenceTable(origin=made, columns=columns, rule={}))
    return prefix


def write_tags(
    prefix: Path, data: Path, *, window: int | None = None, seed: int = 0, model: str = "slm"
) -> TagManifest:
    """All files of tags of a dataset, consistent, of random losses; kept where they are small."""
    lengths = sequence_lengths(data)
    random = np.random.default_rng(seed)
    numbers = random.exponential(2.0, int(lengths.sum())).astype(np.float32)
    values = {"loss": numbers, "entropy": numbers[::-1].copy()}
    kept = numbers < 2.0
    sequences = Sequences.of(lengths, window)
    tokens = np.diff(sequences.bounds)
    running = np.concatenate([[0], np.cumsum(kept)])
    columns = {
        "sequence": np.arange(len(sequences)),
        "start": sequences.bounds[:-1],
        "tokens": tokens,
        "kept": np.diff(running[sequences.bounds]),
        **sequence_scores(values["loss"], kept, values["entropy"], tokens),
    }
    manifest = read_dataset_manifest(data)
    assert manifest is not None
    origin = make_origin(
        data=DataIdentity.of(data), tokenizer=manifest.tokenizer_fingerprint, window=window,
        model=model,
    )  # fmt: skip
    _write(prefix, SequenceTable(origin=origin, columns=columns, rule={}))
    stored = {"mask": kept.astype(np.uint8)}
    stored |= {kind: some.astype(np.float16).view(np.uint16) for kind, some in values.items()}
    for kind, some in stored.items():
        write_indexed(tag_prefix(prefix, kind), np.split(some, np.cumsum(lengths)[:-1]))
    return write_manifest(prefix, origin, int(kept.sum()))


def write_indexed(prefix: str | Path, documents: list[Any]) -> None:
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=documents[0].dtype.type)
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(idx_path(prefix)))


def write_manifest(prefix: Path, origin: TagOrigin, kept_tokens: int) -> TagManifest:
    """A manifest that fits the files which are there."""
    suffixes = [f"_{kind}{end}" for kind in ("mask", "loss", "entropy") for end in (".bin", ".idx")]
    suffixes.append("_sequences.parquet")
    manifest = TagManifest(
        origin=origin,
        sequences=len(read_table(table_path(prefix))),
        kept_tokens=kept_tokens,
        files={suffix: FileRecord.of(Path(f"{prefix}{suffix}")) for suffix in suffixes},
        versions={},
    )
    tag_manifest_path(prefix).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write(prefix: Path, table: SequenceTable) -> None:
    rule = Rule()
    scores = table.score(rule.score, rule.masked)
    chosen = select([scores], rule)[0]
    write_table(table_path(prefix), table.with_selection(scores, chosen, dataclasses.asdict(rule)))
