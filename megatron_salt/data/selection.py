"""Tables of scored sequences, and which of their sequences the KD phase trains on.

A table is a Parquet file, one line per sequence:

    sequence, start, tokens, kept     number, first token in the stream, length, kept tokens
    median_drop, median_zero, …       all scores that the tags allow, see `scores.py`
    score, selected                   what the last selection went by, and its result

Its metadata (key `megatron_salt`) says where the scores come from and by which rule was selected.
`megatron-salt tag` writes it, `megatron-salt select` selects anew, `salt.selection` trains on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_salt.config.records import record_of
from megatron_salt.data.scores import column
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import TagOrigin, sequence_lengths
from megatron_salt.files.disk import atomic_path

TABLE_FORMAT = 1
METADATA_KEY = b"megatron_salt"

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How sequences are selected."""

    score: str = "median"
    masked: str = "drop"
    kind: Literal["top", "bottom", "random", "range"] = "top"
    """Highest or lowest scores, any sequences, or scores within [low, high]."""
    fraction: float | None = 0.5
    """Share of all sequences; None for `range`."""
    low: float | None = None
    high: float | None = None
    seed: int | None = None
    """For `random`."""

    def __post_init__(self) -> None:
        """Raises: ValueError for what contradicts itself."""
        if self.kind == "range":
            if self.low is None or self.high is None or not self.low <= self.high:
                raise ValueError(f"--score-range {self.low} {self.high}: expected LOW <= HIGH")
        elif self.fraction is None or not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"--{self.kind}-fraction {self.fraction}: must be above 0, at most 1")
        if self.kind == "random" and self.seed is None:
            raise ValueError("a random selection needs a seed")


def rule_text(rule: dict[str, Any]) -> str:
    """The rule of a table for people, such as `top 0.5 by median_drop`."""
    if not rule:
        return "no rule recorded"
    scores = column(rule["score"], rule["masked"])
    if "reference" in rule:
        scores += f" of {rule['reference']['name']} minus this model's"
    if rule["kind"] == "range":
        return f"from {rule['low']} to {rule['high']} by {scores}"
    text = f"{rule['kind']} {rule['fraction']} by {scores}"
    if rule["kind"] == "random":
        text = f"random {rule['fraction']}, seed {rule['seed']}"
    return text + (f", competing: {', '.join(rule['sources'])}" if "sources" in rule else "")


@dataclass(frozen=True, kw_only=True)
class SequenceTable:
    """Scored sequences of one dataset."""

    origin: TagOrigin
    columns: Columns
    rule: dict[str, Any]
    """Of the selection in the `selected` column: the fields of `Rule`, with `reference` where
    another model's scores were subtracted and `sources` where several tables competed."""
    path: Path = field(default=Path(), compare=False)
    """Where it was read."""

    def __len__(self) -> int:
        return len(self.columns["sequence"])

    def score(self, score: str, masked: str) -> NDArray[np.float32]:
        """Raises: ValueError naming the file and the column that it lacks."""
        name = column(score, masked)
        if name not in self.columns:
            raise ValueError(
                f"{self.path} has no scores {name}: entropies are there if `tag` was run "
                "with --store entropy"
            )
        return self.columns[name]

    def with_selection(
        self, scores: NDArray[np.float32], selected: NDArray[np.bool_], rule: dict[str, Any]
    ) -> SequenceTable:
        columns = {**self.columns, "score": scores, "selected": selected}
        return dataclasses.replace(self, columns=columns, rule=rule)


def select(
    scores: Sequence[NDArray[np.float32]], rule: Rule, fractions: Sequence[float] | None = None
) -> list[NDArray[np.bool_]]:
    """Which sequences of each source are selected.

    Args:
        scores: of each source; nan is never selected by score.
        fractions: a quota for each source, which then are ranked apart; None: all compete.
    Of equal scores the earlier sequence wins. The number selected is the fraction of all sequences
    of a source (of all sources), rounded to the nearest whole number, or as many as have a score.
    """
    if fractions is not None:
        pairs = zip(scores, fractions, strict=True)
        return [
            _select_from(each, dataclasses.replace(rule, fraction=share), number)
            for number, (each, share) in enumerate(pairs)
        ]
    ends = np.cumsum([len(each) for each in scores])
    return list(np.split(_select_from(np.concatenate(scores), rule, 0), ends[:-1]))


def _select_from(scores: NDArray[np.float32], rule: Rule, source: int) -> NDArray[np.bool_]:
    if rule.kind == "range":
        assert rule.low is not None and rule.high is not None  # Rule
        return np.asarray((scores >= rule.low) & (scores <= rule.high))
    assert rule.fraction is not None
    count = int(np.floor(rule.fraction * len(scores) + 0.5))
    if rule.kind == "random":
        assert rule.seed is not None
        # RandomState, because NumPy promises that its numbers never change.
        state = np.random.RandomState(np.random.SeedSequence([rule.seed, source]).generate_state(4))
        order = state.permutation(len(scores))
    else:
        ranked = scores if rule.kind == "bottom" else -scores
        order = np.argsort(ranked, kind="stable")  # nan comes last
        order = order[: np.count_nonzero(~np.isnan(scores))]
    selected = np.zeros(len(scores), dtype=np.bool_)
    selected[order[:count]] = True
    return selected


