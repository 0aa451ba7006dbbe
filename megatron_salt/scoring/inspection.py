"""Looking at a dataset and its tags: one document or sequence, or all of it checked.

What training checks at every start is sizes and samples; `verify_with_tags` reads every byte, and
holds what can be derived from another file (kept tokens, means, starts) against that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_salt.data.manifest import (
    bin_path,
    check_exists,
    idx_path,
    read_dataset_manifest,
    tokenizer_directory,
    verify_dataset,
)
from megatron_salt.data.scores import MASKED, SCORES, column
from megatron_salt.data.selection import (
    Rule,
    SequenceTable,
    check_same_origin,
    load_selection,
    read_table,
    rule_text,
    select,
)
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.sources import load_sources
from megatron_salt.data.tags import (
    TAG_AGAIN,
    TagManifest,
    as_fp16,
    open_indexed,
    read_stream,
    sequence_lengths,
    table_path,
    tag_manifest_path,
    tag_prefix,
    verify_tags,
)
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_salt.scoring.token_view import TokenTags

TOKENS_PER_READ = 1 << 23
COLUMNS = {"sequence": "i", "start": "i", "tokens": "i", "kept": "i", "score": "f", "selected": "b"}
# A mean of stored losses against the one of the losses before they were rounded to fp16, to which
# 2^-11 of each loss may be missing; and some for fp32, which the table's means are.
RELATIVE, ABSOLUTE = 2.0**-10, 1e-5


@dataclass(frozen=True, kw_only=True)
class TokenSpan:
    """Tokens `[start, stop)` of a dataset, and what is known about them."""

    name: str
    start: int
    stop: int
    ids: list[int]
    tags: TokenTags | None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A dataset with its tags and a table, where they are given."""

    name: str
    data: Any
    lengths: NDArray[np.int32]
    tokenizer: Tokenizer
    manifest: TagManifest | None
    tag_data: dict[str, Any]
    """Indexed datasets of mask, loss and entropy."""
    table: SequenceTable | None

    def document(self, number: int) -> TokenSpan:
        """Raises: ValueError for a document that is not there."""
        if not 0 <= number < len(self.lengths):
            raise ValueError(f"document {number}: {self.name} has documents "
                             f"0 to {len(self.lengths) - 1}")  # fmt: skip
        start = int(self.lengths[:number].sum(dtype=np.int64))
        return self._span(f"document {number}", start, start + int(self.lengths[number]))

    def sequence(self, number: int) -> TokenSpan:
        """Raises: ValueError for a sequence that is not there, or without a table."""
        if self.table is None:
            raise ValueError("--sequence needs the table that numbers them: --tags or --selection")
        if not 0 <= number < len(self.table):
            raise ValueError(f"sequence {number}: {self.table.path} has sequences "
                             f"0 to {len(self.table) - 1}")  # fmt: skip
        start = int(self.table.columns["start"][number])
        stop = start + int(self.table.columns["tokens"][number])
        return self._span(f"sequence {number}", start, stop)

    def _span(self, name: str, start: int, stop: int) -> TokenSpan:
        tags = None
        if self.tag_data:
            read = {kind: read_stream(file, start, stop) for kind, file in self.tag_data.items()}
            kept = read.pop("mask") > 0
            tags = TokenTags(kept=kept, **{kind: as_fp16(each) for kind, each in read.items()})
        ids = read_stream(self.data, start, stop).tolist()
        return TokenSpan(name=name, start=start, stop=stop, ids=ids, tags=tags)


def open_all(
    prefix: str, tags: str | None, selection: str | None, tokenizer_path: str | None
) -> Opened:
    """A dataset, its tags and a table of its sequences (the selection, or else the tags' own).

    Raises: ValueError or FileNotFoundError naming the files that are wrong or do not fit.
    """
    check_exists(prefix)
    tokenizer = _tokenizer(prefix, tokenizer_path)
    verify_dataset(prefix, tokenizer)
    manifest = verify_tags(tags, prefix, tokenizer.fingerprint) if tags is not None else None
    table = None
    if selection is not None or tags is not None:
        table = read_table(table_path(str(tags)) if selection is None else selection)
        check_columns(table)
        table.origin.data.check(prefix, table.path)
        if manifest is not None:
            _check_one_model(table, manifest, str(tags))
    kinds = manifest.stored if manifest is not None else ()
    return Opened(
        name=Path(prefix).name, data=open_indexed(prefix), lengths=sequence_lengths(prefix),
        tokenizer=tokenizer, manifest=manifest,
        tag_data={kind: open_indexed(tag_prefix(str(tags), kind)) for kind in kinds}, table=table,
    )  # fmt: skip


