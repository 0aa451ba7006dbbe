"""What a row asks of the model: causal, prefix or span-corrupted language modelling.

A mixture of the three is UL2's, in its decoder-only form. Everything random about a row is a
function of (seed, row): nothing is saved, and a resumed run draws what the run it resumes
would have drawn. Letters: S positions of a row, N tokens of its text that span corruption reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_salt.config.fields import DataConfig
from megatron_salt.config.values import parse_objective
from megatron_salt.data.tokenizer import SENTINEL, Tokenizer, sentinel_ids

# Sets these draws apart from whatever else is seeded with train.seed.
OBJECTIVE_TAG = 0x0B1EC7


@dataclass(frozen=True, kw_only=True)
class ObjectiveRow:
    """One row as the model gets it. S positions."""

    objective: str
    tokens_S: np.ndarray
    """Inputs, int64."""
    labels_S: np.ndarray
    """The token to predict at each position, int64."""
    mask_S: np.ndarray
    """1 where the position counts, fp32."""
    prefix: int
    """How many of the first tokens see each other in both directions."""


@dataclass(frozen=True, kw_only=True)
class SpanCounts:
    """How N tokens of text are divided: a function of N, so all rows of a run have one shape."""

    num_tokens: int
    num_noise: int
    num_spans: int

    @property
    def input_length(self) -> int:
        """The text, with one sentinel for each span."""
        return self.num_tokens - self.num_noise + self.num_spans

    @property
    def target_length(self) -> int:
        """The spans, each behind its sentinel, and the sentinel that ends them."""
        return self.num_noise + self.num_spans + 1

    @property
    def length(self) -> int:
        return self.input_length + self.target_length


def count_spans(num_tokens: int, rate: float, mean_length: float) -> SpanCounts:
    """T5's numbers of corrupted tokens and of spans for `num_tokens` >= 2 tokens of text."""
    num_noise = min(max(round(num_tokens * rate), 1), num_tokens - 1)
    # Each span stands behind a token that stays, which T5 takes for granted: at high rates it is
    # what limits their number.
    num_spans = min(max(round(num_noise / mean_length), 1), num_noise, num_tokens - num_noise)
    return SpanCounts(num_tokens=num_tokens, num_noise=num_noise, num_spans=num_spans)


def fit_spans(num_places: int, rate: float, mean_length: float) -> SpanCounts:
    """The most text whose input and target fill at most `num_places` (S + 1, at least 5)."""
    num_tokens = num_places
    while count_spans(num_tokens, rate, mean_length).length > num_places:
        num_tokens -= 1
    return count_spans(num_tokens, rate, mean_length)


def spans_of_rows(data: DataConfig) -> SpanCounts:
    return fit_spans(data.seq_length + 1, data.span_corruption_rate, data.span_mean_length)


def sentinels_needed(data: DataConfig) -> int:
    """Sentinels of a span-corrupted row; 0 without span_corruption. Shorter texts need no more."""
    if "span_corruption" not in parse_objective(data.objective):
        return 0
    return spans_of_rows(data).num_spans + 1


def check_sentinels(data: DataConfig, tokenizer: Tokenizer) -> list[int]:
    """Ids of the sentinels that rows of these settings use, in order.

    Raises: ValueError naming the tokenizer and the remedy, if it has too few of them, or if text
        can become one.
    """
    needed, found = sentinels_needed(data), sentinel_ids(tokenizer)
    if len(found) < needed:
        raise ValueError(
            f"data.objective: span_corruption at data.seq_length = {data.seq_length} needs {needed}"
            f" sentinels, {SENTINEL.format(0)} to {SENTINEL.format(needed - 1)}; the tokenizer "
            f"{tokenizer.path} has {len(found)}: train one with megatron-salt tokenizer "
            f"--sentinels {needed} and preprocess the data with it, raise data.span_mean_length, "
            "or leave span_corruption out"
        )
    names = [SENTINEL.format(index) for index in range(needed)]
    for name, index, ids in zip(names, found, tokenizer.encode_batch(names), strict=False):
        if index in ids:
            raise ValueError(
                f"data.objective: the tokenizer {tokenizer.path} makes its token {name} out of the "
                "text of that name, so documents may hold sentinels: make it a control symbol "
                "(sentencepiece) or a special token (Hugging Face), or leave span_corruption out"
            )
    return found[:needed]


