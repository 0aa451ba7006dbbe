"""Tagging: one forward pass of a small model over a dataset, kept as masks, losses and scores.

The stream is cut into shards of whole sequences. Each is scored by one rank, written as a file of
its own, and not scored again by a run that continues a killed one; at the end rank 0 joins them.
What a shard holds depends on data, model and settings, not on ranks: rows are padded to lengths of
their own, and matrix products give each row the same bits whatever else is in the batch. (On CPU
that is tested. A GPU library may choose other code for other batch sizes; keep
--micro_batch_size where bits matter.)
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_salt import checkpoint as ckpt
from megatron_salt.data.manifest import bin_path, idx_path, verify_dataset
from megatron_salt.data.scores import column, sequence_scores
from megatron_salt.data.selection import Rule, SequenceTable, read_table, select, write_table
from megatron_salt.data.sequences import Batch, Sequences, batches_of, rows_of
from megatron_salt.data.tags import (
    DataIdentity,
    FileRecord,
    ModelIdentity,
    TagManifest,
    TagOrigin,
    TagSettings,
    manifest_path,
    open_indexed,
    read_stream,
    read_tag_manifest,
    sequence_lengths,
    table_path,
    tag_prefix,
    verify_tags,
)
from megatron_salt.data.text_files import atomic_path, fsync_path
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.kernels import Chunking, VocabShard, choose_body, token_scores
from megatron_salt.kernels.choose import Impl
from megatron_salt.kernels.token_scores import Wanted
from megatron_salt.model.teacher import Teacher
from megatron_salt.parallel.engine import DTYPES
from megatron_salt.parallel.groups import Groups, from_rank_0, same_error_everywhere

STORED_DTYPES = {"mask": np.uint8, "loss": np.uint16, "entropy": np.uint16}
DEFAULT_TOKENS_PER_SHARD = 1 << 22
# Logits of a chunk on a CPU: few enough to be read again from its caches, enough for its products.
CPU_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class TagRequest:
    """What `tools/tag_data.py` was asked for."""

    data: str
    teacher: str
    output_prefix: str
    window: int | None = None
    top_k: int = 10
    store: tuple[str, ...] = ()
    rule: Rule = field(default_factory=Rule)
    micro_batch_size: int = 8
    precision: str | None = None
    loss_impl: Impl = "auto"
    tokens_per_shard: int = DEFAULT_TOKENS_PER_SHARD


@dataclass(frozen=True, kw_only=True)
class ShardScores:
    """What the model says about the T tokens of a shard, in their order. fp32, bool, fp32."""

    loss_T: NDArray[np.float32]
    kept_T: NDArray[np.bool_]
    entropy_T: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What rank 0 found and every rank goes by."""

    teacher: Path
    manifest: ckpt.CheckpointManifest
    origin: TagOrigin
    eod: int


def tag(request: TagRequest, groups: Groups) -> TagManifest | None:
    """Score a dataset and publish its tags; returns their manifest on rank 0.

    Collectives: those of building the model, and barriers; ranks share nothing while they score.
    Raises: ValueError or FileNotFoundError naming the file or option that is wrong.
    """
    found: tuple[Plan, TagManifest | None] | None = None
    with same_error_everywhere("checking data and teacher"):
        if groups.rank == 0:
            plan = _plan(request)
            found = plan, _finished(request, plan.origin)
    plan, finished = from_rank_0(found)
    if finished is not None:
        _say(groups, f"{manifest_path(request.output_prefix)}: these tags are complete already")
        if groups.rank == 0:
            _remove(_partial_path(request))
        return finished if groups.rank == 0 else None
    with same_error_everywhere("comparing what the ranks see"):
        _check_same_view(request, plan.origin, groups)
    sequences = Sequences.of(sequence_lengths(request.data), plan.origin.settings.window)
    shards = sequences.shards(request.tokens_per_shard)
    with _partial_directory(request, plan.origin, groups) as folder:
        done = from_rank_0([i for i in range(len(shards)) if _shard_path(folder, i).is_file()])
        todo = sorted(set(range(len(shards))) - set(done))
        _say(groups, f"{plan.teacher}, step {plan.manifest.step}, tags {request.data}")
        _say(groups, f"{sequences.num_tokens} tokens, {len(sequences)} sequences, "
                     f"{len(shards)} shards, {len(done)} of them done")  # fmt: skip
        if todo:
            scorer = Scorer(request, plan, groups)
            with same_error_everywhere("scoring"):
                _score_shards(scorer, sequences, shards, todo, folder, groups)
        manifest = None
        with same_error_everywhere("joining the shards"):
            if groups.rank == 0:
                manifest = _publish(request, plan.origin, folder, sequences, shards)
        return manifest


