"""What models have said about a run's data: tags, selections, stored logits; verified."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_salt.config.fields import RunConfig
from megatron_salt.config.values import parse_blend
from megatron_salt.data.logits import (
    LogitsManifest,
    logits_manifest_path,
    stored_windows,
    verify_logits,
)
from megatron_salt.data.selection import Selection, check_same_origin, load_selection, rule_text
from megatron_salt.data.tags import TagManifest, tag_manifest_path, verify_tags
from megatron_salt.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TagInputs:
    """The tags, selections and stored logits of a run's training datasets, verified; empty where it
    has none."""

    tags: tuple[TagManifest, ...] = ()
    selections: tuple[Selection, ...] = ()
    logits: tuple[LogitsManifest, ...] = ()
    windows: tuple[NDArray[np.int64] | None, ...] = ()
    """Of each dataset's logits: which windows are stored; None: all."""

    @property
    def of_windows(self) -> bool:
        """Whether the KD phase must read windows, in which alone the stored logits hold."""
        return any(each.origin.settings.context == "window" for each in self.logits)

    @property
    def teacher_fingerprint(self) -> str | None:
        """Identity of the stored logits of all datasets; None: there are none."""
        text = "".join(each.fingerprint for each in self.logits)
        return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None

    def fingerprints(self) -> tuple[list[str], list[str]]:
        """Identities of tags and selections, to notice at a resume that they changed."""
        return [x.fingerprint for x in self.tags], [x.fingerprint for x in self.selections]

    def describe(self) -> list[str]:
        """Who tagged and by which rule was selected, as lines for people."""
        lines = []
        for tags in self.tags:
            data, model = tags.origin.data, tags.origin.model
            lines.append(f"tags of {data.name} by {model.name}, step {model.step}")
        for chosen in self.selections:
            by = chosen.origin.model.name
            lines.append(f"selection {chosen.path}: {rule_text(chosen.rule)}, by {by}")
        for stored in self.logits:
            data, model, settings = stored.origin.data, stored.origin.model, stored.origin.settings
            what = f"{settings.top_k} likeliest tokens of top-p {settings.top_p:g}"
            if settings.kind == "sampled":
                what = f"{settings.draws} tokens drawn"
            lines.append(
                f"logits of {data.name} by {model.name}, step {model.step}: {what} at each place, "
                f"each {settings.context} by itself"
            )
        return lines


def load_tag_inputs(config: RunConfig, tokenizer: Tokenizer) -> TagInputs:
    """Read and check what config.data.tags and salt.selection name; logits: `with_logits`.

    Raises: ValueError naming the files that do not belong together, and the remedy.
    """
    data, salt = config.data, config.salt
    prefixes = parse_blend(data.train_data_path, "data.train_data_path")[0]
    tags, selections = [], []
    for prefix, tagged in zip(prefixes, data.tags, strict=False):
        tags.append(verify_tags(tagged, prefix, tokenizer.fingerprint))
        if reads_reference_loss(config) and "loss" not in tags[-1].stored:
            raise ValueError(
                f"salt.ce_tokens = excess_loss without a teacher reads the losses of {tagged}, "
                "which has none: tag with --store loss"
            )
    for prefix, path in zip(prefixes, salt.selection, strict=False):
        selection = load_selection(path, prefix, tokenizer.fingerprint)
        if selection.window not in (None, data.seq_length):
            raise ValueError(
                f"{path} selects windows of {selection.window} tokens, data.seq_length is "
                f"{data.seq_length}: the sequences that were scored are those to train on; make "
                "the two equal, or tag documents"
            )
        selections.append(selection)
    if tags and selections:
        for tagged, manifest, selection in zip(data.tags, tags, selections, strict=True):
            check_same_origin(selection, manifest.origin, tag_manifest_path(tagged))
    return TagInputs(tags=tuple(tags), selections=tuple(selections))


