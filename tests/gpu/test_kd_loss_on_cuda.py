"""The loss's kernels on a CUDA device: exact, at rest where they should be, alone in their memory.

SALT_GPU_TESTS_ON_CPU=1 runs the tests of values on the CUDA kernels compiled for the CPU, to try
the tests themselves.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from commands import run_command
from loss_backends import chosen, cuda_on_cpu
from loss_cases import (
    OUTLIERS,
    PACKED,
    TEMPERATURES,
    LinearCase,
    LossCase,
    LossResult,
    Placement,
    assert_as_exact_as_autograd,
    autograd_linear_result,
    autograd_result,
    linear_arguments,
    loss_arguments,
    loss_result,
    make_case,
    make_linear_case,
    masked_out,
    place,
    relative_error,
    with_outliers,
    with_sparse_teacher,
    with_truncated_teacher,
    without_ce,
    without_teacher,
)
from torch import Tensor

from megatron_salt.kernels import Chunking, KdLoss, kd_loss, linear_kd_loss
from megatron_salt.kernels.backend import LossInputs, LossOptions
from megatron_salt.kernels.choose import choose_backend

ON_CPU = os.environ.get("SALT_GPU_TESTS_ON_CPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ON_CPU and not torch.cuda.is_available(), reason="no CUDA device on this machine"
    ),
]
real_device = pytest.mark.skipif(ON_CPU, reason="about the device itself, which is emulated")

DEVICE = "cpu" if ON_CPU else "cuda"
IMPL: Any = "auto" if ON_CPU else "cuda"
TOLERANCE = 1e-6
"""Of fp32, relative to the largest value: ex2.approx alone is up to 2.4e-7 away."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(student, teacher) for student in DTYPES for teacher in DTYPES]


@pytest.fixture(autouse=True)
def kernels_of_the_device() -> Iterator[None]:
    with chosen("cuda on cpu") if ON_CPU else contextlib.nullcontext():
        yield


def case_of(T: int, C: int, **settings: Any) -> LossCase:
    return make_case(T, C, device=DEVICE, **settings)


def arguments_of(case: LossCase, *args: Any, **changes: Any) -> dict[str, Any]:
    return loss_arguments(case, *args, **changes) | {"impl": IMPL}


def implementation(case: LossCase, *args: Any, **changes: Any) -> LossResult:
    return loss_result(arguments_of(case, *args, **changes))


def check(
    case: LossCase,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype | None = None,
    where: Placement = PACKED,
    teacher_where: Placement | None = None,
) -> LossResult:
    """The result, found to be as exact as plain autograd's."""
    got = implementation(
        case, dtype, where, teacher_dtype=teacher_dtype, teacher_where=teacher_where
    )
    plain, exact = autograd_result(case, dtype, teacher_dtype), autograd_result(case)
    assert_as_exact_as_autograd(got, plain, exact, tolerance=TOLERANCE)
    return got


@pytest.mark.parametrize("C", [123, 507, 2049, 32768, 50257, 262144 + 7])
@pytest.mark.parametrize("T", [0, 1, 3, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_exact_as_plain_autograd(dtype: torch.dtype, T: int, C: int) -> None:
    check(case_of(T, C), dtype)


@pytest.mark.parametrize(
    ("how", "num_kept", "C"),
    [("renormalise", 50, 32768), ("to_label", 1, 123), ("sampled", 50, 2049), ("ghost", 12, 50257),
     ("ghost", 507, 507), ("ghost", 50, 262144 + 7)],
)  # fmt: skip
@pytest.mark.parametrize("b", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_teacher_is_as_exact_as_plain_autograd(
    dtype: torch.dtype, b: float, how: str, num_kept: int, C: int
) -> None:
    check(with_sparse_teacher(case_of(33, C, b=b), how, num_kept), dtype)


@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), PAIRS, ids=str)
def test_dtypes_and_temperatures_mix(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype, a: float, b: float
) -> None:
    for T, C in ((33, 2049), (7, 20000)):
        check(case_of(T, C, a=a, b=b), student_dtype, teacher_dtype)


@pytest.mark.parametrize("C", [1, 7, 8, 9, 507, 4096, 8191])
@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), PAIRS, ids=str)
def test_rows_may_start_anywhere(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype, C: int
) -> None:
    """Padding and gaps as with logits[:, 1:], odd rows, storage that starts at an odd element."""
    case = case_of(18, C, b=2.0)
    ways = [
        (Placement(padding=0), Placement(padding=0)),
        (Placement(padding=0, gap=1, offset=1), Placement(padding=0, gap=1, offset=1)),
        (Placement(padding=0, gap=C % 2 + 1, offset=3), Placement(padding=1)),
        (Placement(padding=2, offset=5), Placement(padding=0, gap=3, offset=7)),
    ]
    for student_where, teacher_where in ways:
        check(case, student_dtype, teacher_dtype, student_where, teacher_where)


