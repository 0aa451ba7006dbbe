"""Entry point of evaluation: held-out nats per token of checkpoints, at any layout they were saved.

    python -m megatron_salt.evaluate --checkpoint RUN_OR_CHECKPOINT [...] --data PREFIX

Runs alone or under `torchrun`/`srun`; ranks share the rows. Every model is scored with the same
frozen forward pass that a teacher uses, so student and teacher are compared on equal terms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_salt.noise import silence_known_warnings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_salt.evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", nargs="+", required=True, help="Checkpoints, or output_dirs of runs."
    )
    parser.add_argument(
        "--data", nargs="+", help="Dataset prefixes; default: the held-out data of its own run."
    )
    parser.add_argument(
        "--split", help="With --data: score the second part of this split, as 95,5; default: all."
    )
    parser.add_argument("--samples", type=int, default=1024, help="Sequences to score at most.")
    parser.add_argument("--seq_length", type=int, help="Default: the checkpoint's.")
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], help="Default: the checkpoint's."
    )
    parser.add_argument("--output", type=Path, help="Also write the results as JSON.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Score every checkpoint and print one line each; bad files end with one line and status 2."""
    parser = _parser()
    asked = vars(parser.parse_args(argv))
    for name in ("samples", "micro_batch_size"):
        if asked[name] < 1:
            parser.error(f"--{name} {asked[name]}: must be at least 1")
    paths, output = asked.pop("checkpoint"), asked.pop("output")
    silence_known_warnings()
    # torch takes seconds to import: `--help` does not wait for it.
    import torch.distributed as dist

    from megatron_salt.evaluation.checkpoint_score import ScoreRequest, score_checkpoint
    from megatron_salt.parallel.groups import FailedElsewhere, initialize

    groups = initialize(1, 1, timeout_minutes=30.0)
    try:
        results = [score_checkpoint(path, ScoreRequest(**asked), groups) for path in paths]
    except FailedElsewhere as error:
        raise SystemExit(2) from error
    except (ValueError, FileNotFoundError) as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if groups.rank == 0:
        for result in results:
            print(
                f"{result['checkpoint']}: {result['valid_ce_nats']:.4f} nats/token, accuracy "
                f"{result['valid_accuracy']:.4f}, {result['valid_tokens']} tokens"
            )
        if output:
            output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    dist.barrier()
    # Its threads, left to the interpreter's end, can abort a rank that is done.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
