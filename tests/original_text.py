"""The way back from a row to the text that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_salt.data.objective import ObjectiveRow


def original_text(sample: ObjectiveRow, sentinels: Sequence[int]) -> np.ndarray:
    """The tokens of text that a sample was made of: all S + 1, or span corruption's N."""
    places = np.append(sample.tokens_S, sample.labels_S[-1])
    if sample.objective != "span_corruption":
        return places
    inputs, target = places[: sample.prefix], places[sample.prefix :]
    pieces: list[np.ndarray] = []
    read = answered = 0
    for sentinel, following in pairwise(sentinels):
        gap = np.flatnonzero(inputs[read:] == sentinel)
        if not len(gap):
            break
        start = answered + 1
        stop = start + int(np.flatnonzero(target[start:] == following)[0])
        pieces += [inputs[read : read + gap[0]], target[start:stop]]
        read, answered = read + int(gap[0]) + 1, stop
    return np.concatenate([*pieces, inputs[read:]])
