"""How fast are kd_loss and linear_kd_loss on this GPU, beside what it can do and beside others?

    python benchmarks/kd_loss_gpu.py

- `ceilings`: what this GPU gives in this run: a copy from device memory to device memory, in bytes
  read plus bytes written, and a bf16 matrix product of random numbers.
- `kd_loss`: forward and backward on bf16 logits. Two passes over both logits and one written
  gradient are 10 bytes per (token, column); `of_copy` is that over the time and over the copy's
  bandwidth. `times_ms` are calls from Python, `graph_ms` replays of a captured CUDA graph, without
  the gaps between launches. Rows of kind `one launch` are both passes together, as linear_kd_loss
  uses them; they are counted with what they must read and write once.
- `linear_kd_loss`: from hidden states to the gradients of hidden states and head, in bf16.
  `products_ms` are its own matrix products alone: the same chunks, shapes and calls without the
  loss. `extra_bytes` is what exists at the peak beyond its inputs and what it keeps for the
  backward: the gradient of the hidden states and, in fp32, that of the head.
- `side_by_side`: the same logits through PyTorch, torch.compile and Liger kernels; for all of them
  loss = sum of CE + KL(teacher || student). Liger's cross-entropy writes its gradient over the
  logits and keeps its sums in their dtype.

Every time is a median; each is measured twice, so that the spread shows. Logits rotate among sets
that are together far larger than the second-level cache; hidden states and heads are so by
themselves. `loss_error` and `gradient_error` compare each implementation's result with the
reference in fp64 on the same bf16 inputs, the gradient as ||got - exact|| / ||exact||: rounding it
to bf16 costs 1.7e-3. Memory is what is asked of the allocator. A row that fails says why and the
next one runs.

Writes <output-dir>/<device>-<date>.json and a table of the same name, .md.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_salt.kernels import (
    Chunking,
    Heads,
    VocabShard,
    build,
    choose_backend,
    kd_loss,
    linear_kd_loss,
)
from megatron_salt.kernels.backend import LossInputs, LossOptions

REPO = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SECTIONS = ("ceilings", "kd_loss", "linear_kd_loss", "side_by_side")
LOGITS_SIZES = [(4096, 8192), (4096, 16384), (4096, 32768), (4096, 65536), (4096, 131072),
                (16384, 32768)]  # fmt: skip
ONE_LAUNCH_SIZES = [(4096, 32768), (4096, 131072)]
# T, D, E, W; the second is a quarter of a vocabulary of 131072, as on a rank of tp 4.
LINEAR_SIZES = [(8192, 2560, 2048, 32768), (4096, 4096, 2048, 32768)]
PACKAGES = ("megatron_salt", "torch", "triton", "liger_kernel")
MEASURING_S = 0.2  # of one median
BF16 = torch.bfloat16
DEVICE = "cuda"
IMPL: Any = "cuda"


@dataclass
class Run:
    """Options of a run and what it has found."""

    quick: bool
    deadline_s: float
    """By time.monotonic(); rows that would start later are skipped."""
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def copy_bytes_per_s(self) -> float:
        return float(self.results["ceilings"].get("copy_bytes_per_s", math.nan))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="one or two sizes of each kind")
    parser.add_argument("--only", choices=SECTIONS, help="one section, and the ceilings")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="rows that would start later are skipped"
    )
    parser.add_argument("--commit", help="the code's commit, where git cannot say it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"kd_loss_gpu.py needs a CUDA device; torch {torch.__version__} sees none",
              file=sys.stderr)  # fmt: skip
        return 2
    started_s = time.monotonic()
    run = Run(quick=args.quick, deadline_s=started_s + args.seconds)
    run.results = {"machine": describe_machine(args.commit), "counted": __doc__}
    # A part of a run does not replace a whole one.
    parts = [args.only] if args.only else []
    parts += ["quick"] if args.quick else []
    machine = run.results["machine"]
    stem = "-".join([slug(machine["gpu"]), machine["date"], *parts])
    measure = {
        "ceilings": measure_ceilings,
        "kd_loss": measure_kd_loss,
        "linear_kd_loss": measure_linear_kd_loss,
        "side_by_side": measure_side_by_side,
    }
    for section in SECTIONS:
        if args.only in (None, section) or section == "ceilings":
            print(f"\n{section}", flush=True)
            run.results[section] = measure[section](run)
            run.results["seconds"] = round(time.monotonic() - started_s, 1)
            write_results(args.output_dir / stem, run.results)
    print(f"\n{args.output_dir / stem}.json and .md, {run.results['seconds']} s")
    return 0


# --- Measuring ----------------------------------------------------------------------------------


def time_ms(calls: Sequence[Callable[[], object]], seconds: float = MEASURING_S) -> float:
    """Median milliseconds of a call on the device, the calls taking turns. All have run before."""
    start, stop = events(2)
    for call in calls:
        call()
    torch.cuda.synchronize()
    start.record()
    for call in calls:
        call()
    stop.record()
    torch.cuda.synchronize()
    estimate_ms = start.elapsed_time(stop) / len(calls)
    repetitions = min(max(math.ceil(1e3 * seconds / max(estimate_ms, 1e-3)), 5), 200)
    pairs = [events(2) for _ in range(repetitions)]
    for i, (start, stop) in enumerate(pairs):
        start.record()
        calls[i % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def times_ms(calls: Sequence[Callable[[], object]]) -> list[float]:
    return [time_ms(calls) for _ in range(2)]


def events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what the call launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes asked of the allocator at the peak of a call, above what is there before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)


def attempt(
    run: Run, facts: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """`facts` with what `measure` finds, or with what was in the way."""
    if time.monotonic() > run.deadline_s:
        row = {**facts, "error": "skipped: the time was used up"}
    else:
        try:
            row = {**facts, **measure()}
        except torch.OutOfMemoryError:
            row = {**facts, "error": "out of memory"}
        except ModuleNotFoundError as error:
            name = (error.name or "a module").split(".")[0]
            row = {**facts, "error": f"{name} is not installed"}
        except Exception as error:
            text = " ".join(str(error).split())[:500]
            row = {**facts, "error": f"{type(error).__name__}: {text}"}
        gc.collect()
        torch.cuda.empty_cache()
    print("  " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
    return row


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||, some rows at a time."""
    parts = zip(got.split(512), exact.split(512), strict=True)
    sums = [torch.stack([(g.double() - e).square().sum(), e.double().square().sum()])
            for g, e in parts]  # fmt: skip
    gap, whole = torch.stack(sums).sum(dim=0).sqrt().tolist()
    return gap / whole