def _finished(request: TagRequest, origin: TagOrigin) -> TagManifest | None:
    """The manifest of these very tags, if they are there: a requeued job has nothing to do.

    Tags that are damaged are made anew, over the old ones.
    Raises: ValueError if other tags are there, or if these were selected from by another rule.
    """
    path = manifest_path(request.output_prefix)
    if not path.is_file():
        return None
    try:
        manifest = read_tag_manifest(request.output_prefix)
        differing = _differences(manifest.origin.to_dict(), origin.to_dict())
        if not differing:
            verify_tags(request.output_prefix, request.data, origin.tokenizer_fingerprint)
            rule = read_table(table_path(request.output_prefix)).rule
    except ValueError as error:
        logging.getLogger(__name__).warning("%s\ntagging anew", error)
        return None
    if differing:
        raise ValueError(
            f"{path}: there are tags already, which differ in {', '.join(differing)}: choose "
            "another --output-prefix, or delete that file to give them up"
        )
    if rule != vars(request.rule):
        raise ValueError(
            f"{request.output_prefix} is tagged already, with another selection: to select anew, "
            f"tools/select_data.py --tags {request.output_prefix} takes seconds"
        )
    return manifest


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what differs in two origins (as JSON has them); what is for people does not."""
    before, now = (json.loads(json.dumps(each)) for each in (before, now))
    found = []
    for section, value in now.items():
        for name in value if isinstance(value, dict) else [None]:
            mine = value if name is None else value[name]
            theirs = before.get(section) if name is None else before.get(section, {}).get(name)
            if mine != theirs and name != "name":
                found.append(section if name is None else f"{section}.{name}")
    return found


def _say(groups: Groups, text: str) -> None:
    if groups.rank == 0:
        tqdm.write(text, file=sys.stderr)


def _plan(request: TagRequest) -> Plan:
    """What the tags will be of. Reads no weights."""
    folder = ckpt.resolve(request.teacher, what="--teacher")
    manifest = ckpt.read_manifest(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    verify_dataset(request.data, tokenizer)
    longest = manifest.config.data.seq_length
    if request.window is not None and request.window < 1:
        raise ValueError(f"--window {request.window}: must be at least 1")
    if request.window is not None and request.window > longest:
        raise ValueError(
            f"--window {request.window}: {folder} was trained on sequences of {longest} tokens; "
            "beyond that its predictions are worthless"
        )
    settings = TagSettings(
        window=request.window,
        max_length=request.window or longest,
        top_k=request.top_k,
        store=tuple(name for name in ("loss", "entropy") if name in request.store),
        precision=request.precision or manifest.precision,
        loss_impl=_loss_body(request),
    )
    if not 1 <= request.top_k < manifest.vocab_size:
        raise ValueError(
            f"--top_k {request.top_k}: must lie between 1 and the vocabulary of "
            f"{manifest.vocab_size} tokens"
        )
    if request.rule.score == "entropy" and "entropy" not in settings.store:
        raise ValueError("--score entropy needs --store entropy")
    if not sequence_lengths(request.data).sum():
        raise ValueError(f"{bin_path(request.data)} holds no tokens")
    origin = TagOrigin(
        data=DataIdentity.of(request.data),
        tokenizer_fingerprint=tokenizer.fingerprint,
        model=ModelIdentity(
            fingerprint=ckpt.weights_fingerprint(manifest),
            step=manifest.step,
            name=f"{Path(manifest.config.train.output_dir).name}/{folder.name}",
        ),
        settings=settings,
    )
    return Plan(teacher=folder, manifest=manifest, origin=origin, eod=tokenizer.eod)


def _loss_body(request: TagRequest) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose_body(
        request.loss_impl, device=device, dtypes=frozenset({torch.float32}), divergence="forward_kl"
    ).name


def _check_same_view(request: TagRequest, origin: TagOrigin, groups: Groups) -> None:
    """Raise ValueError where this rank would read or compute something else than rank 0."""
    origin.data.check(request.data, f"rank {groups.rank} sees other data: what rank 0 sees")
    if _loss_body(request) != origin.settings.loss_impl:
        raise ValueError(
            f"rank {groups.rank} would compute losses by its {_loss_body(request)} code, rank 0 by "
            f"{origin.settings.loss_impl}: set --loss_impl (python -m megatron_salt.kernels there "
            "says why)"
        )


class Scorer:
    """The frozen model of this rank, and how it scores rows."""

    def __init__(self, request: TagRequest, plan: Plan, groups: Groups) -> None:
        manifest = plan.manifest
        self.data, self.data_prefix = open_indexed(request.data), request.data
        self.settings, self.eod, self.groups = plan.origin.settings, plan.eod, groups
        self.num_rows, self.impl = request.micro_batch_size, request.loss_impl
        on_cpu = groups.device.type == "cpu"
        self.chunking = Chunking(chunk_bytes=CPU_CHUNK_BYTES) if on_cpu else Chunking()
        self.vocab = VocabShard(size=manifest.vocab_size, start=0, stop=manifest.vocab_size)
        self.model = Teacher(
            plan.teacher,
            manifest,
            groups,
            vocab=self.vocab,
            head_columns=manifest.vocab_size,
            seq_length=self.settings.max_length,
            micro_batch_size=self.num_rows,
            dtype=DTYPES[self.settings.precision],
        )

    def shard(
        self, sequences: Sequences, first: int, last: int, on_tokens: Callable[[int], Any]
    ) -> ShardScores:
        """Scores of every token of sequences `[first, last)`.

        Host sync: one, at the end.
        """
        rows = rows_of(sequences, first, last, self.settings.max_length)
        start, stop = int(sequences.bounds[first]), int(sequences.bounds[last])
        offset = max(start - 1, 0)
        stream = read_stream(self.data, offset, stop)
        beyond = np.flatnonzero((stream < 0) | (stream >= self.vocab.size))
        if len(beyond):
            raise ValueError(
                f"{bin_path(self.data_prefix)}: token {offset + beyond[0]} is id "
                f"{stream[beyond[0]]}, the teacher's vocabulary has {self.vocab.size}: they are of "
                "different tokenizers, or the file is damaged"
            )
        parts: list[tuple[Batch, torch.Tensor]] = []
        batches = batches_of(
            stream, offset, rows, max_length=self.settings.max_length, num_rows=self.num_rows,
            eod=self.eod,
        )  # fmt: skip
        for batch in batches:
            parts.append((batch, self.batch(batch)))
            on_tokens(len(batch.places))
        columns = np.empty((2 + self.with_entropy, stop - start), dtype=np.float32)
        for batch, values in parts:
            columns[:, batch.places] = values.cpu().numpy()[:, batch.predicts_BS.ravel()]
        entropy = columns[2] if self.with_entropy else None
        return ShardScores(loss_T=columns[0], kept_T=columns[1] > 0, entropy_T=entropy)

    @property
    def with_entropy(self) -> bool:
        return "entropy" in self.settings.store

    @torch.no_grad()
    def batch(self, batch: Batch) -> torch.Tensor:
        """Loss, 1 where kept, and entropy if it is asked for: [2 or 3, B * S], filling included.

        Kept means that fewer than top_k tokens have a larger logit than the label.
        """
        device = self.groups.device
        inputs_BS = torch.from_numpy(batch.inputs_BS).to(device, non_blocking=True)
        labels_T = torch.from_numpy(batch.labels_BS).to(device, non_blocking=True).flatten()
        hidden_TE = self.model.forward(inputs_BS).flatten(0, 1)
        assert self.model.head_WE is not None  # one stage: every rank has the head
        want: list[Wanted] = ["ce", "likelier"]
        scores = token_scores(
            hidden_TE, self.model.head_WE, labels_T, vocab=self.vocab, impl=self.impl,
            chunking=self.chunking,
            want=[*want, "entropy"] if self.with_entropy else want,
        )  # fmt: skip
        assert scores.ce_T is not None and scores.likelier_T is not None
        values = [scores.ce_T, (scores.likelier_T < self.settings.top_k).float()]
        return torch.stack(values if scores.entropy_T is None else [*values, scores.entropy_T])


def _score_shards(
    scorer: Scorer,
    sequences: Sequences,
    shards: list[tuple[int, int]],
    todo: list[int],
    folder: Path,
    groups: Groups,
) -> None:
    """Score this rank's part of the shards; a thread writes one while the next is computed."""
    mine = todo[groups.rank :: groups.layout.world_size]
    sizes = [int(sequences.bounds[b] - sequences.bounds[a]) for a, b in shards]
    total = sum(sizes[index] for index in mine)
    terminal = sys.stderr.isatty()
    started = time.monotonic()
    with (
        tqdm(total=total, unit="token", unit_scale=True, disable=groups.rank != 0,
             mininterval=0.5 if terminal else 30.0, desc="rank 0 of "
             f"{groups.layout.world_size}", dynamic_ncols=terminal) as bar,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):  # fmt: skip
        pending: Any = None
        try:
            for index in mine:
                first, last = shards[index]
                scores = scorer.shard(sequences, first, last, bar.update)
                if pending is not None:
                    pending.result()
                pending = writer.submit(
                    _write_shard, _shard_path(folder, index), sequences, first, last, scores,
                    scorer.settings,
                )  # fmt: skip
            if pending is not None:
                pending.result()
        except Exception as error:
            # The others' shards are worth finishing; whoever watches need not wait for them.
            print(f"rank {groups.rank}: {error}\nending when all ranks are done", file=sys.stderr)
            raise
    seconds = time.monotonic() - started
    _say(groups, f"rank 0: {total} tokens in {seconds:.1f} s, {total / max(seconds, 1e-9):,.0f} "
                 "tokens/s")  # fmt: skip


