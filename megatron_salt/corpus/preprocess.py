"""JSONL text to a Megatron dataset: tokenised in parallel, written in order, published whole.

One process reads blocks of lines and writes tokens; worker processes do everything in between
(JSON, Unicode, tokenising). At most a fixed number of blocks is on the way, so memory is bounded,
and results are taken in input order, so the files do not depend on the number of workers. Workers
are processes, not threads, because only part of either tokenizer library runs outside the GIL.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import logging
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_salt.corpus.text_files import BadLine, LineBlock, iter_line_blocks, parse_documents
from megatron_salt.data import manifest
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_salt.files.disk import fsync_path, lock_file, sha256_of

logger = logging.getLogger(__name__)

SHOWN_BAD_LINES = 20
# Enough blocks (1 MiB each) to keep the workers busy while megatron-core is imported.
MIN_BLOCKS_IN_FLIGHT = 64
BLOCKS_IN_FLIGHT_PER_WORKER = 4
RECORDED_PACKAGES = ("megatron-core", "numpy", "sentencepiece", "tokenizers", "zstandard")


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What decides which tokens a corpus becomes."""

    json_key: str = "text"
    append_eod: bool = True
    strict: bool = False


@dataclass(frozen=True)
class _EncodedBlock:
    """The documents of one block as tokens end to end; empty ones are only counted."""

    tokens: np.ndarray
    lengths: np.ndarray
    empty_documents: int
    bad_lines: int
    shown_bad_lines: list[BadLine]


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    bad_lines: int = 0
    empty_documents: int = 0


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    settings: PreprocessSettings | None = None,
    *,
    workers: int | None = None,
) -> manifest.DatasetManifest:
    """Tokenises JSONL files into `<output_prefix>_<json_key>_document.{bin,idx}`.

    Beside them go the manifest and a copy of the tokenizer. Nothing has its final name before
    everything is complete and on disk.

    Raises: FileNotFoundError for missing inputs; ValueError for an empty corpus, a corrupt input,
    or, when strict, the first bad line; RuntimeError when a worker process dies.
    """
    settings = settings or PreprocessSettings()
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"--workers is {workers}, it must be at least 1")
    for path in inputs:
        if not Path(path).exists() or Path(path).is_dir():
            raise FileNotFoundError(f"no input file {path}")
    tokenizer = load_tokenizer(tokenizer_path)
    final_prefix = Path(f"{output_prefix}_{settings.json_key}_document")
    with _partial_directory(final_prefix) as directory:
        prefix = directory / final_prefix.name
        writer = _DatasetWriter(prefix, tokenizer.vocab_size)
        reader = _InputReader(inputs)
        _encode_all(reader, writer, tokenizer.path, settings, workers)
        if not writer.counts.documents:
            raise ValueError(
                f"no document in {len(inputs)} input files: {writer.counts.empty_documents} empty"
                f" documents and {writer.counts.bad_lines} bad lines; is --json-key"
                f" {settings.json_key!r} right?"
            )
        writer.builder.finalize(str(manifest.idx_path(prefix)))
        made = _make_manifest(reader, writer, tokenizer, settings)
        tokenizer.save(manifest.tokenizer_directory(prefix))
        manifest.dataset_manifest_path(prefix).write_text(made.to_json(), encoding="utf-8")
        _publish(prefix, final_prefix)
    return made


class _InputReader:
    """The inputs as blocks of lines, hashed on the way."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        self.records: list[manifest.InputRecord] = []

    def blocks(self, on_read: Callable[[int], Any]) -> Iterator[LineBlock]:
        for path in self.paths:
            digest = hashlib.sha256()
            size_bytes = 0

            def see(data: bytes, digest: Any = digest) -> None:
                nonlocal size_bytes
                digest.update(data)
                size_bytes += len(data)
                on_read(len(data))

            yield from iter_line_blocks(path, on_read=see)
            record = manifest.InputRecord(
                name=path.name, size_bytes=size_bytes, sha256=digest.hexdigest()
            )
            self.records.append(record)


@dataclass
class _DatasetWriter:
    """Appends encoded blocks to the .bin and .idx of megatron-core's builder."""

    prefix: Path
    vocab_size: int
    counts: _Counts = field(default_factory=_Counts)
    digest: Any = field(default_factory=hashlib.sha256)

    @cached_property
    def builder(self) -> Any:
        # Importing megatron-core takes seconds; by the first use the workers have their blocks.
        with warnings.catch_warnings(), _paused_garbage_collector():
            warnings.simplefilter("ignore", UserWarning)  # about GPU packages, of no use here
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        dtype = DType.optimal_dtype(self.vocab_size)
        return IndexedDatasetBuilder(str(manifest.bin_path(self.prefix)), dtype=dtype)

    def append(self, block: _EncodedBlock) -> None:
        """Adds a block of documents of one sequence each.

        The builder's `add_document` converts, copies and writes every document on its own, which
        this one process would do for all workers. A block's bytes are the concatenation of what
        it would write, so they go to the builder's data file at once, and its two lists grow as
        `add_document` would grow them. The .idx is made of the lists by the builder itself.
        """
        tokens = block.tokens.astype(self.builder.dtype, copy=False)
        self.builder.data_file.write(tokens)
        self.digest.update(tokens)
        first_end = len(self.builder.sequence_lengths) + 1
        self.builder.sequence_lengths.extend(block.lengths.tolist())
        self.builder.document_indices.extend(range(first_end, first_end + len(block.lengths)))
        self.counts.documents += len(block.lengths)
        self.counts.tokens += len(tokens)