def write_table(path: Path, table: SequenceTable) -> None:
    """Write a table, whole or not at all."""
    import pyarrow  # not needed by runs without a selection
    import pyarrow.parquet

    origin = dataclasses.asdict(table.origin)
    metadata = {"format_version": TABLE_FORMAT, "origin": origin, "rule": table.rule}
    arrow = pyarrow.table(table.columns)
    arrow = arrow.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    with atomic_path(path) as temporary:
        # No manifest holds a selection's hash: its pages carry their own checksums. Scores hardly
        # repeat, so a dictionary would only make the file larger.
        pyarrow.parquet.write_table(
            arrow, temporary, compression="zstd", write_page_checksum=True, use_dictionary=False
        )


def read_table(path: str | Path) -> SequenceTable:
    """Raises: ValueError naming the file, if it is not such a table."""
    import pyarrow
    import pyarrow.parquet

    again = "give a table of megatron-salt tag or megatron-salt select"
    try:
        # Without threads: ranks that were forked must not wait for a pool that was not.
        arrow = pyarrow.parquet.read_table(
            str(path), use_threads=False, page_checksum_verification=True
        )
        metadata = json.loads((arrow.schema.metadata or {})[METADATA_KEY])
        if metadata["format_version"] != TABLE_FORMAT:
            raise ValueError(f"format {metadata['format_version']}, expected {TABLE_FORMAT}")
        origin = record_of(TagOrigin, metadata["origin"], "origin")
        columns = {name: arrow[name].to_numpy() for name in arrow.column_names}
        rule = metadata["rule"]
        return SequenceTable(origin=origin, columns=columns, rule=rule, path=Path(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {again}") from None
    except (OSError, KeyError, TypeError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a table of sequences ({error!r}); {again}") from error


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The selected sequences of one dataset, as training reads them."""

    path: Path
    origin: TagOrigin
    rule: dict[str, Any]
    sequences: NDArray[np.int64]
    """Their numbers, ascending."""
    tokens: int
    fingerprint: str
    """Identity of the selected sequences: of the data, the window and their numbers."""

    @property
    def window(self) -> int | None:
        return self.origin.settings.window


def load_selection(path: str | Path, data_prefix: str | Path, tokenizer: str) -> Selection:
    """The selection in a table, checked against the dataset that it is used with.

    Raises: ValueError naming both files and what differs, or if nothing is selected.
    """
    table = read_table(path)
    origin = table.origin
    origin.data.check(data_prefix, path)
    if origin.tokenizer_fingerprint != tokenizer:
        raise ValueError(
            f"{path}: made with a tokenizer of fingerprint {origin.tokenizer_fingerprint}, the "
            f"tokenizer of {data_prefix} has {tokenizer}; run `megatron-salt tag` again"
        )
    missing = [name for name in ("sequence", "tokens", "selected") if name not in table.columns]
    if missing:
        raise ValueError(f"{path} has no columns {missing}; make it with megatron-salt select")
    chosen = np.flatnonzero(table.columns["selected"])
    if not len(chosen):
        raise ValueError(f"{path}: no sequence of {data_prefix} is selected; select more")
    numbers = np.ascontiguousarray(table.columns["sequence"][chosen], dtype=np.int64)
    count = len(Sequences.of(sequence_lengths(data_prefix), origin.settings.window))
    if len(table) != count or numbers.min() < 0 or numbers.max() >= count:
        raise ValueError(
            f"{path} lists {len(table)} sequences up to number {numbers.max()}, {data_prefix} has "
            f"{count}: it is not whole; make it again with megatron-salt select"
        )
    about = f"{origin.data.bin_sampled_sha256} {origin.settings.window}"
    fingerprint = hashlib.sha256(about.encode() + numbers.tobytes()).hexdigest()[:16]
    return Selection(
        path=table.path, origin=origin, rule=table.rule, sequences=numbers,
        tokens=int(table.columns["tokens"][chosen].sum(dtype=np.int64)), fingerprint=fingerprint,
    )  # fmt: skip


def check_same_origin(selection: Selection, tags: TagOrigin, tags_path: Path) -> None:
    """Raise ValueError unless a selection and token tags are of one model, with one top_k.

    They tell one story about the data; two models', or two k's, are more likely a mix-up.
    """
    mine = selection.origin
    for what, one, other in (
        ("model", mine.model.fingerprint, tags.model.fingerprint),
        ("top_k", mine.settings.top_k, tags.settings.top_k),
    ):
        if one != other:
            raise ValueError(
                f"{selection.path} and {tags_path} do not belong together: {what} {one} and "
                f"{other}; use a selection made from these tags"
            )