@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OUTLIERS)
def test_large_logits_cost_no_digits(kind: str, dtype: torch.dtype, a: float, b: float) -> None:
    check(with_outliers(case_of(16, 2049, a=a, b=b), kind), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_may_give_tokens_no_probability(dtype: torch.dtype) -> None:
    got = check(with_truncated_teacher(case_of(16, 2049, a=2.0), 5), dtype)
    assert got.kl_T.isfinite().all()


@pytest.mark.parametrize("C", [507, 32768])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_that_equals_its_teacher_is_at_rest(
    dtype: torch.dtype, temperature: float, C: int
) -> None:
    case = case_of(16, C, a=temperature, b=temperature)
    case = without_ce(replace(case, teacher_TV=case.student_TV))
    for teacher_where in (PACKED, Placement(padding=0, gap=2, offset=3)):
        got = implementation(case, dtype, teacher_where=teacher_where)
        assert (got.kl_T == 0).all() and got.loss == 0
        assert (got.grad_TV == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("b", [1.0, 2.0])
def test_zero_weight_is_exactly_nothing(bad: float, b: float) -> None:
    case = case_of(12, 2049, b=b)
    good = implementation(case, torch.bfloat16)
    student, teacher = case.student_TV.clone(), case.teacher.clone()
    student[4, 7], teacher[4, 9] = bad, bad  # rows 4 and 5 weigh nothing
    student[5], teacher[5] = bad, bad
    broken = replace(case, student_TV=student, teacher_TV=teacher)
    got = implementation(broken, torch.bfloat16)
    assert (got.grad_TV[4:6] == 0).all()
    assert torch.equal(got.grad_TV, good.grad_TV) and got.loss == good.loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_batch_of_nan_has_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    case = case_of(9, 507)
    broken = torch.full_like(case.student_TV, torch.nan)
    case = masked_out(replace(case, student_TV=broken, teacher_TV=broken))
    got = implementation(case, dtype)
    assert got.loss == 0 and (got.grad_TV == 0).all()


def test_token_with_ce_alone_ignores_a_broken_teacher() -> None:
    case = case_of(12, 2049)
    teacher = case.teacher.clone()
    teacher[3] = torch.nan  # row 3 has no KD weight
    case = replace(case, ce_weight_T=torch.ones_like(case.ce_weight_T))
    exact = autograd_result(case)
    got = implementation(replace(case, teacher_TV=teacher), torch.float32)
    assert relative_error(got.grad_TV, exact.grad_TV) < TOLERANCE
    assert relative_error(got.loss, exact.loss) < TOLERANCE


@pytest.mark.parametrize("C", [507, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_teacher_it_is_cross_entropy(dtype: torch.dtype, C: int) -> None:
    case = without_teacher(case_of(24, C, b=2.0))
    assert (check(case, dtype).kl_T == 0).all()


def test_gradient_follows_what_is_upstream() -> None:
    case = case_of(8, 2049, b=2.0)
    arguments = arguments_of(case, torch.float32, teacher_dtype=torch.bfloat16)
    student, loss = arguments["student_logits_TW"], kd_loss(**arguments).loss
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(-3.0 * loss, student)
    assert torch.allclose(twice, -3.0 * once, rtol=1e-6)


@pytest.mark.parametrize(
    "where", [Placement(padding=3), Placement(padding=2, gap=1, offset=1)], ids=["packed", "odd"]
)
@pytest.mark.parametrize("C", [1, 507, 2049, 20000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_over_its_logits_touches_nothing_else(
    dtype: torch.dtype, C: int, where: Placement
) -> None:
    """Both passes in one launch, as `linear_kd_loss` uses them."""
    case = case_of(11, C)
    backend = cuda_on_cpu()
    if not ON_CPU:
        backend = choose_backend(IMPL, device=case.labels_T.device, dtypes=frozenset({dtype}))
    options = LossOptions(vocab=arguments_of(case, dtype)["vocab"])
    weights = [weight_T.float() for weight_T in (case.ce_weight_T, case.kd_weight_T)]
    student, teacher = (place(x, dtype, where) for x in (case.student_TV, case.teacher))
    rows = LossInputs(student, teacher, case.labels_T, *weights)
    one = torch.ones((), device=DEVICE)

    expected = torch.empty(student.shape, dtype=dtype, device=DEVICE)
    scores = backend.scores(rows, options)
    backend.gradient_(rows, options, scores.saved, one, expected)
    memory = student._base
    assert memory is not None
    before = memory.clone()
    got = backend.scores_and_gradient_(rows, options, one, student)
    assert torch.equal(student, expected)
    assert all(torch.equal(x, y) for x, y in zip(got[:3], scores[:3], strict=True))
    before.as_strided(student.shape, student.stride(), student.storage_offset()).copy_(student)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(memory.view(bits), before.view(bits)), "memory around the rows has changed"


@pytest.mark.parametrize("C", [2049, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype, C: int) -> None:
    case = case_of(257, C, a=2.0, b=3.0)
    first, second = (implementation(case, dtype) for _ in range(2))
    for name, x, y in zip(LossResult._fields, first, second, strict=True):
        assert torch.equal(x, y), name


@real_device
def test_work_is_queued_on_the_current_stream() -> None:
    case = case_of(65, 2049)
    expected = implementation(case, torch.bfloat16)
    arguments = arguments_of(case, torch.bfloat16)
    names = ("student_logits_TW", "teacher_logits_TW")
    logits = [arguments[name].detach() for name in names]
    student, teacher = (torch.full_like(x, 1.0) for x in logits)
    arguments |= zip(names, (student, teacher), strict=True)
    student.requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms: what runs elsewhere meanwhile reads ones
        with torch.no_grad():
            student.copy_(logits[0])
            teacher.copy_(logits[1])
        result = kd_loss(**arguments)
        (gradient,) = torch.autograd.grad(result.loss, student)
    stream.synchronize()
    assert torch.equal(result.loss.detach(), expected.loss)
    assert torch.equal(gradient[:, :2049], expected.grad_TV)


@real_device
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize("C", [2049, 32768])
def test_captured_graph_computes_what_eager_calls_do(C: int, a: float, b: float) -> None:
    cases = [case_of(33, C, a=a, b=b, seed=seed) for seed in (1, 2)]
    case = cases[0]
    weights = [weight_T.float() for weight_T in (case.ce_weight_T, case.kd_weight_T)]
    static = replace(
        case, labels_T=case.labels_T.clone(), ce_weight_T=weights[0], kd_weight_T=weights[1]
    )
    arguments = arguments_of(static, torch.bfloat16)
    student, teacher = arguments["student_logits_TW"], arguments["teacher_logits_TW"]

    def step() -> list[Tensor]:
        result = kd_loss(**arguments)
        (gradient,) = torch.autograd.grad(result.loss, student)
        return [result.loss.detach(), result.ce_T, result.kl_T, gradient]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new in reversed(cases):
        with torch.no_grad():
            student[:, :C] = new.student_TV.bfloat16()
            teacher[:, :C] = new.teacher.bfloat16()
            for target, source in zip(
                (static.labels_T, *weights),
                (new.labels_T, new.ce_weight_T, new.kd_weight_T),
                strict=True,
            ):
                target.copy_(source)
        eager = step()
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, eager, strict=True))


class LinearCall:
    """A case in the dtype that training has it in, to be called again and again."""

    def __init__(self, case: LinearCase, dtype: torch.dtype, W: int, **options: Any) -> None:
        self.arguments = linear_arguments(case, dtype, W) | {"impl": IMPL} | options
        for name in ("ce_weight_T", "kd_weight_T"):
            self.arguments[name] = self.arguments[name].float()

    def __call__(self, **changes: Any) -> KdLoss:
        return linear_kd_loss(**(self.arguments | changes))

    def results(self, **changes: Any) -> list[Tensor]:
        """Loss, values, and gradients of hidden states and head."""
        result = self(**changes)
        leaves = [self.arguments[name] for name in ("student_hidden_TD", "student_weight_WD")]
        gradients = torch.autograd.grad(result.loss, leaves)
        return [result.loss.detach(), result.ce_T, result.kl_T, *gradients]


@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "16-bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_loss_is_as_exact_as_plain_autograd(
    dtype: torch.dtype, logits_dtype: torch.dtype | None
) -> None:
    case = make_linear_case(300, 1003, 128, 96, device=DEVICE)
    weights = case.ce_weight_T / 300, case.kd_weight_T / 300
    case = replace(case.rounded(dtype), ce_weight_T=weights[0], kd_weight_T=weights[1])
    chunking = Chunking(chunk_bytes=1_200_000, logits_dtype=logits_dtype)  # 2 or 3 chunks
    *values, hidden_grad, head_grad = LinearCall(case, dtype, 1024, chunking=chunking).results()
    assert (head_grad[1003:] == 0).all(), "padding rows must have exactly no gradient"
    plain, exact = autograd_linear_result(case, dtype), autograd_linear_result(case)
    got = exact._replace(loss=values[0], hidden_grad_TD=hidden_grad, head_grad_VD=head_grad[:1003])
    assert_as_exact_as_autograd(got, plain, exact, tolerance=TOLERANCE)


@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "16-bit"])
def test_two_runs_of_the_linear_loss_give_the_same_bits(logits_dtype: torch.dtype | None) -> None:
    chunking = Chunking(chunk_bytes=10_000_000, logits_dtype=logits_dtype)
    case = make_linear_case(700, 5003, 256, 128, device=DEVICE)
    call = LinearCall(case, torch.bfloat16, 5008, chunking=chunking)
    first, second = (call.results() for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@real_device
def test_nothing_waits_for_the_device() -> None:
    case = case_of(33, 2049, a=2.0, b=3.0)
    arguments = arguments_of(case, torch.bfloat16)
    chunking = Chunking(chunk_bytes=1_000_000)
    linear = LinearCall(
        make_linear_case(100, 2049, 64, 32, device=DEVICE), torch.bfloat16, 2049, chunking=chunking
    )

    def gradient(**changes: Any) -> Tensor:
        loss = kd_loss(**(arguments | changes)).loss
        return torch.autograd.grad(loss, arguments["student_logits_TW"])[0]

    def everything() -> None:
        for weight in ({}, {"ce_weight_T": 0.5, "kd_weight_T": 0.5}):
            gradient(**weight)
            linear.results(**weight)
        gradient(teacher_logits_TW=None, kd_weight_T=0.0)
        with torch.no_grad():
            linear()

    everything()  # builds and loads the library, and fills the allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes that a call asks the allocator for at its peak, above what is there before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = function()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del kept
    return int(peak)


@real_device
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 3.0)])
def test_the_gradient_is_the_only_array_of_logits_size(a: float, b: float) -> None:
    """Counted: everything alive at once in a forward and backward, with the gradient."""
    T, C = 512, 32768
    case = case_of(T, C, a=a, b=b)
    arguments = arguments_of(case, torch.bfloat16)
    student = arguments["student_logits_TW"]

    def step() -> Tensor:
        return torch.autograd.grad(kd_loss(**arguments).loss, student)[0]

    step()
    gradient_bytes = student.numel() * student.element_size()
    # 10 floats of scores and 2 of weights a token; the checks' and the sum's small change.
    allowed = gradient_bytes + 16 * 4 * T + (64 << 10)
    assert gradient_bytes <= peak_bytes(step) <= allowed


