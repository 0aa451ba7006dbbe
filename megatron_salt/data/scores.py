"""Scores of sequences from the losses of their tokens. Pure NumPy, the same wherever it runs.

A token is *kept* if it is among the k most likely ones of the model that scores. A score is the
median or the mean of the losses, or the mean of the entropies, with the tokens that are not kept
dropped, set to zero, or left as they are.

Source: SALT, arXiv 2410.18779 (median over kept tokens, k = 10; whether the others are dropped or
zeroed is not certain, so both are there); MiniPLM, arXiv 2410.17215, for differences of means.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Score = Literal["median", "mean", "entropy"]
Masked = Literal["drop", "zero", "all"]
SCORES: tuple[str, ...] = get_args(Score)
MASKED: tuple[str, ...] = get_args(Masked)

Floats = NDArray[np.float32]


def column(score: str, masked: str) -> str:
    """Name of a score's column in a table of sequences."""
    return f"{score}_{masked}"


def sequence_scores(
    loss: Floats, kept: NDArray[np.bool_], entropy: Floats | None, lengths: NDArray[np.int64]
) -> dict[str, Floats]:
    """Every score of consecutive sequences, by column name, fp32; nan where no token counts.

    Args: loss, kept, entropy (or None): of all their tokens, end to end.
    """
    index = np.repeat(np.arange(len(lengths)), lengths)
    found = {}
    for masked in MASKED:
        keep = kept if masked == "drop" else slice(None)
        count = np.bincount(index[keep], minlength=len(lengths))
        zero = masked == "zero"
        losses = np.where(kept, loss, np.float32(0)) if zero else loss
        found[column("median", masked)] = _medians(losses[keep], index[keep], count)
        found[column("mean", masked)] = _means(losses[keep], index[keep], count)
        if entropy is not None:
            entropies = np.where(kept, entropy, np.float32(0)) if zero else entropy
            found[column("entropy", masked)] = _means(entropies[keep], index[keep], count)
    return found


def _medians(values: Floats, index: NDArray[np.int64], count: NDArray[np.int64]) -> Floats:
    """Median per sequence; of an even number of values the fp32 mean of the middle two."""
    ordered = values[np.lexsort((values, index))]
    start = np.cumsum(count) - count
    some = count > 0
    low = ordered[(start + (count - 1) // 2)[some]]
    high = ordered[(start + count // 2)[some]]
    medians = np.full(len(count), np.nan, dtype=np.float32)
    medians[some] = (low + high) / np.float32(2)
    return medians


def _means(values: Floats, index: NDArray[np.int64], count: NDArray[np.int64]) -> Floats:
    """Mean per sequence, summed in fp64 in the order of the tokens."""
    sums = np.bincount(index, weights=values, minlength=len(count))
    with np.errstate(invalid="ignore"):
        return (sums / count).astype(np.float32)
