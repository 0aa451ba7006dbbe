"""JSON files that are read with suspicion, and content that vouches for itself."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

OWN_HASH = "sha256"
MOST_LEVELS = 50


def read_object(path: Path) -> dict[str, Any]:
    """The object that is the whole of a JSON file.

    Raises: ValueError naming the file, whatever it holds instead: a name twice, NaN, or brackets
        without end too.
    """
    try:
        values = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_once_each,
            parse_constant=_number, parse_float=_number,
        )  # fmt: skip
        if not isinstance(values, dict):
            raise ValueError(f"a JSON object is expected, not {type(values).__name__}")
        _check_levels(values, MOST_LEVELS)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    return values


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _check_levels(value: Any, most: int) -> None:
    if most == 0:
        raise ValueError(f"more than {MOST_LEVELS} levels of lists and objects")
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list):
            _check_levels(each, most - 1)


def _content_sha256(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def with_own_hash(values: dict[str, Any]) -> dict[str, Any]:
    """The object with a hash of what it holds, however it is written."""
    return {**values, OWN_HASH: _content_sha256(values)}


def without_own_hash(values: dict[str, Any], source: Path) -> dict[str, Any]:
    """The object that was given to `with_own_hash`. Raises: ValueError for any other."""
    content = {name: value for name, value in values.items() if name != OWN_HASH}
    if values.get(OWN_HASH) != _content_sha256(content):
        raise ValueError(f"{source}: its content is not what its sha256 says: damaged, or edited")
    return content
