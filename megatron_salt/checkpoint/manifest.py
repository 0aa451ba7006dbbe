"""What a checkpoint says about itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_salt.config.fields import RunConfig
from megatron_salt.files.hashes import sha256_of
from megatron_salt.method.switch import SwitchState

CHECKPOINT_FORMAT = 1


MANIFEST = "manifest.json"


VERSIONED_PACKAGES = ("torch", "megatron-core", "deepspeed", "safetensors", "megatron_salt")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A held-out score and what it was measured on; comparable only on the same text."""

    step: int
    ce_nats: float
    accuracy: float
    tokens: int
    data: str
    """Fingerprint of the held-out samples: datasets, split, sequence length, how many."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint says about itself."""

    step: int
    """Optimiser steps done; the next step to run."""
    phase: str
    """Phase of the next step."""
    tokens: int
    """Training tokens seen, counted ones."""
    data_rows: int
    """Rows of the endless order consumed: the data position."""
    data: list[str]
    """Fingerprint of every training dataset, in the order of data.train_data_path."""
    config: RunConfig
    vocab_size: int
    tokenizer_fingerprint: str
    tp_size: int
    pp_size: int
    dp_size: int
    zero_stage: int
    precision: str
    evaluation: Evaluation | None
    teacher_valid_ce_nats: float | None
    """The teacher's CE on the same held-out samples, as measured when it was loaded."""
    teacher_fingerprint: str | None
    """Identity of the teacher's weights, if there has been one."""
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    """Relative path -> {"bytes": …, "sha256": …} of every file but this one."""
    tags: list[str] = field(default_factory=list)
    """Fingerprint of the tags of every training dataset, if the run reads tags."""
    selection: list[str] = field(default_factory=list)
    """Fingerprint of the selected sequences of every training dataset, if the run selects."""
    switch: SwitchState = field(default_factory=SwitchState)
    """What the adaptive switch has seen and decided; with a fixed one nothing."""
    format_version: int = CHECKPOINT_FORMAT


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED_PACKAGES}


def read_checkpoint_manifest(path: Path) -> CheckpointManifest:
    """Read and check the manifest, and the presence and size of every file it names.

    Raises: ValueError naming the file and what is wrong with it.
    """
    source = path / MANIFEST
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error
    if values.get("format_version") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{source}: format {values.get('format_version')!r}, this version reads "
            f"{CHECKPOINT_FORMAT}"
        )
    for name, record in values.get("files", {}).items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file}: missing; the checkpoint is damaged, use another one")
        if file.stat().st_size != record["bytes"]:
            raise ValueError(
                f"{file}: {file.stat().st_size} bytes, the manifest says {record['bytes']}; the "
                "checkpoint is damaged, use another one"
            )
    values["config"] = RunConfig.from_dict(values.get("config", {}), source=str(source))
    try:
        if values["evaluation"] is not None:
            values["evaluation"] = Evaluation(**values["evaluation"])
        if "switch" in values:
            values["switch"] = SwitchState(**values["switch"])
        return CheckpointManifest(**values)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{source}: not a manifest of format {CHECKPOINT_FORMAT}: {error}"
        ) from error


def verify_hashes(path: Path, manifest: CheckpointManifest, names: Sequence[str]) -> None:
    """Raise ValueError naming the first of these files whose content is not what was written."""
    for name in names:
        if sha256_of(path / name) != manifest.files[name]["sha256"]:
            raise ValueError(
                f"{path / name}: content differs from the manifest's hash; the checkpoint is "
                "damaged, use another one"
            )


def weights_fingerprint(manifest: CheckpointManifest) -> str:
    """Identity of a checkpoint's weights, from the hashes of their files."""
    hashes = [
        record["sha256"]
        for name, record in sorted(manifest.files.items())
        if name.startswith("weights/")
    ]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
