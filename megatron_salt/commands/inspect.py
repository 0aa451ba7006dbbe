"""Shows a dataset, or one of its documents token by token with its tags, or checks every byte.

    megatron-salt inspect data/corpus_text_document

    megatron-salt inspect data/corpus_text_document --document 12 --tags data/corpus_slm

    megatron-salt inspect data/corpus_text_document --tags data/corpus_slm --verify

    megatron-salt inspect data/corpus_text_document --document 12 --logits data/corpus_large

shows tokens that the model has among its k most likely ones in green and the others in red, the
stronger the larger their loss; without colour the others stand in brackets. See docs/tags.md.
"""

from __future__ import annotations

import argparse
import io
import os
import sys

from megatron_salt.data.manifest import check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="the dataset, without .bin/.idx")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="show this document, from 0 on")
    what.add_argument("--sequence", type=int, metavar="N",
                      help="show this sequence (document or window) of a table")  # fmt: skip
    what.add_argument("--verify", action="store_true",
                      help="check every byte; exit status 2 if one is wrong")  # fmt: skip
    add("--tags", metavar="PREFIX", help="--output-prefix of `tag`")
    add("--logits", metavar="PREFIX",
        help="--output-prefix of `cache-logits`: also what is stored of each token")  # fmt: skip
    add("--selection", metavar="TABLE", help="a .parquet of `select` (default: the tags')")
    add("--tokenizer", metavar="PATH", help="for data of other tools (default: PREFIX.tokenizer)")
    add("--colour", choices=["auto", "always", "never"], default="auto",
        help="auto: where the output is a terminal (default: auto)")  # fmt: skip
    add("--list", action="store_true", help="a line for every token, with id, loss and entropy")


def check(args: argparse.Namespace) -> None:
    check_exists(args.prefix)


def run(args: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text of any script must not end the program on a terminal that lacks its letters.
        sys.stdout.reconfigure(errors="replace")
    try:
        if args.verify:
            _verify(args)
        elif args.document is None and args.sequence is None:
            _overview(args)
        else:
            _show(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has seen enough; Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _overview(args: argparse.Namespace) -> None:
    from megatron_salt.scoring.inspection import overview

    print("\n".join(overview(args.prefix, args.tags, args.tokenizer)))
    if args.logits is not None:
        from megatron_salt.data.logits import verify_logits
        from megatron_salt.scoring.logits_view import logits_overview

        print(logits_overview(args.logits, verify_logits(args.logits, args.prefix)))


def _show(args: argparse.Namespace) -> None:
    # megatron-core takes seconds to import: --help does not wait for it
    from megatron_salt.scoring import inspection, token_view

    opened = inspection.open_all(args.prefix, args.tags, args.selection, args.tokenizer)
    if args.document is not None:
        span = opened.document(args.document)
    else:
        span = opened.sequence(args.sequence)
    texts = token_view.texts_of(span.ids, token_view.token_bytes(opened.tokenizer))
    if args.list:
        print("\n".join(token_view.listing(span.ids, texts, span.tags, span.start)))
    else:
        colour = args.colour == "always" or (args.colour == "auto" and sys.stdout.isatty())
        top_k = opened.manifest.origin.settings.top_k if opened.manifest else None
        print(token_view.render(texts, span.tags, colour=colour))
        print(f"\n{token_view.legend(span.tags, top_k, colour=colour)}")
    print("\n".join(inspection.summary(opened, span)))
    if args.logits is not None:
        from megatron_salt.scoring.logits_view import logits_listing

        print("\n".join(logits_listing(opened, span, args.prefix, args.logits)))


def _verify(args: argparse.Namespace) -> None:
    from megatron_salt.scoring.inspection import verify_with_tags

    left_out = False
    for line in verify_with_tags(args.prefix, args.tags, args.selection, args.tokenizer):
        print(line, flush=True)
        left_out = left_out or "not made again" in line
    if args.logits is not None:
        from megatron_salt.scoring.logits_view import verify_stored_logits

        for line in verify_stored_logits(args.prefix, args.logits):
            print(line, flush=True)
    print("verified, but for what was not made again" if left_out else "all of it verified")