def num_sets(bytes_of_one: int) -> int:
    """Sets of inputs that are together far larger than the second-level cache; at least 2."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(4 * cache_bytes / bytes_of_one))


# --- Ceilings -----------------------------------------------------------------------------------


def measure_ceilings(run: Run) -> dict[str, Any]:
    return attempt(run, {}, measure_copy_and_product)


def measure_copy_and_product() -> dict[str, Any]:
    copy_bytes, copies = measure_copy()
    size = 8192
    a, b = torch.randn(2, size, size, dtype=BF16, device=DEVICE)
    products = times_ms([lambda: a @ b])
    return {
        "copy_bytes": copy_bytes,
        "copy_ms": copies,
        "copy_bytes_per_s": copy_bytes / min(copies) * 1e3,
        "product_size": size,
        "product_ms": products,
        "product_flop_per_s": 2 * size**3 / min(products) * 1e3,
    }


def measure_copy() -> tuple[int, list[float]]:
    """Bytes read and written, and medians."""
    source = torch.randn(1 << 30, dtype=BF16, device=DEVICE)  # 2 GiB
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size(), times_ms([lambda: target.copy_(source)])


# --- On logits ----------------------------------------------------------------------------------


class Logits(NamedTuple):
    """One set of inputs. Weights are 1, which spares others a scaling of their gradients."""

    student_TW: Tensor
    teacher_TW: Tensor
    labels_T: Tensor
    weight_T: Tensor

    @property
    def vocab(self) -> VocabShard:
        return whole(self.student_TW.shape[1])


def whole(size: int) -> VocabShard:
    return VocabShard(size=size, start=0, stop=size)


def make_logits(T: int, W: int, seed: int) -> Logits:
    """A teacher near its student."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    options: dict[str, Any] = {"generator": rng, "device": DEVICE}
    student = torch.randn(T, W, dtype=BF16, **options).mul_(3)
    teacher = torch.randn(T, W, dtype=BF16, **options).add_(student)
    labels = torch.randint(W, (T,), **options)
    return Logits(student.requires_grad_(), teacher, labels, torch.ones(T, device=DEVICE))


