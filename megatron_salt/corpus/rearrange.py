"""Datasets made of datasets, without tokenising: several laid end to end, or a part of one.

The sources of the documents go along. Of a dataset without sources, its base name is the source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_salt.corpus import preprocess as making
from megatron_salt.data import manifest
from megatron_salt.data.sources import Sources, load_sources
from megatron_salt.data.tags import open_indexed
from megatron_salt.data.tokenizer import load_tokenizer


def merge_datasets(
    prefixes: Sequence[str | Path], output_prefix: str | Path, *, overwrite: bool = False
) -> manifest.DatasetManifest:
    """The documents of several datasets, one dataset after another, as one dataset.

    Raises: FileNotFoundError or ValueError naming the dataset that is damaged or does not fit.
    """
    if not prefixes:
        raise ValueError("no dataset to merge: give their prefixes")
    return _make(prefixes, Path(output_prefix), overwrite, None, {"made_by": "merge"})


def subset_dataset(
    prefix: str | Path, output_prefix: str | Path, *, sources: Sequence[str] | None = None,
    share: float | None = None, documents: int | None = None, seed: int = 1234,
    overwrite: bool = False,
) -> manifest.DatasetManifest:  # fmt: skip
    """Some documents of a dataset, in their order, as one dataset.

    `sources` keeps the documents of these. Of them a share or a number is drawn: with one seed,
    fewer are a part of more.
    Raises: FileNotFoundError or ValueError naming what is wrong with the dataset or what is asked.
    """
    if (share is None) == (documents is None) and not (sources and share is None):
        raise ValueError(f"--share {share}, --documents {documents}: give one of them, or --source")
    if seed < 0 or not (share is None or 0 < share <= 1):
        raise ValueError(f"--share {share}: above 0, at most 1; --seed {seed}: at least 0")

    def choose(found: Sources) -> np.ndarray:
        left = found.documents_of(sources or found.names)
        whole = len(left) if share is None else int(np.floor(share * len(left) + 0.5))
        count = whole if documents is None else documents
        if not 1 <= count <= len(left):
            raise ValueError(f"{count} documents asked for, {prefix} has {len(left)} such")
        return np.sort(left[making.seeded_order(seed, len(left))[:count]])

    asked = {"sources": sources, "share": share, "documents": documents, "seed": seed}
    return _make([prefix], Path(output_prefix), overwrite, choose, {"made_by": "subset", **asked})


def _make(
    prefixes: Sequence[str | Path], final_prefix: Path, overwrite: bool,
    choose: Callable[[Sources], np.ndarray] | None, settings: dict[str, Any],
) -> manifest.DatasetManifest:  # fmt: skip
    """All documents of the datasets, or those chosen of each."""
    places: dict[str, int] = {}
    of_documents, parts = [], []
    for prefix in prefixes:
        manifest.check_exists(prefix)
    with making.partial_dataset(final_prefix, overwrite=overwrite) as partial:
        tokenizer = load_tokenizer(manifest.tokenizer_directory(prefixes[0]))
        builder = making.new_builder(partial, tokenizer.vocab_size)
        for prefix in prefixes:
            part = manifest.verify_dataset(prefix, tokenizer, hashes=True)
            if part is None:
                raise ValueError(f"{prefix} has no manifest to tell which tokenizer made it")
            parts.append({"name": Path(prefix).name, **asdict(part)})
            form = open_indexed(prefix).index.dtype, part.eod, part.settings["append_eod"]
            expected = builder.dtype, tokenizer.eod, parts[0]["settings"]["append_eod"]
            if form != expected:
                what = f"type of ids, end of document and append_eod {form}, not {expected}"
                raise ValueError(f"{prefix} has {what} as {prefixes[0]}; preprocess them alike")
            one = np.zeros(part.documents, np.int32)
            found = load_sources(prefix) or Sources(names=[Path(prefix).name], of_documents=one)
            here = np.array([places.setdefault(x, len(places)) for x in found.names], np.int32)
            chosen = choose(found) if choose else np.arange(part.documents)
            if choose:
                making.copy_documents(prefix, chosen, builder)
            else:
                builder.add_index(str(prefix))
            of_documents.append(here[found.of_documents[chosen]])
        every = Sources(names=list(places), of_documents=np.concatenate(of_documents))
        return making.publish_dataset(
            partial, final_prefix, builder, tokenizer, every,
            bad_lines=sum(part["bad_lines"] for part in parts if not choose),
            empty_documents=sum(part["empty_documents"] for part in parts if not choose),
            inputs=[manifest.InputRecord(name=f"{part['name']}.bin", size_bytes=part["bin_bytes"],
                                         sha256=part["bin_sha256"]) for part in parts],
            settings={**settings, "append_eod": expected[2], "datasets": parts},
        )  # fmt: skip
