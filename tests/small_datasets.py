"""Datasets of a few documents, written without a worker process, and what megatron-core writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_salt.corpus.preprocess import new_builder, partial_dataset, publish_dataset
from megatron_salt.data.manifest import DatasetManifest, InputRecord
from megatron_salt.data.sources import Sources
from megatron_salt.data.tokenizer import load_tokenizer


def write_dataset(
    prefix: Path,
    tokenizer_path: Path,
    documents: Sequence[Sequence[int]],
    sources: Sequence[str] = (),
    *,
    append_eod: bool = True,
    bad_lines: int = 0,
) -> DatasetManifest:
    """A published dataset; sources are one a document, or none."""
    tokenizer = load_tokenizer(tokenizer_path)
    names = sorted(set(sources))
    of_documents = np.array([names.index(name) for name in sources], dtype=np.int32)
    record = InputRecord(name=f"{prefix.name}.jsonl", size_bytes=5, sha256="0" * 64)
    with partial_dataset(prefix, overwrite=False) as partial:
        builder = new_builder(partial, tokenizer.vocab_size)
        for tokens in documents:
            builder.add_document(tokens, [len(tokens)])
        return publish_dataset(
            partial, prefix, builder, tokenizer,
            Sources(names=names, of_documents=of_documents), inputs=[record],
            settings={"append_eod": append_eod}, bad_lines=bad_lines, empty_documents=1,
        )  # fmt: skip


def assert_bytes_of_builder(prefix: Path, documents: Sequence[Sequence[int]], folder: Path) -> None:
    """The files are those that megatron-core makes of these documents."""
    builder = IndexedDatasetBuilder(str(folder / "plain.bin"), dtype=np.uint16)
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / "plain.idx"))
    for end in ("bin", "idx"):
        assert Path(f"{prefix}.{end}").read_bytes() == (folder / f"plain.{end}").read_bytes()


def documents_of(prefix: Path) -> list[list[int]]:
    return [tokens.tolist() for tokens in IndexedDataset(str(prefix))]
