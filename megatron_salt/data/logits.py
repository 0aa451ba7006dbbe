"""Stored logits: a teacher's distribution at every token of a dataset, in lockstep with the tokens.

    PREFIX.logits.json               manifest: of which data, by which model, how; hashes
    PREFIX_ids.bin                   uint16: ids of the kept tokens, their low bits
    PREFIX_high.bin                  uint8: the bits above; only of vocabularies above 65536
    PREFIX_values.bin                log-probabilities, fp16 or fp32, or uint8 codes, or draws
    PREFIX_count.bin                 uint8 (uint16, uint32 where K needs it): entries of each token
    PREFIX_offsets.bin               int64: first entry of each block of 1024 tokens, then the total
    PREFIX_rest.bin                  log of the probability of all other tokens
    PREFIX_entropy.bin, _loss.bin    entropy and -log p of the token itself, nats
    PREFIX_windows.bin, _steps.bin   of logits that a training model wrote: which windows lie here,
                                     int64, in which order, and at which step of its, int32
    PREFIX_held_out.safetensors      optional: the model's scores on a run's held-out samples

Flat arrays, little-endian. The distribution at place i is the one that predicts token i. Its
entries lie side by side, likeliest first; log-probabilities are of temperature 1 and not
renormalised. rest, entropy and loss are fp16, or fp32 with encoding fp32. Letters: S places,
K entries of a place, N entries of all places.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_salt.data import tags

LOGITS_FORMAT = 1
LOGITS_BLOCK_TOKENS = 1024
HELD_OUT = "_held_out.safetensors"
# A code counts 255 steps of this range below the likeliest entry.
CODE_STEP_NATS = 16.0 / 255
LOGITS_AGAIN = tags.run_again("cache-logits")

LogitsContext = Literal["window", "document"]
LogitsKind = Literal["top", "sampled"]
LogitsEncoding = Literal["fp16", "uint8", "fp32"]


@dataclass(frozen=True, kw_only=True)
class LogitsSettings:
    """What decides the stored logits, besides data and model."""

    context: LogitsContext
    """What is before a token: its window of the stream, or its own document alone."""
    max_length: int
    """Tokens of a row, the unit within which a token has context: of a window, if windows."""
    kind: LogitsKind
    top_k: int
    """Entries of a token at most; of sampled ones as many as draws, or as tokens there are."""
    top_p: float
    """The likeliest tokens that have this probability together; sampled: 1."""
    draws: int
    """Tokens drawn at each place; top: 0."""
    seed: int
    """Of the draws; top: 0."""
    encoding: LogitsEncoding
    precision: str
    vocab_size: int

    @property
    def entry_dtypes(self) -> dict[str, np.dtype[Any]]:
        """Of the files that hold something for every entry, by suffix."""
        value = {"fp16": "<f2", "fp32": "<f4", "uint8": "u1"}[self.encoding]
        names = {"_ids.bin": "<u2", "_values.bin": "u1" if self.kind == "sampled" else value}
        names |= {"_high.bin": "u1"} if self.vocab_size > 1 << 16 else {}
        return {suffix: np.dtype(name) for suffix, name in names.items()}

    @property
    def token_dtypes(self) -> dict[str, np.dtype[Any]]:
        """Of the files that hold something for every token, by suffix."""
        count = "u1" if self.top_k < 1 << 8 else "<u2" if self.top_k < 1 << 16 else "<u4"
        scalar = np.dtype("<f4" if self.encoding == "fp32" else "<f2")
        scalars = dict.fromkeys(("_rest.bin", "_entropy.bin", "_loss.bin"), scalar)
        return {"_count.bin": np.dtype(count), **scalars}


@dataclass(frozen=True, kw_only=True)
class LogitsOrigin:
    """Of which data, by which model, how."""

    data: tags.DataIdentity
    tokenizer_fingerprint: str
    model: tags.ModelIdentity
    planned_steps: int | None
    """train.steps of the model's own run, if it is known."""
    settings: LogitsSettings


@dataclass(frozen=True, kw_only=True)
class LogitsManifest(tags.FilesManifest):
    """What a set of stored logits is."""

    origin: LogitsOrigin
    entries: int
    held_out: str | None
    """Fingerprint of the held-out samples that were scored, see `DataSource`; None: none were."""
    windows: int | None = None
    """How many windows are stored, in an order of their own; None: all tokens in theirs."""
    format_version: int = LOGITS_FORMAT

    @property
    def tokens(self) -> int:
        """Places that the files hold."""
        if self.windows is None:
            return self.origin.data.tokens
        return self.windows * self.origin.settings.max_length