def _write_shard(
    path: Path,
    sequences: Sequences,
    first: int,
    last: int,
    scores: ShardScores,
    settings: TagSettings,
) -> None:
    bounds = sequences.bounds[first : last + 1]
    lengths = np.diff(bounds)
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(scores.loss_T.astype(np.float16)))
    if len(bad):
        raise ValueError(
            f"the loss of token {bounds[0] + bad[0]} is {scores.loss_T[bad[0]]}: the teacher does "
            f"not work in {settings.precision}; try --precision fp32"
        )
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
    arrays |= {f"table_{name}": value for name, value in table.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:08d}.npz"


def _partial_path(request: TagRequest) -> Path:
    return Path(f"{request.output_prefix}.tags.partial")


@contextmanager
def _partial_directory(request: TagRequest, origin: TagOrigin, groups: Groups) -> Iterator[Path]:
    """The folder of finished shards; it outlives a kill and goes when the tags are published.

    Raises: ValueError on all ranks if another run is at work in it, or if it is of a run with other
        data, model or settings.
    """
    folder = _partial_path(request)
    identity = {**origin.to_dict(), "tokens_per_shard": request.tokens_per_shard}
    lock = None
    with same_error_everywhere("opening the folder of shards"):
        if groups.rank == 0:
            lock = _locked(folder)
            _check_identity(folder / "identity.json", identity)
    complete = False
    try:
        yield folder
        complete = True
    finally:
        if groups.rank == 0 and complete:
            _remove(folder)
        if lock is not None:
            lock.close()


