"""A rank that trains as `megatron_salt.pretrain` does, and saves its weights for a test to compare.

    torchrun … tests/rank_program.py FOLDER --config run.json --deepspeed_config ds.json

For CUDA, which forked ranks (tests/ranks.py) cannot use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_salt.config.command_line import parse_command_line
from megatron_salt.noise import silence_known_warnings
from megatron_salt.parallel.machine import set_cuda_connections


def main() -> None:
    folder = Path(sys.argv[1])
    command = parse_command_line(sys.argv[2:])
    set_cuda_connections(command.config.parallel.tensor_model_parallel_size, os.environ)
    silence_known_warnings()
    import numpy as np
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param
    from tiny import run_to_end

    from megatron_salt.model.layers import canonical_parameters

    run = run_to_end(command.config, command.deepspeed_config)
    weights = {}
    for name, parameter in canonical_parameters(run.student.module).items():
        # Of 16-bit weights the optimizer's fp32 copy.
        master = parameter if run.settings.precision == "fp32" else None
        master = safe_get_full_fp32_param(parameter) if master is None else master
        weights[name] = master.detach().cpu().numpy()
    np.savez(folder / f"rank_{run.groups.rank}.npz", **weights)
    del run
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
