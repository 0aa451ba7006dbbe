"""Dataclasses out of what JSON and YAML hold: every value of the type that its field names."""

from __future__ import annotations

import dataclasses
import re
import types
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")

WORDS_OF_TYPES = {int: "whole number", float: "number", bool: "true | false", list: "list",
                  dict: "numbers by name", type(None): "null"}  # fmt: skip


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def type_text(kind: Any) -> str:
    """A type in the words of a YAML file."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return " | ".join(parts)
    if isinstance(kind, types.UnionType):
        return " | ".join(map(type_text, parts))
    return WORDS_OF_TYPES.get(get_origin(kind) or kind, "text")


def record_of(kind: type[_Record], values: Any, source: str, place: str = "") -> _Record:
    """The dataclass `kind` with these fields, and what dataclasses there are in it.

    Args:
        source: of the values, for errors; so is `place`, the dotted name of the record in it.
    Raises: ValueError naming source and field, for one that is unknown, missing or of another type.
    """
    where, hints = f" in {place}" if place else "", _hints(kind)  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise ValueError(f"{source}: {place or 'content'} = {_shown(values)}: expected an object")
    fields: dict[str, Any] = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(str(name) for name in values if name not in fields):
        raise ValueError(f"{source}: unknown fields {unknown}{where}")
    missing = [
        name
        for name, item in fields.items()
        if name not in values and item.default is item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{source}: missing fields {missing}{where}")
    return kind(**{
        name: _typed(hints[name], value, source, f"{place}.{name}".lstrip("."))
        for name, value in values.items()
    })  # fmt: skip


def _typed(kind: Any, value: Any, source: str, place: str) -> Any:
    """The value, if it is of this type; lists and objects by what they hold."""
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, types.UnionType):  # of a type and null
        (other,) = (part for part in parts if part is not type(None))
        return None if value is None else _typed(other, value, source, place)
    if dataclasses.is_dataclass(kind):
        return record_of(kind, value, source, place)  # type: ignore[arg-type]
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_typed(parts[0], each, source, place) for each in value)
    if origin is dict and isinstance(value, dict) and all(type(name) is str for name in value):
        return {name: _typed(parts[1], each, source, f"{place}.{name}")
                for name, each in value.items()}  # fmt: skip
    if kind is Any or (origin is None and type(value) is kind and _is_short(value)):
        return value
    if kind is float and type(value) is int:
        return value
    # YAML takes a number without a point, such as 1e-5, for text.
    if kind is float and type(value) is str and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
        return float(value)
    if isinstance(kind, type) and issubclass(kind, str) and kind is not str:  # or a number
        if type(value) in (str, int, float, kind):
            return kind(value)
    if origin is Literal and type(value) is str and value in parts:
        return value
    raise ValueError(f"{source}: {place} = {_shown(value)}: expected {type_text(kind)}")


def _is_short(value: Any) -> bool:
    """Whether it is no integer beyond 64 bits, which neither files nor tensors have."""
    return type(value) is not int or -(1 << 63) <= value < 1 << 63


def _shown(value: Any) -> str:
    """The value for people. Thousands of digits cannot be printed."""
    return str(repr(value) if _is_short(value) else "a number beyond 64 bits")[:80]