@contextmanager
def _paused_garbage_collector() -> Iterator[None]:
    """For an import whose objects all stay: collecting them, now and at exit, takes seconds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _encode_all(
    reader: _InputReader,
    writer: _DatasetWriter,
    tokenizer_path: Path,
    settings: PreprocessSettings,
    workers: int,
) -> None:
    """Runs every block through the pool and appends the results in input order."""
    encode = partial(_encode_block, tokenizer_path=tokenizer_path, settings=settings)
    in_flight = max(MIN_BLOCKS_IN_FLIGHT, BLOCKS_IN_FLIGHT_PER_WORKER * workers)
    total_bytes = sum(path.stat().st_size for path in reader.paths)
    started_s = time.monotonic()
    with (
        _worker_pool(workers) as pool,
        tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None) as progress,
        logging_redirect_tqdm(),
    ):
        blocks = reader.blocks(on_read=progress.update)
        for block in _ordered_results(pool, encode, blocks, in_flight):
            if block.bad_lines and settings.strict:
                raise ValueError(f"bad line {block.shown_bad_lines[0]}")
            for bad in block.shown_bad_lines[: max(SHOWN_BAD_LINES - writer.counts.bad_lines, 0)]:
                logger.warning("bad line %s", bad)
            writer.counts.bad_lines += block.bad_lines
            writer.counts.empty_documents += block.empty_documents
            if len(block.lengths):
                writer.append(block)
            rate = writer.counts.tokens / (time.monotonic() - started_s)
            progress.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)


@contextmanager
def _worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose dead worker is an error, and whose workers do not outlive this process.

    Workers are spawned, not forked: a fork of a process that has run threads (tokenizers, torch)
    may deadlock.
    """
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, most likely killed for lack of memory; use fewer --workers or"
            " more memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # One thread per worker: the pool is the parallelism. Ctrl-C is the parent's to handle.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends the worker when its parent is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ordered_results(
    pool: ProcessPoolExecutor,
    function: Callable[[LineBlock], _EncodedBlock],
    blocks: Iterable[LineBlock],
    in_flight: int,
) -> Iterator[_EncodedBlock]:
    """`map` that keeps the order and never has more than `in_flight` blocks on the way."""
    waiting: deque[Future[_EncodedBlock]] = deque()
    for block in blocks:
        waiting.append(pool.submit(function, block))
        if len(waiting) == in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_load_tokenizer_once = lru_cache(maxsize=1)(load_tokenizer)


def _encode_block(
    block: LineBlock, tokenizer_path: Path, settings: PreprocessSettings
) -> _EncodedBlock:
    """Runs in a worker: the lines of a block to tokens."""
    tokenizer = _load_tokenizer_once(tokenizer_path)
    texts, bad = parse_documents(block, settings.json_key)
    tokens, lengths = tokenizer.encode_flat(texts)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise ValueError(
            f"{tokenizer_path} gave ids from {tokens.min()} to {tokens.max()}, outside its"
            f" vocabulary of {tokenizer.vocab_size}, near {block.path}:{block.first_line}"
        )
    lengths = lengths[lengths > 0]
    empty_documents = len(texts) - len(lengths)
    if settings.append_eod:
        tokens = np.insert(tokens, np.cumsum(lengths), tokenizer.eod)
        lengths = lengths + 1
    if tokenizer.vocab_size <= 1 << 16:  # half the bytes on their way to the writer
        tokens = tokens.astype(np.uint16)
    return _EncodedBlock(tokens, lengths, empty_documents, len(bad), bad[:SHOWN_BAD_LINES])


def _make_manifest(
    reader: _InputReader, writer: _DatasetWriter, tokenizer: Tokenizer, settings: PreprocessSettings
) -> manifest.DatasetManifest:
    versions = {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}
    return manifest.DatasetManifest(
        format_version=manifest.DATASET_FORMAT,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        input_bytes=sum(record.size_bytes for record in reader.records),
        inputs=tuple(reader.records),
        settings=asdict(settings),
        versions={"python": platform.python_version(), **versions},
        bin_bytes=manifest.bin_path(writer.prefix).stat().st_size,
        bin_sha256=writer.digest.hexdigest(),
        idx_bytes=manifest.idx_path(writer.prefix).stat().st_size,
        idx_sha256=sha256_of(manifest.idx_path(writer.prefix)),
        **asdict(writer.counts),
    )


@contextmanager
def _partial_directory(final_prefix: Path) -> Iterator[Path]:
    """A directory beside the output for everything unfinished; removed whatever happens.

    What a killed run left there is cleared by the next one. A lock, which dies with its process,
    tells a killed run from one still at work.
    """
    directory = Path(f"{final_prefix}.partial")
    busy = f"another run is writing {final_prefix}; wait for it"
    with lock_file(directory / "lock", busy=busy):
        for leftover in directory.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != "lock":
                leftover.unlink()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _publish(prefix: Path, final_prefix: Path) -> None:
    """Renames a complete set to its final names, on disk before and after.

    The old set goes first, manifest before all, and the new manifest comes last: killed at any
    point, this leaves no pair of .bin and .idx of different runs and no manifest without them.
    """
    files = (manifest.bin_path, manifest.idx_path, manifest.dataset_manifest_path)
    for path in files:
        fsync_path(path(prefix))
    for copied in manifest.tokenizer_directory(prefix).iterdir():
        fsync_path(copied)
    fsync_path(manifest.tokenizer_directory(prefix))
    for path in reversed(files):
        path(final_prefix).unlink(missing_ok=True)
    if manifest.tokenizer_directory(final_prefix).exists():
        shutil.rmtree(manifest.tokenizer_directory(final_prefix))
    fsync_path(final_prefix.parent)
    for path in (manifest.tokenizer_directory, *files):
        os.rename(path(prefix), path(final_prefix))
    fsync_path(final_prefix.parent)
