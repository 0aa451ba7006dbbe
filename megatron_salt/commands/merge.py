"""Joins datasets of one tokenizer into one, without tokenising.

    megatron-salt merge data/web_text_document data/code_text_document --output-prefix data/both

Each document's source goes along; of a dataset without sources its own name is the source. Tags and
selections do not: they number sequences of the old datasets.
"""

from __future__ import annotations

import argparse

from megatron_salt.corpus.rearrange import merge_datasets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "prefixes",
        nargs="+",
        metavar="PREFIX",
        help="without .bin/.idx, in the order of the result",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="of the result, as it is")
    add("--overwrite", action="store_true", help="replace a dataset of this prefix")


def run(args: argparse.Namespace) -> int:
    made = merge_datasets(args.prefixes, args.output_prefix, overwrite=args.overwrite)
    print(f"{args.output_prefix}: {made.documents} documents, {made.tokens} tokens")
    return 0