def with_logits(inputs: TagInputs, config: RunConfig, tokenizer: Tokenizer) -> TagInputs:
    """The same with what teacher.logits names, read and checked; not for the LM phase, which needs
    none.

    Raises: as `load_tag_inputs` does.
    """
    data, logits, windows = config.data, [], []
    prefixes = parse_blend(data.train_data_path, "data.train_data_path")[0]
    for prefix, stored in zip(prefixes, config.teacher.logits, strict=False):
        manifest = verify_logits(stored, prefix, tokenizer.fingerprint)
        check_logits_serve(logits_manifest_path(stored), manifest, config, tokenizer.vocab_size)
        logits.append(manifest)
        windows.append(None if manifest.windows is None else stored_windows(stored))
    contexts = {each.origin.settings.context for each in logits}
    if len(contexts) > 1:
        raise ValueError(
            f"teacher.logits = {config.teacher.logits}: some are of windows, some of documents; "
            "the rows of a run are of one kind"
        )
    by_document = [each.path for each in inputs.selections if each.window is None]
    if by_document and contexts == {"window"}:
        raise ValueError(
            f"salt.selection {by_document[0]} selects documents, teacher.logits are of windows of "
            f"{data.seq_length} tokens: select windows of that length"
        )
    return dataclasses.replace(inputs, logits=tuple(logits), windows=tuple(windows))


def check_logits_serve(
    source: Path, manifest: LogitsManifest, config: RunConfig, vocab_size: int
) -> None:
    """Raise ValueError where a run asks more of stored logits than they hold."""
    salt, stored = config.salt, manifest.origin.settings
    if stored.vocab_size != vocab_size:
        raise ValueError(
            f"{source}: of a vocabulary of {stored.vocab_size} tokens, the run's has {vocab_size}"
        )
    if stored.context == "window" and stored.max_length != config.data.seq_length:
        raise ValueError(
            f"{source}: of windows of {stored.max_length} tokens, data.seq_length is "
            f"{config.data.seq_length}: make the two equal"
        )
    for name, wanted, kept in (
        ("truncate_k", salt.truncate_k, stored.top_k),
        ("truncate_p", salt.truncate_p, stored.top_p),
    ):
        if stored.kind == "top" and wanted is not None and wanted > kept:
            raise ValueError(
                f"{source}: was stored with {kept}, salt.{name} = {wanted} asks for more: at most "
                "what is stored can be taught"
            )
    if stored.kind != "sampled":
        return
    changed = {
        "truncate_k": None, "truncate_p": None, "teacher_temperature": 1.0,
        "lost_mass": "renormalise",
    }  # fmt: skip
    for name, plain in changed.items():
        if getattr(salt, name) != plain:
            raise ValueError(
                f"{source}: its tokens were drawn, {stored.draws} for each position; salt.{name} = "
                f"{getattr(salt, name)} would bias what they teach: leave it at {plain}, or store "
                "the likeliest (--kind top)"
            )


def logits_warnings(config: RunConfig, logits: Sequence[LogitsManifest]) -> list[str]:
    """What is known to do harm."""
    warnings, salt = [], config.salt
    for stored in logits:
        settings, name = stored.origin.settings, stored.origin.model.name
        if settings.context == "document":
            warnings.append(
                f"logits by {name}: each document was read by itself, training reads documents end "
                "to end: what is taught is not what a teacher in the run would say"
            )
        planned, step = stored.origin.planned_steps, stored.origin.model.step
        if planned is not None and step < planned and salt.kd_weight > 0.5:
            warnings.append(
                f"logits by {name}, step {step} of {planned}: those of an early teacher did harm "
                f"at a high weight (arXiv 2410.16215, table 6); salt.kd_weight is {salt.kd_weight}"
            )
    kept = [x.origin.settings.top_k for x in logits if x.origin.settings.kind == "top"]
    kept += [] if salt.truncate_k is None else [salt.truncate_k]
    if kept and min(kept) < 50 and salt.kd_weight > 0.9 and salt.lost_mass == "renormalise":
        warnings.append(
            f"the {min(kept)} likeliest tokens, renormalised, at salt.kd_weight {salt.kd_weight}: "
            "with fewer than 50 this was worse than no teacher (arXiv 2503.16870); take more, a "
            "weight of at most 0.9, salt.lost_mass ghost, or sampled logits"
        )
    return warnings


def reads_reference_loss(config: RunConfig) -> bool:
    """Whether losses of the tags are read: a teacher in memory computes its own, and stored logits
    bring theirs."""
    return config.salt.ce_tokens == "excess_loss" and config.teacher.kind is None


def reads_tags(config: RunConfig) -> bool:
    """Whether any route goes by data.tags."""
    routes = {config.salt.kd_tokens, config.salt.ce_tokens}
    return not routes.isdisjoint({"tagged", "untagged"}) or reads_reference_loss(config)
