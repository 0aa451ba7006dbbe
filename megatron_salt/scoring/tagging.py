"""Tagging: one forward pass of a small model over a dataset, kept as masks, losses and scores.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import TagManifest, sequence_lengths, tag_manifest_path
from megatron_salt.files.progress import Progress
from megatron_salt.parallel.groups import Groups, from_rank_0, same_error_everywhere
from megatron_salt.scoring import shards as shard_files
from megatron_salt.scoring.request import (
    TaggingJob,
    TagRequest,
    check_same_view,
    finished_tags,
    job_of,
)
from megatron_salt.scoring.scorer import Scorer


def tag(request: TagRequest, groups: Groups) -> TagManifest | None:
    """Score a dataset and publish its tags; returns their manifest on rank 0.

    Collectives: those of building the model, and barriers; ranks share nothing while they score.
    Raises: ValueError or FileNotFoundError naming the file or option that is wrong.
    """
    checked: tuple[TaggingJob, TagManifest | None] | None = None
    with same_error_everywhere("checking data and teacher"):
        if groups.rank == 0:
            job = job_of(request)
            checked = job, finished_tags(request, job.origin)
    job, finished = from_rank_0(checked)
    if finished is not None:
        _say(groups, f"{tag_manifest_path(request.output_prefix)}: these tags are complete already")
        if groups.rank == 0:
            shard_files.remove_folder(shard_files.partial_path(request))
        return finished if groups.rank == 0 else None
    with same_error_everywhere("comparing what the ranks see"):
        check_same_view(request, job.origin, groups)
    sequences = Sequences.of(sequence_lengths(request.data), job.origin.settings.window)
    shards = sequences.shards(request.tokens_per_shard)
    if len(shards) < groups.layout.world_size:
        _say(groups, f"WARNING {len(shards)} shards for {groups.layout.world_size} ranks: some "
                     "have no work; choose a smaller --tokens-per-shard")  # fmt: skip
    with shard_files.partial_folder(request, job.origin, groups) as folder:
        found = [i for i in range(len(shards)) if shard_files.shard_path(folder, i).is_file()]
        done = from_rank_0(found)
        todo = sorted(set(range(len(shards))) - set(done))
        _say(groups, f"{job.folder}, step {job.manifest.model.step}, tags {request.data}")
        _say(groups, f"{sequences.num_tokens} tokens, {len(sequences)} sequences, "
                     f"{len(shards)} shards, {len(done)} of them done")  # fmt: skip
        if todo:
            scorer = Scorer(request, job, groups)
            with same_error_everywhere("scoring"):
                _score_shards(scorer, sequences, shards, todo, folder)
        manifest = None
        with same_error_everywhere("joining the shards"):
            if groups.rank == 0:
                manifest = shard_files.publish_tags(request, job.origin, folder, sequences, shards)
        return manifest


def _say(groups: Groups, text: str) -> None:
    if groups.rank == 0:
        tqdm.write(text, file=sys.stderr)


def _score_shards(
    scorer: Scorer, sequences: Sequences, shards: list[tuple[int, int]], todo: list[int],
    folder: Path,
) -> None:  # fmt: skip
    """Score this rank's part of the shards; a thread writes one while the next is computed."""
    groups = scorer.groups
    mine = todo[groups.rank :: groups.layout.world_size]
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
                scores = scorer.shard(sequences, first, last, bar.update)
                if pending is not None:
                    pending.result()
                path = shard_files.shard_path(folder, index)
                pending = writer.submit(
                    shard_files.write_shard, path, sequences, first, last, scores, scorer.settings
                )
            if pending is not None:
                pending.result()
        except Exception as error:
            # The others' shards are worth finishing; whoever watches need not wait for them.
            print(f"rank {groups.rank}: {error}\nending when all ranks are done", file=sys.stderr)
            raise
    seconds = time.monotonic() - started
    _say(groups, f"rank 0: {total} tokens in {seconds:.1f} s, {total / max(seconds, 1e-9):,.0f} "
                 "tokens/s")  # fmt: skip
