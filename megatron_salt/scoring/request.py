"""What is to be read by which model: checked, and compared with files that are there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import (
    CheckpointManifest,
    read_checkpoint_manifest,
    tokenizer_folder,
    weights_fingerprint,
)
from megatron_salt.data import tags
from megatron_salt.data.manifest import bin_path, data_tokenizer, verify_dataset
from megatron_salt.data.selection import Rule, read_table
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_salt.huggingface.teacher_folder import find_hf_teacher
from megatron_salt.kernels import choose_backend
from megatron_salt.kernels.choose import Impl
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import Groups

DEFAULT_TOKENS_PER_SHARD = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """What a command that reads a dataset with a frozen model was asked for."""

    data: str
    teacher: str | None = None
    output_prefix: str
    window: int | None = None
    micro_batch_size: int = 8
    precision: str | None = None
    tokens_per_shard: int = DEFAULT_TOKENS_PER_SHARD
    what: ClassVar[str]
    """What is made, as in the names of its files."""

    @property
    def manifest_path(self) -> Path:
        return Path(f"{self.output_prefix}.{self.what}.json")


@dataclass(frozen=True, kw_only=True)
class TagRequest(ScoringRequest):
    """What `megatron-salt tag` was asked for."""

    top_k: int = 10
    store: tuple[str, ...] = ()
    rule: Rule = field(default_factory=Rule)
    loss_impl: Impl = "auto"
    what = "tags"


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """What rank 0 found and every rank goes by."""

    folder: Path
    manifest: CheckpointManifest
    origin: Any
    """Of what is made: a `TagOrigin` or `LogitsOrigin`."""
    vocab_size: int
    """The data's tokens, which have all probability; the model may have more rows."""
    eod: int


def finished_files(
    request: ScoringRequest, origin: Any, read: Callable[[str], Any], verify: Callable[..., Any]
) -> Any:
    """The manifest of these very files, if they are there: a requeued job has nothing to do.

    Files that are damaged are made anew, over the old ones.
    Args:
        read, verify: as `tags.read_tag_manifest` and `tags.verify_tags`.
    Raises: ValueError if others are there.
    """
    if not request.manifest_path.is_file():
        return None
    try:
        manifest = read(request.output_prefix)
        differing = differences(asdict(manifest.origin), asdict(origin))
        if not differing:
            verify(request.output_prefix, request.data, origin.tokenizer_fingerprint)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s\nmaking them anew", error)
        return None
    if differing:
        raise ValueError(
            f"{request.manifest_path}: there are {request.what} already, which differ in "
            f"{', '.join(differing)}: choose another --output-prefix, or delete that file to give "
            "them up"
        )
    return manifest


def finished_tags(request: TagRequest, origin: tags.TagOrigin) -> tags.TagManifest | None:
    """As `finished_files`. Raises: ValueError if the tags were selected from by another rule."""

    def verify(prefix: str, *others: str) -> None:
        tags.verify_tags(prefix, *others)
        read_table(tags.table_path(prefix))

    manifest: tags.TagManifest | None = finished_files(
        request, origin, tags.read_tag_manifest, verify
    )
    if manifest is None:
        return None
    if read_table(tags.table_path(request.output_prefix)).rule != vars(request.rule):
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
            mine, theirs = value, before.get(section)
            if name is not None:
                mine = value[name]
                theirs = theirs.get(name) if isinstance(theirs, dict) else None
            if mine != theirs and name != "name":
                found.append(section if name is None else f"{section}.{name}")
    return found


class FoundModel(NamedTuple):
    """A model that can read the data."""

    folder: Path
    manifest: CheckpointManifest
    tokenizer: Tokenizer
    """The data's."""
    max_length: int
    """Tokens of a row."""
    precision: str

    def job(self, data: str, settings: Any, origin: Any, **more: Any) -> ScoringJob:
        """Args:
            origin: its class, `more` its own fields.
        Raises: ValueError for data without tokens.
        """
        if not tags.sequence_lengths(data).sum():
            raise ValueError(f"{bin_path(data)} holds no tokens")
        weights, model = weights_fingerprint(self.manifest), self.manifest.model
        return ScoringJob(
            folder=self.folder, manifest=self.manifest, eod=self.tokenizer.eod,
            vocab_size=min(self.tokenizer.vocab_size, model.vocab_size),
            origin=origin(
                data=tags.DataIdentity.of(data), settings=settings,
                tokenizer_fingerprint=self.tokenizer.fingerprint,
                model=tags.ModelIdentity(fingerprint=weights, step=model.step, name=model.name),
                **more,
            ),
        )  # fmt: skip


def find_model(request: ScoringRequest, hf: str | None = None) -> FoundModel:
    """The checkpoint or Hugging Face folder. Reads no weights, but for a folder's hashes.

    Raises: ValueError or FileNotFoundError naming the file or option that is wrong.
    """
    folder = Path(hf) if hf is not None else resolve(str(request.teacher), what="--teacher")
    manifest = None if hf is not None else read_checkpoint_manifest(folder)
    reader = load_tokenizer(tokenizer_folder(folder, manifest) if manifest else folder)
    tokenizer = data_tokenizer(request.data, reader)
    verify_dataset(request.data, tokenizer)
    window = request.window
    if window is not None and window < 1:
        raise ValueError(f"--window {window}: must be at least 1")
    if manifest is None:
        # Its longest row, or 1 where the folder knows of none.
        _, manifest = find_hf_teacher(str(hf), tokenizer, 1, None)
    longest = manifest.model.seq_length
    if hf is not None and longest == 1:
        if window is None:
            raise ValueError(f"--teacher-hf {hf}: it names no longest sequence: give --window")
        longest = window
    if window is not None and window > longest:
        raise ValueError(
            f"--window {window}: {folder} was trained on sequences of {longest} tokens; "
            f"beyond that its predictions are worthless; give at most {longest}"
        )
    own = manifest.model.precision
    of_torch = {str(dtype): name for name, dtype in DTYPES.items()}  # as transformers says it
    precision = request.precision or of_torch.get(own, own)
    return FoundModel(folder, manifest, tokenizer, window or longest, precision)


def job_of(request: TagRequest) -> ScoringJob:
    """What the tags will be of."""
    found = find_model(request)
    tokenizer = found.tokenizer
    settings = tags.TagSettings(
        window=request.window, max_length=found.max_length, top_k=request.top_k,
        store=tuple(name for name in ("loss", "entropy") if name in request.store),
        precision=found.precision, loss_impl=_loss_backend(request),
    )  # fmt: skip
    if not 1 <= request.top_k < tokenizer.vocab_size:
        raise ValueError(
            f"--top_k {request.top_k}: must lie between 1 and the vocabulary of "
            f"{tokenizer.vocab_size} tokens"
        )
    if request.rule.score == "entropy" and "entropy" not in settings.store:
        raise ValueError("--score entropy needs --store entropy")
    return found.job(request.data, settings, tags.TagOrigin)


def _loss_backend(request: TagRequest) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose_backend(
        request.loss_impl, device=device, dtypes=frozenset({torch.float32}), divergence="forward_kl"
    ).name


def check_same_code(request: TagRequest, origin: tags.TagOrigin, groups: Groups) -> None:
    """Raise ValueError where this rank would compute something else than rank 0."""
    name = _loss_backend(request)
    if name != origin.settings.loss_impl:
        raise ValueError(
            f"rank {groups.rank} would compute losses by its {name} code, rank 0 by "
            f"{origin.settings.loss_impl}: set --loss_impl (megatron-salt kernels there "
            "says why)"
        )
