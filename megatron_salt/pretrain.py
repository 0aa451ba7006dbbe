"""Entry point of training: YAML and DeepSpeed JSON in, a run out.

    torchrun … -m megatron_salt.pretrain --config run.yaml --deepspeed_config ds.json
        [--section.field value …]

Also under `deepspeed` and `srun`.
Without a teacher this is plain pre-training, which is how the small language model is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_salt.config.command_line import parse_command_line
from megatron_salt.noise import silence_known_warnings
from megatron_salt.parallel.machine import set_cuda_connections


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, then train or describe. Bad settings and bad files end with one line and status 2."""
    command = parse_command_line(argv, prog="python -m megatron_salt.pretrain")
    tp_size = command.config.parallel.tensor_model_parallel_size
    warning = set_cuda_connections(tp_size, os.environ)
    if warning and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"WARNING {warning}", file=sys.stderr)
    silence_known_warnings()
    # torch, megatron-core and deepspeed take seconds to import: after the settings are known good.
    import torch.distributed as dist

    from megatron_salt.parallel.groups import FailedElsewhere

    try:
        if command.dry_run:
            from megatron_salt.planner.dry_run import describe_run

            print(describe_run(command.config, command.deepspeed_config))
            return
        from megatron_salt.training.run import prepare, train

        run = prepare(command.config, command.deepspeed_config)
    except FailedElsewhere as error:
        raise SystemExit(2) from error
    except (ValueError, FileNotFoundError) as error:
        # Before the ranks have met (a world size that does not fit) all of them see the same.
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
            print(f"pretrain: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    train(run)
    del run
    # Its threads, left to the interpreter's end, can abort a rank that is done.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
