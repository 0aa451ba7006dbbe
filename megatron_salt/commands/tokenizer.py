"""Trains a small tokenizer on JSONL text; decoding gives back exactly what was encoded.

    megatron-salt tokenizer --input corpus.jsonl --output tok/tokenizer.model

The suffix of --output chooses the format: .model is sentencepiece, .json is a byte-level BPE of
Hugging Face `tokenizers`.
"""

from __future__ import annotations

import argparse
import sys

from megatron_salt.corpus.train_tokenizer import sample_documents, train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", action="extend", required=True, metavar="FILE",
        help=".jsonl[.gz|.zst]")  # fmt: skip
    add("--output", required=True, metavar="FILE", help="tokenizer.model or tokenizer.json")
    add("--vocab-size", type=int, default=4096, help="(default: 4096)")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help="(default: bpe)")
    add("--sample-bytes", type=int, default=8_000_000,
        help="train on a random sample of documents of this size (default: 8000000)")  # fmt: skip
    add("--sentinels", type=int, default=0,
        help="how many of the tokens are <extra_id_0>, … for span_corruption (default: 0)",
    )  # fmt: skip
    add("--json-key", default="text", help="(default: text)")


def run(args: argparse.Namespace) -> int:
    texts, bad_lines = sample_documents(
        args.input, json_key=args.json_key, sample_bytes=args.sample_bytes
    )
    if bad_lines:
        print(f"{len(bad_lines)} bad lines left out, first {bad_lines[0]}", file=sys.stderr)
    train_tokenizer(
        texts, args.output, vocab_size=args.vocab_size, model_type=args.model_type,
        num_sentinels=args.sentinels,
    )  # fmt: skip
    print(f"{args.output}: {args.vocab_size} tokens from {len(texts)} documents")
    return 0
