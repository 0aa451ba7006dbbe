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
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_salt.corpus.text_files import BadLine, LineBlock, iter_line_blocks, parse_documents
from megatron_salt.data import manifest
from megatron_salt.data.sources import Sources, write_sources
from megatron_salt.data.tags import open_indexed
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_salt.files.disk import fsync_path, lock_file, sha256_of
from megatron_salt.files.progress import Progress

logger = logging.getLogger(__name__)

SHOWN_BAD_LINES = 20
# Enough blocks (1 MiB each) to keep the workers busy while megatron-core is imported.
MIN_BLOCKS_IN_FLIGHT = 64
BLOCKS_IN_FLIGHT_PER_WORKER = 4
RECORDED_PACKAGES = ("megatron-core", "numpy", "sentencepiece", "tokenizers", "zstandard")


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What decides which tokens a corpus becomes.

    `source_key` is the field that names a document's source. `deduplicate` keeps the first of equal
    texts; memory: a digest of 16 bytes a document, some 70 bytes while they are compared.
    """

    json_key: str = "text"
    append_eod: bool = True
    strict: bool = False
    source_key: str | None = None
    deduplicate: bool = False
    shuffle_seed: int | None = None


@dataclass(frozen=True)
class _EncodedBlock:
    """The documents of one block as tokens end to end; empty ones are only counted."""

    tokens: np.ndarray
    lengths: np.ndarray
    sources: list[str]
    digests: bytes
    empty_documents: int
    bad_lines: int
    shown_bad_lines: list[BadLine]


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def preprocess(
    inputs: Sequence[str | Path], output_prefix: str | Path, tokenizer_path: str | Path,
    settings: PreprocessSettings | None = None, *, workers: int | None = None,
    overwrite: bool = False,
) -> manifest.DatasetManifest:  # fmt: skip
    """Tokenises JSONL files into `<output_prefix>_<json_key>_document.{bin,idx}`.

    Beside them go the manifest and a copy of the tokenizer. Nothing has its final name before
    everything is complete and on disk.

    Raises: FileNotFoundError for missing inputs; ValueError for an empty corpus, a corrupt input,
    a dataset already there without `overwrite`, or, when strict, the first bad line; RuntimeError
    when a worker process dies.
    """
    settings = settings or PreprocessSettings()
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"--workers is {workers}, it must be at least 1")
    if ((seed := settings.shuffle_seed) or 0) < 0:
        raise ValueError(f"--shuffle-seed is {seed}, it must not be negative")
    for path in inputs:
        if not Path(path).exists() or Path(path).is_dir():
            raise FileNotFoundError(f"--input {path}: no such file")
    tokenizer = load_tokenizer(tokenizer_path)
    final_prefix = Path(f"{output_prefix}_{settings.json_key}_document")
    with partial_dataset(final_prefix, overwrite=overwrite) as prefix:
        as_read = seed is None and not settings.deduplicate
        written = prefix if as_read else prefix.with_name("as_read")
        writer = _DatasetWriter(written, tokenizer.vocab_size)
        reader = _InputReader(inputs)
        _encode_all(reader, writer, tokenizer.path, settings, workers)
        if not writer.documents:
            raise ValueError(
                f"no document in {len(inputs)} input files: {writer.empty_documents} empty"
                f" documents and {writer.bad_lines} bad lines; is --json-key"
                f" {settings.json_key!r} right?"
            )
        builder, order = writer.builder, np.arange(writer.documents)
        if settings.deduplicate:
            order = np.sort(np.unique(np.frombuffer(writer.digests, "V16"), return_index=True)[1])
        if seed is not None:
            order = order[seeded_order(seed, len(order))]
        if not as_read:
            builder.finalize(str(manifest.idx_path(written)))
            builder = new_builder(prefix, tokenizer.vocab_size)
            copy_documents(written, order, builder)
        of_documents = np.array(writer.of_documents)[order if writer.names else []]
        sources = Sources(names=list(writer.names), of_documents=of_documents)
        return publish_dataset(
            prefix, final_prefix, builder, tokenizer, sources, inputs=reader.records,
            settings={**asdict(settings), "duplicates": writer.documents - len(order)},
            bad_lines=writer.bad_lines, empty_documents=writer.empty_documents,
            bin_sha256=writer.digest.hexdigest() if as_read else None,
        )  # fmt: skip


class _InputReader:
    """The inputs as blocks of lines, hashed on the way."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        self.records: list[manifest.InputRecord] = []
        self.bytes_read = 0
        self.block_ends: deque[int] = deque()  # bytes read up to each block

    def blocks(self) -> Iterator[LineBlock]:
        for path in self.paths:
            digest, start = hashlib.sha256(), self.bytes_read

            def see(data: bytes, digest: Any = digest) -> None:
                digest.update(data)
                self.bytes_read += len(data)

            for block in iter_line_blocks(path, on_read=see):
                self.block_ends.append(self.bytes_read)
                yield block
            size, sha256 = self.bytes_read - start, digest.hexdigest()
            record = manifest.InputRecord(name=path.name, size_bytes=size, sha256=sha256)
            self.records.append(record)


