"""What is to be tagged by which model: checked, and compared with tags that are there."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import (
    CheckpointManifest,
    read_checkpoint_manifest,
    weights_fingerprint,
)
from megatron_salt.data import tags
from megatron_salt.data.manifest import bin_path, data_tokenizer, verify_dataset
from megatron_salt.data.selection import Rule, read_table
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.kernels import choose_backend
from megatron_salt.kernels.choose import Impl
from megatron_salt.parallel.groups import Groups

DEFAULT_TOKENS_PER_SHARD = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TagRequest:
    """What `megatron-salt tag` was asked for."""

    data: str
    teacher: str
    output_prefix: str
    window: int | None = None
    top_k: int = 10
    store: tuple[str, ...] = ()
    rule: Rule = field(default_factory=Rule)
    micro_batch_size: int = 8
    precision: str | None = None
    loss_impl: Impl = "auto"
    tokens_per_shard: int = DEFAULT_TOKENS_PER_SHARD


@dataclass(frozen=True, kw_only=True)
class TaggingJob:
    """What rank 0 found and every rank goes by."""

    folder: Path
    manifest: CheckpointManifest
    origin: tags.TagOrigin
    vocab_size: int
    """The data's tokens, which have all probability; the model may have more rows."""
    eod: int


def finished_tags(request: TagRequest, origin: tags.TagOrigin) -> tags.TagManifest | None:
    """The manifest of these very tags, if they are there: a requeued job has nothing to do.

    Tags that are damaged are made anew, over the old ones.
    Raises: ValueError if other tags are there, or if these were selected from by another rule.
    """
    path = tags.tag_manifest_path(request.output_prefix)
    if not path.is_file():
        return None
    try:
        manifest = tags.read_tag_manifest(request.output_prefix)
        differing = differences(asdict(manifest.origin), asdict(origin))
        if not differing:
            tags.verify_tags(request.output_prefix, request.data, origin.tokenizer_fingerprint)
            rule = read_table(tags.table_path(request.output_prefix)).rule
    except ValueError as error:
        logging.getLogger(__name__).warning("%s\ntagging anew", error)
        return None
    if differing:
        raise ValueError(
            f"{path}: there are tags already, which differ in {', '.join(differing)}: choose "
            "another --output-prefix, or delete that file to give them up"
        )
    if rule != vars(request.rule):
        raise ValueError(
            f"{request.output_prefix} is tagged already, with another selection: to select anew, "
            f"megatron-salt select --tags {request.output_prefix} takes seconds"
        )
    return manifest


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what differs in two origins (as JSON has them); what is for people does not."""
    before, now = (json.loads(json.dumps(each)) for each in (before, now))
    found = []
    for section, value in now.items():
        for name in value if isinstance(value, dict) else [None]:
            mine = value if name is None else value[name]
            theirs = before.get(section) if name is None else before.get(section, {}).get(name)
            if mine != theirs and name != "name":
                found.append(section if name is None else f"{section}.{name}")
    return found


def job_of(request: TagRequest) -> TaggingJob:
    """What the tags will be of. Reads no weights."""
    folder = resolve(request.teacher, what="--teacher")
    manifest = read_checkpoint_manifest(folder)
    tokenizer = data_tokenizer(request.data, load_tokenizer(folder / "tokenizer"))
    verify_dataset(request.data, tokenizer)
    longest = manifest.model.seq_length
    if request.window is not None and request.window < 1:
        raise ValueError(f"--window {request.window}: must be at least 1")
    if request.window is not None and request.window > longest:
        raise ValueError(
            f"--window {request.window}: {folder} was trained on sequences of {longest} tokens; "
            f"beyond that its predictions are worthless; give at most {longest}"
        )
    settings = tags.TagSettings(
        window=request.window, max_length=request.window or longest, top_k=request.top_k,
        store=tuple(name for name in ("loss", "entropy") if name in request.store),
        precision=request.precision or manifest.model.precision, loss_impl=_loss_backend(request),
    )  # fmt: skip
    if not 1 <= request.top_k < tokenizer.vocab_size:
        raise ValueError(
            f"--top_k {request.top_k}: must lie between 1 and the vocabulary of "
            f"{tokenizer.vocab_size} tokens"
        )
    if request.rule.score == "entropy" and "entropy" not in settings.store:
        raise ValueError("--score entropy needs --store entropy")
    if not tags.sequence_lengths(request.data).sum():
        raise ValueError(f"{bin_path(request.data)} holds no tokens")
    weights, model = weights_fingerprint(manifest), manifest.model
    origin = tags.TagOrigin(
        data=tags.DataIdentity.of(request.data), tokenizer_fingerprint=tokenizer.fingerprint,
        model=tags.ModelIdentity(fingerprint=weights, step=model.step, name=model.name),
        settings=settings,
    )  # fmt: skip
    return TaggingJob(
        folder=folder, manifest=manifest, origin=origin, eod=tokenizer.eod,
        vocab_size=min(tokenizer.vocab_size, model.vocab_size),
    )  # fmt: skip


def _loss_backend(request: TagRequest) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose_backend(
        request.loss_impl, device=device, dtypes=frozenset({torch.float32}), divergence="forward_kl"
    ).name


def check_same_view(request: TagRequest, origin: tags.TagOrigin, groups: Groups) -> None:
    """Raise ValueError where this rank would read or compute something else than rank 0."""
    origin.data.check(request.data, f"rank {groups.rank} sees other data: what rank 0 sees")
    name = _loss_backend(request)
    if name != origin.settings.loss_impl:
        raise ValueError(
            f"rank {groups.rank} would compute losses by its {name} code, rank 0 by "
            f"{origin.settings.loss_impl}: set --loss_impl (megatron-salt kernels there "
            "says why)"
        )
