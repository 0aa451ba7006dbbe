"""Scores on disk: shards that outlive a kill, then files under their final names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_salt.checkpoint.manifest import installed_versions
from megatron_salt.data import tags
from megatron_salt.data.manifest import bin_path, idx_path
from megatron_salt.data.scores import column, sequence_scores
from megatron_salt.data.selection import SequenceTable, select, write_table
from megatron_salt.data.sequences import Sequences
from megatron_salt.files.disk import atomic_path, fsync_path, lock_file
from megatron_salt.files.json_files import read_object
from megatron_salt.parallel.groups import Groups, same_error_everywhere
from megatron_salt.scoring.request import ScoringRequest, TagRequest, differences
from megatron_salt.scoring.scorer import ShardScores

STORED_DTYPES = {"mask": np.uint8, "loss": np.uint16, "entropy": np.uint16}


def write_shard(
    path: Path, sequences: Sequences, first: int, last: int, scores: ShardScores,
    settings: tags.TagSettings,
) -> None:  # fmt: skip
    bounds = sequences.bounds[first : last + 1]
    lengths = np.diff(bounds)
    check_losses(scores.loss_T, int(bounds[0]), settings.precision)
    arrays: dict[str, NDArray[Any]] = {"mask": scores.kept_T.astype(np.uint8)}
    if "loss" in settings.store:
        arrays["loss"] = scores.loss_T.astype(np.float16).view(np.uint16)
    if scores.entropy_T is not None:
        arrays["entropy"] = scores.entropy_T.astype(np.float16).view(np.uint16)
    index = np.repeat(np.arange(len(lengths)), lengths)
    table = {
        "sequence": np.arange(first, last, dtype=np.int64),
        "start": bounds[:-1],
        "tokens": lengths,
        "kept": np.bincount(index[scores.kept_T], minlength=len(lengths)).astype(np.int64),
        **sequence_scores(scores.loss_T, scores.kept_T, scores.entropy_T, lengths),
    }
    save_shard(path, arrays | {f"table_{name}": value for name, value in table.items()})


def check_losses(loss_T: NDArray[np.float32], start: int, precision: str) -> None:
    """Raise ValueError, naming the token, for a loss that fp16 cannot hold.

    Args:
        start: place of the first.
    """
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(loss_T.astype(np.float16)))
    if len(bad):
        raise ValueError(
            f"the loss of token {start + bad[0]} is {loss_T[bad[0]]}: the teacher does "
            f"not work in {precision}; try --precision fp32"
        )


def save_shard(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write what `read_shards` reads; among it, of the sequences, table_sequence and
    table_tokens."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def read_shards(
    folder: Path, sequences: Sequences, shards: list[tuple[int, int]]
) -> Iterator[dict[str, NDArray[Any]]]:
    """What each shard holds, in order.

    Raises: ValueError naming a shard that is damaged or of other sequences.
    """
    for index, (first, last) in enumerate(shards):
        path = shard_path(folder, index)
        try:
            with np.load(path) as stored:
                shard = dict(stored)
            expected = np.diff(sequences.bounds[first : last + 1])
            if shard["table_sequence"].tolist() != list(range(first, last)) or not (
                np.array_equal(shard["table_tokens"], expected)
            ):
                raise ValueError("it is of other sequences")
        except Exception as error:  # those of zipfile and NumPy's headers have no common base
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
        yield shard


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:08d}.npz"


def partial_path(request: ScoringRequest) -> Path:
    return request.manifest_path.with_suffix(".partial")


@contextmanager
def partial_folder(request: ScoringRequest, origin: Any, groups: Groups) -> Iterator[Path]:
    """The folder of finished shards; it outlives a kill and goes when all is published.

    Raises: ValueError on all ranks if another run is at work in it, or if it is of a run with other
        data, model or settings.
    """
    folder = partial_path(request)
    identity = {**asdict(origin), "tokens_per_shard": request.tokens_per_shard}
    lock = None
    with same_error_everywhere("opening the folder of shards"):
        if groups.rank == 0:
            lock = lock_file(folder / "lock", busy=f"another run is at work in {folder}")
            _check_identity(folder / "identity.json", identity)
    with lock or nullcontext():
        yield folder
        if groups.rank == 0:
            remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Away at once under its name: shards must never be there without what they are of."""
    gone = folder.with_suffix(".removed")
    shutil.rmtree(gone, ignore_errors=True)  # of a run that was killed here
    if folder.exists():
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Raises: ValueError if the folder's shards are of something else, or of nobody knows what."""
    if path.is_file():
        differing = differences(read_object(path), identity)
        if differing:
            raise ValueError(
                f"{path.parent} holds shards of a run that differs in {', '.join(differing)}: "
                "give that run's arguments to continue it, or delete the folder to start anew"
            )
        return
    if any(path.parent.glob("shard_*.npz")):
        raise ValueError(f"{path.parent} holds shards, but not {path.name}: delete the folder")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(identity, indent=2), encoding="utf-8")


