"""Tags: what a small model said about every token of a dataset, in lockstep with the tokens.

    PREFIX.tags.json                 manifest: of which data, by which model, how; hashes
    PREFIX_mask.bin/.idx             uint8, 1: the token is among the model's k most likely ones
    PREFIX_loss.bin/.idx             optional: -log p of the token, nats, fp16
    PREFIX_entropy.bin/.idx          optional: entropy of the model's distribution there, nats, fp16
    PREFIX_sequences.parquet         scores of the sequences, see `selection.py`

The token files are Megatron indexed datasets with the lengths and documents of the data. The format
has no fp16, so those two hold its bits as uint16. The tag at place i is of token i as the one to
be predicted; in a batch it stands where token i is the *label*.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_salt.config.records import record_of
from megatron_salt.data.manifest import (
    bin_path,
    idx_path,
    read_dataset_manifest,
    sampled_sha256,
)
from megatron_salt.files.disk import sha256_of
from megatron_salt.files.json_files import read_object

TAG_FORMAT = 1
TAG_AGAIN = "run `megatron-salt tag` again"


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """Which dataset something was made of. Copying or renaming the dataset keeps it."""

    name: str = field(compare=False)
    """Base name of its prefix, for people."""
    sequences: int
    tokens: int
    bin_bytes: int
    bin_sampled_sha256: str
    bin_sha256: str | None
    """From the dataset's manifest, if it has one."""
    idx_sha256: str

    @classmethod
    def of(cls, prefix: str | Path) -> DataIdentity:
        lengths = sequence_lengths(prefix)
        manifest = read_dataset_manifest(prefix)
        return cls(
            name=Path(prefix).name, sequences=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)), bin_bytes=bin_path(prefix).stat().st_size,
            bin_sampled_sha256=sampled_sha256(bin_path(prefix)),
            bin_sha256=None if manifest is None else manifest.bin_sha256,
            idx_sha256=sha256_of(idx_path(prefix)),
        )  # fmt: skip

    def check(self, prefix: str | Path, source: str | Path) -> None:
        """Raise ValueError, naming both files, unless the dataset at prefix is the one meant."""
        now = DataIdentity.of(prefix)
        names = ["sequences", "tokens", "bin_bytes", "idx_sha256", "bin_sampled_sha256"]
        if None not in (self.bin_sha256, now.bin_sha256):
            names.append("bin_sha256")
        for name in names:
            mine, theirs = getattr(self, name), getattr(now, name)
            if mine != theirs:
                raise ValueError(
                    f"{source} was made of the dataset {self.name}, and {bin_path(prefix)} is not "
                    f"that one: {name} {theirs}, expected {mine}; name the data it was made of, "
                    "or make another of this one"
                )


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model read the data."""

    fingerprint: str
    """Of its weights, see `checkpoint.weights_fingerprint`."""
    step: int
    name: str = field(compare=False)
    """The checkpoint's directory and its run's, for people."""


@dataclass(frozen=True, kw_only=True)
class TagSettings:
    """What decides the tags, besides data and model."""

    window: int | None
    """Tokens of a sequence; None: a sequence is a document."""
    max_length: int
    """Tokens of a row, the unit within which a token has context."""
    top_k: int
    store: tuple[str, ...]
    """Of `loss` and `entropy`."""
    precision: str
    loss_impl: str


@dataclass(frozen=True, kw_only=True)
class TagOrigin:
    """Of which data, by which model, how: what two files must share to be used together."""

    data: DataIdentity
    tokenizer_fingerprint: str
    model: ModelIdentity
    settings: TagSettings


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it was written."""

    num_bytes: int
    sha256: str
    sampled_sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        size, sampled = path.stat().st_size, sampled_sha256(path)
        return cls(num_bytes=size, sha256=sha256_of(path), sampled_sha256=sampled)


@dataclass(frozen=True, kw_only=True)
class FilesManifest:
    """What a set of files that a model made of a dataset is: everything that a reader must compare
    before believing it."""

    origin: Any
    """A dataclass of data, tokenizer_fingerprint, model and settings."""
    files: dict[str, FileRecord]
    """By what follows the prefix, such as `_mask.bin`."""
    versions: dict[str, str]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def fingerprint(self) -> str:
        """Identity of these files: their content and how it came about."""
        hashes = {name: record.sha256 for name, record in sorted(self.files.items())}
        text = json.dumps([dataclasses.asdict(self.origin), hashes])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, path: Path, format_version: int, maker: str) -> Self:
        """Args:
            maker: the command that writes such files.
        Raises: ValueError if there is none or it cannot be read.
        """
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give the --output-prefix of `{maker}`")
        try:
            fields = read_object(path)
            if fields.get("format_version") != format_version:
                raise ValueError(
                    f"format {fields.get('format_version')}, expected {format_version}"
                )
            made = record_of(cls, fields, "it")
            if led_away := [name for name in made.files if "/" in name]:
                raise ValueError(f"{led_away} are files of another folder")
        except ValueError as error:
            raise ValueError(
                f"{path} is not a manifest of `megatron-salt {maker}` ({error}); {run_again(maker)}"
            ) from error
        return made

    def verify(
        self, path: Path, prefix: str | Path, data_prefix: str | Path, tokenizer: str | None,
        maker: str, *, hashes: bool,
    ) -> None:  # fmt: skip
        """Check the files at prefix, and the data that they are used with, against this manifest.

        Sizes and samples of the content always; with `hashes` every byte.
        Args:
            path: where this manifest lies.
            tokenizer: fingerprint of the data's.
        Raises: ValueError naming both files, what differs and what to do.
        """
        again = run_again(maker)
        for suffix, record in self.files.items():
            _check_file(Path(f"{prefix}{suffix}"), record, path, again, hashes=hashes)
        self.origin.data.check(data_prefix, path)
        if tokenizer not in (None, self.origin.tokenizer_fingerprint):
            raise ValueError(
                f"{path}: made with a tokenizer of fingerprint "
                f"{self.origin.tokenizer_fingerprint}, the tokenizer of {data_prefix} has "
                f"{tokenizer}; {again}"
            )


