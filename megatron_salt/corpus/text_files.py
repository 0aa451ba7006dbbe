"""Reading JSONL (plain, gzip, zstd) in blocks of whole lines.

Preprocessing and tokenizer training read the same way: `iter_line_blocks` cuts a file into blocks
of whole lines and `parse_documents` turns a block into texts plus the list of its bad lines. The
first is cheap and runs in the process that reads; the second runs where the text is used.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20
# Compressed text grows 4 to 10 times, so a smaller read keeps blocks near BLOCK_BYTES.
COMPRESSED_READ_BYTES = 1 << 17


@dataclass(frozen=True)
class LineBlock:
    """Consecutive whole lines of one file, as read."""

    path: str
    first_line: int
    data: bytes


@dataclass(frozen=True)
class BadLine:
    """One line that holds no document, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def iter_line_blocks(
    path: str | Path, *, block_bytes: int = BLOCK_BYTES,
    on_read: Callable[[bytes], None] | None = None,
) -> Iterator[LineBlock]:  # fmt: skip
    """Yields the lines of a `.gz`, `.zst` or plain file in blocks of about `block_bytes`.

    `on_read` sees every byte of the file as it is on disk (for hashes and progress). A line is
    never cut, however long. Lines end with `\\n` only, as JSONL says.

    Raises: ValueError when a compressed file is truncated or corrupt.
    """
    path = str(path)
    pending: list[bytes] = []
    pending_bytes = 0
    first_line = 1
    for chunk in _iter_decompressed(path, block_bytes, on_read):
        pending_bytes += len(chunk)
        cut = chunk.rfind(b"\n") + 1
        if pending_bytes < block_bytes or cut == 0:
            pending.append(chunk)
            continue
        data = b"".join([*pending, chunk[:cut]])
        yield LineBlock(path, first_line, data)
        first_line += data.count(b"\n")
        pending = [chunk[cut:]]
        pending_bytes = len(pending[0])
    if data := b"".join(pending):
        yield LineBlock(path, first_line, data)


def _iter_decompressed(
    path: str, read_bytes: int, on_read: Callable[[bytes], None] | None
) -> Iterator[bytes]:
    new_decompressor = _decompressor_factory(path)
    if new_decompressor is not None:
        read_bytes = min(read_bytes, COMPRESSED_READ_BYTES)

    def chunks() -> Iterator[bytes]:
        with open(path, "rb") as file:
            while chunk := file.read(read_bytes):
                if on_read is not None:
                    on_read(chunk)
                yield chunk

    return chunks() if new_decompressor is None else _decompress(path, chunks(), new_decompressor)


def _decompressor_factory(path: str) -> Callable[[], Any] | None:
    if path.endswith(".gz"):
        return lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    if path.endswith(".zst"):
        import zstandard

        # Files written with `zstd --long=31` need the largest window.
        return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return None


def _decompress(
    path: str, chunks: Iterable[bytes], new_decompressor: Callable[[], Any]
) -> Iterator[bytes]:
    """Decompresses concatenated gzip members or zstd frames.

    The streaming readers of zstandard end quietly at a truncated file; asking each decompressor
    whether it saw its end marker does not.
    """
    decompressor = new_decompressor()
    started = False
    try:
        for chunk in chunks:
            while chunk:
                if not started:  # gzip files may be padded with zeros between and after members
                    chunk = chunk.lstrip(b"\0") if path.endswith(".gz") else chunk
                    if not chunk:
                        break
                started = True
                if text := decompressor.decompress(chunk):
                    yield text
                chunk = b""
                if decompressor.eof:
                    chunk = decompressor.unused_data
                    decompressor, started = new_decompressor(), False
    except OSError:  # of the reader
        raise
    except Exception as error:  # zlib.error and zstandard.ZstdError share no base class
        raise ValueError(
            f"{path}: corrupt compressed data ({error}); copy the file again"
        ) from error
    if started:
        raise ValueError(f"{path}: truncated compressed data; copy the file again")


def parse_documents(block: LineBlock, *keys: str) -> tuple[list[list[str]], list[BadLine]]:
    """The strings under the keys of a block's lines, in order, and the lines that lack any.

    A bad line is one that is not UTF-8 or not a JSON object, lacks a key, or has a value there that
    is not a string of valid Unicode. Blank lines are neither documents nor bad.
    """
    documents: list[list[str]] = []
    bad: list[BadLine] = []
    for number, line in enumerate(_decoded_lines(block.data), block.first_line):
        try:
            document = _document(line, keys)
        except (ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            bad.append(BadLine(block.path, number, reason))
        else:
            if document is not None:
                documents.append(document)
    return documents, bad


def _decoded_lines(data: bytes) -> Iterable[str | bytes]:
    try:
        return data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return data.split(b"\n")  # decoded line by line, so that only the broken ones are lost


def _document(line: str | bytes, keys: Sequence[str]) -> list[str] | None:
    """The strings of one JSONL line, None if it is blank. Raises ValueError saying what is bad."""
    if isinstance(line, bytes):
        line = line.decode("utf-8")
    if not line or line.isspace():
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    texts = []
    for key in keys:
        if key not in record:
            raise ValueError(f"no key {key!r}")
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(f"the value of {key!r} is {type(text).__name__}, not a string")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"the value of {key!r} holds a lone surrogate") from None
        texts.append(text)
    return texts
