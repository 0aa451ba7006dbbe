"""The manifest beside a tokenised dataset, and the checks before a dataset is trained on.

A dataset is `<prefix>.bin` and `<prefix>.idx` in Megatron's format. `megatron-salt preprocess` adds
`<prefix>.manifest.json`, which says what the two hold and with which tokenizer they were made, and
a copy of that tokenizer in `<prefix>.tokenizer/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_salt.config.records import record_of
from megatron_salt.config.values import nearest
from megatron_salt.data.tokenizer import (
    Tokenizer,
    check_reads,
    check_same_tokens,
    load_tokenizer,
)
from megatron_salt.files.disk import sha256_of
from megatron_salt.files.json_files import read_object

logger = logging.getLogger(__name__)

DATASET_FORMAT = 1
PREPROCESS_AGAIN = "run `megatron-salt preprocess` again"

# Of a file too large to be read at every start: this many blocks, evenly spread.
SAMPLED_BLOCKS = 1024
SAMPLED_BLOCK_BYTES = 4096

# The header of a Megatron .idx: magic, version, dtype code, numbers of sequences and documents.
# Read here because megatron-core checks it with assertions and only up to the version.
_IDX_MAGIC = b"MMIDIDX\x00\x00"
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """One input file, as it was on disk."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """What a tokenised dataset holds and what it was made of. Names are base names, no paths."""

    format_version: int
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    documents: int
    tokens: int
    bad_lines: int
    empty_documents: int
    input_bytes: int
    inputs: tuple[InputRecord, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    bin_sampled_sha256: str | None = None
    """See `sampled_sha256`; None: of a dataset made before this was written."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


class _IndexSummary(NamedTuple):
    documents: int
    tokens: int
    bin_bytes: int


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def dataset_manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def sources_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.sources.parquet")


def tokenizer_directory(prefix: str | Path) -> Path:
    return Path(f"{prefix}.tokenizer")


def read_dataset_manifest(prefix: str | Path) -> DatasetManifest | None:
    """The manifest of the dataset at `prefix`, or None when it has none.

    Raises: ValueError when there is one that cannot be read.
    """
    path = dataset_manifest_path(prefix)
    if not path.exists():
        return None
    try:
        fields = read_object(path)
        version = fields.get("format_version")
        if version == DATASET_FORMAT:
            return record_of(DatasetManifest, fields, "it")
    except ValueError as error:
        raise ValueError(
            f"{path} is not a dataset manifest ({error}); {PREPROCESS_AGAIN}"
        ) from error
    raise ValueError(
        f"{path} has format version {version}, this release reads {DATASET_FORMAT}; "
        f"{PREPROCESS_AGAIN}"
    )


def check_exists(prefix: str | Path) -> None:
    """Raise FileNotFoundError unless there is a dataset at `prefix`, with the nearest one's prefix.

    What is wrong with a prefix is said before anything else of it is looked at.
    """
    if idx_path(prefix).is_file() and bin_path(prefix).is_file():
        return
    if str(prefix).endswith((".bin", ".idx")) and Path(prefix).is_file():
        raise FileNotFoundError(f"{prefix} is a file of a dataset: give the prefix without its end")
    for here, other in ((idx_path(prefix), bin_path(prefix)), (bin_path(prefix), idx_path(prefix))):
        if other.is_file():
            raise FileNotFoundError(f"missing dataset file {here}; {PREPROCESS_AGAIN}")
    place = Path(prefix).parent
    beside = sorted(str(path.with_suffix("")) for path in place.glob("*.idx"))
    begun = [other for other in beside if other.startswith(f"{prefix}_")]
    hint = f" Did you mean {begun[0]!r}?" if begun else nearest(str(prefix), beside)
    if not place.is_dir():
        hint = f" The folder {place} does not exist."
    if not Path(prefix).is_absolute():
        hint += f" (Looked for from {Path.cwd()})"
    raise FileNotFoundError(f"there is no dataset {prefix}: {idx_path(prefix)} is missing.{hint}")


def verify_dataset(
    prefix: str | Path, tokenizer: Tokenizer | None = None, *, hashes: bool = False
) -> DatasetManifest | None:
    """Checks a dataset before training on it, and returns its manifest.

    Always the sizes, every byte of the `.idx` and samples of the `.bin`. With `tokenizer`, that the
    ids mean its tokens. With `hashes`, every byte (reads the whole dataset). A dataset without a
    manifest, as Megatron-LM writes them, is accepted with a warning if its `.idx` agrees with
    itself; one whose manifest has no hash of samples, of earlier versions, too.

    Raises: FileNotFoundError or ValueError naming the file, what is wrong and what to do.
    """
    check_exists(prefix)
    index = _check_index(idx_path(prefix))
    _check_size(bin_path(prefix), index.bin_bytes, "its index")
    manifest = read_dataset_manifest(prefix)
    if manifest is None:
        logger.warning(
            "%s is missing, so nothing tells which tokenizer made this dataset; its ids are taken"
            " on trust",
            dataset_manifest_path(prefix),
        )
        return None
    _check_size(bin_path(prefix), manifest.bin_bytes, "its manifest")
    _check_size(idx_path(prefix), manifest.idx_bytes, "its manifest")
    check_hash(idx_path(prefix), manifest.idx_sha256)
    if (index.tokens, index.documents) != (manifest.tokens, manifest.documents):
        raise ValueError(
            f"{idx_path(prefix)} counts {index.tokens} tokens in {index.documents} documents, its"
            f" manifest {manifest.tokens} in {manifest.documents}; {PREPROCESS_AGAIN}"
        )
    if hashes:
        check_hash(bin_path(prefix), manifest.bin_sha256)
        if "sources_sha256" in manifest.settings or sources_path(prefix).exists():
            check_hash(sources_path(prefix), manifest.settings.get("sources_sha256"))
    elif manifest.bin_sampled_sha256 is None:
        logger.warning(
            "%s has no hash of samples, so only the size of the .bin is checked; `megatron-salt "
            "inspect --verify` reads all of it",
            dataset_manifest_path(prefix),
        )
    elif sampled_sha256(bin_path(prefix)) != manifest.bin_sampled_sha256:
        raise ValueError(
            f"corrupt: {bin_path(prefix)} is not the file that its manifest was written with; "
            f"{PREPROCESS_AGAIN}"
        )
    if tokenizer is not None:
        _check_tokenizer(prefix, manifest, tokenizer)
    return manifest