def run_again(maker: str) -> str:
    return f"run `megatron-salt {maker}` again"


@dataclass(frozen=True, kw_only=True)
class TagManifest(FilesManifest):
    """What a set of tags is."""

    origin: TagOrigin
    sequences: int
    kept_tokens: int
    format_version: int = TAG_FORMAT

    @property
    def stored(self) -> tuple[str, ...]:
        return ("mask", *self.origin.settings.store)


def tag_manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.tags.json")


def table_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}_sequences.parquet")


def tag_prefix(prefix: str | Path, kind: str) -> str:
    """Prefix of the indexed dataset that holds `mask`, `loss` or `entropy`."""
    return f"{prefix}_{kind}"


def check_tag_prefix(prefix: str | Path) -> None:
    """Raise ValueError for a file of tags where their prefix is wanted."""
    ends = r"(_sequences\.parquet|\.tags\.json|_(mask|loss|entropy)\.(bin|idx))$"
    stem = re.sub(ends, "", str(prefix))
    if stem != str(prefix) and Path(prefix).is_file():
        raise ValueError(f"{prefix} is a file of tags: give {stem}, the --output-prefix of `tag`")


def read_tag_manifest(prefix: str | Path) -> TagManifest:
    """Raises: ValueError if there is none or it cannot be read."""
    check_tag_prefix(prefix)
    return TagManifest.read(tag_manifest_path(prefix), TAG_FORMAT, "tag")


def verify_tags(
    prefix: str | Path, data_prefix: str | Path, tokenizer_fingerprint: str | None = None, *,
    hashes: bool = False,
) -> TagManifest:  # fmt: skip
    """Check tags against their manifest and against the data that they are used with.

    Sizes and samples of the content always; with `hashes` every byte.
    Raises: ValueError naming both files, what differs and what to do.
    """
    manifest, path = read_tag_manifest(prefix), tag_manifest_path(prefix)
    manifest.verify(path, prefix, data_prefix, tokenizer_fingerprint, "tag", hashes=hashes)
    lengths = sequence_lengths(data_prefix)
    for kind in manifest.stored:
        if not {f"_{kind}.bin", f"_{kind}.idx"} <= set(manifest.files):
            raise ValueError(f"{path}: it lists no files of {kind!r}; {TAG_AGAIN}")
        if not np.array_equal(sequence_lengths(tag_prefix(prefix, kind)), lengths):
            raise ValueError(
                f"{idx_path(tag_prefix(prefix, kind))} and {idx_path(data_prefix)} have sequences "
                f"of different lengths; {TAG_AGAIN}"
            )
    return manifest


def _check_file(
    path: Path, record: FileRecord, source: Path, again: str, *, hashes: bool
) -> None:  # fmt: skip
    if not path.is_file():
        raise ValueError(f"{path}: missing, but {source} lists it; {again}")
    size = path.stat().st_size
    if size != record.num_bytes:
        what = "truncated" if size < record.num_bytes else "overlong"
        raise ValueError(
            f"{what}: {path} has {size} bytes, {source} says {record.num_bytes}; {again}"
        )
    same = sampled_sha256(path) == record.sampled_sha256
    if not same or (hashes and sha256_of(path) != record.sha256):
        raise ValueError(
            f"{path} is not the file that {source} was written with: its content differs (damaged, "
            f"or of another set of files); {again}"
        )


def open_indexed(prefix: str | Path) -> Any:
    """megatron-core's `IndexedDataset` at this prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds to import

    return IndexedDataset(str(prefix))


def sequence_lengths(prefix: str | Path) -> NDArray[np.int32]:
    """Lengths of an indexed dataset's sequences.

    A copy, made while the dataset lives: its own arrays are unmapped when it is deleted, and
    reading them then is a segmentation fault.
    """
    dataset = open_indexed(prefix)
    return np.array(dataset.sequence_lengths)


def read_stream(dataset: Any, start: int, stop: int) -> NDArray[Any]:
    """Items `[start, stop)` of an IndexedDataset's data, whatever sequences they are of."""
    dtype = dataset.index.dtype
    return np.array(dataset.bin_reader.read(dtype, stop - start, start * np.dtype(dtype).itemsize))


def as_fp16(bits: NDArray[Any]) -> NDArray[np.float16]:
    """Losses or entropies from what an indexed dataset holds of them."""
    return bits.astype(np.uint16).view(np.float16)