def _locked(folder: Path) -> IO[str]:
    """The lock of the folder, which is made. Raises: ValueError if another run holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "lock"
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"another run is at work in {folder}") from None
        # Whoever held it may have removed the folder in between: then this locks nothing.
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
        lock.close()


def _remove(folder: Path) -> None:
    """Away at once under its name: shards must never be there without what they are of."""
    gone = folder.with_suffix(".removed")
    shutil.rmtree(gone, ignore_errors=True)  # of a run that was killed here
    if folder.exists():
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Raises: ValueError if the folder's shards are of something else, or of nobody knows what."""
    if path.is_file():
        differing = _differences(json.loads(path.read_text(encoding="utf-8")), identity)
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


def _publish(
    request: TagRequest,
    origin: TagOrigin,
    folder: Path,
    sequences: Sequences,
    shards: list[tuple[int, int]],
) -> TagManifest:
    """Join the shards, write table and manifest, and give all files their names, manifest last."""
    final, built = Path(request.output_prefix), folder / "built" / "tags"
    built.parent.mkdir(exist_ok=True)
    data = open_indexed(request.data)
    stored = ("mask", *origin.settings.store)
    builders = {kind: _builder(built, kind) for kind in stored}
    parts: list[dict[str, NDArray[Any]]] = []
    kept = 0
    for index, (first, last) in enumerate(shards):
        path = _shard_path(folder, index)
        try:
            with np.load(path) as shard:
                expected = np.diff(sequences.bounds[first : last + 1])
                if shard["table_sequence"].tolist() != list(range(first, last)) or not (
                    np.array_equal(shard["table_tokens"], expected)
                ):
                    raise ValueError("it is of other sequences")
                for kind, builder in builders.items():
                    builder.data_file.write(shard[kind].tobytes())
                kept += int(shard["mask"].sum(dtype=np.int64))
                names = [name for name in shard.files if name.startswith("table_")]
                parts.append({name.removeprefix("table_"): shard[name] for name in names})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
    for kind, builder in builders.items():
        # As `IndexedDatasetBuilder.add_document` would have filled them.
        builder.sequence_lengths = data.sequence_lengths.tolist()
        builder.document_indices = data.document_indices.tolist()
        builder.finalize(str(idx_path(tag_prefix(built, kind))))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    scores = columns[column(request.rule.score, request.rule.masked)]
    table = SequenceTable(origin=origin, columns=columns, rule={}).with_selection(
        scores, select([scores], request.rule)[0], vars(request.rule)
    )
    write_table(table_path(built), table)
    suffixes = [f"_{kind}{end}" for kind in stored for end in (".bin", ".idx")]
    suffixes.append("_sequences.parquet")
    manifest = TagManifest(
        origin=origin,
        sequences=len(table),
        kept_tokens=kept,
        files={suffix: FileRecord.of(Path(f"{built}{suffix}")) for suffix in suffixes},
        versions=ckpt.installed_versions(),
    )
    final.parent.mkdir(parents=True, exist_ok=True)
    manifest_path(final).unlink(missing_ok=True)
    for kind in STORED_DTYPES:  # what earlier tags had and these do not
        for path in (bin_path(tag_prefix(final, kind)), idx_path(tag_prefix(final, kind))):
            path.unlink(missing_ok=True)
    for suffix in suffixes:
        fsync_path(f"{built}{suffix}")
        os.replace(f"{built}{suffix}", f"{final}{suffix}")
    for leftover in final.parent.glob(f".{manifest_path(final).name}.*.partial*"):
        leftover.unlink()  # of a run that was killed here
    with atomic_path(manifest_path(final)) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _builder(built: Path, kind: str) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder(str(bin_path(tag_prefix(built, kind))), dtype=STORED_DTYPES[kind])
