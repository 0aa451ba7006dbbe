"""The training path on tensors that say "cuda", without a device: a forgotten `.to(device)` fails.

Looked at is where tensors are in forward passes, the loss with its gradients, and evaluation, as
fake_cuda.py says; not values, the backward passes of layers, DeepSpeed and NCCL.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command

pytestmark = pytest.mark.processes

HERE = Path(__file__).resolve().parent


LOW_ENTROPY = {"kd_tokens": "low_entropy"}
TEACHER_BETTER = {"kd_tokens": "teacher_better", "untaught_ce": "full"}
TAGGED = {"kd_tokens": "tagged", "ce_tokens": "untagged"}
EXCESS_LOSS = {"ce_tokens": "excess_loss"}


def case(
    model: str,
    precision: str,
    route: dict[str, str],
    *,
    tp: int = 1,
    sequence_parallel: bool = False,
    recompute: bool = False,
) -> dict[str, Any]:
    return {
        "model": model, "precision": precision, "route": route, "tp": tp,
        "sequence_parallel": sequence_parallel, "recompute": recompute,
    }  # fmt: skip


# Models of tests/tiny.py: grouped queries, SwiGLU, rotary table; learned positions, GELU, tied.
CASES = {
    "llama-bf16": case("LLAMA", "bf16", LOW_ENTROPY),
    "llama-fp32": case("LLAMA", "fp32", EXCESS_LOSS),
    "llama-bf16-recompute": case("LLAMA", "bf16", TAGGED, recompute=True),
    "llama-bf16-tp2": case("LLAMA", "bf16", LOW_ENTROPY, tp=2),
    "llama-bf16-tp2-sp": case("LLAMA", "bf16", EXCESS_LOSS, tp=2, sequence_parallel=True),
    "gpt-bf16": case("GPT", "bf16", TEACHER_BETTER),
    "gpt-fp16-tp2-recompute": case("GPT", "fp16", TAGGED, tp=2, recompute=True),
    "gpt-fp32-tp2-sp": case("GPT", "fp32", TEACHER_BETTER, tp=2, sequence_parallel=True),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """By case what went wrong, found by one process for all of them."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: it compiles the few lines that let tensors say 'cuda'")
    folder = tmp_path_factory.mktemp("fake_cuda")
    torch_folder = Path(torch.__file__).parent
    guard = folder / "guard.so"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-std=c++20", "-I", str(torch_folder / "include"),
         str(HERE / "fake_cuda_guard.cpp"), "-o", str(guard),
         "-L", str(torch_folder / "lib"), "-lc10"],
        check=True,
    )  # fmt: skip
    done = run_command(
        str(HERE / "fake_cuda.py"), str(guard), json.dumps(CASES), str(folder), seconds=300
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line["error"] for line in lines}


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="a CUDA build of PyTorch: tests/gpu has the real thing"
)
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_a_step_is_on_the_device(errors: dict[str, str | None], name: str) -> None:
    assert errors[name] is None, errors[name]