def overview(prefix: str, tags: str | None, tokenizer_path: str | None) -> list[str]:
    """What a dataset holds and what it was made of; with tags, what they say of all of it.

    Raises: as `open_all`.
    """
    opened = open_all(prefix, tags, None, tokenizer_path)
    lengths, made = opened.lengths, read_dataset_manifest(prefix)
    tokens = int(lengths.sum(dtype=np.int64))
    size = bin_path(prefix).stat().st_size / 2**20
    lines = [f"{prefix}: {len(lengths)} documents, {tokens} tokens, {size:.1f} MiB"]
    if len(lengths):
        low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
        lines.append(f"tokens of a document: {low} to {high}, median {middle}")
    if (sources := load_sources(prefix)) is not None:
        counts = np.bincount(sources.of_documents, minlength=len(sources.names))
        each = (f"{n} {count}" for n, count in zip(sources.names, counts, strict=True))
        lines.append(f"documents of each source: {', '.join(each)}")
    own = opened.tokenizer
    lines.append(f"tokenizer: {own.path}, {own.vocab_size} tokens, end of document {own.eod}")
    if made is not None:
        inputs = ", ".join(f"{each.name} ({each.size_bytes} bytes)" for each in made.inputs)
        out = {"empty documents": made.empty_documents, "bad lines": made.bad_lines,
               "duplicates": made.settings.get("duplicates", 0)}  # fmt: skip
        left_out = ", ".join(f"{count} {what}" for what, count in out.items())
        lines.append(f"made of: {inputs}; left out: {left_out}")
    if opened.manifest is not None:
        by, kept = opened.manifest.origin, opened.manifest.kept_tokens
        lines.append(f"tags: {', '.join(opened.manifest.stored)} by {by.model.name}; "
                     f"{kept / max(tokens, 1):.1%} of the tokens kept")  # fmt: skip
    return lines


def _tokenizer(prefix: str, path: str | None) -> Tokenizer:
    beside = tokenizer_directory(prefix)
    if path is None and not beside.is_dir():
        raise FileNotFoundError(f"no {beside} beside the dataset; give --tokenizer")
    return load_tokenizer(path or beside)


def _check_one_model(table: SequenceTable, manifest: TagManifest, tags: str) -> None:
    if table.origin != manifest.origin:
        raise ValueError(
            f"{table.path} and {tag_manifest_path(tags)} do not belong together: they are of "
            f"{table.origin.model.name} and {manifest.origin.model.name}, or differ in data or "
            "settings; give the tags that the table was made from"
        )


def summary(opened: Opened, span: TokenSpan) -> list[str]:
    """What is known about a span: its tokens, then a line for each sequence that it overlaps."""
    parts = [f"{span.name} of {opened.name}: {len(span.ids)} tokens, [{span.start}, {span.stop})"]
    if span.tags is not None and span.ids:
        parts.append(f"kept {span.tags.kept.mean():.1%}")
        for name, values in (("loss", span.tags.loss), ("entropy", span.tags.entropy)):
            if values is not None:
                parts.append(f"mean {name} {values.mean(dtype=np.float64):.3f} nats")
    lines = [", ".join(parts)]
    if opened.table is None:
        return lines
    columns = opened.table.columns
    ends = columns["start"] + columns["tokens"]
    overlap = (columns["start"] < span.stop) & (ends > span.start)
    whole = (columns["start"] == span.start) & (ends == span.stop)
    for place in np.flatnonzero(overlap | whole):
        lines.append(_row(columns, int(place), opened.table.origin.settings.window, span))
    return lines


def _row(columns: dict[str, NDArray[Any]], place: int, window: int | None, span: TokenSpan) -> str:
    start, tokens = int(columns["start"][place]), int(columns["tokens"][place])
    common = min(start + tokens, span.stop) - max(start, span.start)
    kind = "document" if window is None else "window"
    line = f"{kind} {columns['sequence'][place]}"
    if common < tokens:
        line += f" ({common} of its {tokens} tokens)"
    chosen = "selected" if columns["selected"][place] else "not selected"
    line += f": score {columns['score'][place]:.4g}, {chosen}"
    names = [column(score, masked) for score in SCORES for masked in MASKED]
    shown = [f"{name} {columns[name][place]:.4g}" for name in names if name in columns]
    # All scores where this is what was asked for, not for each of a document's many windows.
    is_span = (start, start + tokens) == (span.start, span.stop)
    return f"{line}; {', '.join(shown)}" if is_span else line


