"""What does the loss cost on the CPU, in time and in memory, beside plain PyTorch?

    python benchmarks/kd_loss_cpu.py

`kd_loss`: forward and backward from logits, T 2048 x W 32768, CE and KL weighted one half each.

- `native`: the compiled code. `reference`: this project's specification in plain PyTorch.
- `plain autograd`: log_softmax, exp and sums in fp32, differentiated by autograd.
- `ModelOpt's formula`: the steps of the tensor-parallel KL loss of NVIDIA's Model Optimizer for
  Megatron (centre on the maximum, sum of exponentials, kl_div of two log-probabilities) and a
  cross-entropy, in fp32, on one rank; written anew here, differentiated by autograd.

`linear_kd_loss`: from hidden states, D 1024 and E 1024, at several T, against its own matrix
products alone (the same calls at the same sizes), and its memory against its budget.

Times: one warm-up, then rounds in which every candidate runs once, in turns, so that other load on
the machine meets all alike; ratios are medians over rounds of ratios within a round. Memory: in a
process of its own for each, from when inputs and code are in place: the peak of PyTorch's
allocations (its profiler's record of each), and of the resident size as Linux counts it (VmHWM),
which has the matrix library's working memory and the allocator's slack in it. For linear_kd_loss
the gradients that are its result, of the hidden states and in fp32 of the head, are subtracted.
Writes benchmarks/results/kd_loss_cpu.json and kd_loss_cpu.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_salt.kernels import Chunking, VocabShard, kd_loss, linear_kd_loss
from megatron_salt.kernels.chunks import Heads

RESULTS = Path(__file__).parent / "results"
T, W = 2048, 32768
WIDTH = 1024
BUDGET_BYTES = 64 << 20
TOKENS = (512, 2048, 8192)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PACKAGES = ("megatron_salt", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)  # a process of its own
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_here(*arguments.memory_of))
        return
    results: dict[str, Any] = {"machine": describe_machine(), "counted": __doc__}
    results["kd_loss"] = {name: measure_loss(name, arguments.rounds) for name in DTYPES}
    results["linear_kd_loss"] = {
        name: {str(n): measure_linear(name, n, arguments.rounds) for n in TOKENS} for name in DTYPES
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "kd_loss_cpu.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(results), encoding="utf-8")
    print(table(results))


# --- candidates: (student logits with gradient, teacher logits, labels) -> loss -------------------


def plain_autograd(student_TW: Tensor, teacher_TW: Tensor, labels_T: Tensor) -> Tensor:
    log_q_TW = student_TW.float().log_softmax(dim=1)
    log_p_TW = teacher_TW.float().log_softmax(dim=1)
    kl_T = (log_p_TW.exp() * (log_p_TW - log_q_TW)).sum(dim=1)
    ce_T = -log_q_TW.gather(1, labels_T[:, None]).squeeze(1)
    return (0.5 * ce_T + 0.5 * kl_T).sum() / len(labels_T)


def modelopt_formula(student_TW: Tensor, teacher_TW: Tensor, labels_T: Tensor) -> Tensor:
    s_TW, z_TW = student_TW.float(), teacher_TW.float()
    with torch.no_grad():
        s_max_T1, z_max_T1 = s_TW.amax(dim=1, keepdim=True), z_TW.amax(dim=1, keepdim=True)
    s_TW, z_TW = s_TW - s_max_T1, z_TW - z_max_T1
    log_q_TW = s_TW - s_TW.exp().sum(dim=1, keepdim=True).log()
    log_p_TW = z_TW - z_TW.exp().sum(dim=1, keepdim=True).log()
    kl_T = F.kl_div(log_q_TW, log_p_TW, reduction="none", log_target=True).sum(dim=1)
    ce_T = F.cross_entropy(student_TW.float(), labels_T, reduction="none")
    return (0.5 * ce_T + 0.5 * kl_T).sum() / len(labels_T)


def ours(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(student_TW: Tensor, teacher_TW: Tensor, labels_T: Tensor) -> Tensor:
        weight = 0.5 / len(labels_T)
        return kd_loss(
            student_TW, teacher_TW, labels_T, ce_weight_T=weight, kd_weight_T=weight,
            vocab=VocabShard(size=W, start=0, stop=W), impl=impl,  # type: ignore[arg-type]
        ).loss  # fmt: skip

    return loss


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "native": ours("native"),
    "reference": ours("reference"),
    "plain autograd": plain_autograd,
    "ModelOpt's formula": modelopt_formula,
}


def make_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    student = (torch.randn(T, W, generator=rng) * 3).to(dtype)
    teacher = (student.float() + torch.randn(T, W, generator=rng)).to(dtype)
    return student.requires_grad_(), teacher, torch.randint(W, (T,), generator=rng)


def forward_backward(name: str, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student.grad = None
    loss = CANDIDATES[name](student, teacher, labels)
    loss.backward()
    return loss.detach()


def measure_loss(dtype_name: str, rounds: int) -> dict[str, Any]:
    logits = make_logits(DTYPES[dtype_name])
    losses, gradients = {}, {}
    for name in CANDIDATES:  # warm-up; and all must compute the same
        losses[name] = float(forward_backward(name, *logits))
        assert logits[0].grad is not None
        gradients[name] = logits[0].grad.float()
    exact = gradients["reference"].norm()
    differences = {
        name: float((grad - gradients["reference"]).norm() / exact)
        for name, grad in gradients.items()
    }
    del gradients
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(rounds):
        for name in CANDIDATES:
            times[name].append(seconds(forward_backward, name, *logits))
    logits[0].grad = None
    return {
        name: {
            "time_over_native": ratio(times[name], times["native"]),
            "median_s": round(statistics.median(times[name]), 4),
            "peak_extra_MiB": memory_elsewhere("tensors", "loss", dtype_name, name),
            "peak_resident_MiB": memory_elsewhere("resident", "loss", dtype_name, name),
            "loss": losses[name],
            "gradient_difference_from_reference": differences[name],
        }
        for name in CANDIDATES
    }


# --- linear_kd_loss ------------------------------------------------------------------------------


def make_states(dtype: torch.dtype, num_tokens: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng).to(dtype)
    return {
        "student_hidden_TD": normal(num_tokens, WIDTH).requires_grad_(),
        "student_weight_WD": (normal(W, WIDTH) * 0.05).requires_grad_(),
        "teacher_hidden_TE": normal(num_tokens, WIDTH),
        "teacher_weight_WE": normal(W, WIDTH) * 0.05,
        "labels_T": torch.randint(W, (num_tokens,), generator=rng),
    }


VOCAB = VocabShard(size=W, start=0, stop=W)
CHUNKING = Chunking(chunk_bytes=BUDGET_BYTES)


def linear_forward_backward(states: dict[str, Tensor]) -> None:
    states["student_hidden_TD"].grad = states["student_weight_WD"].grad = None
    weight = 0.5 / len(states["labels_T"])
    linear_kd_loss(
        **states, ce_weight_T=weight, kd_weight_T=weight, vocab=VOCAB, chunking=CHUNKING
    ).loss.backward()  # fmt: skip


@torch.no_grad()
def products_alone(states: dict[str, Tensor]) -> None:
    """The five products of every chunk, as linear_kd_loss makes them, and nothing between."""
    heads = Heads.of(*(states[name] for name in list(states)[:4]), VOCAB, CHUNKING)
    hidden = torch.empty_like(states["student_hidden_TD"])
    weight = torch.zeros(W, WIDTH)
    for chunk in heads.chunks():
        grad_NW = chunk.student_logits_NW.to(heads.gradient_dtype)  # no copy on the CPU
        hidden[chunk.start : chunk.stop] = heads.student.hidden_gradient(grad_NW)
        heads.student.add_weight_gradient_(grad_NW, chunk.hidden_ND, weight)


def measure_linear(dtype_name: str, num_tokens: int, rounds: int) -> dict[str, Any]:
    states = make_states(DTYPES[dtype_name], num_tokens)
    heads = Heads.of(*(states[name] for name in list(states)[:4]), VOCAB, CHUNKING)
    linear_forward_backward(states)
    products_alone(states)
    whole, products = [], []
    for _ in range(max(3, rounds * TOKENS[0] // num_tokens)):
        whole.append(seconds(linear_forward_backward, states))
        products.append(seconds(products_alone, states))
    extra = memory_elsewhere("tensors", "linear", dtype_name, str(num_tokens))
    budget = BUDGET_BYTES / 2**20
    return {
        "time_over_its_products": ratio(whole, products),
        "median_s": round(statistics.median(whole), 3),
        "tokens_per_chunk": heads.tokens_per_chunk(),
        "peak_extra_MiB": extra,
        "peak_resident_MiB": memory_elsewhere("resident", "linear", dtype_name, str(num_tokens)),
        "budget_MiB": budget,
        "peak_over_budget": round(extra / budget, 3),
        "whole_logits_MiB": round(2 * num_tokens * W * 4 / 2**20),
    }


# --- measuring -----------------------------------------------------------------------------------


def seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def ratio(times: list[float], unit: list[float]) -> dict[str, float]:
    """Of times within the same round: median, and the extremes."""
    ratios = [a / b for a, b in zip(times, unit, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def memory_elsewhere(*what: str) -> float:
    command = [sys.executable, __file__, "--memory-of", *what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def memory_here(how: str, what: str, dtype_name: str, which: str) -> float:
    """Peak MiB above the inputs, of one forward and backward after a warm-up on fewer tokens."""
    dtype = DTYPES[dtype_name]
    if what == "loss":
        student, teacher, labels = make_logits(dtype)
        few = (student.detach()[:64].clone().requires_grad_(), teacher[:64], labels[:64])
        forward_backward(which, *few)
        run = lambda: forward_backward(which, student, teacher, labels)
        result_bytes = 0
    else:
        states = make_states(dtype, int(which))
        hidden, weight = states["student_hidden_TD"], states["student_weight_WD"]
        few_states = {n: x if "weight" in n else x[:64].detach() for n, x in states.items()}
        few_states["student_hidden_TD"].requires_grad_()
        linear_forward_backward(few_states)
        weight.grad = None
        run = lambda: linear_forward_backward(states)
        result_bytes = hidden.numel() * hidden.element_size() + weight.numel() * 4
    measure = allocated_peak_bytes if how == "tensors" else resident_peak_bytes
    return round((measure(run) - result_bytes) / 2**20, 1)


def allocated_peak_bytes(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    total = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def resident_peak_bytes(run: Callable[[], object]) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def describe_machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def table(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# The loss on the CPU",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, Python "
        f"{machine['python']}. Ratios are medians over rounds of one run (least to most); what is "
        "counted is said in benchmarks/kd_loss_cpu.py, which wrote this.",
        "",
        f"`kd_loss`, forward and backward, T {T} x W {W}:",
        "",
        "| dtype | code | time over native | peak of tensors above the inputs | resident |",
        "| --- | --- | --- | --- | --- |",
    ]
    for dtype, rows in results["kd_loss"].items():
        for name, row in rows.items():
            of = row["time_over_native"]
            times = f"{of['median']:.2f} ({of['min']:.2f} to {of['max']:.2f})"
            lines.append(
                f"| {dtype} | {name} | {times} | {row['peak_extra_MiB']:.0f} MiB | "
                f"{row['peak_resident_MiB']:.0f} MiB |"
            )
    budget = BUDGET_BYTES // 2**20
    lines += [
        "",
        f"`linear_kd_loss`, forward and backward, W {W}, D and E {WIDTH}, logits in fp32, a budget "
        f"of {budget} MiB:",
        "",
        "| dtype | T | tokens per chunk | time over its matrix products | peak of tensors over the "
        "budget | resident | whole logits would take |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for dtype, sizes in results["linear_kd_loss"].items():
        for num_tokens, row in sizes.items():
            of = row["time_over_its_products"]
            lines.append(
                f"| {dtype} | {num_tokens} | {row['tokens_per_chunk']} | {of['median']:.3f} "
                f"({of['min']:.3f} to {of['max']:.3f}) | {row['peak_over_budget']:.3f} | "
                f"{row['peak_resident_MiB']:.0f} MiB | {row['whole_logits_MiB']} MiB |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
