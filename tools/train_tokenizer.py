"""Trains a small tokenizer on JSONL text; decoding gives back exactly what was encoded.

    python tools/train_tokenizer.py --input corpus.jsonl --output tok/tokenizer.model

The suffix of --output chooses the format: .model is sentencepiece, .json is a byte-level BPE of
Hugging Face `tokenizers`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_salt.corpus.train_tokenizer import sample_documents, train_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help=".jsonl[.gz|.zst]"
    )
    parser.add_argument("--output", required=True, help="tokenizer.model or tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=4096, help="(default: 4096)")
    parser.add_argument(
        "--model-type", choices=("bpe", "unigram"), default="bpe", help="(default: bpe)"
    )
    parser.add_argument(
        "--sample-bytes",
        type=int,
        default=8_000_000,
        help="train on a random sample of documents of this size (default: 8000000)",
    )
    parser.add_argument(
        "--sentinels",
        type=int,
        default=0,
        help="how many of the tokens are <extra_id_0>, … for span_corruption (default: 0)",
    )
    parser.add_argument("--json-key", default="text", help="(default: text)")
    args = parser.parse_args(argv)
    try:
        texts, bad_lines = sample_documents(
            args.input, json_key=args.json_key, sample_bytes=args.sample_bytes
        )
        if bad_lines:
            print(f"{len(bad_lines)} bad lines left out, first {bad_lines[0]}", file=sys.stderr)
        train_tokenizer(
            texts,
            args.output,
            vocab_size=args.vocab_size,
            model_type=args.model_type,
            num_sentinels=args.sentinels,
        )
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.vocab_size} tokens from {len(texts)} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
