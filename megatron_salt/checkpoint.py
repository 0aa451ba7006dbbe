"""Checkpoints: written beside, verified, renamed; complete in themselves; readable at any layout.

    OUTPUT_DIR/checkpoints/step_00000100/
        manifest.json        written last: step, phase, config, versions, size and hash of all files
        weights/             safetensors, one file per pipeline stage and tensor-parallel rank,
                             under the names of model/weights.py: what a teacher is built from
        deepspeed/           DeepSpeed's own files: weights, optimiser, loss scale; for resuming
        tokenizer/           a copy
        deepspeed.json       the DeepSpeed config of the run
        held_out/            the teacher's loss on every held-out token, where there was a teacher

A directory with its final name is complete: it is built as `.step_00000100.partial` and renamed
after every file has been flushed, read back and hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_salt.config import RunConfig
from megatron_salt.model.weights import merge, weight_table
from megatron_salt.switch import SwitchState

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEACHER_SCORES = "held_out/teacher.safetensors"
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
    format_version: int = FORMAT_VERSION


def checkpoints_dir(output_dir: str | Path) -> Path:
    return Path(output_dir) / "checkpoints"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED_PACKAGES}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = checkpoints_dir(output_dir).glob("step_*")
    return sorted(path for path in found if (path / MANIFEST).is_file())


def resolve(path: str, *, what: str) -> Path:
    """A checkpoint directory from its path or from a run's output_dir (its newest checkpoint).

    Raises: ValueError naming the setting `what`, the path and what was expected there.
    """
    given = Path(path)
    if (given / MANIFEST).is_file():
        return given
    found = list_checkpoints(given)
    if found:
        return found[-1]
    problem = "does not exist" if not given.exists() else "holds no complete checkpoint"
    raise ValueError(
        f"{what} = {path}: {problem}; give a directory with {MANIFEST}, or a run's output_dir "
        "with checkpoints/ in it"
    )


def read_manifest(path: Path) -> CheckpointManifest:
    """Read and check the manifest, and the presence and size of every file it names.

    Raises: ValueError naming the file and what is wrong with it.
    """
    source = path / MANIFEST
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{source}: format {values.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}"
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
        raise ValueError(f"{source}: not a manifest of format {FORMAT_VERSION}: {error}") from error


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


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_file(pp_rank: int, tp_rank: int) -> str:
    return f"weights/stage_{pp_rank:03d}_tp_{tp_rank:03d}.safetensors"


def write_weights(
    directory: Path, pp_rank: int, tp_rank: int, weights: Mapping[str, Tensor]
) -> None:
    """Write one rank's part of the weights, by canonical name."""
    target = directory / weights_file(pp_rank, tp_rank)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), target)


