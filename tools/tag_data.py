"""Tags a dataset with what a small language model says about its tokens.

    python tools/tag_data.py --data data/corpus_text_document --teacher runs/slm \\
        --output-prefix data/corpus_slm --store loss

    srun python tools/tag_data.py --data data/corpus_text_document --teacher runs/slm \\
        --output-prefix data/corpus_slm --window 1280

writes data/corpus_slm_mask.{bin,idx}, data/corpus_slm_sequences.parquet, data/corpus_slm.tags.json
and what --store asks for. Runs alone or under torchrun/srun, on CPU or GPU; started again after a
kill, it goes on where it was. See docs/tags.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_salt.noise import silence_known_warnings
from megatron_salt.scoring.rule_arguments import add_rule_arguments, rule_of


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    silence_known_warnings()
    # torch takes seconds to import: --help does not wait for it
    import torch.distributed as dist

    from megatron_salt.parallel.groups import FailedElsewhere, initialize
    from megatron_salt.scoring.tagging import TagRequest, tag

    groups = initialize(1, 1, timeout_minutes=24 * 60.0)
    try:
        request = TagRequest(
            data=args.data, teacher=args.teacher, output_prefix=args.output_prefix,
            window=args.window, top_k=args.top_k, store=tuple(args.store), rule=rule_of(args),
            micro_batch_size=args.micro_batch_size, precision=args.precision,
            loss_impl=args.loss_impl, tokens_per_shard=args.tokens_per_shard,
        )  # fmt: skip
        manifest = tag(request, groups)
    except FailedElsewhere:
        return 1
    except KeyboardInterrupt:
        print("tag_data: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"tag_data: error: {error}", file=sys.stderr)
        return 1
    if manifest is not None:
        tokens = manifest.origin.data.tokens
        print(
            f"{args.output_prefix}: {tokens} tokens, {manifest.kept_tokens / tokens:.1%} among the "
            f"{args.top_k} most likely; {manifest.sequences} sequences; "
            f"{', '.join(sorted(manifest.files))}"
        )
    # Ranks that have nothing to publish are done early; left to the interpreter's end, the threads
    # of a process group may abort the process.
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="without .bin/.idx")
    parser.add_argument(
        "--teacher", required=True, help="a checkpoint, or a run's output_dir (its newest one)"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument(
        "--window", type=int,
        help="score windows of so many tokens, laid over the documents end to end; train with the "
        "same data.seq_length (default: score documents)",
    )  # fmt: skip
    parser.add_argument(
        "--top_k", type=int, default=10,
        help="mask 1: the token is among the k most likely (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--store", nargs="*", choices=["loss", "entropy"], default=[],
        help="also write these per token, 2 bytes each (default: neither)",
    )  # fmt: skip
    add_rule_arguments(parser)
    parser.add_argument(
        "--micro_batch_size", type=int, default=8, help="rows per forward pass (default: 8)"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], help="(default: the checkpoint's)"
    )
    parser.add_argument(
        "--loss_impl", choices=["auto", "reference", "native", "cuda"], default="auto",
        help="code of the loss, see python -m megatron_salt.kernels (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens-per-shard", type=int, default=1 << 22,
        help="what a killed run may lose (default: 4194304)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for option in ("--micro_batch_size", "--tokens-per-shard"):
        value = getattr(args, option.lstrip("-").replace("-", "_"))
        if value < 1:
            parser.error(f"{option} {value}: must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
