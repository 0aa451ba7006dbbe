"""Looking at stored logits: what they say of some tokens, or all of them checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_salt.data.logits import (
    LOGITS_AGAIN,
    LOGITS_BLOCK_TOKENS,
    LogitsManifest,
    StoredLogits,
    block_offsets,
    logits_manifest_path,
    verify_logits,
)
from megatron_salt.data.manifest import read_dataset_manifest
from megatron_salt.data.tags import open_indexed, read_stream
from megatron_salt.scoring.inspection import Opened, TokenSpan
from megatron_salt.scoring.token_view import texts_of, token_bytes

SHOWN_ENTRIES = 4
NUMBERS_PER_READ = 1 << 22
# Of probabilities and losses as they are stored: a sum of rounded ones, one against another.
SUM_ABSOLUTE, LOSS_NATS = 0.02, {"fp32": 1e-3, "fp16": 0.02, "uint8": 0.1}


def logits_overview(logits: str, manifest: LogitsManifest) -> str:
    """A line: what is stored, of whom, and how much."""
    origin, tokens = manifest.origin, max(manifest.tokens, 1)
    settings = origin.settings
    kind = f"{settings.draws} draws" if settings.kind == "sampled" else f"top {settings.top_k}"
    if settings.top_p < 1.0:
        kind += f" of top_p {settings.top_p}"
    size = sum(record.num_bytes for record in manifest.files.values())
    return (
        f"logits {logits}: {kind}, {settings.encoding}, each {settings.context} by itself, by "
        f"{origin.model.name}; {manifest.entries / tokens:.2f} entries and {size / tokens:.1f} "
        "bytes a token"
    )


def logits_listing(opened: Opened, span: TokenSpan, prefix: str, logits: str) -> list[str]:
    """A line for every token of a span: place, its loss, entropy and rest, the likeliest tokens.

    Raises: ValueError for a place that is not stored, or as `verify_logits`.
    """
    manifest = verify_logits(logits, prefix, opened.tokenizer.fingerprint)
    found = StoredLogits(logits, manifest, top_k=None).of_places(np.arange(span.start, span.stop))
    names = token_bytes(opened.tokenizer)
    head = ("place", "loss", "entropy", "rest")
    lines = ["".join(f"{name:>9}" for name in head) + "  token, likeliest tokens"]
    for row, text in enumerate(texts_of(span.ids, names)):
        loss, entropy, rest = (
            float(found[f"logits_{name}"][row]) for name in ("loss", "entropy", "rest")
        )
        line = f"{span.start + row:9d}{loss:9.3f}{entropy:9.3f}{np.exp(rest):9.3f}  {_shown(text)}"
        best = (found[f"logits_{name}"][row, :SHOWN_ENTRIES].tolist() for name in ("ids", "logp"))
        for token, logp in zip(*best, strict=True):
            if logp > -np.inf:
                line += f"  {_shown(texts_of([token], names)[0])} {np.exp(logp):.3f}"
        lines.append(line)
    return [*lines, logits_overview(logits, manifest)]


def _shown(text: str) -> str:
    return repr(text.replace("\n", ""))  # the sign for it stays


def verify_stored_logits(prefix: str, logits: str) -> Iterator[str]:
    """Check every byte and every distribution, yielding what was checked.

    Raises: ValueError naming the first file that is wrong.
    """
    made = read_dataset_manifest(prefix)
    fingerprint = None if made is None else made.tokenizer_fingerprint
    manifest = verify_logits(logits, prefix, fingerprint, hashes=True)
    for suffix, record in manifest.files.items():
        path = logits_manifest_path(logits).name
        yield f"{logits}{suffix}: {record.num_bytes} bytes, as in {path}"
    settings, tokens = manifest.origin.settings, manifest.tokens
    stored, data = StoredLogits(logits, manifest, top_k=None), open_indexed(prefix)
    counts = np.fromfile(f"{logits}_count.bin", settings.token_dtypes["_count.bin"])
    offsets = np.fromfile(f"{logits}_offsets.bin", "<i8")
    if not np.array_equal(offsets, block_offsets(counts)) or offsets[-1] != manifest.entries:
        raise ValueError(
            f"{logits}_offsets.bin: its sums are not those of {logits}_count.bin; {LOGITS_AGAIN}"
        )
    at_once = max(1, NUMBERS_PER_READ // settings.top_k // LOGITS_BLOCK_TOKENS)
    step = at_once * LOGITS_BLOCK_TOKENS
    for start in range(0, tokens, step):
        held = np.arange(start, min(start + step, tokens))
        places = stored.places_of(held)
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        labels = np.concatenate([read_stream(data, run[0], run[-1] + 1) for run in runs])
        for text, right in _checks(stored, places, labels.astype(np.int64)):
            if len(wrong := np.flatnonzero(~right)):
                place = places[wrong[0]]
                raise ValueError(f"{logits}: at place {place} {text}; {LOGITS_AGAIN}")
    yield f"    {manifest.entries} entries of {tokens} tokens, distinct, likeliest first, in sum 1"


def _checks(
    stored: StoredLogits, places_S: np.ndarray, labels_S: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """What may be wrong at these places, and where it is not, [S]."""
    found = {name: value.numpy() for name, value in stored.of_places(places_S).items()}
    ids_SK, logp_SK, loss_S = (found[f"logits_{name}"] for name in ("ids", "logp", "loss"))
    present_SK = logp_SK > -np.inf
    filled_SK = np.sort(np.where(present_SK, ids_SK, -1 - np.arange(ids_SK.shape[1])), axis=1)
    yield "a token is stored twice", (filled_SK[:, 1:] != filled_SK[:, :-1]).all(axis=1)
    yield "a later entry is likelier", (logp_SK[:, 1:] <= logp_SK[:, :-1]).all(axis=1)
    sum_S = np.exp(logp_SK.astype(np.float64)).sum(axis=1)
    sum_S += np.exp(found["logits_rest"].astype(np.float64))
    yield "probabilities are not 1 in sum", np.abs(sum_S - 1) <= SUM_ABSOLUTE
    known_S = np.isfinite(loss_S) & np.isfinite(found["logits_entropy"])
    yield "loss or entropy is no number", known_S
    if stored.settings.kind == "top":
        is_label_SK = present_SK & (ids_SK == labels_S[:, None])
        label_S = np.where(is_label_SK, logp_SK, 0.0).sum(axis=1)
        bound = LOSS_NATS[stored.settings.encoding]
        near_S = np.abs(label_S + loss_S) <= bound * (1 + np.abs(loss_S))
        near_S |= ~is_label_SK.any(axis=1)
        yield "the token's loss is not its entry's", near_S
