"""Selection redone from stored scores: other shares or scores, several sources, a second model.

NumPy over the tables that tagging wrote (see `selection.py`); no model is needed. Where sources
compete their scores are compared as they are, so they must be of one model.

Source of the difference of two models' scores: MiniPLM, arXiv 2410.17215.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_salt.data.manifest import tokenizer_directory, verify_dataset
from megatron_salt.data.scores import column
from megatron_salt.data.selection import Rule, SequenceTable, read_table, select
from megatron_salt.data.tags import ModelIdentity, open_indexed, read_stream, table_path
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer

SAMPLE_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class Source:
    """The table of one dataset's tags, and what its sequences are ranked by."""

    name: str
    """Base name of the tags' prefix."""
    table: SequenceTable
    scores: NDArray[np.float32]
    reference: ModelIdentity | None
    """The model whose scores these were subtracted from."""


def read_sources(
    tags: Sequence[str], rule: Rule, references: Sequence[str] | None = None
) -> list[Source]:
    """The tables of tags at these prefixes, with the rule's scores.

    Args:
        references: prefixes of another, smaller model's tags of the same datasets, in the same
            order. The score is then theirs minus the tags': what the smaller model finds hard
            and the other does not.
    Raises: ValueError naming the files that are missing or do not belong together.
    """
    if references is not None and len(references) != len(tags):
        raise ValueError(
            f"{len(references)} --reference for {len(tags)} --tags: give one for each, of the same "
            "data and in the same order"
        )
    sources = []
    for place, prefix in enumerate(tags):
        table = read_table(table_path(prefix))
        scores = table.score(rule.score, rule.masked)
        reference = None
        if references is not None:
            other = read_table(table_path(references[place]))
            _check_comparable(table, other)
            scores = other.score(rule.score, rule.masked) - scores
            reference = other.origin.model
        name = Path(prefix).name
        sources.append(Source(name=name, table=table, scores=scores, reference=reference))
    return sources


def _check_comparable(table: SequenceTable, other: SequenceTable) -> None:
    """Raise ValueError unless two models scored the same sequences."""
    mine, theirs, both = table.origin, other.origin, f"{table.path} and {other.path}"
    for field in ("sequences", "tokens", "bin_bytes", "idx_sha256", "bin_sampled_sha256"):
        if getattr(mine.data, field) != getattr(theirs.data, field):
            raise ValueError(
                f"{both} are not of the same data ({mine.data.name} and {theirs.data.name} differ "
                f"in {field}); tag one dataset by both models"
            )
    for what, one, two in (
        ("tokenizer", mine.tokenizer_fingerprint, theirs.tokenizer_fingerprint),
        ("--window", mine.settings.window, theirs.settings.window),
    ):
        if one != two:
            raise ValueError(
                f"{both} cannot be subtracted: {what} {one} and {two}; run megatron-salt tag with "
                "the same for both models"
            )
    for name in ("sequence", "start", "tokens"):
        if not np.array_equal(table.columns[name], other.columns[name]):
            raise ValueError(
                f"{both} do not hold the same sequences (column {name}); run megatron-salt tag "
                "again for both models"
            )
    if mine.model.fingerprint == theirs.model.fingerprint:
        raise ValueError(
            f"{both} are of one model, {mine.model.name}: all differences would be 0; give the "
            "tags of another model as --reference"
        )


def select_again(
    sources: Sequence[Source], rule: Rule, fractions: Sequence[float]
) -> list[SequenceTable]:
    """The sources' tables with a new selection.

    Args:
        fractions: one for all, who then compete, or one for each source, a quota; not used by a
            range of scores.
    Raises: ValueError for another number of fractions, for sources that cannot compete, or if no
        sequence at all is selected.
    """
    quotas = None
    if rule.kind != "range" and len(fractions) > 1:
        if len(fractions) != len(sources):
            raise ValueError(
                f"{len(fractions)} fractions for {len(sources)} --tags: give one, for which all "
                "compete, or one for each"
            )
        quotas = list(fractions)
    competing = len(sources) > 1 and quotas is None and rule.kind != "range"
    if competing and rule.kind != "random":
        _check_competitors(sources)
    scores = [source.scores for source in sources]
    selected = select(scores, rule, quotas)
    if not any(each.any() for each in selected):
        raise ValueError(_nothing_selected(scores, rule))
    tables = []
    for place, (source, chosen) in enumerate(zip(sources, selected, strict=True)):
        fields: dict[str, Any] = dataclasses.asdict(rule)
        if quotas is not None:
            fields["fraction"] = quotas[place]
            fields["source"] = place  # a random quota depends on it
        if source.reference is not None:
            fields["reference"] = dataclasses.asdict(source.reference)
        if competing:
            fields["sources"] = {
                each.name: each.table.origin.data.bin_sampled_sha256[:16] for each in sources
            }
        tables.append(source.table.with_selection(source.scores, chosen, fields))
    return tables


def _check_competitors(sources: Sequence[Source]) -> None:
    first = sources[0]
    for source in sources[1:]:
        mine, theirs = first.table.origin, source.table.origin
        pairs = {
            "model": (mine.model.fingerprint, theirs.model.fingerprint),
            "reference": tuple(s.reference and s.reference.fingerprint for s in (first, source)),
            "top_k": (mine.settings.top_k, theirs.settings.top_k),
            "window": (mine.settings.window, theirs.settings.window),
        }
        differing = [what for what, (one, two) in pairs.items() if one != two]
        if differing:
            raise ValueError(
                f"{first.table.path} and {source.table.path} cannot compete: their scores differ "
                f"in {', '.join(differing)}; give one fraction for each"
            )


