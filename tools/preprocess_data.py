"""Tokenises JSONL text into a Megatron dataset with a manifest.

    python tools/preprocess_data.py --input a.jsonl b.jsonl.zst --output-prefix data/corpus \\
        --tokenizer tok/tokenizer.model

writes data/corpus_text_document.{bin,idx,manifest.json} and a copy of the tokenizer in
data/corpus_text_document.tokenizer/. The result does not depend on --workers.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence

from megatron_salt.corpus.preprocess import PreprocessSettings, available_cores, preprocess


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    settings = PreprocessSettings(
        json_key=args.json_key, append_eod=args.append_eod, strict=args.strict
    )
    started_s = time.monotonic()
    try:
        manifest = preprocess(
            args.input, args.output_prefix, args.tokenizer, settings, workers=args.workers
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        return 1
    elapsed_s = time.monotonic() - started_s
    print(
        f"{args.output_prefix}_{args.json_key}_document: {manifest.documents} documents,"
        f" {manifest.tokens} tokens in {elapsed_s:.1f} s ({manifest.tokens / elapsed_s:,.0f}"
        f" tokens/s); left out: {manifest.empty_documents} empty documents,"
        f" {manifest.bad_lines} bad lines"
    )
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz, .jsonl.zst"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument(
        "--tokenizer", required=True, help="a .model, a .json, or a directory with one"
    )
    parser.add_argument("--json-key", default="text", help="(default: text)")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="processes (default: all cores)"
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token (default: on)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first bad line instead of counting it"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
