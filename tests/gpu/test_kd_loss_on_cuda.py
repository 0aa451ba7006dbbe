"""The loss's kernels on a CUDA device: exact, at rest where they should be, alone in their memory.

The oracle sees un-rounded fp64 logits; the kernels, and the plain autograd version that bounds
their error, see them rounded to their dtypes. Letters: T tokens, C real vocabulary columns,
W columns with padding, D and E widths of student and teacher.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from commands import run_command
from torch import Tensor

from megatron_salt.kernels import Chunking, KdLoss, VocabShard, kd_loss, linear_kd_loss
from megatron_salt.kernels.backend import LossInputs, LossOptions
from megatron_salt.kernels.choose import choose_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

DEVICE = "cuda"
IMPL: Any = "cuda"
TOLERANCE = 1e-6
"""Of fp32, relative to the largest value: ex2.approx alone is up to 2.4e-7 away."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(student, teacher) for student in DTYPES for teacher in DTYPES]
TEMPERATURES = [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (0.5, 3.0)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch of tokens in fp64, real vocabulary columns only."""

    student_TC: Tensor
    teacher_TC: Tensor | None
    labels_T: Tensor
    ce_weight_T: Tensor
    kd_weight_T: Tensor
    a: float = 1.0
    b: float = 1.0

    @property
    def vocab(self) -> VocabShard:
        C = self.student_TC.shape[1]
        return VocabShard(size=C, start=0, stop=C)


def make_case(T: int, C: int, *, a: float = 1.0, b: float = 1.0, seed: int = 0) -> Case:
    """Teacher near the student, labels at both ends, 20 % masked tokens, two masked rows."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    options: dict[str, Any] = {"generator": rng, "dtype": torch.float64, "device": DEVICE}
    student = torch.randn(T, C, **options).mul_(3)
    teacher = torch.randn(T, C, **options).add_(student)
    labels = torch.randint(C, (T,), generator=rng, device=DEVICE)
    labels[0:1], labels[1:2] = 0, C - 1
    mask = (torch.rand(T, **options) > 0.2).double()
    mask[:2] = 1.0
    ce_weight, kd_weight = (torch.rand(2, T, **options) + 0.1) * mask
    ce_weight[2:3], kd_weight[3:4] = 0.0, 0.0  # only KD, only CE
    ce_weight[4:6], kd_weight[4:6] = 0.0, 0.0  # neither
    return Case(
        student_TC=student, teacher_TC=teacher, labels_T=labels, ce_weight_T=ce_weight,
        kd_weight_T=kd_weight, a=a, b=b,
    )  # fmt: skip


def without_teacher(case: Case) -> Case:
    return replace(case, teacher_TC=None, kd_weight_T=torch.zeros_like(case.kd_weight_T))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where logits lie: rows of W = C + padding columns, `gap` elements between them."""

    padding: int = 5
    gap: int = 0
    offset: int = 0
    """Elements before the first row."""


PACKED = Placement()


def placed(logits_TC: Tensor, dtype: torch.dtype, where: Placement = PACKED) -> Tensor:
    """Rounded to `dtype`; padding full of inf and nan, the memory around the rows full of nan."""
    T, C = logits_TC.shape
    stride = C + where.padding + where.gap
    memory = torch.full((where.offset + T * stride,), torch.nan, dtype=dtype, device=DEVICE)
    logits_TW = memory[where.offset :].view(T, stride)[:, : C + where.padding]
    logits_TW[:, :C] = logits_TC.to(dtype)
    for i in range(where.padding):
        logits_TW[:, C + i] = (torch.inf, torch.nan, -torch.inf)[i % 3]
    return logits_TW


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loss: Tensor
    ce_T: Tensor
    kl_T: Tensor
    grad_TC: Tensor


def plain(case: Case, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Outcome:
    """Textbook log-softmax and autograd, of rounded logits; at least fp32 inside."""
    student = case.student_TC.to(student_dtype, copy=True).requires_grad_()
    inner = torch.promote_types(student_dtype, torch.float32)
    ce = -student.to(inner).log_softmax(dim=1).gather(1, case.labels_T[:, None]).squeeze(1)
    kl = torch.zeros_like(ce)
    if case.teacher_TC is not None:
        log_p = (case.teacher_TC.to(teacher_dtype).to(inner) / case.a).log_softmax(dim=1)
        log_q = (student.to(inner) / case.b).log_softmax(dim=1)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1)
    loss = (case.ce_weight_T.to(inner) * ce + case.kd_weight_T.to(inner) * kl).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    return Outcome(loss=loss.detach(), ce_T=ce.detach(), kl_T=kl.detach(), grad_TC=gradient)


def call(case: Case, student_TW: Tensor, teacher_TW: Tensor | None, **changes: Any) -> KdLoss:
    arguments: dict[str, Any] = dict(
        ce_weight_T=case.ce_weight_T, kd_weight_T=case.kd_weight_T, vocab=case.vocab,
        teacher_temperature=case.a, student_temperature=case.b, impl=IMPL,
    )  # fmt: skip
    return kd_loss(student_TW, teacher_TW, case.labels_T, **(arguments | changes))


def implementation(
    case: Case,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    where: Placement = PACKED,
    teacher_where: Placement | None = None,
) -> Outcome:
    C = case.student_TC.shape[1]
    student = placed(case.student_TC, student_dtype, where).requires_grad_()
    teacher = None
    if case.teacher_TC is not None:
        teacher = placed(case.teacher_TC, teacher_dtype, teacher_where or where)
    result = call(case, student, teacher)
    (gradient,) = torch.autograd.grad(result.loss, student)
    assert gradient.dtype == student_dtype and gradient.shape == student.shape
    assert (gradient[:, C:] == 0).all(), "padding must have exactly no gradient"
    return Outcome(
        loss=result.loss.detach(), ce_T=result.ce_T, kl_T=result.kl_T, grad_TC=gradient[:, :C]
    )


def error(got: Tensor, exact: Tensor) -> float:
    """Largest deviation, relative to the largest exact value."""
    if not exact.numel():
        return 0.0
    scale = max(float(exact.abs().max()), 1e-30)
    return float((got.double() - exact).abs().max()) / scale


def assert_as_good_as_plain(
    case: Case,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    where: Placement = PACKED,
    teacher_where: Placement | None = None,
) -> None:
    exact = plain(case, torch.float64, torch.float64)
    reference = plain(case, student_dtype, teacher_dtype)
    got = implementation(case, student_dtype, teacher_dtype, where, teacher_where)
    for name in ("ce_T", "kl_T", "loss", "grad_TC"):
        ours = error(getattr(got, name), getattr(exact, name))
        bound = 2 * error(getattr(reference, name), getattr(exact, name)) + TOLERANCE
        assert ours <= bound, f"{name}: error {ours:.2e} above {bound:.2e}"


@pytest.mark.parametrize("C", [123, 507, 2049, 32768, 50257, 262144 + 7])
@pytest.mark.parametrize("T", [0, 1, 3, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_exact_as_plain_autograd(dtype: torch.dtype, T: int, C: int) -> None:
    assert_as_good_as_plain(make_case(T, C), dtype, dtype)


@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), PAIRS, ids=str)
def test_dtypes_and_temperatures_mix(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype, a: float, b: float
) -> None:
    for T, C in ((33, 2049), (7, 20000)):
        assert_as_good_as_plain(make_case(T, C, a=a, b=b), student_dtype, teacher_dtype)


@pytest.mark.parametrize("C", [1, 7, 8, 9, 507, 4096, 8191])
@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), PAIRS, ids=str)
def test_rows_may_start_anywhere(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype, C: int
) -> None:
    """Padding and gaps as with logits[:, 1:], odd rows, storage that starts at an odd element."""
    case = make_case(18, C, b=2.0)
    ways = [
        (Placement(padding=0), Placement(padding=0)),
        (Placement(padding=0, gap=1, offset=1), Placement(padding=0, gap=1, offset=1)),
        (Placement(padding=0, gap=C % 2 + 1, offset=3), Placement(padding=1)),
        (Placement(padding=2, offset=5), Placement(padding=0, gap=3, offset=7)),
    ]
    for student_where, teacher_where in ways:
        assert_as_good_as_plain(case, student_dtype, teacher_dtype, student_where, teacher_where)


@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["spikes of 50", "one at 1e4", "all near 1e4", "all near -300"])
def test_large_logits_cost_no_digits(kind: str, dtype: torch.dtype, a: float, b: float) -> None:
    case = make_case(16, 2049, a=a, b=b)
    student, teacher = case.student_TC.clone(), case.teacher_TC
    assert teacher is not None
    teacher = teacher.clone()
    if kind == "spikes of 50":
        student[:, 5::17] += 50
        student[:, 6::19] -= 50
        teacher[:, 5::13] += 50
    elif kind == "one at 1e4":
        student[::2, 7] = 1e4
        teacher[::3, 2000] = -1e4
    else:
        student += 1e4 if kind == "all near 1e4" else -300
        teacher += 1e4 if kind == "all near 1e4" else -300
    case = replace(case, student_TC=student, teacher_TC=teacher)
    assert_as_good_as_plain(case, dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_may_give_tokens_no_probability(dtype: torch.dtype) -> None:
    case = make_case(16, 2049, a=2.0)
    assert case.teacher_TC is not None
    lowest_kept = case.teacher_TC.topk(5, dim=1).values[:, -1:]
    truncated = case.teacher_TC.where(case.teacher_TC >= lowest_kept, -torch.inf)
    case = replace(case, teacher_TC=truncated)
    assert_as_good_as_plain(case, dtype, dtype)
    assert implementation(case, dtype, dtype).kl_T.isfinite().all()


@pytest.mark.parametrize("C", [507, 32768])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_that_equals_its_teacher_is_at_rest(
    dtype: torch.dtype, temperature: float, C: int
) -> None:
    case = make_case(16, C, a=temperature, b=temperature)
    no_ce = torch.zeros_like(case.ce_weight_T)
    case = replace(case, teacher_TC=case.student_TC, ce_weight_T=no_ce)
    for teacher_where in (PACKED, Placement(padding=0, gap=2, offset=3)):
        got = implementation(case, dtype, dtype, teacher_where=teacher_where)
        assert (got.kl_T == 0).all() and got.loss == 0
        assert (got.grad_TC == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("b", [1.0, 2.0])
def test_zero_weight_is_exactly_nothing(bad: float, b: float) -> None:
    case = make_case(12, 2049, b=b)
    assert case.teacher_TC is not None
    good = implementation(case, torch.bfloat16, torch.bfloat16)
    student, teacher = case.student_TC.clone(), case.teacher_TC.clone()
    student[4, 7], teacher[4, 9] = bad, bad  # rows 4 and 5 weigh nothing
    student[5], teacher[5] = bad, bad
    broken = replace(case, student_TC=student, teacher_TC=teacher)
    got = implementation(broken, torch.bfloat16, torch.bfloat16)
    assert (got.grad_TC[4:6] == 0).all()
    assert torch.equal(got.grad_TC, good.grad_TC) and got.loss == good.loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_batch_of_nan_has_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    case = make_case(9, 507)
    nothing = torch.zeros_like(case.ce_weight_T)
    broken = torch.full_like(case.student_TC, torch.nan)
    case = replace(case, student_TC=broken, teacher_TC=broken, ce_weight_T=nothing,
                   kd_weight_T=nothing)  # fmt: skip
    got = implementation(case, dtype, dtype)
    assert got.loss == 0 and (got.grad_TC == 0).all()


def test_token_with_ce_alone_ignores_a_broken_teacher() -> None:
    case = make_case(12, 2049)
    assert case.teacher_TC is not None
    teacher = case.teacher_TC.clone()
    teacher[3] = torch.nan  # row 3 has no KD weight
    case = replace(case, ce_weight_T=torch.ones_like(case.ce_weight_T))
    exact = plain(case, torch.float64, torch.float64)
    got = implementation(replace(case, teacher_TC=teacher), torch.float32, torch.float32)
    assert error(got.grad_TC, exact.grad_TC) < TOLERANCE
    assert error(got.loss, exact.loss) < TOLERANCE


@pytest.mark.parametrize("C", [507, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_teacher_it_is_cross_entropy(dtype: torch.dtype, C: int) -> None:
    case = without_teacher(make_case(24, C, b=2.0))
    assert_as_good_as_plain(case, dtype, dtype)
    assert (implementation(case, dtype, dtype).kl_T == 0).all()


def test_gradient_follows_what_is_upstream() -> None:
    case = make_case(8, 2049, b=2.0)
    student = placed(case.student_TC, torch.float32).requires_grad_()
    result = call(case, student, placed(case.teacher_TC, torch.bfloat16))  # type: ignore[arg-type]
    (once,) = torch.autograd.grad(result.loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(-3.0 * result.loss, student)
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
    case = make_case(11, C)
    assert case.teacher_TC is not None
    body = choose_backend(IMPL, device=case.labels_T.device, dtypes=frozenset({dtype}))
    options = LossOptions(vocab=case.vocab)
    weights = [weight_T.float() for weight_T in (case.ce_weight_T, case.kd_weight_T)]
    student = placed(case.student_TC, dtype, where)
    rows = LossInputs(student, placed(case.teacher_TC, dtype, where), case.labels_T, *weights)
    one = torch.ones((), device=DEVICE)

    expected = torch.empty(student.shape, dtype=dtype, device=DEVICE)
    scores = body.scores(rows, options, None)
    body.gradient_(rows, options, scores.saved, one, expected)
    memory = student._base
    assert memory is not None
    before = memory.clone()
    got = body.scores_and_gradient_(rows, options, None, one, student)
    assert torch.equal(student, expected)
    assert all(torch.equal(x, y) for x, y in zip(got[:3], scores[:3], strict=True))
    before.as_strided(student.shape, student.stride(), student.storage_offset()).copy_(student)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(memory.view(bits), before.view(bits)), "memory around the rows has changed"


@pytest.mark.parametrize("C", [2049, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype, C: int) -> None:
    case = make_case(257, C, a=2.0, b=3.0)
    first, second = (implementation(case, dtype, dtype) for _ in range(2))
    for name in ("loss", "ce_T", "kl_T", "grad_TC"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_work_is_queued_on_the_current_stream() -> None:
    case = make_case(65, 2049)
    expected = implementation(case, torch.bfloat16, torch.bfloat16)
    logits = [placed(x, torch.bfloat16) for x in (case.student_TC, case.teacher_TC)]  # type: ignore[arg-type]
    student, teacher = (torch.full_like(x, 1.0) for x in logits)
    student.requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms: what runs elsewhere meanwhile reads ones
        with torch.no_grad():
            student.copy_(logits[0])
            teacher.copy_(logits[1])
        result = call(case, student, teacher)
        (gradient,) = torch.autograd.grad(result.loss, student)
    stream.synchronize()
    assert torch.equal(result.loss.detach(), expected.loss)
    assert torch.equal(gradient[:, :2049], expected.grad_TC)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize("C", [2049, 32768])
def test_captured_graph_computes_what_eager_calls_do(C: int, a: float, b: float) -> None:
    cases = [make_case(33, C, a=a, b=b, seed=seed) for seed in (1, 2)]
    case = cases[0]
    student, teacher = (
        placed(x, torch.bfloat16)
        for x in (case.student_TC, case.teacher_TC)  # type: ignore[arg-type]
    )
    student.requires_grad_()
    labels_T = case.labels_T.clone()
    weights = [weight_T.float() for weight_T in (case.ce_weight_T, case.kd_weight_T)]
    static = replace(case, labels_T=labels_T, ce_weight_T=weights[0], kd_weight_T=weights[1])

    def step() -> list[Tensor]:
        result = call(static, student, teacher)
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
            student[:, :C] = new.student_TC.bfloat16()
            teacher[:, :C] = new.teacher_TC.bfloat16()  # type: ignore[union-attr]
            for target, source in zip(
                (labels_T, *weights), (new.labels_T, new.ce_weight_T, new.kd_weight_T), strict=True
            ):
                target.copy_(source)
        eager = step()
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, eager, strict=True))


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """Hidden states and heads in the dtype that training has them in."""

    hidden_TD: Tensor
    weight_WD: Tensor
    teacher_hidden_TE: Tensor
    teacher_weight_WE: Tensor
    labels_T: Tensor
    ce_weight_T: Tensor
    kd_weight_T: Tensor
    vocab: VocabShard

    def call(self, **changes: Any) -> KdLoss:
        arguments: dict[str, Any] = dict(
            ce_weight_T=self.ce_weight_T, kd_weight_T=self.kd_weight_T, vocab=self.vocab, impl=IMPL
        )
        return linear_kd_loss(
            self.hidden_TD, self.weight_WD, self.teacher_hidden_TE, self.teacher_weight_WE,
            self.labels_T, **(arguments | changes),
        )  # fmt: skip

    def gradients(self, **changes: Any) -> list[Tensor]:
        """Loss, and gradients of hidden states and head."""
        loss = self.call(**changes).loss
        grads = torch.autograd.grad(loss, (self.hidden_TD, self.weight_WD))
        return [loss.detach(), *grads]


def make_linear_case(
    T: int, D: int, E: int, C: int, *, padding: int = 0, dtype: torch.dtype, weight: float = 1.0
) -> LinearCase:
    rng = torch.Generator(DEVICE).manual_seed(0)
    options: dict[str, Any] = {"generator": rng, "device": DEVICE}
    hidden, teacher_hidden = (torch.randn(T, width, **options) for width in (D, E))
    head, teacher_head = (
        torch.randn(C + padding, width, **options) * (3 / width**0.5) for width in (D, E)
    )
    ce_weight, kd_weight = (torch.rand(2, T, **options) + 0.1) * weight
    return LinearCase(
        hidden_TD=hidden.to(dtype).requires_grad_(),
        weight_WD=head.to(dtype).requires_grad_(),
        teacher_hidden_TE=teacher_hidden.to(dtype),
        teacher_weight_WE=teacher_head.to(dtype),
        labels_T=torch.randint(C, (T,), **options),
        ce_weight_T=ce_weight,
        kd_weight_T=kd_weight,
        vocab=VocabShard(size=C, start=0, stop=C),
    )


def plain_linear(case: LinearCase, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients by whole logits in `dtype`, textbook formulas and autograd."""
    C = case.vocab.size
    hidden, head = (x.detach().to(dtype).requires_grad_() for x in (case.hidden_TD, case.weight_WD))
    student = hidden @ head.t()
    teacher = case.teacher_hidden_TE.to(dtype) @ case.teacher_weight_WE.to(dtype).t()
    inner = torch.promote_types(dtype, torch.float32)
    log_q, log_p = (x[:, :C].to(inner).log_softmax(dim=1) for x in (student, teacher))
    ce = -log_q.gather(1, case.labels_T[:, None]).squeeze(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    loss = (case.ce_weight_T.to(inner) * ce + case.kd_weight_T.to(inner) * kl).sum()
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, head))]


