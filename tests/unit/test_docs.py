"""The documentation keeps up with the code: tables, keys, fields and links."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
from commands import ROOT
from evaluation_keys import STUDENT_KEYS, TEACHER_KEYS

from megatron_salt.checkpoint.manifest import CheckpointManifest
from megatron_salt.config.deepspeed import KNOWN_KEYS, REFUSED_KEYS
from megatron_salt.config.fields import KEYS
from megatron_salt.report.runs import STEP_KEYS, VALID_KEYS

DOCS = ROOT / "docs"
DOCUMENTS = sorted(DOCS.glob("*.md"))


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_configuration_holds_the_table_made_from_the_code() -> None:
    path = DOCS / "make_configuration_table.py"
    spec = importlib.util.spec_from_file_location("make_configuration_table", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = script.table()
    for key in KEYS:
        assert table.count(f"| `{key}` |") == 1, key
    assert f"{script.BEGIN}{table}{script.END}" in text_of("configuration.md"), (
        f"run: python {path.relative_to(ROOT)} --write"
    )


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ("configuration.md", [*KNOWN_KEYS, *REFUSED_KEYS]),
        ("checkpoints.md", [field.name for field in dataclasses.fields(CheckpointManifest)]),
        ("metrics.md", ["step", *STEP_KEYS, *VALID_KEYS, *STUDENT_KEYS, *TEACHER_KEYS]),
    ],
)
def test_every_name_is_explained(document: str, names: list[str]) -> None:
    text = text_of(document)
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []
