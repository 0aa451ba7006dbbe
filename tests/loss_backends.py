"""The backends of the loss that a machine without a GPU can run, for tests to go through.

`reference` and `native` are what `impl` calls them. `cuda on cpu` is kernels/csrc/kd_loss.cu
itself, compiled for the CPU with tests/cuda_on_cpu.h: the CUDA kernels, thread by thread.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_salt.kernels import build, kd_loss, linear_kd_loss  # noqa: F401
from megatron_salt.kernels.choose import choose_backend
from megatron_salt.kernels.compiled import CompiledBackend

BACKENDS = ("reference", "native", "cuda on cpu")
EMULATOR = Path(__file__).parent / "cuda_on_cpu.h"


def dtypes_of(backend: str) -> list[torch.dtype]:
    """Only the reference computes in fp64."""
    compiled = [torch.float32, torch.bfloat16, torch.float16]
    return [*compiled, torch.float64] if backend == "reference" else compiled


BACKENDS_AND_DTYPES = [(backend, dtype) for backend in BACKENDS for dtype in dtypes_of(backend)]


@functools.cache
def cuda_on_cpu() -> CompiledBackend:
    """The CUDA kernels as a backend for CPU tensors. Compiled once and kept beside `native`, for
    every session and process until a source, the compiler's flags or the processor change."""
    compiler = build.find_cxx()
    assert compiler is not None, "the tests need a C++ compiler"
    command = [
        compiler, "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fopenmp-simd",
        "-U_FORTIFY_SOURCE",  # whose longjmp refuses to go from one stack to another
        "-fPIC", "-shared", "-w", "-x", "c++", "-include", str(EMULATOR),
        str(build.SOURCES / "kd_loss.cu"), "-o",
    ]  # fmt: skip
    made_of = [build.library_name("native"), *command, EMULATOR.read_text(encoding="utf-8")]
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = build.cache_folder()
    output = folder / f"cuda_on_cpu-{name}.so"
    if not output.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
            built = Path(scratch) / output.name
            done = subprocess.run([*command, str(built)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            built.replace(output)  # two sessions at once build twice, the same
    return CompiledBackend("cuda on cpu", output)


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
def chosen(backend: str) -> Iterator[None]:
    """Every call of the loss inside goes through this backend."""

    def choose(impl: str, **about: Any) -> Any:
        if backend == "cuda on cpu":
            return cuda_on_cpu()
        return choose_backend(backend, **about)  # type: ignore[arg-type]

    with contextlib.ExitStack() as patches:
        for module in ("kd_loss", "linear_kd_loss"):
            path = f"megatron_salt.kernels.{module}"
            patches.enter_context(mock.patch(f"{path}.choose_backend", choose))
        yield
