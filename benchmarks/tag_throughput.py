"""How fast is tagging against the bare forward pass of the model that tags?

    python benchmarks/tag_throughput.py

Real text (the standard library of the running Python), a vocabulary learnt from it, an SLM of the
size below. In one process, in turn: the shards of the dataset as `megatron-salt tag` scores and
writes them, and the same batches through the model's layers and output head alone, whose logits are
made and dropped. The ratio is of the medians of the rounds. Documents are shorter than a row, so
the filling of rows counts on both sides; windows have none. Writes results/tag_throughput.json with
machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from real_text import make_data

from megatron_salt.data.sequences import Sequences, batches_of, windows_of
from megatron_salt.data.tags import read_stream, sequence_lengths
from megatron_salt.kernels import Heads
from megatron_salt.parallel.groups import initialize
from megatron_salt.report.markdown import describe_machine
from megatron_salt.scoring.request import TagRequest, job_of
from megatron_salt.scoring.scorer import Scorer
from megatron_salt.scoring.shards import shard_path, write_shard

REPO = Path(__file__).parents[1]
VOCAB_SIZE = 16384
MODEL = {"num_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 1408}
SEQ_LENGTH = 512
CASES: dict[str, dict[str, Any]] = {
    "documents: mask and scores": {},
    "windows: mask and scores": {"window": SEQ_LENGTH},
    "windows: mask, scores and losses": {"window": SEQ_LENGTH, "store": ("loss",)},
    "windows: mask, scores, losses and entropies": {
        "window": SEQ_LENGTH, "store": ("loss", "entropy"),
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=12_288, help="of a round")
    parser.add_argument(
        "--output", type=Path, default=REPO / "benchmarks/results/tag_throughput.json"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix, slm = make_data(folder, VOCAB_SIZE), folder / "slm"
        train(folder, prefix, slm)
        groups = initialize(1, 1, 30.0)
        results = []
        for case, settings in CASES.items():
            request = TagRequest(
                data=str(prefix), teacher=str(slm), output_prefix=str(folder / "tags"), **settings
            )
            result = {"case": case, **measure(request, groups, arguments, folder)}
            results.append(result)
            print(
                f"{case}: {result['ratio']:.3f} of the bare forward pass's tokens/s "
                f"({result['lowest']:.3f} to {result['highest']:.3f} by round)",
                flush=True,
            )
    report = {
        "machine": describe_machine(), "threads": torch.get_num_threads(), "model": MODEL,
        "vocab_size": VOCAB_SIZE, "seq_length": SEQ_LENGTH, "tokens": arguments.tokens,
        "rounds": arguments.rounds, "results": results,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def train(folder: Path, prefix: Path, output: Path) -> None:
    """One step: what the model has learnt does not change what it costs."""
    run = {
        "model": MODEL,
        "data": {"train_data_path": [str(prefix)], "split": "95,5", "seq_length": SEQ_LENGTH},
        "train": {"steps": 1, "output_dir": str(output), "eval_samples": 1, "tensorboard": False},
    }
    deepspeed = {
        "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }  # fmt: skip
    files = []
    for name, values in (("run.json", run), ("deepspeed.json", deepspeed)):
        files.append(folder / name)
        files[-1].write_text(json.dumps(values), encoding="utf-8")
    command = [sys.executable, "-m", "megatron_salt.pretrain", "--config", str(files[0]),
               "--deepspeed_config", str(files[1])]  # fmt: skip
    subprocess.run(command, check=True, cwd=REPO, stderr=subprocess.DEVNULL)


def measure(
    request: TagRequest, groups: Any, arguments: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """Ratio of tokens per second, tagging over bare, medians of alternating rounds."""
    scorer = Scorer(request, job_of(request), groups)
    sequences = Sequences.of(sequence_lengths(request.data), request.window)
    shards = sequences.shards(arguments.tokens)[: arguments.rounds + 1]
    shard_folder = folder / "shards"
    shard_folder.mkdir(exist_ok=True)
    bare_s, tag_s = [], []
    for index, (first, last) in enumerate(shards):

        def tag(first: int = first, last: int = last, index: int = index) -> None:
            scores = scorer.shard(sequences, first, last, lambda count: None)
            path = shard_path(shard_folder, index)
            write_shard(path, sequences, first, last, scores, scorer.settings)

        def bare(first: int = first, last: int = last) -> None:
            bare_forward(scorer, sequences, first, last)

        in_turn = [(bare, bare_s), (tag, tag_s)]
        for work, seconds in in_turn if index % 2 else reversed(in_turn):
            started = time.perf_counter()
            work()
            if index:  # the first round warms up
                seconds.append(time.perf_counter() - started)
    ratios = [bare / tagged for bare, tagged in zip(bare_s, tag_s, strict=True)]
    ratio = statistics.median(bare_s) / statistics.median(tag_s)
    return {"ratio": ratio, "lowest": min(ratios), "highest": max(ratios)}


@torch.no_grad()
def bare_forward(scorer: Scorer, sequences: Sequences, first: int, last: int) -> None:
    """The same batches through layers and head; nothing is read off the logits."""
    max_length = scorer.settings.max_length
    rows = windows_of(sequences, first, last, max_length)
    offset = max(int(sequences.bounds[first]) - 1, 0)
    stream = read_stream(scorer.data, offset, int(sequences.bounds[last]))
    for batch in batches_of(
        stream, offset, rows, max_length=max_length, num_rows=scorer.num_rows, eod=scorer.eod
    ):
        inputs_BS = torch.from_numpy(batch.inputs_BS).to(scorer.groups.device)
        hidden_TE = scorer.hidden_states(inputs_BS).flatten(0, 1)
        head_WE = scorer.model.head_WE
        assert head_WE is not None
        for _ in Heads.of(hidden_TE, head_WE, None, None, scorer.vocab, scorer.chunking).chunks():
            pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
