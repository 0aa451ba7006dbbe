"""Keeps a thousand ranks from repeating what other packages say at import."""

from __future__ import annotations

import logging
import os
import warnings


def silence_known_warnings() -> None:
    """Filter warnings that are known, understood and not about the user's run.

    Transformer Engine and Apex are optional (docs/install.md); the CUDA-graph scope is a default of
    megatron-core that it calls deprecated itself; the rest is said by torch and DeepSpeed about
    each other. Call it before importing megatron-core.
    """
    for message in (
        ".*Transformer Engine.*",
        ".*Apex.*",
        ".*full scope is deprecated.*",
        ".*torch.distributed.reduce_scatter_tensor.*deprecated.*",
        ".*torch.distributed.all_gather_into_tensor.*deprecated.*",
        ".*autograd kernel was not registered.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    import torch  # seconds: `--help` and a misspelt key must not wait for it

    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else each rank says that it found no GPU
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
