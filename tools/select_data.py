"""Selects sequences of tagged data anew, from their stored scores and without the model.

    python tools/select_data.py --tags data/corpus_slm --output-prefix data/hard --top-fraction 0.3

    python tools/select_data.py --tags data/web_slm data/code_slm --output-prefix data/both \\
        --data data/web_text_document data/code_text_document --top-fraction 0.5 0.25

writes data/hard.parquet (data/both_web_slm.parquet and data/both_code_slm.parquet) for
salt.selection, a histogram of the scores as .png, and with --data some sequences of either side
as .txt. One fraction: all sources compete; one for each: quotas. See docs/tags.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_salt.noise import silence_known_warnings
from megatron_salt.scoring.rule_arguments import add_rule_arguments, fractions_of, rule_of


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    silence_known_warnings()
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"select_data: error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    # matplotlib takes a second to import: --help does not wait for it
    from megatron_salt.data.selection import read_table, rule_text, write_table
    from megatron_salt.files.disk import atomic_path
    from megatron_salt.report.score_histogram import write_score_histogram
    from megatron_salt.scoring import reselect

    rule = rule_of(args)
    sources = reselect.read_sources(args.tags, rule, args.reference)
    paths = reselect.output_tables(args.output_prefix, sources)
    score = reselect.score_name(rule, sources)
    names = [source.name for source in sources]
    tables = reselect.select_again(sources, rule, fractions_of(args))
    text_path = Path(f"{args.output_prefix}.txt")
    texts = []
    if args.data is not None:
        if len(args.data) != len(sources):
            raise ValueError(
                f"{len(args.data)} --data for {len(sources)} --tags: give the dataset of each, in "
                "the same order"
            )
        for source, table, prefix in zip(sources, tables, args.data, strict=True):
            data, tokenizer = reselect.open_data(source, prefix)
            texts.append(
                reselect.samples_text(source.name, table, score, data, tokenizer, args.samples)
            )
    for path, table in zip(paths, tables, strict=True):
        if path.exists() and read_table(path).rule != table.rule:
            raise ValueError(
                f"{path} is there already, with another selection "
                f"({rule_text(read_table(path).rule)}), which a run may need to go on: choose "
                "another --output-prefix, or delete it"
            )
    for source in sources:
        if source.reference is not None and np.nanmean(source.scores) < 0:
            print(
                f"WARNING: {source.name}: on average --reference predicts the data better than "
                "--tags; the smaller model is the reference: are the two swapped?",
                file=sys.stderr,
            )
    for name, path, table in zip(names, paths, tables, strict=True):
        write_table(path, table)
        print(reselect.describe_selection(name, table, score))
        print(f"    written: {path}")
    picture = Path(f"{args.output_prefix}.png")
    write_score_histogram(picture, dict(zip(names, tables, strict=True)), score)
    print(f"histogram: {picture}")
    if texts:
        with atomic_path(text_path) as temporary:
            temporary.write_text("\n".join(texts), encoding="utf-8")
        print(f"samples: {text_path}")
    else:
        text_path.unlink(missing_ok=True)  # of an earlier selection
        print("samples: none, their text needs --data")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tags", nargs="+", required=True, metavar="PREFIX",
        help="--output-prefix of tag_data.py, of each source",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument(
        "--reference", nargs="+", metavar="PREFIX",
        help="tags of the same data by a smaller model: the score is the smaller model's minus the "
        "tags', as in MiniPLM (which uses --score mean --masked all)",
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", metavar="PREFIX",
        help="the tagged datasets, to show text of some sequences",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=5, metavar="N",
        help="with --data: sequences to show of each source, N selected and N not (default: 5)",
    )  # fmt: skip
    add_rule_arguments(parser, several=True)
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error(f"--samples {args.samples}: must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
