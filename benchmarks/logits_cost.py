"""What stored logits cost: bytes of a token, capture against the bare forward pass, and reading.

    python benchmarks/logits_cost.py

Real text, vocabulary and model as in tag_throughput.py. Of each kind and encoding, in one process:

- capture: shards of the dataset as `megatron-salt cache-logits` makes and writes them, and the same
  batches through layers and output head alone; the ratio of the medians of alternating rounds;
- bytes: of all files over the tokens, of the dataset captured by the rounds' shards;
- reading: rows of 1280 tokens in random order from files that the page cache holds, by one thread.
  Beside it what 64 H100 need that train a model of 2.8e9 parameters at 23,500 tokens/s each, and
  what of it falls on one node of 8.

The model has learnt nothing, so with top_p nearly all of top_k is kept: its bytes are an upper
bound. Writes results/logits_cost.json with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_text import make_data
from tag_throughput import MODEL, REPO, SEQ_LENGTH, VOCAB_SIZE, bare_forward, train

from megatron_salt.data.logits import LogitsManifest, StoredLogits
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import sequence_lengths
from megatron_salt.parallel.groups import initialize
from megatron_salt.report.markdown import describe_machine
from megatron_salt.scoring.capture import LogitsPass, LogitsRequest
from megatron_salt.scoring.shards import shard_path

NEEDED_TOKENS_PER_S, GPUS, GPUS_PER_NODE = 23_500, 64, 8
ROW_TOKENS = 1280
CASES: dict[str, dict[str, Any]] = {
    "documents: top 50, fp16": {"window": None},
    "top 50, fp16": {},
    "top 50, uint8": {"encoding": "uint8"},
    "top 12, fp16": {"top_k": 12},
    "50 draws": {"kind": "sampled"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=12_288, help="of a round")
    parser.add_argument("--rows", type=int, default=400, help="to read")
    output = REPO / "benchmarks/results/logits_cost.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix, teacher = make_data(folder, VOCAB_SIZE), folder / "teacher"
        train(folder, prefix, teacher)
        groups = initialize(1, 1, 30.0)
        for case, settings in CASES.items():
            request = LogitsRequest(
                data=str(prefix), teacher=str(teacher), output_prefix=str(folder / "logits"),
                **{"window": SEQ_LENGTH, **settings},
            )  # fmt: skip
            made = LogitsPass(request, groups)
            result = {"case": case, **measure(made, arguments, folder)}
            results.append(result)
            print(
                f"{case}: {result['bytes_per_token']:.1f} bytes a token; capture "
                f"{result['ratio']:.3f} of the bare forward pass's tokens/s ({result['lowest']:.3f}"
                f" to {result['highest']:.3f} by round); read {result['read_tokens_per_s']:,.0f} "
                "tokens/s",
                flush=True,
            )
    needed = GPUS * NEEDED_TOKENS_PER_S
    print(f"{GPUS} GPUs need {needed:,} tokens/s, one node {needed * GPUS_PER_NODE // GPUS:,}")
    report = {
        "machine": describe_machine(), "threads": torch.get_num_threads(), "model": MODEL,
        "vocab_size": VOCAB_SIZE, "seq_length": SEQ_LENGTH, "tokens": arguments.tokens,
        "rounds": arguments.rounds, "rows_read": arguments.rows, "row_tokens": ROW_TOKENS,
        "needed_tokens_per_s": needed, "gpus": GPUS, "gpus_per_node": GPUS_PER_NODE,
        "results": results,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(made: LogitsPass, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Ratio of capture over bare, bytes, and the rate of reading, of one kind."""
    made.job = made.find_job()
    sequences = Sequences.of(sequence_lengths(made.request.data), made.request.window)
    # The first round warms up.
    shards = sequences.shards(arguments.tokens)[: arguments.rounds + 1]
    shard_folder = folder / "shards"
    shard_folder.mkdir(exist_ok=True)
    bare_s, capture_s = [], []
    for index, (first, last) in enumerate(shards):

        def capture(first: int = first, last: int = last, index: int = index) -> None:
            scores = made.scorer.shard(sequences, first, last, lambda count: None)
            made.write(shard_path(shard_folder, index), sequences, first, last, scores)

        def bare(first: int = first, last: int = last) -> None:
            bare_forward(made.scorer, sequences, first, last)

        in_turn = [(bare, bare_s), (capture, capture_s)]
        for work, seconds in in_turn if index % 2 else reversed(in_turn):
            started = time.perf_counter()
            work()
            if index:
                seconds.append(time.perf_counter() - started)
    ratios = [bare / whole for bare, whole in zip(bare_s, capture_s, strict=True)]
    manifest = made.publish(shard_folder, sequences, shards)
    tokens = int(sequences.bounds[shards[-1][1]])
    size = sum(record.num_bytes for record in manifest.files.values())
    return {
        "ratio": statistics.median(bare_s) / statistics.median(capture_s),
        "lowest": min(ratios), "highest": max(ratios), "bytes_per_token": size / tokens,
        "entries_per_token": manifest.entries / tokens,
        "read_tokens_per_s": reading_rate(made.request.output_prefix, manifest, tokens, arguments),
    }  # fmt: skip


def reading_rate(
    prefix: str, manifest: LogitsManifest, tokens: int, arguments: argparse.Namespace
) -> float:
    stored = StoredLogits(prefix, manifest, top_k=None)
    starts = np.random.default_rng(1).integers(0, tokens - ROW_TOKENS, arguments.rows)
    stored.of_places(np.arange(tokens))  # now the page cache holds all of it
    started = time.perf_counter()
    for start in starts.tolist():
        stored.of_places(np.arange(start, start + ROW_TOKENS))
    return arguments.rows * ROW_TOKENS / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
