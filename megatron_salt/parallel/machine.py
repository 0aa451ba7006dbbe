"""What a rank's machine must have for code that is compiled at run time, and CUDA's queues.

A leaf, without torch at import: `set_cuda_connections` comes before CUDA does.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def set_cuda_connections(tp_size: int, environment: MutableMapping[str, str]) -> str | None:
    """One hardware queue to the GPU where tp > 1; a value that was set stays.

    Before torch is imported: the driver reads the variable once, when CUDA starts. With one queue
    megatron-core's tensor-parallel communication starts before the product that is to hide it;
    otherwise it only makes streams wait for one another.

    Returns: a warning where the value that was set contradicts this.
    """
    chosen = environment.get(CONNECTIONS)
    if chosen is None and tp_size > 1:
        environment[CONNECTIONS] = "1"
    if chosen is None or (chosen == "1") == (tp_size > 1):
        return None
    problem = "one queue serves tensor parallelism only, and makes other streams wait"
    if tp_size > 1:
        problem = "tensor-parallel communication may start too late to hide behind compute"
    return f"{CONNECTIONS}={chosen} with tp = {tp_size}: {problem}; unset, it is chosen by tp"


def fused_adam_facts() -> dict[str, Any]:
    """This machine, for `check_fused_adam`, as DeepSpeed finds it; versions as "13.0"."""
    import torch
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.builder import MissingCUDAException, installed_cuda_version
    from torch.utils.cpp_extension import is_ninja_available

    try:
        nvcc = ".".join(map(str, installed_cuda_version()))
    except MissingCUDAException:
        nvcc = None
    return {
        "prebuilt": bool(installed_ops.get("fused_adam")),
        "nvcc": nvcc,
        "torch_cuda": ".".join(str(torch.version.cuda).split(".")[:2]),
        "ninja": is_ninja_available(),
        "skips_check": os.environ.get("DS_SKIP_CUDA_CHECK", "0") == "1",
    }


def wants_fused_adam(values: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed compiles its FusedAdam for this JSON on CUDA.

    Source: `_configure_basic_optimizer` in DeepSpeed 0.19's runtime/engine.py.
    """
    optimizer, zero = values.get("optimizer", {}), values.get("zero_optimization", {})
    offload = (zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme")
    adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    torch_adam = optimizer.get("params", {}).get("torch_adam")
    return adam and not (torch_adam or offload or zero.get("cpu_offload"))


def check_fused_adam(values: Mapping[str, Any], path: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what is missing, if FusedAdam is wanted and will not compile."""
    from deepspeed.ops.op_builder.builder import cuda_minor_mismatch_ok

    if facts["prebuilt"] or not wants_fused_adam(values):
        return
    missing, nvcc, ours = [], facts["nvcc"], facts["torch_cuda"]
    if nvcc is None:
        missing.append("there is no nvcc (CUDA toolkit, CUDA_HOME)")
    elif nvcc != ours and not facts["skips_check"]:
        alike = cuda_minor_mismatch_ok.get(int(nvcc.split(".")[0]), ())
        if nvcc not in alike or ours not in alike:
            missing.append(
                f"nvcc is of CUDA {nvcc} and torch of {ours}, which DeepSpeed refuses "
                "(DS_SKIP_CUDA_CHECK=1 overrules it)"
            )
    if not facts["ninja"]:
        missing.append("ninja is not on the PATH (it is in the environment's bin folder)")
    if missing:
        raise ValueError(
            f"{path}: optimizer.type {values['optimizer']['type']!r} is DeepSpeed's FusedAdam, "
            f"which is compiled at its first use; on {platform.node()} {' and '.join(missing)}. "
            'PyTorch\'s needs no compiler: "torch_adam": true, "fused": true in optimizer.params'
        )


def adam_to_compile(values: Mapping[str, Any]) -> str | None:
    """DeepSpeed's Adam that this JSON asks for and that was never compiled here, or None."""
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    offload = (values.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device")
    optimizer = values.get("optimizer", {})
    name = "cpu_adam" if offload in ("cpu", "nvme") else "fused_adam"
    adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    if not adam or optimizer.get("params", {}).get("torch_adam") or installed_ops.get(name):
        return None
    built = Path(_get_build_directory(name, verbose=False)) / f"{name}.so"
    return None if built.exists() else name


def why_not_compiled() -> str | None:
    """Why torch.compile cannot work on CUDA here, or None: Triton compiles launchers in C."""
    compiler = os.environ.get("CC")
    compilers = [compiler] if compiler else ["gcc", "clang"]
    # Debian's scheme for local packages has no headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = Path(sysconfig.get_path("include", scheme))
    missing = []
    if not any(map(shutil.which, compilers)):
        missing.append(f"no C compiler ({', '.join(compilers)})")
    if not (include / "Python.h").is_file():
        missing.append(f"no Python.h in {include} (Debian, Ubuntu: python3-dev)")
    return " and ".join(missing) or None


def fuses_operations() -> bool:
    """Whether layers use megatron-core's compiled operations: on CUDA, if all ranks can compile."""
    import torch

    return torch.cuda.is_available() and _all_ranks_compile()


@functools.cache
def _all_ranks_compile() -> bool:
    """Decided once and alike: fused and plain operations round differently.

    Collectives: with NCCL, one all-gather of a short string over all ranks.
    """
    import torch.distributed as dist

    reason = why_not_compiled()
    reasons = [f"{platform.node()} has {reason}" if reason else None]
    rank = 0
    if dist.is_initialized() and dist.get_backend() == "nccl":
        rank, mine = dist.get_rank(), reasons[0]
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, mine)
    found = next(filter(None, reasons), None)
    if found and rank == 0:
        print(f"WARNING fused operations are off, which is slower: {found}", file=sys.stderr)
    return found is None
