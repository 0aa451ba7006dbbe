"""Capture: a teacher's distributions at every token of a dataset, stored as `data.logits` says.

What a file holds depends on data, model and settings, as tags do; so do draws, whose random numbers
are of seed, place and draw alone.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from megatron_salt.checkpoint.manifest import installed_versions
from megatron_salt.checkpoint.weights import load_frozen, save_teacher_scores
from megatron_salt.config.fields import RunConfig
from megatron_salt.config.problems import spreading_problems
from megatron_salt.data.dataset import DataSource, find_tokenizer, verify_datasets
from megatron_salt.data.logits import (
    HELD_OUT,
    LogitsEncoding,
    LogitsManifest,
    LogitsOrigin,
    LogitsSettings,
    block_offsets,
    encode_logits,
    read_logits_manifest,
    verify_logits,
)
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import FileRecord
from megatron_salt.evaluation.held_out import TeacherScores, teacher_losses
from megatron_salt.files.disk import atomic_path
from megatron_salt.huggingface.teacher_model import load_hf_model
from megatron_salt.kernels import distributions
from megatron_salt.model.loss import LossFunction
from megatron_salt.parallel.groups import Groups, from_rank_0, same_error_everywhere
from megatron_salt.scoring import shards as shard_files
from megatron_salt.scoring.request import (
    ScoringJob,
    ScoringRequest,
    find_model,
    finished_files,
)
from megatron_salt.scoring.scorer import DatasetScorer
from megatron_salt.scoring.tagging import DatasetPass

MOST_DRAWS = 255
SCALARS = ("rest", "entropy", "loss")


@dataclass(frozen=True, kw_only=True)
class LogitsRequest(ScoringRequest):
    """What `megatron-salt cache-logits` was asked for."""

    teacher_hf: str | None = None
    kind: Literal["top", "sampled", "full"] = "top"
    top_k: int = 50
    top_p: float = 1.0
    draws: int = 50
    seed: int = 0
    encoding: LogitsEncoding = "fp16"
    held_out: str | None = None
    """YAML of a run that will be taught by what is stored."""
    what = "logits"

    def settings(self, max_length: int, precision: str, vocab_size: int) -> LogitsSettings:
        """Raises: ValueError naming the option that is wrong."""
        if self.kind == "top" and not 1 <= self.top_k <= vocab_size:
            raise ValueError(
                f"--top_k {self.top_k}: must lie between 1 and the vocabulary of {vocab_size}"
            )
        if self.kind == "top" and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top_p {self.top_p}: must be above 0, at most 1")
        if self.kind == "sampled" and not 1 <= self.draws <= MOST_DRAWS:
            raise ValueError(f"--draws {self.draws}: must lie between 1 and {MOST_DRAWS}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"--seed {self.seed}: must lie between 0 and 2^63 - 1")
        sampled, full = self.kind == "sampled", self.kind == "full"
        top_k = vocab_size if full else min(self.draws, vocab_size) if sampled else self.top_k
        return LogitsSettings(
            context="document" if self.window is None else "window", max_length=max_length,
            kind="sampled" if sampled else "top", top_k=top_k,
            top_p=self.top_p if self.kind == "top" else 1.0, draws=self.draws if sampled else 0,
            seed=self.seed if sampled else 0, encoding="fp32" if full else self.encoding,
            precision=precision, vocab_size=vocab_size,
        )  # fmt: skip


def draw_uniforms(seed: int, places_T: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that depend on seed, place and number of the draw alone. [T, draws]

    Source: splitmix64, Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)

    def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    start_1 = mixed(np.array([seed], np.uint64))
    start_T = mixed(start_1 + places_T.astype(np.uint64) * gamma)
    numbers = np.arange(1, draws + 1, dtype=np.uint64)
    bits = mixed(start_T[:, None] + numbers * gamma) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


class LogitsScorer(DatasetScorer):
    """What logits are stored of."""

    def __init__(self, request: LogitsRequest, job: ScoringJob, groups: Groups) -> None:
        load = load_frozen if request.teacher_hf is None else load_hf_model
        super().__init__(request, job, groups, load)

    def shard(
        self, sequences: Sequences, first: int, last: int, on_tokens: Callable[[int], Any]
    ) -> list[NDArray[Any]]:
        """Of every token of sequences `[first, last)` what `distributions` gives: ids and values
        [T, K], rest, entropy and loss [T].

        Host sync: one, at the end.
        """
        start, stop = int(sequences.bounds[first]), int(sequences.bounds[last])
        settings, parts = self.settings, []
        for batch, hidden_TE, labels_T in self.batches(sequences, first, last, on_tokens):
            uniforms_TK = None
            if settings.kind == "sampled":
                places_T = np.zeros(len(labels_T), np.int64)  # filling gets any
                places_T[batch.predicts_BS.ravel()] = start + batch.places
                drawn_TK = draw_uniforms(settings.seed, places_T, settings.draws)
                uniforms_TK = torch.from_numpy(drawn_TK).to(labels_T.device, non_blocking=True)
            found = distributions(
                hidden_TE, self.model.head_WE, labels_T, vocab=self.vocab, chunking=self.chunking,
                top_k=settings.top_k, top_p=settings.top_p, uniforms_TK=uniforms_TK,
            )  # fmt: skip
            parts.append((batch, found))
        ids = np.empty((stop - start, settings.top_k), np.int32)
        values = np.empty(ids.shape, np.uint8 if settings.kind == "sampled" else np.float32)
        arrays = [ids, values, *(np.empty(len(ids), np.float32) for _ in SCALARS)]
        for batch, found in parts:
            for array, tensor in zip(arrays, found, strict=True):
                array[batch.places] = tensor.cpu().numpy()[batch.predicts_BS.ravel()]
        return arrays


class LogitsPass(DatasetPass):
    """Stored logits."""

    request: LogitsRequest

    def find_job(self) -> ScoringJob:
        request, tp_size = self.request, self.groups.layout.tp_size
        found = find_model(request, request.teacher_hf)
        uneven = list(spreading_problems(found.manifest.model.config, tp_size))
        if request.teacher_hf is not None and tp_size > 1:
            uneven = ["models of transformers are whole on each rank"]
        if uneven:
            problems = "\n".join(uneven)
            raise ValueError(f"--tensor_parallel {tp_size}: {found.folder}\n{problems}")
        size = min(found.tokenizer.vocab_size, found.manifest.model.vocab_size)
        settings = request.settings(found.max_length, found.precision, size)
        run = found.manifest.training
        planned = None if run is None else run.config.train.steps
        return found.job(request.data, settings, LogitsOrigin, planned_steps=planned)

    def finished(self, job: ScoringJob) -> LogitsManifest | None:
        manifest: LogitsManifest | None = finished_files(
            self.request, job.origin, read_logits_manifest, verify_logits
        )
        return manifest

    def make_scorer(self) -> LogitsScorer:
        return LogitsScorer(self.request, self.job, self.groups)

    def write(
        self, path: Path, sequences: Sequences, first: int, last: int, scores: Any
    ) -> None:  # fmt: skip
        ids, values, *scalars = scores
        bounds, settings = sequences.bounds[first : last + 1], self.job.origin.settings
        shard_files.check_losses(scalars[-1], int(bounds[0]), settings.precision)
        arrays = encode_logits(settings, ids, values, dict(zip(SCALARS, scalars, strict=True)))
        table = {"table_sequence": np.arange(first, last), "table_tokens": np.diff(bounds)}
        shard_files.save_shard(path, arrays | table)

    def publish(
        self, folder: Path, sequences: Sequences, shards: list[tuple[int, int]]
    ) -> LogitsManifest:
        built = folder / "built" / "logits"
        built.parent.mkdir(exist_ok=True)
        settings, entries = self.job.origin.settings, 0
        suffixes = [*settings.entry_dtypes, *settings.token_dtypes]
        with ExitStack() as stack:
            files = {
                suffix: stack.enter_context(open(f"{built}{suffix}", "wb")) for suffix in suffixes
            }
            for shard in shard_files.read_shards(folder, sequences, shards):
                for suffix, file in files.items():
                    file.write(shard[suffix].tobytes())
                entries += len(shard["_ids.bin"])
        counts = np.memmap(f"{built}_count.bin", settings.token_dtypes["_count.bin"], mode="r")
        block_offsets(counts).tofile(f"{built}_offsets.bin")
        suffixes.append("_offsets.bin")
        manifest = LogitsManifest(
            origin=self.job.origin, entries=entries, held_out=None, versions=installed_versions(),
            files={suffix: FileRecord.of(Path(f"{built}{suffix}")) for suffix in suffixes},
        )  # fmt: skip
        earlier = ["_high.bin", "_windows.bin", "_steps.bin", HELD_OUT]
        shard_files.publish_files(self.request, built, manifest, earlier)
        return manifest

    def add_held_out(self, path: str, manifest: LogitsManifest | None) -> LogitsManifest | None:
        """Score the held-out samples of the run of this YAML, unless they are there, and put the
        scores beside the logits; returns the new manifest on rank 0, where the old one is given.

        They are what the run would find with this teacher in its memory.
        Collectives: those of the model and of `teacher_losses`.
        Raises: ValueError or FileNotFoundError naming the file and what does not fit.
        """
        groups, origin = self.groups, self.job.origin
        with same_error_everywhere(f"reading --held-out {path}"):
            config = _run_config(path)
            tokenizer = find_tokenizer(config.data)
            verify_datasets(config.data, tokenizer)
            if tokenizer.fingerprint != origin.tokenizer_fingerprint:
                raise ValueError(
                    f"--held-out {path}: its tokenizer {tokenizer.path} is not the one of "
                    f"{self.request.data}; name a run on the same tokens"
                )
            if config.data.seq_length > origin.settings.max_length:
                raise ValueError(
                    f"--held-out {path}: its data.seq_length = {config.data.seq_length} is more "
                    f"than the {origin.settings.max_length} tokens of a row; give it as --window"
                )
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(from_rank_0(scratch))  # one name: rank 0 writes, the others map
            source = DataSource(
                config.data, tokenizer, num_samples=1, seed=0, cache_path=cache, held_out_only=True
            )
            samples = source.evaluation_fingerprint(config.train.eval_samples)
            if from_rank_0(manifest and manifest.held_out) == samples:
                return manifest
            loss = LossFunction(
                vocab=self.scorer.vocab, salt=config.salt, tp_group=groups.tp,
                sequence_parallel=False, device=groups.device,
            )  # fmt: skip
            loss.teacher_head_WE = self.scorer.model.head_WE
            found_2NS, packed = teacher_losses(
                source, groups, min(config.train.eval_samples, source.num_held_out()),
                self.request.micro_batch_size,
                lambda tokens_BS, labels_BS: loss.score_teacher(
                    self.scorer.hidden_states(tokens_BS), labels_BS
                ),
            )  # fmt: skip
        scores = TeacherScores.of(found_2NS, packed)
        self.say(f"held-out CE of the run of {path}: {scores.ce_nats:.4f} nats/token")
        with same_error_everywhere("writing the held-out scores"):
            if not np.isfinite(scores.ce_nats):
                raise ValueError(f"{self.job.folder}: its held-out CE is {scores.ce_nats}")
            if manifest is not None:
                manifest = self._with_held_out(manifest, scores, samples)
        return manifest

    def _with_held_out(
        self, manifest: LogitsManifest, scores: TeacherScores, samples: str
    ) -> LogitsManifest:
        path, target = self.request.manifest_path, Path(f"{self.request.output_prefix}{HELD_OUT}")
        files = {name: record for name, record in manifest.files.items() if name != HELD_OUT}
        if files != manifest.files:  # killed below, the logits themselves are still in order
            without = dataclasses.replace(manifest, files=files, held_out=None)
            shard_files.write_files_manifest(path, without)
        with atomic_path(target) as temporary:
            save_teacher_scores(temporary, scores.tensors, samples)
        manifest = dataclasses.replace(
            manifest, files={**files, HELD_OUT: FileRecord.of(target)}, held_out=samples
        )
        shard_files.write_files_manifest(path, manifest)
        return manifest


def _run_config(path: str) -> RunConfig:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return RunConfig.from_dict(values, source=path)
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(f"--held-out {path} is not the YAML of a run: {error}") from error


def cache_logits(request: LogitsRequest, groups: Groups) -> LogitsManifest | None:
    """Store a teacher's distributions over a dataset; returns their manifest on rank 0.

    Collectives, Raises: as `DatasetPass.run` and `LogitsPass.add_held_out`.
    """
    made = LogitsPass(request, groups)
    manifest: LogitsManifest | None = made.run()
    if request.held_out is not None:
        manifest = made.add_held_out(request.held_out, manifest)
    return manifest
