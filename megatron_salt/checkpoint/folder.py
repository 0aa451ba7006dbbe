"""Checkpoints: written beside, verified, renamed; complete in themselves; readable at any layout.

    OUTPUT_DIR/checkpoints/step_00000100/
        manifest.json        written last: step, phase, config, versions, size and hash of all files
        weights/             safetensors, one file per pipeline stage and tensor-parallel rank,
                             under the names of model/weights.py: what a teacher is built from
        optimizer/           the fragments of the optimizer's state that each rank held, and their
                             index: checkpoint/optimizer.py; for resuming at any layout
        tokenizer/           a copy
        deepspeed.json       the DeepSpeed config of the run
        held_out/            the teacher's loss on every held-out token, where there was a teacher

A directory with its final name is complete: it is built as `.step_00000100.partial` and renamed
after every file has been flushed, read back and hashed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_salt.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    ModelRecord,
    RunRecord,
    installed_versions,
    manifest_text,
    read_checkpoint_manifest,
    verify_hashes,
)
from megatron_salt.checkpoint.weights import weights_file
from megatron_salt.files.disk import atomic_path, fsync_path, sha256_of


def checkpoints_dir(output_dir: str | Path) -> Path:
    return Path(output_dir) / "checkpoints"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


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
    if (given / "config.json").is_file() and not checkpoints_dir(given).exists():
        problem += " (`megatron-salt convert` makes one of a Hugging Face folder)"
    raise ValueError(
        f"{what} = {path}: {problem}; give a directory with {MANIFEST}, or a run's output_dir "
        "with checkpoints/ in it"
    )


def partial_dir(output_dir: str | Path, step: int) -> Path:
    return checkpoints_dir(output_dir) / f".{step_name(step)}.partial"


def start_partial(output_dir: str | Path, step: int) -> None:
    """Make a directory to write a checkpoint into; remains of a killed attempt are removed."""
    checkpoints_dir(output_dir).mkdir(parents=True, exist_ok=True)
    for pattern in (".step_*.partial", ".step_*.replaced", ".step_*.deleted"):
        for leftover in checkpoints_dir(output_dir).glob(pattern):
            if leftover.is_symlink():  # of somebody else's making
                leftover.unlink()
            else:
                shutil.rmtree(leftover, ignore_errors=pattern.endswith("deleted"))
    partial_dir(output_dir, step).mkdir()


def list_files(partial: Path) -> list[str]:
    """Relative paths of the files of a partial checkpoint, sorted."""
    return sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())


def hash_files(partial: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Flush, read back and hash files of a partial checkpoint."""
    records = {}
    for name in names:
        path = partial / name
        fsync_path(path)
        records[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return records


def publish(partial: Path, manifest: CheckpointManifest, output_dir: str | Path) -> Path:
    """Write the manifest, then give the checkpoint its final name in one rename."""
    if not any((partial / "tokenizer").iterdir()):
        raise RuntimeError(f"{partial}: tokenizer/ is empty; not published")
    for pp_rank in range(manifest.model.pp_size):
        for tp_rank in range(manifest.model.tp_size):
            if weights_file(pp_rank, tp_rank) not in manifest.files:
                raise RuntimeError(f"{partial}: no {weights_file(pp_rank, tp_rank)}; not published")
    _write_manifest(partial, manifest)
    # Directory entries, so that the rename after this implies the files.
    for directory in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        fsync_path(directory)
    final = checkpoints_dir(output_dir) / step_name(manifest.model.step)
    if final.exists():
        # A run resumed from an older checkpoint reaches this step again.
        replaced = checkpoints_dir(output_dir) / f".{step_name(manifest.model.step)}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced)
    else:
        partial.rename(final)
    fsync_path(final.parent)
    return final


def write_model_manifest(
    partial: Path, model: ModelRecord, training: RunRecord | None = None,
    versions: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Hash the files of a folder and write the manifest of a model, and of the run behind it if
    there is one.

    Args: versions: of the packages that have made it; None: those that are installed.
    """
    files = hash_files(partial, list_files(partial))
    manifest = CheckpointManifest(
        model=model, training=training, versions=versions or installed_versions(), files=files
    )
    _write_manifest(partial, manifest)


def _write_manifest(partial: Path, manifest: CheckpointManifest) -> None:
    with atomic_path(partial / MANIFEST) as temporary:
        temporary.write_text(manifest_text(manifest), encoding="utf-8")


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


def find_resume(
    output_dir: str, resume: str, damaged: Mapping[str, str] = MappingProxyType({})
) -> tuple[Path | None, list[str]]:
    """Which checkpoint to resume from, and a warning for each damaged one that was passed over.

    `none`: nothing. `auto`: the newest complete one of this run, if any. Else: a path, which must
    be good.

    Args: damaged: what has been found wrong with the contents, by the names of checkpoints.
    Raises: ValueError for a damaged path, and for `auto` if all are damaged.
    """
    if resume == "none":
        return None, []
    if resume != "auto":
        path = resolve(resume, what="train.resume")
        _check_intact(path, damaged)
        return path, []
    warnings = []
    for path in reversed(_named_checkpoints(output_dir)):
        try:
            _check_intact(path, damaged)
        except (OSError, ValueError) as error:
            warnings.append(f"passing over {path}: {error}")
            continue
        return path, warnings
    if warnings:
        raise ValueError("train.resume = auto: every checkpoint is damaged: " + "; ".join(warnings))
    return None, []


def _named_checkpoints(output_dir: str | Path) -> list[Path]:
    """All that have a checkpoint's name, oldest first; also one that has lost its manifest."""
    return sorted(path for path in checkpoints_dir(output_dir).glob("step_*") if path.is_dir())


def _check_intact(path: Path, damaged: Mapping[str, str]) -> None:
    """Raise ValueError for a checkpoint of which that is known, or which one rank sees at once:
    by manifest and sizes, and by the hash of the settings that are compared before all else."""
    if path.name in damaged:
        raise ValueError(damaged[path.name])
    manifest = read_checkpoint_manifest(path)
    verify_hashes(path, manifest, [name for name in manifest.files if name == "deepspeed.json"])


def set_aside_damaged(output_dir: str, resumed_from: Path) -> None:
    """Rename damaged checkpoints newer than the one resumed from to `damaged_step_…`.

    They are kept, but neither a later resume nor `remove_old` takes them for this run's newest.
    """
    for path in _named_checkpoints(output_dir):
        if path.parent == resumed_from.parent and path.name > resumed_from.name:
            number = len(list(path.parent.glob(f"damaged_{path.name}*")))
            path.rename(path.with_name(f"damaged_{path.name}" + (f".{number}" if number else "")))