@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "16-bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_loss_is_as_exact_as_plain_autograd(
    dtype: torch.dtype, logits_dtype: torch.dtype | None
) -> None:
    case = make_linear_case(300, 128, 96, 1003, padding=21, dtype=dtype, weight=1 / 300)
    exact, reference = plain_linear(case, torch.float64), plain_linear(case, dtype)
    chunking = Chunking(chunk_bytes=1_200_000, logits_dtype=logits_dtype)  # 2 or 3 chunks
    got = case.gradients(chunking=chunking)
    for name, ours, theirs, wanted in zip(
        ("loss", "hidden", "head"), got, reference, exact, strict=True
    ):
        bound = 2 * error(theirs, wanted) + TOLERANCE
        assert error(ours, wanted) <= bound, f"{name}: {error(ours, wanted):.2e} above {bound:.2e}"
    assert (got[2][1003:] == 0).all(), "padding rows of the head must have exactly no gradient"


@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "16-bit"])
def test_two_runs_of_the_linear_loss_give_the_same_bits(logits_dtype: torch.dtype | None) -> None:
    case = make_linear_case(700, 256, 128, 5003, padding=5, dtype=torch.bfloat16)
    chunking = Chunking(chunk_bytes=10_000_000, logits_dtype=logits_dtype)
    first, second = (case.gradients(chunking=chunking) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_nothing_waits_for_the_device() -> None:
    case = make_case(33, 2049, a=2.0, b=3.0)
    student = placed(case.student_TC, torch.bfloat16).requires_grad_()
    teacher = placed(case.teacher_TC, torch.bfloat16)  # type: ignore[arg-type]
    linear = make_linear_case(100, 64, 32, 2049, dtype=torch.bfloat16)
    chunking = Chunking(chunk_bytes=1_000_000)

    def everything() -> None:
        for weight in ({}, {"ce_weight_T": 0.5, "kd_weight_T": 0.5}):
            torch.autograd.grad(call(case, student, teacher, **weight).loss, student)
            linear.gradients(chunking=chunking, **weight)
        no_teacher = call(case, student, None, kd_weight_T=0.0)
        torch.autograd.grad(no_teacher.loss, student)
        with torch.no_grad():
            linear.call(chunking=chunking)

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


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 3.0)])
def test_the_gradient_is_the_only_array_of_logits_size(a: float, b: float) -> None:
    """Counted: everything alive at once in a forward and backward, with the gradient."""
    T, C = 512, 32768
    case = make_case(T, C, a=a, b=b)
    student = placed(case.student_TC, torch.bfloat16).requires_grad_()
    teacher = placed(case.teacher_TC, torch.bfloat16)  # type: ignore[arg-type]

    def step() -> Tensor:
        return torch.autograd.grad(call(case, student, teacher).loss, student)[0]

    step()
    gradient_bytes = student.numel() * student.element_size()
    # 10 floats of scores and 2 of weights a token; the checks' and the sum's small change.
    allowed = gradient_bytes + 16 * 4 * T + (64 << 10)
    assert gradient_bytes <= peak_bytes(step) <= allowed