class Draws:
    """Random numbers of one row.

    From the raw words of a bit generator, whose stream NumPy promises to keep; that of
    `Generator.permutation` and its like may change with NumPy's version, and a resume with it.
    """

    def __init__(self, seed: int, row: int) -> None:
        self._words = np.random.PCG64(np.random.SeedSequence([seed, OBJECTIVE_TAG, row]))

    def uniform(self) -> float:
        """In [0, 1)."""
        return (int(self._words.random_raw()) >> 11) / 2**53

    def lengths(self, total: int, count: int) -> np.ndarray:
        """T5's random segmentation: `count` lengths >= 1 of sum `total`, all equally likely."""
        order = np.argsort(self._words.random_raw(total - 1), kind="stable")
        cuts = np.sort(order[: count - 1]) + 1
        return np.diff(cuts, prepend=0, append=total)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The objectives of a run and what it takes to apply them."""

    seed: int
    shares: dict[str, float]
    """Of the rows, in the order of `OBJECTIVES`; they sum to 1."""
    data: DataConfig
    eod: int
    sentinels: tuple[int, ...]

    @cached_property
    def counts(self) -> SpanCounts:
        return spans_of_rows(self.data)

    def sample(self, text: np.ndarray, row: int) -> ObjectiveRow:
        """What is made of the S + 1 consecutive tokens of a row.

        Args:
            row: its place in the endless order (of the blend, where there is one). No run reads the
                same row of two orders, so the row alone tells draws apart.
        """
        assert text.shape == (self.data.seq_length + 1,)
        draws = Draws(self.seed, row)
        objective = self._objective(draws.uniform())
        if objective == "span_corruption":
            return self._corrupted(text, draws)
        prefix = 0
        if objective == "prefix":
            prefix = 1 + int(draws.uniform() * self.data.seq_length)
        return self._framed(objective, text, prefix, len(text))

    def _objective(self, uniform: float) -> str:
        reached = 0.0
        for name, share in self.shares.items():
            reached += share
            if uniform < reached:
                return name
        return name  # the sum of the shares may be a rounding below 1

    def _framed(self, objective: str, places: np.ndarray, prefix: int, stop: int) -> ObjectiveRow:
        """Inputs and labels of S + 1 tokens, of which those in [max(prefix, 1), stop) count."""
        tokens_S, labels_S = places[:-1], places[1:]
        mask_S = np.zeros(len(tokens_S), dtype=np.float32)
        mask_S[max(prefix - 1, 0) : stop - 1] = 1.0
        if self.data.eod_mask_loss:
            mask_S[tokens_S == self.eod] = 0.0
        return ObjectiveRow(
            objective=objective, tokens_S=tokens_S, labels_S=labels_S, mask_S=mask_S, prefix=prefix
        )

    def _corrupted(self, text: np.ndarray, draws: Draws) -> ObjectiveRow:
        counts = self.counts
        noise = draws.lengths(counts.num_noise, counts.num_spans)
        kept = draws.lengths(counts.num_tokens - counts.num_noise, counts.num_spans)
        stops = np.cumsum(kept + noise)
        inputs: list[np.ndarray] = []
        target: list[np.ndarray] = []
        end = 0  # of the span before
        sentinels = np.asarray(self.sentinels, dtype=text.dtype)
        for index, (start, stop) in enumerate(zip(stops - noise, stops, strict=True)):
            sentinel = sentinels[index : index + 1]
            inputs += [text[end:start], sentinel]
            target += [sentinel, text[start:stop]]
            end = stop
        target.append(sentinels[counts.num_spans : counts.num_spans + 1])
        filling = np.full(len(text) - counts.length, self.eod, dtype=text.dtype)
        places = np.concatenate([*inputs, *target, filling])
        return self._framed("span_corruption", places, counts.input_length, counts.length)


def make_mixture(data: DataConfig, tokenizer: Tokenizer, seed: int) -> Mixture | None:
    """The mixture of data.objective; None where all rows are causal and stay as they are read.

    Raises: ValueError as `check_sentinels`.
    """
    shares = parse_objective(data.objective)
    if list(shares) == ["causal"]:
        return None
    sentinels = tuple(check_sentinels(data, tokenizer))
    return Mixture(seed=seed, shares=shares, data=data, eod=tokenizer.eod, sentinels=sentinels)
