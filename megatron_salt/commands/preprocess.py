"""Tokenises JSONL text into a Megatron dataset with a manifest.

    megatron-salt preprocess --input a.jsonl b.jsonl.zst --output-prefix data/corpus \\
        --tokenizer tok/tokenizer.model

writes data/corpus_text_document.{bin,idx,manifest.json} and a copy of the tokenizer in
data/corpus_text_document.tokenizer/. The result does not depend on --workers.
"""

from __future__ import annotations

import argparse
import logging
import time

from megatron_salt.corpus.preprocess import PreprocessSettings, available_cores, preprocess


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", action="extend", required=True, metavar="FILE",
        help=".jsonl, .jsonl.gz, .jsonl.zst")  # fmt: skip
    add("--output-prefix", required=True, metavar="PREFIX")
    add("--tokenizer", required=True, help="a .model, a .json, or a directory with one")
    add("--json-key", default="text", help="(default: text)")
    add("--workers", type=int, default=available_cores(), help="processes (default: all cores)")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end every document with the end-of-document token (default: on)")  # fmt: skip
    add(
        "--source-key",
        metavar="FIELD",
        help="the JSON field that names a document's source; held-out losses are said for each",
    )
    add("--deduplicate", action="store_true", help="of equal texts keep the first")
    add(
        "--shuffle-seed",
        type=int,
        metavar="N",
        help="shuffle the documents, whose last ones data.split holds out (default: as read)",
    )
    add("--overwrite", action="store_true", help="replace a dataset of this prefix")
    add("--strict", action="store_true", help="stop at the first bad line instead of counting it")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    settings = PreprocessSettings(
        json_key=args.json_key, append_eod=args.append_eod, strict=args.strict,
        source_key=args.source_key, deduplicate=args.deduplicate, shuffle_seed=args.shuffle_seed,
    )  # fmt: skip
    started_s = time.monotonic()
    manifest = preprocess(
        args.input, args.output_prefix, args.tokenizer, settings, workers=args.workers,
        overwrite=args.overwrite,
    )  # fmt: skip
    elapsed_s = time.monotonic() - started_s
    print(
        f"{args.output_prefix}_{args.json_key}_document: {manifest.documents} documents,"
        f" {manifest.tokens} tokens in {elapsed_s:.1f} s ({manifest.tokens / elapsed_s:,.0f}"
        f" tokens/s); left out: {manifest.empty_documents} empty documents,"
        f" {manifest.bad_lines} bad lines"
        + (f", {manifest.settings['duplicates']} duplicates" if args.deduplicate else "")
    )
    return 0