def _nothing_selected(scores: Sequence[NDArray[np.float32]], rule: Rule) -> str:
    present = np.concatenate(scores)
    present = present[~np.isnan(present)]
    if not len(present):
        return "no sequence is selected: none has a score; give another --score or --masked"
    found = f"the scores lie between {present.min():.4g} and {present.max():.4g}"
    if rule.kind == "range":
        return f"no sequence has a score from {rule.low} to {rule.high}: {found}"
    return f"a fraction of {rule.fraction} selects no sequence of {sum(map(len, scores))}"


def output_tables(output_prefix: str, sources: Sequence[Source]) -> list[Path]:
    """Where the tables go: one file, or one for each source, named after it.

    Raises: ValueError if two would be one file, or one is the table of tags.
    """
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several --tags are named {', '.join(twice)}; give each another name")
    endings = [f"_{name}" for name in names] if len(names) > 1 else [""]
    paths = [Path(f"{output_prefix}{ending}.parquet") for ending in endings]
    tagged = {source.table.path.resolve() for source in sources}
    for path in paths:
        if path.resolve() in tagged:
            raise ValueError(f"{path} is the table of the tags; give another --output-prefix")
    return paths


def score_name(rule: Rule, sources: Sequence[Source]) -> str:
    """What the scores are, for people."""
    name = column(rule.score, rule.masked)
    return name if sources[0].reference is None else f"difference of {name}"


def describe_selection(name: str, table: SequenceTable, score: str) -> str:
    """One line: how much is selected, and of which scores."""
    selected, tokens = table.columns["selected"], table.columns["tokens"]
    scores = table.columns["score"]
    chosen = scores[selected & ~np.isnan(scores)]
    found = f"{score} {chosen.min():.4g} to {chosen.max():.4g}" if len(chosen) else f"no {score}"
    of_tokens = int(tokens[selected].sum(dtype=np.int64)), int(tokens.sum(dtype=np.int64))
    return (
        f"{name}: selected {_part(int(np.count_nonzero(selected)), len(table), 'sequences')}, "
        f"{_part(*of_tokens, 'tokens')}, {found}; "
        f"{int(np.count_nonzero(np.isnan(scores)))} sequences without a score"
    )


def _part(part: int, whole: int, unit: str) -> str:
    return f"{part} of {whole} {unit} ({part / max(whole, 1):.1%})"


def sample_places(scores: NDArray[np.float32], side: NDArray[np.bool_], count: int) -> list[int]:
    """Up to count sequences of one side at evenly spaced quantiles of the score, ascending."""
    candidates = np.flatnonzero(side & ~np.isnan(scores))
    count = min(count, len(candidates))
    if count < 1:
        return []
    ranks = np.rint(np.linspace(0, len(candidates) - 1, count)).astype(np.int64)
    # Only these ranks are wanted: a partition is several times faster than a sort.
    return candidates[np.argpartition(scores[candidates], ranks)[ranks]].tolist()


def open_data(source: Source, prefix: str) -> tuple[Any, Tokenizer]:
    """The dataset that a source was made of, and its tokenizer.

    Raises: ValueError or FileNotFoundError naming the file, if it is another or has no tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_directory(prefix))
    verify_dataset(prefix, tokenizer)
    origin = source.table.origin
    origin.data.check(prefix, source.table.path)
    if tokenizer.fingerprint != origin.tokenizer_fingerprint:
        raise ValueError(
            f"{source.table.path}: made with a tokenizer of fingerprint "
            f"{origin.tokenizer_fingerprint}, {tokenizer.path} has {tokenizer.fingerprint}; give "
            "the data that was tagged"
        )
    return open_indexed(prefix), tokenizer


def samples_text(
    name: str, table: SequenceTable, score: str, data: Any, tokenizer: Tokenizer, count: int
) -> str:
    """The beginnings of some sequences that are selected and some that are not."""
    scores, selected = table.columns["score"], table.columns["selected"]
    lines = []
    for side, what in ((selected, "selected"), (~selected, "not selected")):
        places = sample_places(scores, side, count)
        total = int(np.count_nonzero(side))
        lines.append(f"== {name}: {len(places)} of {total} sequences that are {what}, by {score}\n")
        for place in places:
            names = ("sequence", "start", "tokens", "kept")
            sequence, start, tokens, kept = (int(table.columns[key][place]) for key in names)
            lines.append(
                f"-- sequence {sequence} of {name}, {what}: {score} {scores[place]:.4g}, "
                f"{tokens} tokens, {kept / max(tokens, 1):.1%} of them kept"
            )
            lines.append(_beginning(data, start, tokens, tokenizer))
    return "\n".join(lines)


def _beginning(data: Any, start: int, tokens: int, tokenizer: Tokenizer) -> str:
    """The first characters of a sequence, indented."""
    ids = read_stream(data, start, start + min(tokens, SAMPLE_CHARACTERS))
    text = tokenizer.decode(ids.tolist())
    more = len(text) > SAMPLE_CHARACTERS or tokens > len(ids)
    if more:  # a character may be cut in two
        text = text[:SAMPLE_CHARACTERS].rstrip("\N{REPLACEMENT CHARACTER}").rstrip() + " …"
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return "".join(f"    {line}\n" for line in shown.split("\n"))