def verify_with_tags(
    prefix: str, tags: str | None, selection: str | None, tokenizer_path: str | None
) -> Iterator[str]:
    """Check every byte of a dataset, its tags and a selection, yielding what was checked.

    Raises: ValueError or FileNotFoundError naming the first file that is wrong.
    """
    tokenizer = _tokenizer(prefix, tokenizer_path)
    dataset = verify_dataset(prefix, tokenizer, hashes=True)
    lengths = sequence_lengths(prefix)
    trusted = "as in its manifest" if dataset is not None else "no manifest to compare with"
    for path in (bin_path(prefix), idx_path(prefix)):
        yield f"{path}: {path.stat().st_size} bytes, {trusted}"
    num_tokens = int(lengths.sum(dtype=np.int64))
    largest = _largest_id(prefix, num_tokens)
    if largest >= tokenizer.vocab_size:
        raise ValueError(
            f"{bin_path(prefix)} holds the id {largest}, {tokenizer.path} has "
            f"{tokenizer.vocab_size} tokens; give the tokenizer that made the dataset"
        )
    yield (f"    {len(lengths)} documents, {num_tokens} tokens, ids up to {largest} of "
           f"{tokenizer.vocab_size}")  # fmt: skip
    manifest = None
    if tags is not None:
        manifest = verify_tags(tags, prefix, tokenizer.fingerprint, hashes=True)
        for suffix, record in manifest.files.items():
            yield f"{tags}{suffix}: {record.num_bytes} bytes, as in {tag_manifest_path(tags).name}"
        yield from _verify_table_of_tags(tags, manifest, lengths)
    if selection is not None:
        table = read_table(selection)
        _check_bounds(table, lengths)
        chosen = load_selection(selection, prefix, tokenizer.fingerprint)
        size = table.path.stat().st_size
        yield f"{selection}: {size} bytes, {len(table)} sequences as in the data"
        if manifest is not None and tags is not None:
            check_same_origin(chosen, manifest.origin, tag_manifest_path(tags))
            if manifest.origin == table.origin:
                _check_like(table, read_table(table_path(tags)))
                yield f"    scores as in {table_path(tags)}"
        yield from _verify_choice(table)
        yield f"    {chosen.tokens} tokens in them"


def _largest_id(prefix: str, num_tokens: int) -> int:
    data, largest = open_indexed(prefix), -1
    for start in range(0, num_tokens, TOKENS_PER_READ):
        part = read_stream(data, start, min(start + TOKENS_PER_READ, num_tokens))
        largest = max(largest, int(part.max()))
    return largest


def check_columns(table: SequenceTable) -> None:
    """Raise ValueError unless a table has the columns that its readers go by."""
    for name, kind in COLUMNS.items():
        values = table.columns.get(name)
        if values is None or values.dtype.kind != kind:
            found = "missing" if values is None else f"of type {values.dtype}"
            raise ValueError(f"{table.path}: column {name} is {found}; {TAG_AGAIN}")


def _check_bounds(table: SequenceTable, lengths: NDArray[np.int32]) -> Sequences:
    """Raise ValueError unless the table's sequences are those of the data, in order."""
    check_columns(table)
    sequences = Sequences.of(lengths, table.origin.settings.window)
    if len(table) != len(sequences):
        raise ValueError(
            f"{table.path} has {len(table)} sequences, its data {len(sequences)}; {TAG_AGAIN}"
        )
    numbers, tokens = np.arange(len(sequences)), np.diff(sequences.bounds)
    expected = {"sequence": numbers, "start": sequences.bounds[:-1], "tokens": tokens}
    for name, values in expected.items():
        _check_equal(table, name, table.columns[name], values, "the data")
    return sequences


def _check_equal(
    table: SequenceTable, name: str, found: NDArray[Any], expected: NDArray[Any], source: object
) -> None:
    differing = np.flatnonzero(found != expected)
    if len(differing):
        first = int(differing[0])
        raise ValueError(
            f"{table.path}: {name} of sequence {first} is {found[first]}, by {source} it is "
            f"{expected[first]} ({len(differing)} sequences differ); {TAG_AGAIN}"
        )


