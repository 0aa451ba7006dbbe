"""The teacher's checkpoint, and whether it can teach this run."""

from __future__ import annotations

from pathlib import Path

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import (
    CheckpointManifest,
    read_checkpoint_manifest,
    tokenizer_folder,
    weights_fingerprint,
)
from megatron_salt.config.fields import RunConfig
from megatron_salt.config.problems import spreading_problems
from megatron_salt.config.values import parse_objective
from megatron_salt.data.tokenizer import Tokenizer, check_reads, load_tokenizer


def find_teacher(
    path: str, tokenizer: Tokenizer, seq_length: int, resumed: CheckpointManifest | None,
    tp_size: int = 1,
) -> tuple[Path, CheckpointManifest]:  # fmt: skip
    """The teacher's checkpoint: it reads the run's tokens, and is of the run that is resumed.

    Its tokenizer may have more tokens, behind the run's. For rank 0 alone, which tells the others.

    Args:
        tp_size: over how many ranks it is to be spread.
    Raises: ValueError naming the checkpoint and what does not fit.
    """
    folder = resolve(path, what="teacher.checkpoint")
    manifest = read_checkpoint_manifest(folder)
    try:
        theirs = load_tokenizer(tokenizer_folder(folder, manifest))
        check_reads(f"teacher {folder}", theirs, "the student's data", tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}\ntake another teacher, or its tokenizer for the data") from None
    check_teacher_fits(folder, manifest, tokenizer.vocab_size, seq_length)
    if uneven := list(spreading_problems(manifest.model.config, tp_size)):
        raise ValueError("\n".join([f"teacher {folder} cannot be spread:", *uneven]))
    check_same_teacher(folder, manifest, resumed)
    return folder, manifest


def check_same_teacher(
    folder: Path, manifest: CheckpointManifest, resumed: CheckpointManifest | None
) -> None:
    """Raise ValueError if a resumed run has had a teacher of other weights."""
    fingerprint = weights_fingerprint(manifest)
    if resumed and resumed.run.teacher_fingerprint not in (None, fingerprint):
        raise ValueError(
            f"teacher {folder} has other weights than the teacher that this run was resumed with: "
            "name the same one"
        )


def check_teacher_fits(
    path: Path, manifest: CheckpointManifest, vocab_size: int, seq_length: int
) -> None:
    """Raise ValueError if the teacher's vocabulary or trained length cannot serve the student.

    Rows beyond the tokenizer's tokens do no harm: the head is cut to `vocab_size`.
    """
    if manifest.model.vocab_size < vocab_size:
        raise ValueError(
            f"teacher {path} has {manifest.model.vocab_size} rows in its vocabulary for a "
            f"tokenizer of {vocab_size} tokens: the folder tokenizer/ is not its own; name another "
            "checkpoint"
        )
    longest = manifest.model.seq_length
    if seq_length > longest:
        raise ValueError(
            f"teacher {path} was trained on sequences of {longest} tokens, data.seq_length is "
            f"{seq_length}: beyond its length its predictions are worthless; shorten the "
            "sequences or use another teacher"
        )


def unseen_objectives(folder: Path, manifest: CheckpointManifest, config: RunConfig) -> list[str]:
    """Warnings about objectives of the run that its teacher was not trained on."""
    theirs = parse_objective(manifest.model.objective)
    ours = parse_objective(config.data.objective)
    if list(theirs) == ["causal"] and list(ours) != ["causal"]:
        never = "read a prefix in both directions"
    elif "span_corruption" in ours and "span_corruption" not in theirs:
        never = "saw sentinels"
    else:
        return []
    return [
        f"teacher {folder} was trained on data.objective = {list(theirs)} and never {never}; on "
        f"such rows of this run's {list(ours)} what it teaches may be worth little"
    ]
