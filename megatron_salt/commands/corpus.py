"""Makes a small real JSONL corpus out of the source files of the running Python.

megatron-salt corpus --output corpus.jsonl --max-bytes 20000000
"""

from __future__ import annotations

import argparse

from megatron_salt.corpus.python_sources import make_corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="the JSONL file to write")
    add("--max-bytes", type=int, help="largest size of the output (default: all)")
    add("--source", nargs="+", action="extend", default=[], metavar="DIR",
        help="directories of .py, .rst and .txt files (default: Python's library)")  # fmt: skip
    add("--seed", type=int, default=1234, help="of the shuffle (default: 1234)")


def run(args: argparse.Namespace) -> int:
    report = make_corpus(args.output, sources=args.source, max_bytes=args.max_bytes, seed=args.seed)
    print(f"{args.output}: {report}")
    return 0
