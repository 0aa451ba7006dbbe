"""One forward pass of a frozen model over a dataset; of tagging, kept as masks, losses and scores.

The stream is cut into shards of whole sequences. Each is scored by one rank, written as a file of
its own, and not scored again by a run that continues a killed one; at the end rank 0 joins them.
What a shard holds depends on data, model and settings, not on ranks: rows are padded to lengths of
their own, and matrix products give each row the same bits whatever else is in the batch. (On CPU
that is tested. A GPU library may choose other code for other batch sizes; keep
--micro_batch_size where bits matter.)
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import TagManifest, sequence_lengths
from megatron_salt.files.progress import Progress
from megatron_salt.parallel.groups import Groups, from_rank_0, same_error_everywhere
from megatron_salt.scoring import shards as shard_files
from megatron_salt.scoring.request import (
    ScoringJob,
    ScoringRequest,
    TagRequest,
    check_same_code,
    finished_tags,
    job_of,
)
from megatron_salt.scoring.scorer import Scorer


class DatasetPass(ABC):
    """One pass of a frozen model over a dataset, and what is made of it."""

    request: ScoringRequest
    job: ScoringJob

    def __init__(self, request: Any, groups: Groups) -> None:
        self.request, self.groups = request, groups

    @abstractmethod
    def find_job(self) -> ScoringJob:
        """On rank 0: what will be made, of what. Raises: ValueError."""

    @abstractmethod
    def finished(self, job: ScoringJob) -> Any:
        """On rank 0: the manifest of what is there already; see `request.finished_files`."""

    def check_rank(self) -> None:
        """Raise ValueError where this rank would read or compute something else than rank 0."""
        source = f"rank {self.groups.rank} sees other data: what rank 0 sees"
        self.job.origin.data.check(self.request.data, source)

    @abstractmethod
    def make_scorer(self) -> Any:
        """The model, on every rank, with a method `shard` as `Scorer` has."""

    @abstractmethod
    def write(
        self, path: Path, sequences: Sequences, first: int, last: int, scores: Any
    ) -> None:  # fmt: skip
        """One shard."""

    @abstractmethod
    def publish(
        self, folder: Path, sequences: Sequences, shards: list[tuple[int, int]]
    ) -> Any:  # fmt: skip
        """On rank 0: all files under their names, the manifest last, which is returned."""

    @cached_property
    def scorer(self) -> Any:
        return self.make_scorer()

    def run(self) -> Any:
        """Read the dataset, publish what is made of it; returns its manifest on rank 0.

        Collectives: those of building the model and, where ranks share one, of running it; ranks
            that do not share nothing while they score.
        Raises: ValueError or FileNotFoundError naming the file or option that is wrong.
        """
        request, groups = self.request, self.groups
        checked: tuple[ScoringJob, Any] | None = None
        with same_error_everywhere("checking data and teacher"):
            if groups.rank == 0:
                job = self.find_job()
                checked = job, self.finished(job)
        self.job, finished = from_rank_0(checked)
        job = self.job
        if finished is not None:
            self.say(f"{request.manifest_path}: these {request.what} are complete already")
            if groups.rank == 0:
                shard_files.remove_folder(shard_files.partial_path(request))
            return finished if groups.rank == 0 else None
        with same_error_everywhere("comparing what the ranks see"):
            self.check_rank()
        sequences = Sequences.of(sequence_lengths(request.data), request.window)
        shards = sequences.shards(request.tokens_per_shard)
        if len(shards) < groups.layout.dp_size:
            self.say(f"WARNING {len(shards)} shards for {groups.layout.dp_size} models: some have "
                     "no work; choose a smaller --tokens-per-shard")  # fmt: skip
        with shard_files.partial_folder(request, job.origin, groups) as folder:
            found = [i for i in range(len(shards)) if shard_files.shard_path(folder, i).is_file()]
            done = from_rank_0(found)
            todo = sorted(set(range(len(shards))) - set(done))
            self.say(f"{job.folder}, step {job.manifest.model.step}, reads {request.data}")
            self.say(f"{sequences.num_tokens} tokens, {len(sequences)} sequences, "
                     f"{len(shards)} shards, {len(done)} of them done")  # fmt: skip
            if todo:
                _ = self.scorer
                with same_error_everywhere("scoring"):
                    self._score_shards(sequences, shards, todo, folder)
            manifest = None
            with same_error_everywhere("joining the shards"):
                if groups.rank == 0:
                    manifest = self.publish(folder, sequences, shards)
            return manifest

    def say(self, text: str) -> None:
        if self.groups.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def _score_shards(
        self, sequences: Sequences, shards: list[tuple[int, int]], todo: list[int], folder: Path
    ) -> None:
        """Score this model's part of the shards; a thread writes one while the next is computed."""
        groups = self.groups
        mine = todo[groups.dp_rank :: groups.layout.dp_size]
        sizes = [int(sequences.bounds[b] - sequences.bounds[a]) for a, b in shards]
        total = sum(sizes[index] for index in mine)
        started = time.monotonic()
        with (
            Progress(total, "token", f"rank 0 of {groups.layout.world_size}",
                     visible=groups.rank == 0) as bar,
            ThreadPoolExecutor(max_workers=1) as writer,
        ):  # fmt: skip
            pending: Any = None
            try:
                for index in mine:
                    first, last = shards[index]
                    scores = self.scorer.shard(sequences, first, last, bar.update)
                    # Those who share a model end together: none waits for one that has failed.
                    with same_error_everywhere("writing a shard", groups.tp):
                        if pending is not None:
                            pending.result()
                    if groups.tp_rank == 0:  # the others have the same
                        path = shard_files.shard_path(folder, index)
                        pending = writer.submit(self.write, path, sequences, first, last, scores)
                if pending is not None:
                    pending.result()
            except Exception as error:
                # The others' shards are worth finishing; whoever watches need not wait for them.
                print(f"rank {groups.rank}: {error}\nending when all ranks are done",
                      file=sys.stderr)  # fmt: skip
                raise
        seconds = time.monotonic() - started
        self.say(f"rank 0: {total} tokens in {seconds:.1f} s, {total / max(seconds, 1e-9):,.0f} "
                 "tokens/s")  # fmt: skip


class TagPass(DatasetPass):
    """Tags: masks, losses, scores of sequences."""

    request: TagRequest

    def find_job(self) -> ScoringJob:
        return job_of(self.request)

    def finished(self, job: ScoringJob) -> TagManifest | None:
        return finished_tags(self.request, job.origin)

    def check_rank(self) -> None:
        super().check_rank()
        check_same_code(self.request, self.job.origin, self.groups)

    def make_scorer(self) -> Scorer:
        return Scorer(self.request, self.job, self.groups)

    def write(
        self, path: Path, sequences: Sequences, first: int, last: int, scores: Any
    ) -> None:  # fmt: skip
        shard_files.write_shard(path, sequences, first, last, scores, self.job.origin.settings)

    def publish(
        self, folder: Path, sequences: Sequences, shards: list[tuple[int, int]]
    ) -> TagManifest:
        return shard_files.publish_tags(self.request, self.job.origin, folder, sequences, shards)


def tag(request: TagRequest, groups: Groups) -> TagManifest | None:
    """Score a dataset and publish its tags; returns their manifest on rank 0; see `DatasetPass`."""
    manifest: TagManifest | None = TagPass(request, groups).run()
    return manifest