def data_tokenizer(prefix: str | Path, reader: Tokenizer) -> Tokenizer:
    """The tokenizer that a dataset was made with, as its copy says, if `reader` reads its tokens;
    `reader` itself where it does not, which `verify_dataset` refuses, or where there is no copy."""
    try:
        own = load_tokenizer(tokenizer_directory(prefix))
        check_reads("", reader, "", own)
    except (OSError, ValueError):
        return reader
    return own


def _check_index(path: Path) -> _IndexSummary:
    """Reads the header and the lengths of an .idx and checks that they fit together."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(_IDX_HEADER.size)
    if len(header) < _IDX_HEADER.size or not header.startswith(_IDX_MAGIC):
        raise ValueError(f"{path} is not a Megatron index (bad header); {PREPROCESS_AGAIN}")
    _, version, dtype_code, sequences, boundaries = _IDX_HEADER.unpack(header)
    if version != 1 or dtype_code not in _IDX_ITEM_BYTES:
        raise ValueError(
            f"{path} is not a Megatron index that can be read: version {version},"
            f" dtype code {dtype_code}"
        )
    expected = _IDX_HEADER.size + sequences * (4 + 8) + boundaries * 8
    if size != expected:
        raise ValueError(
            f"truncated or overlong: {path} has {size} bytes, its header says {expected}; "
            f"{PREPROCESS_AGAIN}"
        )
    offset = _IDX_HEADER.size
    lengths = np.fromfile(path, dtype="<i4", count=sequences, offset=offset)
    pointers = np.fromfile(path, dtype="<i8", count=sequences, offset=offset + sequences * 4)
    ends = np.fromfile(path, dtype="<i8", offset=offset + sequences * (4 + 8))
    starts = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    item_bytes = _IDX_ITEM_BYTES[dtype_code]
    in_order = len(ends) and ends[0] == 0 and ends[-1] == sequences and (np.diff(ends) >= 0).all()
    if not in_order or (lengths < 0).any():
        raise ValueError(
            f"{path} contradicts itself: documents do not end at its end; {PREPROCESS_AGAIN}"
        )
    if not np.array_equal(pointers, starts[:-1] * item_bytes):
        raise ValueError(
            f"{path} contradicts itself: sequences do not lie end to end; {PREPROCESS_AGAIN}"
        )
    return _IndexSummary(boundaries - 1, int(starts[-1]), int(starts[-1]) * item_bytes)


def _check_size(path: Path, expected_bytes: int, authority: str) -> None:
    actual_bytes = os.path.getsize(path)
    if actual_bytes != expected_bytes:
        what = "truncated" if actual_bytes < expected_bytes else "overlong"
        raise ValueError(
            f"{what}: {path} has {actual_bytes} bytes, {authority} says {expected_bytes}; "
            f"{PREPROCESS_AGAIN}"
        )


def check_hash(path: Path, expected_sha256: str | None) -> None:
    """Raises: FileNotFoundError or ValueError unless a dataset's file is its manifest's."""
    if not path.is_file():
        raise FileNotFoundError(f"missing dataset file {path}; {PREPROCESS_AGAIN}")
    actual = sha256_of(path)
    if actual != expected_sha256:
        raise ValueError(
            f"corrupt: {path} has sha256 {actual}, its manifest says {expected_sha256}; "
            f"{PREPROCESS_AGAIN}"
        )


def _check_tokenizer(prefix: str | Path, manifest: DatasetManifest, tokenizer: Tokenizer) -> None:
    if manifest.tokenizer_fingerprint == tokenizer.fingerprint:
        return
    remedy = f"give the tokenizer that made the dataset, or {PREPROCESS_AGAIN}"
    try:
        made_with = load_tokenizer(tokenizer_directory(prefix))
    except (OSError, ValueError):
        made_with = None
    if made_with is not None and made_with.fingerprint == manifest.tokenizer_fingerprint:
        try:
            check_same_tokens(
                f"the dataset {prefix}", made_with, f"the tokenizer {tokenizer.path}", tokenizer
            )
        except ValueError as error:
            raise ValueError(f"{error}\n{remedy}") from None
    raise ValueError(
        f"the dataset {prefix} was made with a tokenizer of {manifest.vocab_size} tokens and"
        f" fingerprint {manifest.tokenizer_fingerprint}, {tokenizer.path} has"
        f" {tokenizer.vocab_size} and {tokenizer.fingerprint}; {remedy}"
    )


def sampled_sha256(path: str | Path) -> str:
    """sha256 of the size and of 1024 blocks of 4 KiB, evenly spread; of all up to 4 MiB."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    blocks = -(-size // SAMPLED_BLOCK_BYTES)
    chosen = np.rint(np.linspace(0, max(blocks - 1, 0), min(blocks, SAMPLED_BLOCKS)))
    with path.open("rb") as file:
        for block in chosen.astype(np.int64).tolist():
            file.seek(block * SAMPLED_BLOCK_BYTES)
            digest.update(file.read(SAMPLED_BLOCK_BYTES))
    return digest.hexdigest()
