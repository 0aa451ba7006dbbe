"""Stores a teacher's distributions over a dataset, from which many students can train.

    megatron-salt cache-logits --data data/corpus_text_document --teacher runs/large \\
        --output-prefix data/corpus_large --window 1280

    srun megatron-salt cache-logits --data data/corpus_text_document --teacher-hf models/large \\
        --output-prefix data/corpus_large --kind sampled --held-out runs/student.yaml

writes data/corpus_large.logits.json and the files that it names. Runs alone or under torchrun/srun,
on CPU or GPU; started again after a kill, it goes on where it was. See docs/logits.md.
"""

from __future__ import annotations

import argparse

from megatron_salt.commands import tag

AFTER_INTERRUPT = "the same command goes on from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="PREFIX", help="without .bin/.idx")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--teacher", metavar="DIR",
                     help="a checkpoint, or a run's output_dir (its newest one)")  # fmt: skip
    who.add_argument("--teacher-hf", metavar="DIR", help="a Hugging Face folder, as teacher.hf")
    add("--output-prefix", required=True, metavar="PREFIX")
    add("--window", type=int,
        help="of windows of so many tokens, laid over the documents end to end, which training "
        "reads with the same data.seq_length (default: each document by itself)")  # fmt: skip
    add("--kind", choices=["top", "sampled", "full"], default="top",
        help="the likeliest tokens, draws, or all tokens in fp32, for tests (default: top)",
    )  # fmt: skip
    add("--top_k", type=int, default=50, help="of kind top: tokens at most (default: 50)")
    add("--top_p", type=float, default=1.0,
        help="of kind top: the likeliest that have this probability together, then at most top_k "
        "(default: 1.0)")  # fmt: skip
    add("--draws", type=int, default=50, help="of kind sampled (default: 50)")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--encoding", choices=["fp16", "uint8", "fp32"], default="fp16",
        help="of log-probabilities; uint8: steps of 0.063 nats (default: fp16)")  # fmt: skip
    add("--micro_batch_size", type=int, default=8, help="rows per forward pass (default: 8)")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="(default: the teacher's)")
    add("--tensor_parallel", type=int, default=1, metavar="N",
        help="spread each teacher over N ranks (default: 1)")  # fmt: skip
    add("--tokens-per-shard", type=int, default=1 << 18,
        help="what a killed run may lose, and what one rank takes at a time (default: 262144)",
    )  # fmt: skip
    add("--held-out", metavar="CONFIG",
        help="YAML of a run that will train from the logits: score its held-out samples too, for "
        "its evaluations and an adaptive switch")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    tag.check(args)
    if args.tensor_parallel < 1:
        raise ValueError(f"--tensor_parallel {args.tensor_parallel}: must be at least 1")


def run(args: argparse.Namespace) -> int:
    asked = vars(args).copy()
    tp_size = asked.pop("tensor_parallel")
    # torch takes seconds to import: --help does not wait for it
    from megatron_salt.parallel.groups import initialize, leave
    from megatron_salt.scoring.capture import LogitsRequest, cache_logits

    groups = initialize(tp_size, 1, timeout_minutes=24 * 60.0)
    manifest = cache_logits(LogitsRequest(**asked), groups)
    if manifest is not None:
        tokens = manifest.origin.data.tokens
        size = sum(record.num_bytes for record in manifest.files.values())
        print(
            f"{args.output_prefix}: {tokens} tokens, {manifest.entries / tokens:.2f} entries and "
            f"{size / tokens:.1f} bytes a token; {', '.join(sorted(manifest.files))}"
        )
    leave()
    return 0
