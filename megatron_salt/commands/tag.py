"""Tags a dataset with what a small language model says about its tokens.

    megatron-salt tag --data data/corpus_text_document --teacher runs/slm \\
        --output-prefix data/corpus_slm --store loss

    srun megatron-salt tag --data data/corpus_text_document --teacher runs/slm \\
        --output-prefix data/corpus_slm --window 1280

writes data/corpus_slm_mask.{bin,idx}, data/corpus_slm_sequences.parquet, data/corpus_slm.tags.json
and what --store asks for. Runs alone or under torchrun/srun, on CPU or GPU; started again after a
kill, it goes on where it was. See docs/tags.md.
"""

from __future__ import annotations

import argparse

from megatron_salt.commands.rule_arguments import add_rule_arguments, rule_of
from megatron_salt.data.manifest import check_exists

AFTER_INTERRUPT = "the same command goes on from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="PREFIX", help="without .bin/.idx")
    add("--teacher", required=True, help="a checkpoint, or a run's output_dir (its newest one)")
    add("--output-prefix", required=True, metavar="PREFIX")
    add("--window", type=int,
        help="score windows of so many tokens, laid over the documents end to end; train with the "
        "same data.seq_length (default: score documents)")  # fmt: skip
    add("--top_k", type=int, default=10,
        help="mask 1: the token is among the k most likely (default: 10)")  # fmt: skip
    add("--store", nargs="+", action="extend", choices=["loss", "entropy"], default=[],
        help="also write these per token, 2 bytes each (default: neither)")  # fmt: skip
    add_rule_arguments(parser)
    add("--micro_batch_size", type=int, default=8, help="rows per forward pass (default: 8)")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="(default: the checkpoint's)")
    add("--loss_impl", choices=["auto", "reference", "native", "cuda"], default="auto",
        help="code of the loss, see `megatron-salt kernels` (default: auto)")  # fmt: skip
    add("--tokens-per-shard", type=int, default=1 << 22,
        help="what a killed run may lose, and what one rank takes at a time (default: 4194304)",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    check_exists(args.data)
    for option in ("--micro_batch_size", "--tokens-per-shard"):
        value = getattr(args, option.lstrip("-").replace("-", "_"))
        if value < 1:
            raise ValueError(f"{option} {value}: must be at least 1")


def run(args: argparse.Namespace) -> int:
    # torch takes seconds to import: --help does not wait for it
    from megatron_salt.parallel.groups import initialize, leave
    from megatron_salt.scoring.tagging import TagRequest, tag

    groups = initialize(1, 1, timeout_minutes=24 * 60.0)
    request = TagRequest(
        data=args.data, teacher=args.teacher, output_prefix=args.output_prefix,
        window=args.window, top_k=args.top_k, store=tuple(args.store), rule=rule_of(args),
        micro_batch_size=args.micro_batch_size, precision=args.precision,
        loss_impl=args.loss_impl, tokens_per_shard=args.tokens_per_shard,
    )  # fmt: skip
    manifest = tag(request, groups)
    if manifest is not None:
        tokens = manifest.origin.data.tokens
        print(
            f"{args.output_prefix}: {tokens} tokens, {manifest.kept_tokens / tokens:.1%} among the "
            f"{args.top_k} most likely; {manifest.sequences} sequences; "
            f"{', '.join(sorted(manifest.files))}"
        )
    leave()  # ranks that have nothing to publish are done early
    return 0
