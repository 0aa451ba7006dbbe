"""Stored logits without a model: files of numbers that a test chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_salt.data.logits import (
    LogitsManifest,
    LogitsOrigin,
    LogitsSettings,
    block_offsets,
    encode_logits,
    logits_manifest_path,
)
from megatron_salt.data.tags import DataIdentity, FileRecord, ModelIdentity


def make_settings(**changes: Any) -> LogitsSettings:
    """Of the 8 likeliest of 509 tokens, or with `draws` of so many draws."""
    if "draws" in changes:
        changes = {"kind": "sampled", "top_k": min(changes["draws"], 509), **changes}
    return LogitsSettings(**{
        "context": "window", "max_length": 16, "kind": "top", "top_k": 8, "top_p": 1.0, "draws": 0,
        "seed": 0, "encoding": "fp16", "precision": "fp32", "vocab_size": 509,
        **changes,
    })  # fmt: skip


def write_logits(
    prefix: Path, data: Path, settings: LogitsSettings, ids_SK: np.ndarray, values_SK: np.ndarray,
    of_token: dict[str, np.ndarray], tokenizer: str = "tok",
) -> LogitsManifest:  # fmt: skip
    """All files, consistent, of what `encode_logits` makes of these."""
    files = encode_logits(settings, ids_SK, values_SK, of_token)
    files["_offsets.bin"] = block_offsets(files["_count.bin"])
    for suffix, values in files.items():
        values.tofile(f"{prefix}{suffix}")
    return write_logits_manifest(prefix, data, settings, tokenizer, [*files])


def write_logits_manifest(
    prefix: Path, data: Path, settings: LogitsSettings, tokenizer: str, suffixes: list[str]
) -> LogitsManifest:
    """A manifest that fits the files which are there."""
    manifest = LogitsManifest(
        origin=LogitsOrigin(
            data=DataIdentity.of(data), tokenizer_fingerprint=tokenizer,
            model=ModelIdentity(fingerprint="weights", step=7, name="large/step_7"),
            planned_steps=9, settings=settings,
        ),
        entries=Path(f"{prefix}_ids.bin").stat().st_size // 2, held_out=None, versions={},
        files={suffix: FileRecord.of(Path(f"{prefix}{suffix}")) for suffix in suffixes},
    )  # fmt: skip
    logits_manifest_path(prefix).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
