"""Showing stored logits beside their tokens, and finding every distribution that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from tiny_logits import make_settings, write_logits

from megatron_salt.data.manifest import read_dataset_manifest
from megatron_salt.data.tags import open_indexed, read_stream, sequence_lengths
from megatron_salt.data.tokenizer import load_tokenizer

Capture = pytest.CaptureFixture[str]


def made_of(data: Path) -> dict[str, np.ndarray]:
    """At each place its token with p = 1/2, the next two with 1/4 and 1/8, a rest of 1/8."""
    tokens = int(sequence_lengths(data).sum())
    ids = read_stream(open_indexed(data), 0, tokens).astype(np.int32)
    logp = np.tile(np.log(np.float32([0.5, 0.25, 0.125])), (tokens, 1))
    return {
        "ids": (ids[:, None] + np.arange(3, dtype=np.int32)) % 509, "logp": logp,
        "rest": logp[:, 2].copy(), "entropy": np.full(tokens, 1.25, np.float32),
        "loss": -logp[:, 0],
    }  # fmt: skip


def write(prefix: Path, data: Path, made: dict[str, np.ndarray], **settings: Any) -> Path:
    manifest = read_dataset_manifest(data)
    assert manifest is not None
    of_token = {name: made[name] for name in ("rest", "entropy", "loss")}
    write_logits(
        prefix, data, make_settings(top_k=3, **settings), made["ids"], made["logp"], of_token,
        manifest.tokenizer_fingerprint,
    )  # fmt: skip
    return prefix


def test_a_document_with_its_distributions(dataset: Path, tmp_path: Path, capsys: Capture) -> None:
    prefix = write(tmp_path / "large", dataset, made_of(dataset))
    assert call("inspect", dataset, "--document", "3", "--logits", prefix) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "likeliest tokens" in line)
    start, length = int(sequence_lengths(dataset)[:3].sum()), int(sequence_lengths(dataset)[3])
    listing = lines[at + 1 : at + 1 + length]
    pieces = load_tokenizer(f"{dataset}.tokenizer").tokens()
    ids = read_stream(open_indexed(dataset), start, start + length)
    for place, line in enumerate(listing):
        words = line.split()
        assert [*map(float, words[:4])] == [start + place, 0.693, 1.25, 0.125]
        assert " 0.500  " in line and " 0.250  " in line and line.endswith(" 0.125")
        piece = pieces[ids[place]].replace("▁", " ")
        if piece.isalnum():
            assert line.count(f"'{piece}'  '{piece}' 0.500") == 1
    assert lines[-1].startswith(f"logits {prefix}: top 3, fp16, each window by itself, by large/")
    assert "3.00 entries and" in lines[-1]
    assert call("inspect", dataset, "--logits", prefix) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]
    assert call("inspect", dataset, "--verify", "--logits", prefix) == 0
    printed = capsys.readouterr().out
    assert "_values.bin: " in printed and "distinct, likeliest first" in printed
    assert printed.endswith("all of it verified\n")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", 0, "a token is stored twice"),
        ("logp", np.log(np.float32([0.5, 0.125, 0.25])), "a later entry is likelier"),
        ("rest", np.float32(-1.0), "probabilities are not 1 in sum"),
        ("loss", np.float32(1.0), "the token's loss is not its entry's"),
        ("loss", np.float32(np.inf), "loss or entropy is no number"),
        ("entropy", np.float32(np.nan), "loss or entropy is no number"),
        ("logp", np.float32(-np.inf), "_count.bin, place 2000: nothing is stored there"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_is_named(
    dataset: Path, tmp_path: Path, capsys: Capture, name: str, value: Any, message: str
) -> None:
    """In files that agree with their manifest; the place is in a later block."""
    made = made_of(dataset)
    made[name][2000] = value
    for encoding in ("fp16", "fp32"):
        write(tmp_path / "large", dataset, made, encoding=encoding)
        assert call("inspect", dataset, "--verify", "--logits", tmp_path / "large") == 2
        error = capsys.readouterr().err
        assert message in error and "2000" in error and "cache-logits` again" in error


def test_offsets_are_sums_of_counts(dataset: Path, tmp_path: Path, capsys: Capture) -> None:
    from tiny_logits import write_logits_manifest

    from megatron_salt.data.logits import read_logits_manifest

    prefix = write(tmp_path / "large", dataset, made_of(dataset))
    offsets = np.fromfile(f"{prefix}_offsets.bin", np.int64)
    offsets[1] += 1
    offsets.tofile(f"{prefix}_offsets.bin")
    before = read_logits_manifest(prefix)
    origin = before.origin
    write_logits_manifest(
        prefix, dataset, origin.settings, origin.tokenizer_fingerprint, [*before.files]
    )
    assert call("inspect", dataset, "--verify", "--logits", prefix) == 2
    assert "large_offsets.bin: its sums are not those of" in capsys.readouterr().err
