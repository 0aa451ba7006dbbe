"""Takes some documents of a dataset, in their order, as a dataset of their own.

megatron-salt subset data/all_text_document --source wiki code --output-prefix data/two

megatron-salt subset data/all_text_document --share 0.1 --output-prefix data/tenth
"""

from __future__ import annotations

import argparse

from megatron_salt.corpus.rearrange import subset_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="the dataset, without .bin/.idx")
    add("--output-prefix", required=True, metavar="PREFIX", help="of the result, as it is")
    add("--source", nargs="+", action="extend", metavar="NAME", help="documents of these sources")
    add("--share", type=float, help="of the documents (of these sources), drawn at random")
    add("--documents", type=int, metavar="N", help="how many, drawn at random")
    add(
        "--seed",
        type=int,
        default=1234,
        help="with one seed fewer are a part of more (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a dataset of this prefix")


def run(args: argparse.Namespace) -> int:
    made = subset_dataset(
        args.prefix, args.output_prefix, sources=args.source, share=args.share,
        documents=args.documents, seed=args.seed, overwrite=args.overwrite,
    )  # fmt: skip
    print(f"{args.output_prefix}: {made.documents} documents, {made.tokens} tokens")
    return 0
