"""A small real corpus that every machine has: source files and their documentation.

Made for the examples, the tests and the benchmarks, which must run without a download. The default
source is the standard library of the running Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_salt.files.disk import atomic_path

SUFFIXES = (".py", ".rst", ".txt")
EXCLUDED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "__pycache__", ".git"})
MIN_CHARACTERS = 64


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What `make_corpus` wrote and what it left out."""

    documents: int
    output_bytes: int
    short: int
    duplicate: int
    not_utf8: int
    over_limit: int

    def __str__(self) -> str:
        return (
            f"{self.documents} documents, {self.output_bytes} bytes written; left out:"
            f" {self.short} nearly empty, {self.duplicate} duplicates, {self.not_utf8} not UTF-8,"
            f" {self.over_limit} beyond --max-bytes"
        )


def make_corpus(
    output: str | Path,
    *,
    sources: Sequence[str | Path] = (),
    max_bytes: int | None = None,
    seed: int = 1234,
) -> CorpusReport:
    """Writes one JSON line `{"text": ..., "source": relative path}` per text file of `sources`.

    The order is a seeded shuffle of the sorted relative paths, so it depends on nothing else and
    any contiguous split by document gives parts that are alike. Of files with the same content the
    first in that order of paths stays. `max_bytes` bounds the size of the output file.

    Raises: ValueError when nothing is left to write.
    """
    roots = [Path(source) for source in sources] or [Path(sysconfig.get_path("stdlib"))]
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"--source {root} is not a directory")
    lines: list[bytes] = []
    seen: set[bytes] = set()
    left_out = {"short": 0, "duplicate": 0, "not_utf8": 0}
    for name, path in sorted(_iter_text_files(roots)):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            left_out["not_utf8"] += 1
            continue
        digest = hashlib.sha256(content).digest()
        if len(text.strip()) < MIN_CHARACTERS:
            left_out["short"] += 1
        elif digest in seen:
            left_out["duplicate"] += 1
        else:
            seen.add(digest)
            record = json.dumps({"text": text, "source": name}, ensure_ascii=False)
            lines.append(record.encode("utf-8") + b"\n")
    random.Random(seed).shuffle(lines)
    ends = list(accumulate(map(len, lines)))
    kept = lines if max_bytes is None else lines[: bisect_right(ends, max_bytes)]
    if not kept:
        raise ValueError(
            f"no document to write: {len(lines)} usable files in the sources and"
            f" --max-bytes {max_bytes}; give a larger limit or another --source"
        )
    with atomic_path(output) as temporary:
        temporary.write_bytes(b"".join(kept))
    return CorpusReport(
        documents=len(kept),
        output_bytes=ends[len(kept) - 1],
        over_limit=len(lines) - len(kept),
        **left_out,
    )


def _iter_text_files(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Pairs of (name relative to its root, path); roots are told apart by name if several."""
    for root in roots:
        for directory, subdirectories, files in os.walk(root):
            subdirectories[:] = [d for d in subdirectories if d not in EXCLUDED_DIRECTORIES]
            for file in files:
                path = Path(directory, file)
                if path.suffix in SUFFIXES and path.is_file():
                    name = path.relative_to(root).as_posix()
                    yield (f"{root.name}/{name}" if len(roots) > 1 else name), path
