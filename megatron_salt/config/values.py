"""Settings that are a small language of their own: blends, splits, mixtures of objectives."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Sequence

from megatron_salt.config.fields import DataConfig

# In this order whatever the order in data.objective, which then changes nothing.
OBJECTIVES = ("causal", "prefix", "span_corruption")


def nearest(name: str, known: Sequence[str]) -> str:
    """A suggestion to append to an error, or nothing: the known name nearest to `name`."""
    tail = name.rsplit(".", 1)[-1]
    tails = {key.rsplit(".", 1)[-1]: key for key in known}
    for candidates, lookup in ((known, {}), (list(tails), tails)):
        match = difflib.get_close_matches(tail if lookup else name, candidates, n=1, cutoff=0.6)
        if match:
            return f" Did you mean {lookup.get(match[0], match[0])!r}?"
    return ""


def is_number(value: object) -> bool:
    """Whether `value` is a finite number: not NaN, true or text, no integer beyond the floats."""
    largest = sys.float_info.max
    return type(value) in (int, float) and -largest <= value <= largest  # type: ignore[operator]


def parse_blend(paths: Sequence[str], option: str) -> tuple[list[str], list[float]]:
    """Prefixes and weights from `PREFIX` or `WEIGHT PREFIX WEIGHT PREFIX …`.

    Raises: ValueError naming the option for any other form.
    """
    if len(paths) == 1:
        return [paths[0]], [1.0]
    try:
        weights = [float(word) for word in paths[0::2]]
    except ValueError as error:
        raise ValueError(
            f"{option} = {list(paths)}: several datasets need a weight before each prefix"
        ) from error
    prefixes = list(paths[1::2])
    if len(prefixes) != len(weights) or not are_weights(weights):
        raise ValueError(
            f"{option} = {list(paths)}: expected WEIGHT PREFIX pairs with weights above 0"
        )
    return prefixes, weights


def are_weights(values: Sequence[float]) -> bool:
    """Whether each is above 0 and shares of their sum are numbers: NaN compares as false."""
    return all(value > 0 for value in values) and sum(values) < math.inf


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is two shares.

    megatron-core takes whatever is no digit or point for a comma: -5 and 1e-3 mean others there.
    """
    share = r"\s*(\d+\.?\d*|\.\d+)\s*"
    found = re.fullmatch(f"{share},{share}", split, re.ASCII)
    if found is None or not 0 < sum(float(part) for part in found.groups()) < math.inf:
        raise ValueError(
            f"data.split = {split!r}: expected the shares of training and held-out documents, two "
            "plain numbers as in 99,1"
        )


def parse_objective(words: Sequence[str]) -> dict[str, float]:
    """Share of each objective, in the order of `OBJECTIVES`, from `NAME` or `WEIGHT NAME …`.

    Raises: ValueError naming data.objective for any other form, an unknown or a repeated name.
    """
    option = f"data.objective = {list(words)}"
    words = ["1", *words] if len(words) == 1 else words
    names = list(words[1::2])
    for name in names:
        if name not in OBJECTIVES:
            raise ValueError(
                f"{option}: {name!r} is no objective; expected NAME or WEIGHT NAME pairs of "
                f"{list(OBJECTIVES)}.{nearest(name, OBJECTIVES)}"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"{option}: an objective is named twice")
    try:
        weights = [float(word) for word in words[0::2]]
    except ValueError as error:
        raise ValueError(f"{option}: several objectives need a weight before each name") from error
    if not 0 < len(names) == len(weights) or not are_weights(weights):
        raise ValueError(f"{option}: expected WEIGHT NAME pairs with weights above 0")
    given = dict(zip(names, weights, strict=True))
    return {name: given[name] / sum(weights) for name in OBJECTIVES if name in given}


def effective_split(data: DataConfig) -> str:
    """Which documents of the training datasets train: all, if held-out data is named apart."""
    return "1,0" if data.valid_data_path else data.split
