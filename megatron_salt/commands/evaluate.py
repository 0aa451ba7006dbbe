"""Held-out nats per token of checkpoints, at any layout they were saved.

    megatron-salt evaluate --checkpoint runs/baseline runs/salt --data data/held_out_text_document

Runs alone or under `torchrun`/`srun`; ranks share the rows. Every model is scored with the same
frozen forward pass that a teacher uses, so student and teacher are compared on equal terms.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_salt.data.manifest import check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", nargs="+", action="extend", required=True, metavar="DIR",
        help="checkpoints, or output_dirs of runs")  # fmt: skip
    add("--data", nargs="+", action="extend", metavar="PREFIX",
        help="datasets (default: the held-out data of its own run)")  # fmt: skip
    add("--split", help="with --data: score the second part of this split, as 95,5 (default: all)")
    add("--samples", type=int, default=1024, help="sequences to score at most (default: 1024)")
    add("--seq_length", type=int, help="(default: the checkpoint's)")
    add("--micro_batch_size", type=int, default=8, help="(default: 8)")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="(default: the checkpoint's)")
    add("--output", type=Path, metavar="FILE", help="also write the results as JSON")


def check(args: argparse.Namespace) -> None:
    for name in ("samples", "micro_batch_size"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    for prefix in args.data or ():
        check_exists(prefix)


def _difference(result: dict[str, Any], samples: int) -> str:
    own = result["samples_of_its_run"]
    if own != samples:
        return f"the run's own score is of {own} samples: --samples {own}"
    return "not the text of the run's own score"


def run(args: argparse.Namespace) -> int:
    asked = vars(args).copy()
    paths, output = asked.pop("checkpoint"), asked.pop("output")
    # torch takes seconds to import: `--help` does not wait for it.
    from megatron_salt.evaluation.checkpoint_score import ScoreRequest, score_checkpoint
    from megatron_salt.parallel.groups import initialize, leave

    groups = initialize(1, 1, timeout_minutes=30.0)
    results = []
    for path in paths:
        result = score_checkpoint(path, ScoreRequest(**asked), groups)
        results.append(result)
        if groups.rank == 0:
            print(
                f"{path}: {result['valid_ce_nats']:.4f} nats/token, accuracy "
                f"{result['valid_accuracy']:.4f}, {result['valid_tokens']} tokens"
                + ("" if result["text_of_its_run"] else f" ({_difference(result, args.samples)})"),
                flush=True,
            )
            for key, value in result.items():
                if "/" in key:
                    print(f"    {key.partition('/')[2]}: {value:.4f}", flush=True)
    if groups.rank == 0 and output:
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    leave()
    return 0