def publish_tags(
    request: TagRequest, origin: tags.TagOrigin, folder: Path, sequences: Sequences,
    shards: list[tuple[int, int]],
) -> tags.TagManifest:  # fmt: skip
    """Join the shards, write table and manifest, and give all files their names, manifest last."""
    built = folder / "built" / "tags"
    built.parent.mkdir(exist_ok=True)
    data = tags.open_indexed(request.data)
    stored = ("mask", *origin.settings.store)
    builders = {kind: _builder(built, kind) for kind in stored}
    parts: list[dict[str, NDArray[Any]]] = []
    kept = 0
    for shard in read_shards(folder, sequences, shards):
        for kind, builder in builders.items():
            builder.data_file.write(shard[kind].tobytes())
        kept += int(shard["mask"].sum(dtype=np.int64))
        names = [name for name in shard if name.startswith("table_")]
        parts.append({name.removeprefix("table_"): shard[name] for name in names})
    for kind, builder in builders.items():
        # As `IndexedDatasetBuilder.add_document` would have filled them.
        builder.sequence_lengths = data.sequence_lengths.tolist()
        builder.document_indices = data.document_indices.tolist()
        builder.finalize(str(idx_path(tags.tag_prefix(built, kind))))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    scores = columns[column(request.rule.score, request.rule.masked)]
    table = SequenceTable(origin=origin, columns=columns, rule={}).with_selection(
        scores, select([scores], request.rule)[0], vars(request.rule)
    )
    write_table(tags.table_path(built), table)
    suffixes = [f"_{kind}{end}" for kind in stored for end in (".bin", ".idx")]
    suffixes.append("_sequences.parquet")
    manifest = tags.TagManifest(
        origin=origin, sequences=len(table), kept_tokens=kept, versions=installed_versions(),
        files={suffix: tags.FileRecord.of(Path(f"{built}{suffix}")) for suffix in suffixes},
    )  # fmt: skip
    earlier = [f"_{kind}{end}" for kind in STORED_DTYPES for end in (".bin", ".idx")]
    publish_files(request, built, manifest, earlier)
    return manifest


def publish_files(
    request: ScoringRequest, built: Path, manifest: tags.FilesManifest, earlier: Iterable[str]
) -> None:
    """Give the files of a manifest their names, and write it last.

    Args:
        built: their prefix so far.
        earlier: suffixes that files of an earlier run may have and these do not.
    """
    final, path = Path(request.output_prefix), request.manifest_path
    final.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    for suffix in earlier:
        Path(f"{final}{suffix}").unlink(missing_ok=True)
    for suffix in manifest.files:
        fsync_path(f"{built}{suffix}")
        os.replace(f"{built}{suffix}", f"{final}{suffix}")
    for leftover in final.parent.glob(f".{path.name}.*.partial*"):
        leftover.unlink()  # of a run that was killed here
    write_files_manifest(path, manifest)


def write_files_manifest(path: Path, manifest: tags.FilesManifest) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")


def _builder(built: Path, kind: str) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    path = bin_path(tags.tag_prefix(built, kind))
    return IndexedDatasetBuilder(str(path), dtype=STORED_DTYPES[kind])