@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "16-bit"])
def test_linear_loss_keeps_to_its_budget(logits_dtype: torch.dtype | None) -> None:
    """Counted: everything alive at once in the forward, less what it keeps for the backward, which
    is the gradient of the hidden states in their dtype and that of the head in fp32. The backward
    adds the head's gradient in bf16, when the chunks are gone."""
    T, D, W = 4096, 512, 32768
    case = make_linear_case(T, D, 256, W, dtype=torch.bfloat16)
    chunking = Chunking(chunk_bytes=128 << 20, logits_dtype=logits_dtype)
    case.gradients(chunking=chunking)  # also leaves cuBLAS its workspace
    kept = 2 * T * D + 4 * W * D
    forward = peak_bytes(lambda: case.call(chunking=chunking)) - kept
    assert forward <= 1.1 * chunking.chunk_bytes, f"{forward / 2**20:.1f} MiB"
    both = peak_bytes(lambda: case.gradients(chunking=chunking)) - kept
    assert both <= max(1.1 * chunking.chunk_bytes, 2 * W * D + (1 << 20)), f"{both / 2**20:.1f} MiB"


WRONG_CALL = """
import torch
from megatron_salt.kernels import VocabShard, kd_loss

logits = torch.randn(4, 9, device="cuda")


def call(label, teacher):
    labels = torch.full((4,), label, device="cuda")
    vocab = VocabShard(size=9, start=0, stop=9)
    kd_loss(logits, teacher, labels, ce_weight_T=1.0, kd_weight_T=1.0, vocab=vocab, impl="cuda")
    torch.cuda.synchronize()


call(0, logits)
call(8, logits)
print("what is right passes", flush=True)
"""


@pytest.mark.parametrize(
    "wrong", ["call(9, logits)", "call(-100, logits)", "call(0, None)"],
    ids=["label too large", "ignore index", "no teacher"],
)  # fmt: skip
def test_what_does_not_fit_is_asserted_on_the_device(wrong: str) -> None:
    done = run_command("-c", WRONG_CALL + wrong)  # the assertion ends the process's use of CUDA
    assert "what is right passes" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0 and "device-side assert" in done.stderr