def with_gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


def our_loss(x: Logits) -> Tensor:
    return kd_loss(
        x.student_TW, x.teacher_TW, x.labels_T, ce_weight_T=x.weight_T, kd_weight_T=x.weight_T,
        vocab=x.vocab, impl=IMPL,
    ).loss  # fmt: skip


def exact_results(x: Logits) -> tuple[Tensor, Tensor]:
    """Loss, and gradient rounded from fp64 to fp32."""
    gradient = torch.empty_like(x.student_TW, dtype=torch.float32)
    loss = x.weight_T.new_zeros((), dtype=torch.float64)
    for start in range(0, len(x.labels_T), 512):
        rows = slice(start, start + 512)
        student = x.student_TW.detach()[rows].double().requires_grad_()
        part = kd_loss(
            student, x.teacher_TW[rows].double(), x.labels_T[rows], ce_weight_T=1.0,
            kd_weight_T=1.0, vocab=x.vocab, impl="reference",
        ).loss  # fmt: skip
        gradient[rows] = torch.autograd.grad(part, student)[0].float()
        loss += part.detach()
    return loss, gradient


def errors(got: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    loss_error = abs(float(got[0]) - float(exact[0])) / abs(float(exact[0]))
    found = {"loss_error": loss_error}
    for name, ours, theirs in zip(names, got[1:], exact[1:], strict=True):
        found[name] = relative_error(ours, theirs)
    return found


def plain_loss(student_TW: Tensor, teacher_TW: Tensor, labels_T: Tensor) -> Tensor:
    """The textbook formula in fp32."""
    log_q = student_TW.float().log_softmax(dim=-1)
    log_p = teacher_TW.float().log_softmax(dim=-1)
    ce = F.nll_loss(log_q, labels_T, reduction="sum")
    return ce + F.kl_div(log_q, log_p, reduction="sum", log_target=True)


class Way(NamedTuple):
    """One implementation: what makes its loss, from a set of inputs."""

    name: str
    make: Callable[[], Callable[[Any], Tensor]]
    overwrites: bool = False
    """It writes over its inputs."""
    chunking: Chunking | None = None
    """Of linear_kd_loss."""


def eager() -> Callable[[Logits], Tensor]:
    return lambda x: plain_loss(x.student_TW, x.teacher_TW, x.labels_T)


def inductor() -> Callable[[Logits], Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(plain_loss, dynamic=False)
    return lambda x: compiled(x.student_TW, x.teacher_TW, x.labels_T)


def liger_on_logits(log_dtype: torch.dtype) -> Callable[[Logits], Tensor]:
    """Its KL divergence wants log-probabilities; its CE goes last, because it leaves a gradient
    where the logits were."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="sum", log_target=True)
    cross_entropy = LigerCrossEntropyLoss(reduction="sum")

    def loss(x: Logits) -> Tensor:
        log_q, log_p = (logits.log_softmax(dim=-1, dtype=log_dtype) for logits in x[:2])
        kl = divergence(log_q, log_p)
        del log_q, log_p
        return kl + cross_entropy(x.student_TW, x.labels_T)

    return loss


LOGITS_WAYS = [
    Way("kd_loss", lambda: our_loss),
    Way("PyTorch", eager),
    Way("Liger KLDIVLoss + CrossEntropyLoss, fp32 log-probabilities",
        lambda: liger_on_logits(torch.float32), overwrites=True),
    Way("Liger KLDIVLoss + CrossEntropyLoss, bf16 log-probabilities",
        lambda: liger_on_logits(BF16), overwrites=True),
    Way("torch.compile", inductor),
]  # fmt: skip


def measure_way(way: Way, sets: list[Logits], exact: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The first call is checked. A way that overwrites gets copies, which are not counted."""
    started_s = time.monotonic()
    loss = way.make()
    if way.overwrites:
        sets = [x._replace(student_TW=x.student_TW.detach().clone().requires_grad_()) for x in sets]
    calls = [functools.partial(lambda x: with_gradient(loss(x), x.student_TW), x) for x in sets]
    found = errors(calls[0](), exact, ["gradient_error"])
    first_s = time.monotonic() - started_s
    for call in calls:
        call()
    found["extra_bytes"] = peak_bytes(calls[0])
    return {"times_ms": times_ms(calls), **found, "first_call_s": round(first_s, 2)}


def measure_side_by_side(run: Run) -> list[dict[str, Any]]:
    rows = []
    for T, W in LOGITS_SIZES[2:3] if run.quick else LOGITS_SIZES:
        sets, exact = logits_and_results(T, W)
        for way in LOGITS_WAYS:
            measure = functools.partial(measure_way, way, sets, exact)
            rows.append(attempt(run, {"T": T, "W": W, "name": way.name}, measure))
        del sets, exact, measure
    return rows


def logits_and_results(T: int, W: int) -> tuple[list[Logits], tuple[Tensor, Tensor]]:
    gc.collect()
    torch.cuda.empty_cache()
    sets = [make_logits(T, W, seed) for seed in range(num_sets(2 * T * W * BF16.itemsize))]
    return sets, exact_results(sets[0])


def measure_kd_loss(run: Run) -> list[dict[str, Any]]:
    rows = []
    for T, W in LOGITS_SIZES[:3:2] if run.quick else LOGITS_SIZES:
        facts = {"kind": "forward and backward", "T": T, "W": W}
        measure = functools.partial(measure_ours, run, T, W)
        rows.append(attempt(run, facts, measure))
    for T, W in ONE_LAUNCH_SIZES[:1] if run.quick else ONE_LAUNCH_SIZES:
        for dtype in (BF16, torch.float32):
            facts = {"kind": f"one launch, {dtype_name(dtype)} logits", "T": T, "W": W}
            measure = functools.partial(measure_one_launch, run, T, W, dtype)
            rows.append(attempt(run, facts, measure))
    return rows


def measure_ours(run: Run, T: int, W: int) -> dict[str, Any]:
    sets, exact = logits_and_results(T, W)
    calls = [functools.partial(lambda x: with_gradient(our_loss(x), x.student_TW), x) for x in sets]
    found = errors(calls[0](), exact, ["gradient_error"])
    del exact
    extra = peak_bytes(calls[0])
    found["extra_bytes_beyond_the_gradient"] = extra - T * W * BF16.itemsize
    found["times_ms"] = times_ms(calls)
    graphs = [captured(call) for call in calls]
    found["graph_ms"] = times_ms([graph.replay for graph in graphs])
    del graphs
    with torch.no_grad():
        forward = [captured(functools.partial(our_loss, x)) for x in sets]
    found["forward_graph_ms"] = times_ms([graph.replay for graph in forward])
    return with_bandwidth(run, found, 10 * T * W)


def with_bandwidth(run: Run, found: dict[str, Any], num_bytes: int) -> dict[str, Any]:
    found["bytes"] = num_bytes
    found["graph_bytes_per_s"] = num_bytes / min(found["graph_ms"]) * 1e3
    found["of_copy"] = found["graph_bytes_per_s"] / run.copy_bytes_per_s
    if "times_ms" in found:
        found["of_copy_from_python"] = num_bytes / min(found["times_ms"]) * 1e3
        found["of_copy_from_python"] /= run.copy_bytes_per_s
    return found


def measure_one_launch(run: Run, T: int, W: int, dtype: torch.dtype) -> dict[str, Any]:
    """Values and a bf16 gradient of logits in `dtype`, in one launch."""
    sets = []
    for seed in range(num_sets(2 * T * W * dtype.itemsize)):
        x = make_logits(T, W, seed)
        logits = (x.student_TW.detach().to(dtype), x.teacher_TW.to(dtype))
        sets.append(LossInputs(*logits, x.labels_T, x.weight_T, x.weight_T))
    del x, logits
    backend = choose_backend(IMPL, device=sets[0].labels_T.device, dtypes=frozenset({dtype, BF16}))
    options, one = LossOptions(vocab=whole(W)), torch.ones((), device=DEVICE)

    def call(inputs: LossInputs) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(inputs.student_TW, dtype=BF16)
        scores = backend.scores_and_gradient_(inputs, options, one, gradient)
        return scores.loss_T.sum(), gradient

    inputs = sets[0]
    bf16 = Logits(inputs.student_TW.to(BF16), inputs.teacher_TW.to(BF16), *inputs[2:4])
    found = errors(call(inputs), exact_results(bf16), ["gradient_error"])
    graphs = [captured(functools.partial(call, inputs)) for inputs in sets]
    found["graph_ms"] = times_ms([graph.replay for graph in graphs])
    return with_bandwidth(run, found, (2 * dtype.itemsize + BF16.itemsize) * T * W)


# --- From hidden states -------------------------------------------------------------------------


class Hidden(NamedTuple):
    """Hidden states and heads. Weights are 1 / T, the mean that Liger computes."""

    hidden_TD: Tensor
    weight_WD: Tensor
    teacher_hidden_TE: Tensor
    teacher_weight_WE: Tensor
    labels_T: Tensor

    @property
    def vocab(self) -> VocabShard:
        return whole(self.weight_WD.shape[0])


def make_hidden(T: int, D: int, E: int, W: int) -> Hidden:
    rng = torch.Generator(DEVICE).manual_seed(0)
    options: dict[str, Any] = {"generator": rng, "device": DEVICE}
    student, teacher = (
        (torch.randn(T, width, **options), torch.randn(W, width, **options) * (3 / width**0.5))
        for width in (D, E)
    )
    return Hidden(
        *(x.to(BF16).requires_grad_() for x in student),
        *(x.to(BF16) for x in teacher),
        torch.randint(W, (T,), **options),
    )


def our_linear_loss(chunking: Chunking) -> Callable[[Hidden], Tensor]:
    return lambda x: linear_kd_loss(
        *x, ce_weight_T=1 / len(x.labels_T), kd_weight_T=1 / len(x.labels_T), vocab=x.vocab,
        chunking=chunking, impl=IMPL,
    ).loss  # fmt: skip


def exact_linear_results(x: Hidden) -> list[Tensor]:
    """Loss and both gradients in fp64."""
    student = [y.detach().double().requires_grad_() for y in x[:2]]
    loss = linear_kd_loss(
        *student, *(y.double() for y in x[2:4]), x.labels_T, ce_weight_T=1 / len(x.labels_T),
        kd_weight_T=1 / len(x.labels_T), vocab=x.vocab, chunking=Chunking(logits_dtype=None),
        impl="reference",
    ).loss  # fmt: skip
    return list(with_gradient(loss, *student))


def whole_logits(loss: Callable[[Logits], Tensor]) -> Callable[[Hidden], Tensor]:
    """All logits in bf16 by plain products, then a loss on them."""

    def from_hidden(x: Hidden) -> Tensor:
        student_TW = x.hidden_TD @ x.weight_WD.t()
        teacher_TW = x.teacher_hidden_TE @ x.teacher_weight_WE.t()
        ones_T = torch.ones(len(x.labels_T), device=student_TW.device)
        return loss(Logits(student_TW, teacher_TW, x.labels_T, ones_T)) / len(x.labels_T)

    return from_hidden


def liger_two_sweeps(accum_dtype: torch.dtype | None) -> Callable[[Hidden], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    # beta = 0 is the forward KL; both are means over tokens.
    divergence = LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=accum_dtype)
    cross_entropy = LigerFusedLinearCrossEntropyLoss(reduction="mean", accum_dtype=accum_dtype)

    def loss(x: Hidden) -> Tensor:
        kl = divergence(*x[:4], None)
        return kl + cross_entropy(x.weight_WD, x.hidden_TD, x.labels_T)

    return loss


def liger_on_probabilities() -> Callable[[Hidden], Tensor]:
    """Its fused KL takes the teacher's probabilities, which are made whole, in bf16."""
    from liger_kernel.transformers import (
        LigerFusedLinearCrossEntropyLoss,
        LigerFusedLinearKLDivLoss,
    )

    divergence = LigerFusedLinearKLDivLoss(reduction="batchmean", accum_dtype=torch.float32)
    cross_entropy = LigerFusedLinearCrossEntropyLoss(reduction="mean", accum_dtype=torch.float32)

    def loss(x: Hidden) -> Tensor:
        p_TW = (x.teacher_hidden_TE @ x.teacher_weight_WE.t()).softmax(dim=-1)
        kl = divergence(x.hidden_TD, x.weight_WD, p_TW)
        del p_TW
        return kl + cross_entropy(x.weight_WD, x.hidden_TD, x.labels_T)

    return loss


def liger_one_sweep() -> Callable[[Hidden], Tensor]:
    """CE and KL of chunks of 1024 tokens by torch.compile."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch._dynamo.reset()
    both = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0)
    return lambda x: both(*x)


def our_way(name: str, chunking: Chunking) -> Way:
    return Way(name, lambda: our_linear_loss(chunking), chunking=chunking)


LINEAR_WAYS = [
    our_way("linear_kd_loss, fp32 logits", Chunking(logits_dtype=torch.float32)),
    our_way("linear_kd_loss, bf16 logits", Chunking(logits_dtype=None)),
    Way("whole bf16 logits, kd_loss", lambda: whole_logits(our_loss)),
    Way("whole bf16 logits, PyTorch", lambda: whole_logits(eager())),
    Way("Liger FusedLinearJSD + FusedLinearCrossEntropy, gradients added up in fp32",
        lambda: liger_two_sweeps(torch.float32)),
    Way("Liger FusedLinearJSD + FusedLinearCrossEntropy, in bf16", lambda: liger_two_sweeps(None)),
    Way("Liger FusedLinearKLDiv + FusedLinearCrossEntropy, in fp32", liger_on_probabilities),
    Way("Liger chunked FusedLinearJSD with CE, in bf16", liger_one_sweep),
]  # fmt: skip


def measure_linear_way(way: Way, x: Hidden, exact: list[Tensor]) -> dict[str, Any]:
    started_s = time.monotonic()
    loss = way.make()
    call = lambda: with_gradient(loss(x), x.hidden_TD, x.weight_WD)
    found = errors(call(), exact, ["hidden_gradient_error", "head_gradient_error"])
    first_s = time.monotonic() - started_s
    peak = peak_bytes(call)
    found |= {"times_ms": times_ms([call]), "peak_bytes": peak, "first_call_s": round(first_s, 2)}
    if way.chunking is not None:
        kept = x.hidden_TD.numel() * x.hidden_TD.element_size() + 4 * x.weight_WD.numel()
        products = times_ms([matrix_products(x, way.chunking)])
        found |= {
            "products_ms": products,
            "times_over_products": min(found["times_ms"]) / min(products),
            "extra_bytes": peak - kept,
            "chunk_bytes": way.chunking.chunk_bytes,
            "products_flop_per_s": product_flop(x) / min(products) * 1e3,
        }
    return found


def matrix_products(x: Hidden, chunking: Chunking) -> Callable[[], None]:
    """The products of linear_kd_loss, in its chunks, on a gradient of random numbers."""
    heads = Heads.of(*x[:4], x.vocab, chunking)
    assert heads.teacher is not None
    student, teacher = heads.student, heads.teacher
    T, W = len(x.labels_T), x.weight_WD.shape[0]
    step = min(heads.tokens_per_chunk(), T)
    hidden_TD = x.hidden_TD.detach()
    student_NW, teacher_NW = hidden_TD.new_empty((2, step, W), dtype=heads.logits_dtype)
    grad_NW = torch.randn_like(student_NW, dtype=heads.gradient_dtype)
    grad_WD = torch.zeros_like(x.weight_WD, dtype=torch.float32, requires_grad=False)

    def multiply() -> None:
        for start in range(0, T, step):
            hidden_ND = hidden_TD[start : start + step]
            rows = slice(0, len(hidden_ND))
            student.logits_(hidden_ND, student_NW[rows])
            teacher.logits_(x.teacher_hidden_TE[start : start + step], teacher_NW[rows])
            student.hidden_gradient(grad_NW[rows])
            student.add_weight_gradient_(grad_NW[rows], hidden_ND, grad_WD)

    return multiply


def product_flop(x: Hidden) -> int:
    """Of the student's three products and the teacher's one."""
    T, W = len(x.labels_T), x.weight_WD.shape[0]
    return 2 * T * W * (3 * x.hidden_TD.shape[1] + x.teacher_hidden_TE.shape[1])


def measure_linear_kd_loss(run: Run) -> list[dict[str, Any]]:
    rows = []
    for T, D, E, W in LINEAR_SIZES[:1] if run.quick else LINEAR_SIZES:
        gc.collect()
        torch.cuda.empty_cache()
        x = make_hidden(T, D, E, W)
        exact = exact_linear_results(x)
        for way in LINEAR_WAYS[:-1] if run.quick else LINEAR_WAYS:
            facts = {"T": T, "D": D, "E": E, "W": W, "name": way.name}
            measure = functools.partial(measure_linear_way, way, x, exact)
            rows.append(attempt(run, facts, measure))
        del x, exact, measure
    return rows


# --- What is written ----------------------------------------------------------------------------


def describe_machine(commit: str | None) -> dict[str, Any]:
    """The GPU, its driver and the versions; nothing that names the machine."""
    properties = torch.cuda.get_device_properties(0)
    smi = output_of("nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm",
                    "--format=csv,noheader").split("\n")[0].split(", ")  # fmt: skip
    driver, power, clock = smi if len(smi) == 3 else ("unknown", "unknown", "unknown")
    nvcc = build.find_nvcc()
    release = re.search(r"release ([\d.]+)", output_of(nvcc, "--version") if nvcc else "")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit or commit_of_repository(),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "power_limit": power,
        "max_sm_clock": clock,
        "driver": driver,
        "cuda_of_torch": torch.version.cuda,
        "nvcc": release[1] if release else "none",
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }


def commit_of_repository() -> str:
    commit = output_of("git", "-C", str(REPO), "rev-parse", "HEAD").strip()
    if not commit:
        return "unknown"
    paths = ("megatron_salt", "benchmarks/*.py")
    changed = output_of("git", "-C", str(REPO), "status", "--porcelain", "--", *paths)
    return commit + (" with changes" if changed.strip() else "")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dtype_name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", torch.float32: "fp32"}[dtype]


def shown(value: Any) -> str:
    """A value in few characters, for the terminal."""
    if isinstance(value, list):
        return "/".join(shown(x) for x in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(stem: Path, results: dict[str, Any]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix: a device's name may hold a dot.
    text = json.dumps(results, indent=2) + "\n"
    (stem.parent / f"{stem.name}.json").write_text(text, encoding="utf-8")
    (stem.parent / f"{stem.name}.md").write_text(markdown_of(results), encoding="utf-8")


Column = tuple[str, Callable[[dict[str, Any]], str]]


def number(key: str, form: str = ".3g", scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    """A column's text: one number, or both of two measurements."""

    def text(row: dict[str, Any]) -> str:
        if key not in row:
            return ""
        values = row[key] if isinstance(row[key], list) else [row[key]]
        return " / ".join(format(scale * value, form) for value in values)

    return text


def word(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: str(row.get(key, "")).replace("|", "\\|")


MIB = 1 / 2**20
TABLES: dict[str, list[Column]] = {
    "kd_loss": [
        ("", word("kind")), ("T", word("T")), ("W", word("W")),
        ("ms from Python", number("times_ms", ".3f")), ("ms of a graph", number("graph_ms", ".3f")),
        ("of it forward", number("forward_graph_ms", ".3f")),
        ("TB/s", number("graph_bytes_per_s", ".2f", 1e-12)),
        ("of the copy", number("of_copy", ".1%")),
        ("from Python", number("of_copy_from_python", ".1%")),
        ("MiB beyond the gradient", number("extra_bytes_beyond_the_gradient", ".2f", MIB)),
        ("error of the loss", number("loss_error", ".1e")),
        ("of the gradient", number("gradient_error", ".1e")),
    ],
    "linear_kd_loss": [
        ("", word("name")), ("T", word("T")), ("D", word("D")), ("E", word("E")), ("W", word("W")),
        ("ms", number("times_ms", ".2f")), ("its products alone", number("products_ms", ".2f")),
        ("ratio", number("times_over_products", ".3f")),
        ("TFLOP/s of the products", number("products_flop_per_s", ".0f", 1e-12)),
        ("MiB at the peak", number("peak_bytes", ".0f", MIB)),
        ("of it beyond gradients", number("extra_bytes", ".0f", MIB)),
        ("budget", number("chunk_bytes", ".0f", MIB)),
        ("error of the loss", number("loss_error", ".1e")),
        ("of hidden's gradient", number("hidden_gradient_error", ".1e")),
        ("of the head's", number("head_gradient_error", ".1e")),
    ],
    "side_by_side": [
        ("", word("name")), ("T", word("T")), ("W", word("W")), ("ms", number("times_ms", ".3f")),
        ("times kd_loss", number("times_of_kd_loss", ".2f")),
        ("MiB at the peak", number("extra_bytes", ".0f", MIB)),
        ("error of the loss", number("loss_error", ".1e")),
        ("of the gradient", number("gradient_error", ".1e")),
    ],
}  # fmt: skip


def markdown_of(results: dict[str, Any]) -> str:
    machine, ceilings = results["machine"], results["ceilings"]
    lines = [f"# kd_loss on {machine['gpu']}, {machine['date']}", ""]
    lines += ["Written by `benchmarks/kd_loss_gpu.py`, whose first lines say what is counted.", ""]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in machine.items()]
    if "error" in ceilings:
        lines += [f"| ceilings | {ceilings['error']} |"]
    else:
        copy, product = ceilings["copy_bytes_per_s"], ceilings["product_flop_per_s"]
        lines += [f"| copy, bytes read and written | {copy * 1e-12:.2f} TB/s |"]
        size = ceilings["product_size"]
        lines += [f"| bf16 matrix product of size {size} | {product * 1e-12:.0f} TFLOP/s |"]
    for section, columns in TABLES.items():
        if section in results:
            lines += ["", f"## {section}", "", *table_of(columns, results[section])]
    return "\n".join(lines) + "\n"


def table_of(columns: list[Column], rows: list[dict[str, Any]]) -> list[str]:
    """A row that failed has its error in place of its numbers. Two numbers are two medians."""
    ours = {(row.get("T"), row.get("W")): min(row["times_ms"])
            for row in rows if row.get("name") == "kd_loss" and "times_ms" in row}  # fmt: skip
    lines = ["| " + " | ".join(title for title, _ in columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        own = ours.get((row.get("T"), row.get("W")))
        if own and "times_ms" in row:
            row = {**row, "times_of_kd_loss": min(row["times_ms"]) / own}
        cells = [text(row) for _, text in columns]
        if "error" in row:
            cells[cells.index("")] = str(row["error"]).replace("|", "\\|")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
