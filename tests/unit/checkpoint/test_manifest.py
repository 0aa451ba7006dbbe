"""What a checkpoint's manifest says is believed only if it vouches for itself, value by value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edited import edit_manifest

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import (
    manifest_text,
    read_checkpoint_manifest,
    tokenizer_folder,
)


@pytest.fixture
def checkpoint(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(list_checkpoints(teacher)[-1], tmp_path / "model"))


def test_it_is_read_as_it_was_written(checkpoint: Path) -> None:
    manifest = read_checkpoint_manifest(checkpoint)
    assert manifest.run.config.model == manifest.model.config
    assert (checkpoint / "manifest.json").read_text() == manifest_text(manifest)


@pytest.mark.parametrize("old, new", [("1e-05", "100000.0"), ('"rope"', '"rppe"'), ("{", "{\n ")])
def test_any_other_content_is_refused(checkpoint: Path, old: str, new: str) -> None:
    path = checkpoint / "manifest.json"
    before = path.read_text()
    path.write_text(before.replace(old, new))
    assert path.read_text() != before
    if old == "{":  # the same content, written otherwise
        read_checkpoint_manifest(checkpoint)
        return
    with pytest.raises(ValueError, match=r"manifest\.json: its content is not what its sha256"):
        read_checkpoint_manifest(checkpoint)


def test_without_a_hash_it_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="not what its sha256 says"):
        read_checkpoint_manifest(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(step="8"), "model.step = '8': expected whole number"),
        (lambda d: d["model"].update(step=True), "model.step = True: expected whole number"),
        (lambda d: d["model"].update(step=1 << 63), "model.step = a number beyond 64 bits"),
        (lambda d: d["model"].pop("bos"), None),
        (lambda d: d["model"].pop("name"), r"missing fields \['name'\] in model"),
        (lambda d: d["model"]["evaluation"].update(x=1), r"unknown fields \['x'\] in model.eval"),
        (lambda d: d["model"].update(objective=[3]), r"model.objective = 3: expected text"),
        (lambda d: d["training"].update(data=None), "training.data = None: expected list"),
        (lambda d: d.update(training=[]), r"training = \[\]: expected an object"),
        (lambda d: d["versions"].update(torch=2), "versions.torch = 2: expected text"),
        (lambda d: d["training"]["config"]["model"].update(position_embedding_type="rppe"),
         "config.model.position_embedding_type = 'rppe': expected rope"),
        (lambda d: d["training"]["config"]["salt"].update(teacher_temperature=-1.0),
         "salt.teacher_temperature = -1.0: must be above 0"),
        (lambda d: d["model"]["config"].update(layernorm_epsilon=-1e-5),
         "model.layernorm_epsilon = -1e-05: must be above 0"),
        (lambda d: d["model"]["config"].update(num_attention_heads=3),
         "is not a multiple of num_attention_heads"),
        (lambda d: d["files"].update(a=7), "files.a = 7: expected numbers by name"),
        (lambda d: d["files"].update(a={"bytds": 7}), "files.a = .*: expected its bytes and sha"),
        (lambda d: d["files"].update(a={"bytes": "7", "sha256": "x"}), "files.a = .*: expected"),
    ],
)  # fmt: skip
def test_every_value_has_the_type_and_range_of_its_field(
    checkpoint: Path, change: Callable[[dict[str, Any]], Any], message: str | None
) -> None:
    edit_manifest(checkpoint, change)
    if message is None:
        read_checkpoint_manifest(checkpoint)
        return
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint_manifest(checkpoint)
    assert str(error.value).startswith(f"{checkpoint}/manifest.json: ")


@pytest.mark.parametrize(
    "name", ["../secret", "weights/../../secret", "{tmp}/secret", "\0", "x" * 300]
)
def test_names_do_not_leave_the_folder(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("1234567")
    name = name.format(tmp=tmp_path)
    record = {"bytes": 7, "sha256": "0" * 64}
    edit_manifest(checkpoint, lambda values: values["files"].update({name: record}))
    with pytest.raises(ValueError, match="leads out of its folder|null byte|too long|missing"):
        read_checkpoint_manifest(checkpoint)


@pytest.mark.parametrize("what", ["file", "folder", "loop"])
def test_links_do_not_leave_the_folder(checkpoint: Path, tmp_path: Path, what: str) -> None:
    moved = checkpoint / "weights"
    if what != "folder":
        (moved,) = moved.iterdir()
    away = shutil.move(moved, tmp_path / "away")
    moved.symlink_to(moved if what == "loop" else away)
    with pytest.raises(
        ValueError, match="Symlink loop" if what == "loop" else "leads out of its fold"
    ):
        read_checkpoint_manifest(checkpoint)


def test_links_within_a_checkpoint_and_to_it_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    (file,) = (checkpoint / "weights").iterdir()
    file.rename(checkpoint / "kept")
    file.symlink_to("../kept")
    (tmp_path / "latest").symlink_to(checkpoint)
    read_checkpoint_manifest(tmp_path / "latest")


def test_a_tokenizer_is_the_one_that_was_written(checkpoint: Path) -> None:
    manifest = read_checkpoint_manifest(checkpoint)
    assert tokenizer_folder(checkpoint, manifest) == checkpoint / "tokenizer"
    other = checkpoint / "tokenizer" / "tokenizer.json"  # which would be read first
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not listed in .*manifest\.json"):
        tokenizer_folder(checkpoint, manifest)
    other.unlink()
    (file,) = (checkpoint / "tokenizer").iterdir()
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"tokenizer\.model: content differs"):
        tokenizer_folder(checkpoint, manifest)
