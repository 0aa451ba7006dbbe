"""Command-line options of a selection rule, for the tools that select."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_salt.data.scores import MASKED, SCORES
from megatron_salt.data.selection import Rule


def add_rule_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add them; `several`: fractions may be given once per source."""
    group = parser.add_argument_group("which sequences are selected")
    group.add_argument(
        "--score", choices=SCORES, default="median",
        help="median or mean of the losses, or mean of the entropies (default: median)",
    )  # fmt: skip
    group.add_argument(
        "--masked", choices=MASKED, default="drop",
        help="tokens outside the top k: drop them, count them as zero, or use all (default: drop)",
    )  # fmt: skip
    kind = group.add_mutually_exclusive_group()
    count: dict[str, Any] = {"nargs": "+", "action": "extend"} if several else {"nargs": 1}
    for name, text in (
        ("top", "the highest scores (default: 0.5)"),
        ("bottom", "the lowest scores: a control"),
        ("random", "any sequences: a control"),
    ):
        kind.add_argument(
            f"--{name}-fraction", type=float, metavar="SHARE", **count,
            help=f"this share of the sequences, {text}",
        )  # fmt: skip
    kind.add_argument("--score-range", type=float, nargs=2, metavar=("LOW", "HIGH"))
    group.add_argument("--seed", type=int, default=1234, help="of --random-fraction")


def fractions_of(args: argparse.Namespace) -> list[float]:
    """The fractions as given; the default if there is none."""
    given = [args.top_fraction, args.bottom_fraction, args.random_fraction]
    return next((each for each in given if each is not None), [0.5])


def rule_of(args: argparse.Namespace) -> Rule:
    """Raises: ValueError for what contradicts itself."""
    if args.score_range is not None:
        low, high = args.score_range
        return Rule(
            score=args.score, masked=args.masked, kind="range", fraction=None, low=low, high=high
        )
    kind = "top"
    for name in ("bottom", "random"):
        if getattr(args, f"{name}_fraction") is not None:
            kind = name
    return Rule(
        score=args.score, masked=args.masked, kind=kind,  # type: ignore[arg-type]
        fraction=fractions_of(args)[0], seed=args.seed if kind == "random" else None,
    )  # fmt: skip
