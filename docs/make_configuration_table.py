"""Prints the tables of docs/configuration.md: every setting with its values, default and meaning.

    python docs/make_configuration_table.py            # print
    python docs/make_configuration_table.py --write    # put it into docs/configuration.md

The only source is `megatron_salt/config/fields.py`: fields and defaults come from its dataclasses,
and meanings from the docstrings below the fields. tests/unit/test_docs.py fails when the document
is behind.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

from megatron_salt.config.command_line import type_text
from megatron_salt.config.fields import SECTIONS

DOCUMENT = Path(__file__).with_name("configuration.md")
BEGIN = "<!-- table: begin (docs/make_configuration_table.py --write) -->\n"
END = "<!-- table: end -->\n"


def field_docstrings(kind: type) -> dict[str, str]:
    """The string literal below each field; Python itself does not keep these."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def values_of(hint: Any) -> str:
    """A type in the words of `--help`, with what is written as it stands as code."""
    kinds = {"whole number", "number", "numbers by name", "list", "text"}
    words = type_text(hint).split(" | ")
    return ", ".join(word if word in kinds else f"`{word}`" for word in words)


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    if field.default is dataclasses.MISSING:
        return "**required**"
    value = field.default
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def table() -> str:
    """One Markdown table per section, in the order of the sections."""
    lines = []
    for name, kind in SECTIONS.items():
        meanings, hints = field_docstrings(kind), get_type_hints(kind)
        lines += [f"### `{name}`", "", (inspect.getdoc(kind) or "").split("\n\n")[0], ""]
        lines += ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
        for field in dataclasses.fields(kind):
            cells = [
                f"`{name}.{field.name}`",
                values_of(hints[field.name]),
                default_of(field),
                meanings[field.name].replace("|", "\\|"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update docs/configuration.md")
    if not parser.parse_args().write:
        sys.stdout.write(table())
        return
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