@dataclass
class _DatasetWriter:
    """Appends encoded blocks to the .bin and .idx of megatron-core's builder."""

    prefix: Path
    vocab_size: int
    documents: int = 0
    tokens: int = 0
    bad_lines: int = 0
    empty_documents: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    digests: bytearray = field(default_factory=bytearray)
    names: dict[str, int] = field(default_factory=dict)
    of_documents: array[int] = field(default_factory=partial(array, "i"))

    @cached_property
    def builder(self) -> Any:
        # Importing megatron-core takes seconds; by the first use the workers have their blocks.
        return new_builder(self.prefix, self.vocab_size)

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
        self.documents += len(block.lengths)
        self.tokens += len(tokens)
        self.digests += block.digests
        for name in block.sources:
            self.of_documents.append(self.names.setdefault(name, len(self.names)))


def new_builder(prefix: Path, vocab_size: int) -> Any:
    """megatron-core's builder of a dataset's .bin and .idx."""
    was_enabled = gc.isenabled()
    gc.disable()  # what is imported stays: collecting it, now and at exit, takes seconds
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about GPU packages, of no use here
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
    return IndexedDatasetBuilder(str(manifest.bin_path(prefix)), DType.optimal_dtype(vocab_size))


def _encode_all(
    reader: _InputReader, writer: _DatasetWriter, tokenizer_path: Path,
    settings: PreprocessSettings, workers: int,
) -> None:  # fmt: skip
    """Runs every block through the pool and appends the results in input order."""
    encode = partial(_encode_block, tokenizer_path=tokenizer_path, settings=settings)
    in_flight = max(MIN_BLOCKS_IN_FLIGHT, BLOCKS_IN_FLIGHT_PER_WORKER * workers)
    started_s = time.monotonic()
    with (
        _worker_pool(workers) as pool,
        Progress(sum(x.stat().st_size for x in reader.paths), "B", "tokenising") as progress,
        logging_redirect_tqdm(),
    ):
        for block in _ordered_results(pool, encode, reader.blocks(), in_flight):
            if block.bad_lines and settings.strict:
                raise ValueError(f"bad line {block.shown_bad_lines[0]}")
            for bad in block.shown_bad_lines[: max(SHOWN_BAD_LINES - writer.bad_lines, 0)]:
                logger.warning("bad line %s", bad)
            writer.bad_lines += block.bad_lines
            writer.empty_documents += block.empty_documents
            if len(block.lengths):
                writer.append(block)
            rate = writer.tokens / (time.monotonic() - started_s)
            progress.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            progress.update(reader.block_ends.popleft() - progress.n)
        progress.update(reader.bytes_read - progress.n)


@contextmanager
def _worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose dead worker is an error, and whose workers do not outlive this process.

    Workers are spawned, not forked: a fork of a process that has run threads (tokenizers, torch)
    may deadlock.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
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
    pool: ProcessPoolExecutor, function: Callable[[LineBlock], _EncodedBlock],
    blocks: Iterable[LineBlock], in_flight: int,
) -> Iterator[_EncodedBlock]:  # fmt: skip
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
    keys = (settings.json_key, settings.source_key)
    documents, bad = parse_documents(block, *(key for key in keys if key is not None))
    texts = [text for text, *_ in documents]
    tokens, lengths = tokenizer.encode_flat(texts)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise ValueError(
            f"{tokenizer_path} gave ids from {tokens.min()} to {tokens.max()}, outside its"
            f" vocabulary of {tokenizer.vocab_size}, near {block.path}:{block.first_line}"
        )
    documents = list(compress(documents, lengths > 0))
    lengths = lengths[lengths > 0]
    empty = len(texts) - len(lengths)
    if settings.append_eod:
        tokens = np.insert(tokens, np.cumsum(lengths), tokenizer.eod)
        lengths = lengths + 1
    if tokenizer.vocab_size <= 1 << 16:  # half the bytes on their way to the writer
        tokens = tokens.astype(np.uint16)
    sources = [source for _, *named in documents for source in named]
    hashed = [text.encode() for text, *_ in documents if settings.deduplicate]
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in hashed)
    return _EncodedBlock(tokens, lengths, sources, digests, empty, len(bad), bad[:SHOWN_BAD_LINES])


