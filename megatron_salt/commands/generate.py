"""Text from checkpoints: prompts continued by several models, under one another."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-salt generate`."""
    add = parser.add_argument
    extend = partial(add, action="extend", nargs="+")
    extend("--checkpoint", required=True, metavar="RUN", help="output_dirs of runs, or checkpoints")
    extend("--prompt", default=[], metavar="TEXT", help='"": the beginning of a document')
    add("--prompt-file", type=Path, help='lines of a .txt, or a .jsonl of {"prompt": "…"}')
    add("--max-new-tokens", type=int, default=64, help="for each prompt (%(default)s)")
    add("--greedy", action="store_true", help="always the most likely token")
    add("--temperature", type=float, default=1.0, help="below 1: likely tokens more often (1)")
    add("--top-k", type=int, default=0, help="draw from so many likeliest tokens (0: all)")
    add(
        "--top-p", type=float, default=1.0, help="draw from the likeliest with this chance (1: all)"
    )
    add("--seed", type=int, default=1234, help="of the draws (%(default)s)")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="(the checkpoint's)")
    add("--output", type=Path, metavar="FILE.jsonl", help="also write a line of JSON for each text")


def check(args: argparse.Namespace) -> None:
    if not args.prompt and not args.prompt_file:
        raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE")


def run(args: argparse.Namespace) -> int:
    """Print the texts of all checkpoints. Raises: ValueError or OSError saying what is wrong."""
    # Seconds, for which `--help` does not wait.
    import torch.distributed as dist

    from megatron_salt.generation.continuation import continuer, read_prompts, side_by_side
    from megatron_salt.generation.sampling import GenerationRequest
    from megatron_salt.parallel.groups import initialize, planned_world_size

    if (ranks := planned_world_size() or 1) > 1:
        raise ValueError(f"{ranks} ranks: generate runs on one, without a launcher")
    prompts = args.prompt + (read_prompts(args.prompt_file) if args.prompt_file else [])
    asked = {k: v for k, v in vars(args).items() if k in GenerationRequest.__annotations__}
    request = GenerationRequest(prompts=prompts, **asked)
    note = partial(print, "note:", file=sys.stderr)
    continuers = [continuer(path, request, note) for path in args.checkpoint]
    groups = initialize(1, 1, timeout_minutes=30.0)
    texts = [continued(groups) for continued in continuers]
    dist.destroy_process_group()
    print(side_by_side(texts), end="")
    if args.output:
        lines = [json.dumps(each) + "\n" for of_one in texts for each in of_one]
        args.output.write_text("".join(lines), encoding="utf-8")
    return 0
