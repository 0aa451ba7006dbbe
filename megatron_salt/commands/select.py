"""Selects sequences of tagged data anew, from their stored scores and without the model.

    megatron-salt select --tags data/corpus_slm --output-prefix data/hard --top-fraction 0.3

    megatron-salt select --tags data/web_slm data/code_slm --output-prefix data/both \\
        --data data/web_text_document data/code_text_document --top-fraction 0.5 0.25

writes data/hard.parquet (data/both_web_slm.parquet and data/both_code_slm.parquet) for
salt.selection, a histogram of the scores as .png, and with --data some sequences of either side
as .txt. One fraction: all sources compete; one for each: quotas. See docs/tags.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_salt.commands.rule_arguments import add_rule_arguments, fractions_of, rule_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "PREFIX"}
    add("--tags", required=True, help="--output-prefix of `tag`, of each source", **several)
    add("--output-prefix", required=True, metavar="PREFIX")
    add("--reference", **several,
        help="tags of the same data by a smaller model: the score is the smaller model's minus the "
        "tags', as in MiniPLM (which uses --score mean --masked all)")  # fmt: skip
    add("--data", help="the tagged datasets, to show text of some sequences", **several)
    add("--samples", type=int, default=5, metavar="N",
        help="with --data: sequences to show of each source, N selected and N not (default: 5)",
    )  # fmt: skip
    add_rule_arguments(parser, several=True)


def run(args: argparse.Namespace) -> int:
    # matplotlib takes a second to import: --help does not wait for it
    from megatron_salt.data.selection import read_table, rule_text, write_table
    from megatron_salt.data.tags import check_tag_prefix
    from megatron_salt.files.disk import atomic_path
    from megatron_salt.report.score_histogram import write_score_histogram
    from megatron_salt.scoring import reselect

    if args.samples < 1:
        raise ValueError(f"--samples {args.samples}: must be at least 1")
    for prefix in (*args.tags, *(args.reference or ())):
        check_tag_prefix(prefix)
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
        print(f"text of some sequences: {text_path}")
    else:
        text_path.unlink(missing_ok=True)  # of an earlier selection
        print("text of some sequences is shown with --data, the tagged dataset")
    return 0