def read_weights(path: Path, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """The whole model's weights on the CPU, merged from the parts of any tp and pp.

    Raises: ValueError naming checkpoint and weight, if one is missing, twice there, unknown or of
        another shape than the config says, or if a file's content does not match its hash.
    """
    config = manifest.config
    table = weight_table(config.model, manifest.vocab_size, config.position_rows)
    parts: dict[str, list[Tensor]] = {name: [] for name in table}
    names = sorted(name for name in manifest.files if name.startswith("weights/"))
    verify_hashes(path, manifest, names)
    for pp_rank in range(manifest.pp_size):
        for tp_rank in range(manifest.tp_size):
            name = weights_file(pp_rank, tp_rank)
            if name not in names:
                raise ValueError(f"{path}: {name} is missing from the manifest")
            with safe_open(path / name, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118  not a dict
                    if key not in parts:
                        raise ValueError(f"{path / name}: unknown weight {key}")
                    parts[key].append(stored.get_tensor(key))
    full = {}
    for name, spec in table.items():
        if len(parts[name]) != manifest.tp_size:
            raise ValueError(
                f"{path}: weight {name} has {len(parts[name])} of {manifest.tp_size} parts"
            )
        full[name] = merge(parts.pop(name), spec)
    return full


def write_teacher_scores(directory: Path, tensors: Mapping[str, Tensor], samples: str) -> None:
    """Write what the teacher made of the held-out samples, of this fingerprint; see `held_out`."""
    target = directory / TEACHER_SCORES
    target.parent.mkdir()
    save_file(dict(tensors), target, metadata={"samples": samples})


def read_teacher_scores(
    path: Path, manifest: CheckpointManifest
) -> tuple[dict[str, Tensor], str] | None:
    """The tensors and the fingerprint that `write_teacher_scores` wrote; None where it did not.

    Raises: ValueError if the content does not match its hash.
    """
    if TEACHER_SCORES not in manifest.files:
        return None
    verify_hashes(path, manifest, [TEACHER_SCORES])
    with safe_open(path / TEACHER_SCORES, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        return tensors, stored.metadata()["samples"]


def partial_dir(output_dir: str | Path, step: int) -> Path:
    return checkpoints_dir(output_dir) / f".{step_name(step)}.partial"


def start_partial(output_dir: str | Path, step: int) -> Path:
    """An empty directory to write a checkpoint into; remains of a killed attempt are removed."""
    checkpoints_dir(output_dir).mkdir(parents=True, exist_ok=True)
    for pattern in (".step_*.partial", ".step_*.replaced", ".step_*.deleted"):
        for leftover in checkpoints_dir(output_dir).glob(pattern):
            shutil.rmtree(leftover, ignore_errors=pattern.endswith("deleted"))
    partial = partial_dir(output_dir, step)
    partial.mkdir()
    return partial


def list_files(partial: Path) -> list[str]:
    """Relative paths of the files of a partial checkpoint, sorted."""
    return sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())


def hash_files(partial: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Flush, read back and hash files of a partial checkpoint."""
    records = {}
    for name in names:
        path = partial / name
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        records[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return records


def fsync_directories(root: Path) -> None:
    """Flush the directory entries below `root`, so that a rename after this implies the files."""
    for path in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        _fsync_directory(path)


def publish(partial: Path, manifest: CheckpointManifest, output_dir: str | Path) -> Path:
    """Write the manifest, then give the checkpoint its final name in one rename."""
    for required in ("weights", "deepspeed", "tokenizer"):
        if not any((partial / required).iterdir()):
            raise RuntimeError(f"{partial}: {required}/ is empty; not published")
    for pp_rank in range(manifest.pp_size):
        for tp_rank in range(manifest.tp_size):
            if weights_file(pp_rank, tp_rank) not in manifest.files:
                raise RuntimeError(f"{partial}: no {weights_file(pp_rank, tp_rank)}; not published")
    values = asdict(manifest)
    with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(values, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_directories(partial)
    final = checkpoints_dir(output_dir) / step_name(manifest.step)
    if final.exists():
        # A run resumed from an older checkpoint reaches this step again.
        replaced = checkpoints_dir(output_dir) / f".{step_name(manifest.step)}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced)
    else:
        partial.rename(final)
    _fsync_directory(final.parent)
    return final


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old(output_dir: str | Path, keep: int) -> list[str]:
    """Delete all but the newest `keep` checkpoints; 0 keeps all. Returns what could not be deleted.

    Renamed first, so that a half-deleted one is not taken for a checkpoint; `start_partial` sweeps
    up what an interruption or a reader elsewhere left.
    """
    problems = []
    for path in list_checkpoints(output_dir)[: -keep if keep else 0]:
        doomed = path.with_name(f".{path.name}.deleted")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            problems.append(f"old checkpoint {path} not deleted: {error}")
    return problems


def find_resume(output_dir: str, resume: str) -> tuple[Path | None, list[str]]:
    """Which checkpoint to resume from, and a warning for each damaged one that was passed over.

    `none`: nothing. `auto`: the newest complete one of this run, if any. Else: a path, which must
    be good.
    """
    if resume == "none":
        return None, []
    if resume != "auto":
        path = resolve(resume, what="train.resume")
        read_manifest(path)
        return path, []
    warnings = []
    for path in reversed(list_checkpoints(output_dir)):
        try:
            read_manifest(path)
        except ValueError as error:
            warnings.append(f"passing over {path}: {error}")
            continue
        return path, warnings
    if warnings:
        raise ValueError("train.resume = auto: every checkpoint is damaged: " + "; ".join(warnings))
    return None, []


def set_aside_damaged(output_dir: str, resumed_from: Path) -> None:
    """Rename damaged checkpoints newer than the one resumed from to `damaged_step_…`.

    They are kept, but neither a later resume nor `remove_old` takes them for this run's newest.
    """
    for path in list_checkpoints(output_dir):
        if path.parent == resumed_from.parent and path.name > resumed_from.name:
            number = len(list(path.parent.glob(f"damaged_{path.name}*")))
            path.rename(path.with_name(f"damaged_{path.name}" + (f".{number}" if number else "")))