def seeded_order(seed: int, number: int) -> np.ndarray:
    """A permutation of range(number), another for every seed from 0."""
    # RandomState, because NumPy promises that its numbers never change.
    state = np.random.RandomState(np.random.SeedSequence([seed]).generate_state(4))
    return state.permutation(number)


def copy_documents(prefix: str | Path, order: np.ndarray, builder: Any) -> None:
    """Gives a builder these documents of a dataset in this order; one at a time is in memory."""
    data = open_indexed(prefix)
    ends = data.document_indices
    with Progress(len(order), "document", "writing") as progress:
        for first, last in zip(ends[:-1][order].tolist(), ends[1:][order].tolist(), strict=True):
            lengths = data.sequence_lengths[first:last].tolist()
            start = data.index.sequence_pointers[first]
            tokens = data.bin_reader.read(data.index.dtype, sum(lengths), start)
            builder.add_document(tokens, lengths)
            progress.update(1)


@contextmanager
def partial_dataset(final_prefix: Path, *, overwrite: bool) -> Iterator[Path]:
    """The prefix to build a dataset at, in a directory that is removed whatever happens.

    What a killed run left there is cleared by the next one. A lock, which dies with its process,
    tells a killed run from one still at work.
    Raises: ValueError if another run builds it, or without `overwrite` if it is there already.
    """
    directory = Path(f"{final_prefix}.partial")
    busy = f"another run is writing {final_prefix}; wait for it"
    taken = f"{final_prefix} is a dataset; --overwrite replaces it, or give another --output-prefix"
    with lock_file(directory / "lock", busy=busy):
        try:
            # A .bin or .idx alone is what a run killed while renaming has left.
            there = manifest.bin_path(final_prefix), manifest.idx_path(final_prefix)
            made = manifest.dataset_manifest_path(final_prefix).exists()
            if not overwrite and (made or all(path.exists() for path in there)):
                raise ValueError(taken)
            for leftover in directory.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != "lock":
                    leftover.unlink()
            yield directory / final_prefix.name
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def publish_dataset(
    prefix: Path, final_prefix: Path, builder: Any, tokenizer: Tokenizer, sources: Sources,
    *, inputs: Sequence[manifest.InputRecord], settings: dict[str, Any], bad_lines: int,
    empty_documents: int, bin_sha256: str | None = None,
) -> manifest.DatasetManifest:  # fmt: skip
    """Completes the set of a builder and renames it to its final names, on disk before and after.

    The old set goes first, manifest before all, and the new manifest comes last: killed at any
    point, this leaves no pair of .bin and .idx of different runs and no manifest without them.
    """
    bin_path, idx_path = manifest.bin_path(prefix), manifest.idx_path(prefix)
    builder.finalize(str(idx_path))
    if sources.names:
        write_sources(prefix, sources)
        settings = {**settings, "sources_sha256": sha256_of(manifest.sources_path(prefix))}
    versions = {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}
    made = manifest.DatasetManifest(
        format_version=manifest.DATASET_FORMAT, tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size, eod=tokenizer.eod,
        documents=len(builder.document_indices) - 1,
        tokens=int(np.sum(builder.sequence_lengths, dtype=np.int64)), bad_lines=bad_lines,
        empty_documents=empty_documents, inputs=tuple(inputs),
        input_bytes=sum(record.size_bytes for record in inputs), settings=settings,
        versions={"python": platform.python_version(), **versions},
        bin_bytes=bin_path.stat().st_size, bin_sha256=bin_sha256 or sha256_of(bin_path),
        idx_bytes=idx_path.stat().st_size, idx_sha256=sha256_of(idx_path),
        bin_sampled_sha256=manifest.sampled_sha256(bin_path),
    )  # fmt: skip
    tokenizer.save(manifest.tokenizer_directory(prefix))
    manifest.dataset_manifest_path(prefix).write_text(made.to_json(), encoding="utf-8")
    files = (manifest.sources_path, manifest.bin_path, manifest.idx_path,
             manifest.dataset_manifest_path)  # fmt: skip
    complete = [path for path in files if path(prefix).exists()]
    copied = manifest.tokenizer_directory(prefix)
    for made_path in (*(path(prefix) for path in complete), *copied.iterdir(), copied):
        fsync_path(made_path)
    for path in reversed(files):
        path(final_prefix).unlink(missing_ok=True)
    if manifest.tokenizer_directory(final_prefix).exists():
        shutil.rmtree(manifest.tokenizer_directory(final_prefix))
    fsync_path(final_prefix.parent)
    for path in (manifest.tokenizer_directory, *complete):
        os.rename(path(prefix), path(final_prefix))
    fsync_path(final_prefix.parent)
    return made