@real_device
@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "16-bit"])
def test_linear_loss_keeps_to_its_budget(logits_dtype: torch.dtype | None) -> None:
    """Counted: everything alive at once in the forward, less what it keeps for the backward, which
    is the gradient of the hidden states in their dtype and that of the head in fp32. The backward
    adds the head's gradient in bf16, when the chunks are gone."""
    T, D, W = 4096, 512, 32768
    chunking = Chunking(chunk_bytes=128 << 20, logits_dtype=logits_dtype)
    call = LinearCall(
        make_linear_case(T, W, D, 256, device=DEVICE), torch.bfloat16, W, chunking=chunking
    )
    call.results()  # also leaves cuBLAS its workspace
    kept = 2 * T * D + 4 * W * D
    forward = peak_bytes(call) - kept
    assert forward <= 1.1 * chunking.chunk_bytes, f"{forward / 2**20:.1f} MiB"
    both = peak_bytes(call.results) - kept
    assert both <= max(1.1 * chunking.chunk_bytes, 2 * W * D + (1 << 20)), f"{both / 2**20:.1f} MiB"


WRONG_CALL = """
import torch
from megatron_salt.kernels import SparseTeacher, VocabShard, kd_loss

logits = torch.randn(4, 9, device="cuda")


def call(label, teacher, known=None):
    labels = torch.full((4,), label, device="cuda")
    vocab = VocabShard(size=9, start=0, stop=9)
    if known is not None:
        ids = torch.full((4, 3), known[0], device="cuda", dtype=torch.int32)
        known = SparseTeacher(ids, torch.full((4, 3), known[1], device="cuda"))
    kd_loss(logits, teacher, labels, ce_weight_T=1.0, kd_weight_T=1.0, vocab=vocab, impl="cuda",
            sparse_teacher=known)
    torch.cuda.synchronize()


call(0, logits)
call(8, logits)
call(0, None, (8, 0.3))
call(0, None, (9, 0.0))
print("what is right passes", flush=True)
"""


@real_device
@pytest.mark.parametrize(
    "wrong", ["call(9, logits)", "call(-100, logits)", "call(0, None)", "call(0, None, (9, 0.3))",
              "call(0, None, (0, -0.1))"],
    ids=["label too large", "ignore index", "no teacher", "id too large", "weight below 0"],
)  # fmt: skip
def test_what_does_not_fit_is_asserted_on_the_device(wrong: str) -> None:
    done = run_command("-c", WRONG_CALL + wrong)  # the assertion ends the process's use of CUDA
    assert "what is right passes" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0 and "device-side assert" in done.stderr
