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
from megatron_salt.config.fields import DataConfig
from megatron_salt.config.values import parse_blend
from megatron_salt.noise import silence_known_warnings
from megatron_salt.parallel import endings
from megatron_salt.parallel.machine import set_cuda_connections

PROGRAM = "megatron-salt pretrain"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, then train or describe. Bad settings and bad files end with one line and status 2."""
    command = parse_command_line(argv, prog=PROGRAM)
    tp_size = command.config.parallel.tensor_model_parallel_size
    warning = set_cuda_connections(tp_size, os.environ)
    if warning and endings.is_first_rank():
        print(f"WARNING {warning}", file=sys.stderr)
    if argv is None:
        endings.interrupt_on_sigterm()
    if endings.is_first_rank():
        check_prefixes(command.config.data)
    run = None
    try:
        silence_known_warnings()
        # torch, megatron-core and deepspeed take seconds to import: after the settings are known
        # good.
        import torch.distributed as dist

        from megatron_salt.parallel.groups import FailedElsewhere, leave

        try:
            if command.dry_run:
                from megatron_salt.planner.dry_run import describe_run

                print(describe_run(command.config, command.deepspeed_config))
                return
            from megatron_salt.training.run import prepare, train
            from megatron_salt.training.start import NothingToDo

            try:
                run = prepare(command.config, command.deepspeed_config)
            except NothingToDo as done:
                if endings.is_first_rank():
                    print(done)
        except (ValueError, OSError, FailedElsewhere) as error:
            # Before the ranks have met (a world size that does not fit) all of them see the same.
            here = not isinstance(error, FailedElsewhere) if dist.is_initialized() else None
            endings.refuse(PROGRAM, error, here=here)
        if run is not None:
            train(run)
    except KeyboardInterrupt:
        start = "before the first step; the same command starts again"
        endings.end_interrupted(PROGRAM, run.where_it_is if run else lambda: start)
    except Exception as error:
        endings.tell_failure(error)
        raise
    del run
    leave()


def check_prefixes(data: DataConfig) -> None:
    """End, before torch is imported, if a dataset is not there: the most usual slip."""
    from megatron_salt.data.manifest import check_exists

    try:
        for prefix in [*parse_blend(data.train_data_path, "")[0], *data.valid_data_path]:
            check_exists(prefix)
    except FileNotFoundError as error:
        endings.refuse(PROGRAM, error)


if __name__ == "__main__":
    main()