def logits_manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.logits.json")


def read_logits_manifest(prefix: str | Path) -> LogitsManifest:
    """Raises: ValueError if there is none or it cannot be read."""
    names = "ids|high|values|count|offsets|rest|entropy|loss|windows|steps"
    ends = rf"(\.logits\.json|_({names})\.bin|_held_out\.safetensors)$"
    stem = re.sub(ends, "", str(prefix))
    if stem != str(prefix) and Path(prefix).is_file():
        raise ValueError(
            f"{prefix} is a file of logits: give {stem}, the --output-prefix of `cache-logits`"
        )
    path = logits_manifest_path(prefix)
    return LogitsManifest.read(path, LOGITS_FORMAT, "cache-logits")


def verify_logits(
    prefix: str | Path, data_prefix: str | Path, tokenizer_fingerprint: str | None = None, *,
    hashes: bool = False,
) -> LogitsManifest:  # fmt: skip
    """Check stored logits against their manifest and against the data that they are used with.

    Sizes and samples of the content always; with `hashes` every byte.
    Raises: ValueError naming both files, what differs and what to do.
    """
    manifest, path = read_logits_manifest(prefix), logits_manifest_path(prefix)
    manifest.verify(path, prefix, data_prefix, tokenizer_fingerprint, "cache-logits", hashes=hashes)
    settings, tokens = manifest.origin.settings, manifest.tokens
    sizes = {name: manifest.entries * x.itemsize for name, x in settings.entry_dtypes.items()}
    sizes |= {name: tokens * x.itemsize for name, x in settings.token_dtypes.items()}
    if manifest.windows is not None:
        sizes |= {"_windows.bin": 8 * manifest.windows, "_steps.bin": 4 * manifest.windows}
    sizes["_offsets.bin"] = 8 * (-(-tokens // LOGITS_BLOCK_TOKENS) + 1)
    for suffix, size in sizes.items():
        record = manifest.files.get(suffix)
        if record is None or record.num_bytes != size:
            found = "no such file" if record is None else f"{record.num_bytes} bytes"
            raise ValueError(
                f"{path}: {prefix}{suffix} must have {size} bytes for {tokens} tokens and "
                f"{manifest.entries} entries, it says {found}; {LOGITS_AGAIN}"
            )
    return manifest


def encode_logits(
    settings: LogitsSettings, ids_SK: NDArray[np.int32], values_SK: NDArray[Any],
    of_token: dict[str, NDArray[np.float32]],
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """What the files hold of some places, by suffix; all but the offsets.

    Args:
        values_SK: log-probabilities in nats, likeliest first, -inf: no entry; sampled: how often
            the token was drawn, 0: no entry.
        of_token: rest, entropy and loss, [S] each.
    """
    present_SK = values_SK > (0 if settings.kind == "sampled" else -np.inf)
    if settings.kind == "top" and settings.encoding == "uint8":
        below_SK = np.where(present_SK, values_SK[:, :1] - values_SK, 0.0)
        values_SK = np.minimum(np.rint(below_SK / CODE_STEP_NATS), 255)
    ids_N = ids_SK[present_SK]
    found = {
        "_ids.bin": ids_N & 0xFFFF, "_high.bin": ids_N >> 16, "_values.bin": values_SK[present_SK],
        "_count.bin": present_SK.sum(axis=1),
        **{f"_{name}.bin": value_S for name, value_S in of_token.items()},
    }  # fmt: skip
    dtypes = {**settings.entry_dtypes, **settings.token_dtypes}
    with np.errstate(over="ignore"):  # to -inf
        return {suffix: found[suffix].astype(dtype) for suffix, dtype in dtypes.items()}


def block_offsets(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """What the file of offsets holds, from the counts of all tokens."""
    starts = np.arange(0, len(counts), LOGITS_BLOCK_TOKENS)
    offsets = np.zeros(len(starts) + 1, dtype="<i8")
    if len(starts):
        np.cumsum(np.add.reduceat(counts, starts, dtype=np.int64), out=offsets[1:])
    return offsets


def stored_windows(prefix: str | Path) -> NDArray[np.int64]:
    """Numbers of the windows that are stored, in the order of the files."""
    return np.fromfile(f"{prefix}_windows.bin", "<i8")


class StoredLogits:
    """The stored logits of one dataset, opened: distributions at any of its places.

    Args:
        manifest: see `verify_logits`, which has checked the files.
        top_k: entries to give of each place, fewer than are stored; None: all.
    Raises: ValueError for a top_k of sampled logits, which would no longer be unbiased.
    """

    def __init__(self, prefix: str | Path, manifest: LogitsManifest, *, top_k: int | None) -> None:
        self.prefix, self.settings = Path(prefix), manifest.origin.settings
        stored = self.settings.top_k
        if top_k is not None and (top_k < 1 or self.settings.kind == "sampled"):
            raise ValueError(
                f"top_k = {top_k} of {logits_manifest_path(prefix)}: "
                + ("must be at least 1" if top_k < 1 else "it has draws, which cannot be cut")
            )
        self.num_kept = min(stored, top_k or stored)
        self.num_tokens = manifest.origin.data.tokens
        self._windows: NDArray[np.int64] | None = None
        self._slots: NDArray[np.int64] | None = None
        """Of every window of the data: where it lies in the files, -1: nowhere."""
        if manifest.windows is not None:
            self._windows = stored_windows(prefix)
            self._slots = np.full(-(-self.num_tokens // self.settings.max_length), -1)
            self._slots[self._windows] = np.arange(len(self._windows))
        dtypes = {**self.settings.entry_dtypes, **self.settings.token_dtypes}
        self._maps: dict[str, NDArray[Any]] = {
            # Without the class of memory-mapped arrays, whose slices cost as much as a copy.
            suffix: np.asarray(np.memmap(self._file(suffix), dtype, mode="r"))
            for suffix, dtype in [*dtypes.items(), ("_offsets.bin", np.dtype("<i8"))]
            if manifest.files[suffix].num_bytes  # an empty file cannot be mapped
        }

    def _file(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}")

    def of_places(self, places_S: NDArray[np.int64]) -> dict[str, Tensor]:
        """Distributions at these places, in their order; runs of consecutive ones are one read.

        Returns: logits_ids [S, K], uint16, or int32 for a vocabulary above 65536; logits_logp
            [S, K], fp16 as it is stored, or fp32, -inf where filled up; fp32 [S] each: logits_rest,
            the log of the probability outside these K; logits_entropy and logits_loss. K is
            num_kept. (Who widens them does so on the device: a row is mostly copied here.)
        Raises: ValueError naming the file and the place of something that is not stored or cannot
            be.
        """
        wrong_S = places_S[(places_S < 0) | (places_S >= self.num_tokens)]
        if len(wrong_S):
            raise ValueError(
                f"{logits_manifest_path(self.prefix)}: place {wrong_S[0]} is asked for, its data "
                f"has {self.num_tokens} tokens"
            )
        held_S = self._held(places_S)
        edges = np.flatnonzero(np.diff(held_S) != 1) + 1
        runs = list(zip([0, *edges.tolist()], [*edges.tolist(), len(held_S)], strict=True))
        ranges = [(int(held_S[a]), int(held_S[b - 1]) + 1) for a, b in runs if b > a]
        count_S = self._joined("_count.bin", ranges).astype(np.int64)
        if len(wrong := np.flatnonzero((count_S < 1) | (count_S > self.settings.top_k))):
            place, count = places_S[wrong[0]], count_S[wrong[0]]
            why = f"{count} entries are too many" if count else "nothing is stored there"
            raise ValueError(f"{self._file('_count.bin')}, place {place}: {why}; {LOGITS_AGAIN}")
        entries = [self._entries(start, stop) for start, stop in ranges]
        ids_N = self._joined("_ids.bin", entries)
        if "_high.bin" in self._maps:
            ids_N = self._joined("_high.bin", entries).astype(np.int32) << 16 | ids_N
        if len(ids_N) != count_S.sum() or ids_N.max(initial=0) >= self.settings.vocab_size:
            self._refuse_ids(places_S, count_S, ids_N)
        rest_S = self._joined("_rest.bin", ranges).astype(np.float32)
        width = max(self.num_kept, int(count_S.max(initial=1)))
        ids_SK = _filled_up(ids_N, count_S, width, 0)
        logp_SK = self._logp(self._joined("_values.bin", entries), count_S, width, rest_S)
        kept = self.num_kept
        if width > kept:
            cut_S = np.exp(logp_SK[:, kept:].astype(np.float64)).sum(axis=1)
            with np.errstate(divide="ignore"):
                rest_S = np.logaddexp(rest_S.astype(np.float64), np.log(cut_S))
        found = {
            "ids": np.ascontiguousarray(ids_SK[:, :kept]),
            "logp": np.ascontiguousarray(logp_SK[:, :kept]),
            "rest": rest_S.astype(np.float32),
            "entropy": self._joined("_entropy.bin", ranges).astype(np.float32),
            "loss": self._joined("_loss.bin", ranges).astype(np.float32),
        }
        return {f"logits_{name}": torch.from_numpy(value) for name, value in found.items()}

    def _held(self, places_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the files these places lie."""
        if self._slots is None:
            return places_S
        window_S, within_S = np.divmod(places_S, self.settings.max_length)
        slot_S = self._slots[window_S]
        if len(absent := window_S[slot_S < 0]):
            raise ValueError(
                f"{self._file('_windows.bin')}: window {absent[0]} is not stored; the model that "
                "wrote them has not read it"
            )
        return slot_S * self.settings.max_length + within_S

    def places_of(self, held_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which places of the data the files hold there."""
        if self._windows is None:
            return held_S
        slot_S, within_S = np.divmod(held_S, self.settings.max_length)
        return self._windows[slot_S] * self.settings.max_length + within_S

    def _entries(self, start: int, stop: int) -> tuple[int, int]:
        """The range of the entries of places `[start, stop)`."""
        block = start // LOGITS_BLOCK_TOKENS
        counts = self._maps["_count.bin"][block * LOGITS_BLOCK_TOKENS : stop]
        before = start - block * LOGITS_BLOCK_TOKENS
        first = int(self._maps["_offsets.bin"][block]) + int(counts[:before].sum(dtype=np.int64))
        return first, first + int(counts[before:].sum(dtype=np.int64))

    def _joined(self, suffix: str, ranges: list[tuple[int, int]]) -> NDArray[Any]:
        whole = self._maps[suffix]
        return np.concatenate([whole[:0], *(whole[start:stop] for start, stop in ranges)])

    def _logp(
        self, values_N: NDArray[Any], count_S: NDArray[np.int64], width: int,
        rest_S: NDArray[np.float32],
    ) -> NDArray[Any]:  # fmt: skip
        """Log-probabilities of all entries, -inf beside them, from what is stored of them."""
        if self.settings.kind == "sampled":
            with np.errstate(divide="ignore"):
                table = np.log(np.arange(256) / self.settings.draws).astype(np.float32)
            return _filled_up(table[values_N], count_S, width, -np.inf)
        if self.settings.encoding != "uint8":
            return _filled_up(values_N, count_S, width, -np.inf)
        below_N = values_N * np.float32(-CODE_STEP_NATS)
        logp_SK = _filled_up(below_N, count_S, width, -np.inf)
        # The entries have together what the others leave them.
        sum_S = np.exp(logp_SK).sum(axis=1, dtype=np.float64)
        kept_S = np.log1p(-np.exp(rest_S.astype(np.float64)))
        return logp_SK + (kept_S - np.log(sum_S))[:, None].astype(np.float32)

    def _refuse_ids(
        self, places_S: NDArray[np.int64], count_S: NDArray[np.int64], ids_N: NDArray[np.int32]
    ) -> None:
        """Raises: ValueError naming file and place."""
        if len(ids_N) != count_S.sum():
            raise ValueError(
                f"{self._file('_offsets.bin')}: it places entries of place {places_S[0]} and those "
                f"after it outside {self._file('_ids.bin')}; {LOGITS_AGAIN}"
            )
        entry = int(np.flatnonzero(ids_N >= self.settings.vocab_size)[0])
        place = places_S[np.searchsorted(np.cumsum(count_S), entry, side="right")]
        raise ValueError(
            f"{self._file('_ids.bin')}, place {place}: id {ids_N[entry]} is beyond the vocabulary "
            f"of {self.settings.vocab_size} tokens; {LOGITS_AGAIN}"
        )


def _filled_up(
    values_N: NDArray[Any], count_S: NDArray[np.int64], width: int, filling: float
) -> NDArray[Any]:  # fmt: skip
    """Each place's entries in a row of its own. [S, width]"""
    if values_N.size == len(count_S) * width:
        return values_N.reshape(-1, width)
    filled_SK = np.full((len(count_S), width), filling, values_N.dtype)
    filled_SK[np.arange(width) < count_S[:, None]] = values_N
    return filled_SK
