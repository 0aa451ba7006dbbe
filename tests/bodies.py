"""The bodies of the loss that a machine without a GPU can run, for tests to go through.

`reference` and `native` are what `impl` calls them. `cuda on cpu` is kernels/csrc/kd_loss.cu
itself, compiled for the CPU with tests/cuda_on_cpu.h: the CUDA kernels, thread by thread.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_salt.kernels import build
from megatron_salt.kernels.choose import choose_backend
from megatron_salt.kernels.compiled import CompiledBackend

BODIES = ("reference", "native", "cuda on cpu")
EMULATOR = Path(__file__).parent / "cuda_on_cpu.h"


def dtypes_of(body: str) -> list[torch.dtype]:
    """Only the reference computes in fp64."""
    compiled = [torch.float32, torch.bfloat16, torch.float16]
    return [*compiled, torch.float64] if body == "reference" else compiled


BODIES_AND_DTYPES = [(body, dtype) for body in BODIES for dtype in dtypes_of(body)]


@functools.cache
def cuda_on_cpu() -> CompiledBackend:
    """The CUDA kernels as a body for CPU tensors."""
    compiler = build.find_cxx()
    assert compiler is not None, "the tests need a C++ compiler"
    folder = tempfile.TemporaryDirectory(prefix="cuda_on_cpu-")
    output = Path(folder.name) / "cuda_on_cpu.so"
    command = [
        compiler, "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fopenmp-simd",
        "-fPIC", "-shared", "-w", "-x", "c++", "-include", str(EMULATOR),
        str(build.SOURCES / "kd_loss.cu"), "-o", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    body = CompiledBackend("cuda on cpu", output)
    folder.cleanup()  # what is loaded stays; forked ranks have it too
    return body


@contextlib.contextmanager
def threads_backwards() -> Iterator[None]:
    """Run the threads of each emulated block from the last to the first."""
    order = cuda_on_cpu()._library.salt_fiber_order
    order(1)
    try:
        yield
    finally:
        order(0)


@contextlib.contextmanager
def chosen(body: str) -> Iterator[None]:
    """Every call of the loss inside goes through this body."""

    def choose(impl: str, **about: Any) -> Any:
        if body == "cuda on cpu":
            return cuda_on_cpu()
        return choose_backend(body, **about)  # type: ignore[arg-type]

    with contextlib.ExitStack() as patches:
        for module in ("kd_loss", "linear_kd_loss"):
            path = f"megatron_salt.kernels.{module}"
            patches.enter_context(mock.patch(f"{path}.choose_body", choose))
        yield