def _verify_table_of_tags(
    tags: str, manifest: TagManifest, lengths: NDArray[np.int32]
) -> Iterator[str]:
    table = read_table(table_path(tags))
    _check_one_model(table, manifest, tags)
    sequences = _check_bounds(table, lengths)
    unit = "documents" if sequences.window is None else f"windows of {sequences.window} tokens"
    yield f"    {len(sequences)} sequences, {unit}, cover the stream without gaps"
    sums = {kind: np.zeros(len(sequences)) for kind in manifest.stored}
    files = {kind: open_indexed(tag_prefix(tags, kind)) for kind in manifest.stored}
    for first, last in sequences.shards(TOKENS_PER_READ):
        bounds = sequences.bounds[first : last + 1]
        for kind, file in files.items():
            values = read_stream(file, int(bounds[0]), int(bounds[-1]))
            source = bin_path(tag_prefix(tags, kind))
            sums[kind][first:last] = _sums(kind, values, bounds - bounds[0], source)
    kept = sums["mask"].astype(np.int64)
    mask_file = bin_path(tag_prefix(tags, "mask"))
    _check_equal(table, "kept", table.columns["kept"], kept, mask_file)
    if (manifest.sequences, manifest.kept_tokens) != (len(table), int(kept.sum())):
        raise ValueError(
            f"{tag_manifest_path(tags)} counts {manifest.kept_tokens} kept tokens in "
            f"{manifest.sequences} sequences, {mask_file} and {table.path} have {int(kept.sum())} "
            f"in {len(table)}; {TAG_AGAIN}"
        )
    yield f"    {int(kept.sum())} kept tokens; those of each sequence are as in the mask"
    for kind, score in (("loss", "mean"), ("entropy", "entropy")):
        if kind in sums:
            _check_means(table, column(score, "all"), sums[kind], tag_prefix(tags, kind))
            yield f"    means of each sequence are those of the stored {kind}"
    # A sequence has scores of its kept tokens just where it has such tokens.
    for masked, count in (("drop", "kept"), ("all", "tokens")):
        name = column("mean", masked)
        if name in table.columns:
            scored = ~np.isnan(table.columns[name])
            _check_equal(table, f"{name} (known)", scored, table.columns[count] > 0, count)
    yield from _verify_choice(table)


def _sums(
    kind: str, values: NDArray[Any], bounds: NDArray[np.int64], path: Path
) -> NDArray[np.float64]:
    """Sum over each sequence. Raises: ValueError for values that no tag has."""
    if kind == "mask" and len(values) and values.max() > 1:
        raise ValueError(f"{path} holds {values.max()}, a mask holds 0 and 1; {TAG_AGAIN}")
    numbers = (values if kind == "mask" else as_fp16(values)).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{path} holds values that are not finite; {TAG_AGAIN}")
    index = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return np.bincount(index, weights=numbers, minlength=len(bounds) - 1).astype(np.float64)


def _check_means(table: SequenceTable, name: str, sums: NDArray[np.float64], prefix: str) -> None:
    tokens = table.columns["tokens"]
    some = tokens > 0
    means = sums[some] / tokens[some]
    found = table.columns[name][some].astype(np.float64)
    if not np.allclose(found, means, rtol=RELATIVE, atol=ABSOLUTE):
        first = int(np.flatnonzero(some)[np.argmax(~np.isclose(found, means, RELATIVE, ABSOLUTE))])
        raise ValueError(
            f"{table.path}: {name} of sequence {first} is {table.columns[name][first]:.5g}, by "
            f"{bin_path(prefix)} it is {sums[first] / tokens[first]:.5g}; {TAG_AGAIN}"
        )


def _verify_choice(table: SequenceTable) -> Iterator[str]:
    """The selection in a table, made again by its rule where that needs no other table."""
    path, rule = table.path, table.rule
    scores, selected = table.columns["score"], table.columns["selected"]
    names = [name for name in Rule.__dataclass_fields__ if name in rule]
    try:
        fields = Rule(**{name: rule[name] for name in names})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its rule {rule} is none ({error}); {TAG_AGAIN}") from error
    if "reference" not in rule:
        expected = table.score(fields.score, fields.masked)
        if not np.array_equal(scores, expected, equal_nan=True):
            raise ValueError(
                f"{path}: its scores are not its {column(fields.score, fields.masked)}; run "
                "`megatron-salt select` again"
            )
    chosen = f"{int(np.count_nonzero(selected))} sequences selected"
    if "sources" in rule:
        yield f"    {chosen}; not made again, other sources competed: {', '.join(rule['sources'])}"
        return
    # A random quota depends on the place of its source among the others.
    place = rule.get("source", 0)
    sources = [np.empty(0, dtype=np.float32)] * place + [scores]
    quotas = [fields.fraction] * len(sources) if fields.fraction is not None else None
    again = select(sources, fields, quotas)[-1]  # type: ignore[arg-type]
    if not np.array_equal(selected, again):
        raise ValueError(
            f"{path}: the selected sequences are not those of its rule {rule} "
            f"({int(np.count_nonzero(selected != again))} differ); run `megatron-salt select` again"
        )
    yield f"    {chosen}, the same when selected again: {rule_text(rule)}"
    if "reference" in rule:
        yield f"    scores not made again, other tags are needed: {rule['reference']['name']}"


def _check_like(table: SequenceTable, tagged: SequenceTable) -> None:
    for name, values in tagged.columns.items():
        if name in ("score", "selected"):
            continue
        found = table.columns.get(name)
        if found is None or not np.array_equal(found, values, equal_nan=values.dtype.kind == "f"):
            raise ValueError(
                f"{table.path} and {tagged.path} differ in column {name}; run megatron-salt select "
                "again"
            )
