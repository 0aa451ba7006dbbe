"""What a checkpoint says about itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.config.problems import check_config, check_model
from megatron_salt.config.records import record_of
from megatron_salt.files.disk import sha256_of
from megatron_salt.files.json_files import read_object, with_own_hash, without_own_hash
from megatron_salt.method.switch import SwitchState
from megatron_salt.model.weights import num_parameters

CHECKPOINT_FORMAT = 3
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
class ModelRecord:
    """What a model says about itself, whoever made it: enough to build, to teach and to score."""

    name: str
    """For people: run and checkpoint, as `slm/step_00000100`."""
    step: int
    """Optimizer steps behind its weights."""
    config: ModelConfig
    vocab_size: int
    """Rows of its vocabulary: those behind the tokens of its tokenizer are nobody's."""
    num_positions: int
    """Rows of a learned position table."""
    seq_length: int
    """Tokens of the sequences that it was trained on; beyond that its predictions are worthless."""
    objective: list[str]
    """data.objective that it was trained on."""
    tokenizer_fingerprint: str
    precision: str
    tp_size: int
    pp_size: int
    """Parts in which weights/ holds it, as tp_size."""
    evaluation: Evaluation | None
    bos: int | None = None
    """The token that began its texts, if it is known; our own have none."""
    parameters: int | None = None
    """Of a model that is not ours, whose `config` only stands for its cost; None: see `config`."""

    @property
    def num_parameters(self) -> int:
        """Of the whole model, real vocabulary rows only."""
        own = num_parameters(self.config, self.vocab_size, self.num_positions)
        return own if self.parameters is None else self.parameters


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run says about itself: enough to go on with it exactly."""

    config: RunConfig
    step: int
    """Optimizer steps done; the next step to run."""
    phase: str
    """Phase of the next step."""
    tokens: int
    """Training tokens seen, counted ones."""
    data_rows: int
    """Rows of the endless order consumed: the data position."""
    data: list[str]
    """Fingerprint of every training dataset, in the order of data.train_data_path."""
    dp_size: int
    zero_stage: int
    teacher_valid_ce_nats: float | None
    """The teacher's CE on the same held-out samples, as measured when it was loaded."""
    teacher_fingerprint: str | None
    """Identity of the teacher's weights, or of its stored logits, if there has been one."""
    tags: list[str]
    """Fingerprint of the tags of every training dataset, if the run reads tags."""
    selection: list[str]
    """Fingerprint of the selected sequences of every training dataset, if the run selects."""
    switch: SwitchState
    """What the adaptive switch has seen and decided; with a fixed one nothing."""
    loss_scaler: dict[str, float]
    """What fp16's dynamic loss scale remembers; empty without one."""
    skipped_steps: int
    """Steps without an update, of which DeepSpeed counts: fp16's overflows."""
    init_fingerprint: str | None = None
    """Identity of the weights that the run started from (train.init_from)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint says about itself."""

    model: ModelRecord
    training: RunRecord | None
    """None: a model that no run of this package has made; it cannot be resumed."""
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    """Relative path -> {"bytes": …, "sha256": …} of every file but this one."""
    format_version: int = CHECKPOINT_FORMAT

    @property
    def run(self) -> RunRecord:
        """Raises: ValueError for a model without a run."""
        if self.training is None:
            raise ValueError(
                f"checkpoint {self.model.name} holds a model without its run: it can teach, tag "
                "and be scored on data that is named, but not be resumed"
            )
        return self.training


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED_PACKAGES}


def read_checkpoint_manifest(path: Path) -> CheckpointManifest:
    """Read and check the manifest, and the presence and size of every file it names.

    Raises: ValueError naming the file and what is wrong with it.
    """
    source = path / MANIFEST
    values = read_object(source)
    if values.get("format_version") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{source}: format {values.get('format_version')!r}, this version reads "
            f"{CHECKPOINT_FORMAT}"
        )
    manifest = record_of(CheckpointManifest, without_own_hash(values, source), str(source))
    try:
        if manifest.training is not None:
            check_config(manifest.training.config)
        check_model(manifest.model.config, manifest.model.seq_length)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for name, record in manifest.files.items():
        _check_file(path, name, record, source)
    return manifest


def manifest_text(manifest: CheckpointManifest) -> str:
    """The file's content, which vouches for itself."""
    return json.dumps(with_own_hash(asdict(manifest)), indent=1)


def _check_file(path: Path, name: str, record: dict[str, Any], source: Path) -> None:
    """Raise ValueError unless a file of this record is there, in this folder and of this size."""
    if set(map(type, record.values())) != {int, str} or set(record) != {"bytes", "sha256"}:
        raise ValueError(f"{source}: files.{name} = {record}: expected its bytes and sha256")
    file, damaged = path / name, "the checkpoint is damaged, use another one"
    try:
        there, size = file.is_file(), file.stat().st_size if file.is_file() else 0
        within = file.resolve().is_relative_to(path.resolve()) and ".." not in Path(name).parts
    except (OSError, ValueError, RuntimeError) as error:  # no name of a file; a loop of links
        raise ValueError(f"{file}: {error}; {damaged}") from error
    if not within or Path(name).is_absolute():
        raise ValueError(f"{file}: listed in {source}, and leads out of its folder: do not use it")
    if not there:
        raise ValueError(f"{file}: missing; {damaged}")
    if size != record["bytes"]:
        raise ValueError(f"{file}: {size} bytes, the manifest says {record['bytes']}; {damaged}")


def tokenizer_folder(path: Path, manifest: CheckpointManifest) -> Path:
    """Where the tokenizer of a checkpoint lies, as it was written.

    Raises: ValueError naming a file that has changed, or that was not written with it.
    """
    folder = path / "tokenizer"
    # Hidden ones are a file system's; nothing reads them.
    names = [f"tokenizer/{each.name}" for each in folder.glob("[!.]*")]
    if extra := [name for name in names if name not in manifest.files]:
        raise ValueError(f"{path / extra[0]}: not listed in {path / MANIFEST}: remove it")
    verify_hashes(path, manifest, names)
    return folder


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
    names = sorted(name for name in manifest.files if name.startswith("weights/"))
    hashes = "".join(manifest.files[name]["sha256"] for name in names)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]
