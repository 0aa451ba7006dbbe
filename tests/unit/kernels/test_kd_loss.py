"""Every body of `kd_loss` on one rank against a plain fp64 oracle: values, gradients, errors.

The oracle sees un-rounded fp64 logits; the implementation, and the plain autograd version that
bounds its error, see them rounded to their dtype. Letters: T tokens, W columns, V real vocabulary.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from bodies import BODIES, BODIES_AND_DTYPES, chosen, dtypes_of, threads_backwards
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_salt.kernels import KdLoss, VocabShard, kd_loss, padded_vocab_size
from megatron_salt.kernels.backend import Divergence
from megatron_salt.kernels.choose import _say_once, choose_backend

torch.set_num_threads(1)  # these tensors are too small to share, and other tests run beside us

TEMPERATURES = [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (0.5, 3.0)]
SIZES = [(252, 256), (507, 640), (123, 123)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch of tokens in fp64, real vocabulary columns only."""

    student_TV: Tensor
    teacher_TV: Tensor | None
    labels_T: Tensor
    ce_weight_T: Tensor
    kd_weight_T: Tensor
    a: float = 1.0
    b: float = 1.0


def make_case(T: int, V: int, *, a: float = 1.0, b: float = 1.0, seed: int = 0) -> Case:
    """Teacher near the student, labels at both ends, 20 % masked tokens, two masked rows."""
    rng = torch.Generator().manual_seed(seed)
    student = torch.randn(T, V, generator=rng, dtype=torch.float64) * 3
    teacher = student + torch.randn(T, V, generator=rng, dtype=torch.float64)
    labels = torch.randint(V, (T,), generator=rng)
    labels[:2] = torch.tensor([0, V - 1])[:T]
    mask = (torch.rand(T, generator=rng) > 0.2).double()
    ce_weight, kd_weight = (torch.rand(2, T, generator=rng, dtype=torch.float64) + 0.1) * mask
    ce_weight[2:3], kd_weight[3:4] = 0.0, 0.0  # only KD, only CE
    ce_weight[4:6], kd_weight[4:6] = 0.0, 0.0  # neither
    return Case(
        student_TV=student, teacher_TV=teacher, labels_T=labels, ce_weight_T=ce_weight,
        kd_weight_T=kd_weight, a=a, b=b,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loss: Tensor
    ce_T: Tensor
    kl_T: Tensor
    grad_TV: Tensor


def plain(case: Case, dtype: torch.dtype) -> Outcome:
    """Textbook log-softmax and autograd, of logits rounded to `dtype`; at least fp32 inside."""
    student = case.student_TV.to(dtype, copy=True).requires_grad_()
    inner = torch.promote_types(dtype, torch.float32)
    log_q1 = student.to(inner).log_softmax(dim=1)
    ce = -log_q1[torch.arange(len(case.labels_T)), case.labels_T]
    kl = torch.zeros_like(ce)
    if case.teacher_TV is not None:
        log_p = (case.teacher_TV.to(dtype).to(inner) / case.a).log_softmax(dim=1)
        log_q = (student.to(inner) / case.b).log_softmax(dim=1)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1)
    loss = (case.ce_weight_T.to(inner) * ce + case.kd_weight_T.to(inner) * kl).sum()
    loss.backward()
    assert student.grad is not None
    return Outcome(loss=loss.detach(), ce_T=ce.detach(), kl_T=kl.detach(), grad_TV=student.grad)


def padded(logits_TV: Tensor, W: int, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, columns from V to W filled with inf, -inf and nan."""
    garbage = torch.tensor([torch.inf, torch.nan, -torch.inf])
    num_padding = W - logits_TV.shape[1]
    filling = garbage.repeat(num_padding // 3 + 1)[:num_padding].expand(len(logits_TV), -1)
    return torch.cat([logits_TV.to(dtype), filling.to(dtype)], dim=1)


def implementation(
    body: str, case: Case, W: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None = None
) -> Outcome:
    V = case.student_TV.shape[1]
    student = padded(case.student_TV, W, dtype).requires_grad_()
    teacher = None
    if case.teacher_TV is not None:
        teacher = padded(case.teacher_TV, W, teacher_dtype or dtype)
    with chosen(body):
        result = kd_loss(
            student, teacher, case.labels_T, ce_weight_T=case.ce_weight_T,
            kd_weight_T=case.kd_weight_T, vocab=VocabShard(size=V, start=0, stop=V),
            teacher_temperature=case.a, student_temperature=case.b,
        )  # fmt: skip
    result.loss.backward()
    assert student.grad is not None and student.grad.dtype == dtype
    assert (student.grad[:, V:] == 0).all(), "padding must have exactly no gradient"
    return Outcome(
        loss=result.loss.detach(), ce_T=result.ce_T, kl_T=result.kl_T, grad_TV=student.grad[:, :V]
    )


def error(got: Tensor, exact: Tensor) -> float:
    """Largest deviation, relative to the largest exact value."""
    if not exact.numel():
        return 0.0
    scale = max(float(exact.abs().max()), 1e-30)
    return float((got.double() - exact).abs().max()) / scale


def assert_as_good_as_plain(body: str, case: Case, W: int, dtype: torch.dtype) -> None:
    exact, reference = plain(case, torch.float64), plain(case, dtype)
    got = implementation(body, case, W, dtype)
    tolerance = 1e-14 if dtype == torch.float64 else 5e-7
    for name in ("ce_T", "kl_T", "loss", "grad_TV"):
        ours = error(getattr(got, name), getattr(exact, name))
        bound = 2 * error(getattr(reference, name), getattr(exact, name)) + tolerance
        assert ours <= bound, f"{name}: error {ours:.2e} above {bound:.2e}"


@pytest.mark.parametrize(("V", "W"), SIZES)
@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
@pytest.mark.parametrize(("body", "dtype"), BODIES_AND_DTYPES, ids=str)
def test_is_as_exact_as_plain_autograd(
    body: str, dtype: torch.dtype, a: float, b: float, V: int, W: int
) -> None:
    assert_as_good_as_plain(body, make_case(24, V, a=a, b=b), W, dtype)


@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", ["spikes of 50", "one at 1e4", "all near 1e4", "all near -300"])
def test_large_logits_cost_no_digits(
    kind: str, body: str, dtype: torch.dtype, a: float, b: float
) -> None:
    case = make_case(16, 123, a=a, b=b)
    student, teacher = case.student_TV.clone(), case.teacher_TV
    assert teacher is not None
    teacher = teacher.clone()
    if kind == "spikes of 50":
        student[:, 5::17] += 50
        student[:, 6::19] -= 50
        teacher[:, 5::13] += 50
    elif kind == "one at 1e4":
        student[::2, 7] = 1e4
        teacher[::3, 9] = -1e4
    else:
        # A constant changes no probability, so nothing may get worse in fp32.
        student += 1e4 if kind == "all near 1e4" else -300
        teacher += 1e4 if kind == "all near 1e4" else -300
    assert_as_good_as_plain(body, replace(case, student_TV=student, teacher_TV=teacher), 128, dtype)


@pytest.mark.parametrize(("body", "dtype"), BODIES_AND_DTYPES, ids=str)
def test_teacher_may_give_tokens_no_probability(body: str, dtype: torch.dtype) -> None:
    case = make_case(16, 252, a=2.0, b=1.0)
    assert case.teacher_TV is not None
    lowest_kept = case.teacher_TV.topk(5, dim=1).values[:, -1:]
    truncated = case.teacher_TV.where(case.teacher_TV >= lowest_kept, -torch.inf)
    case = replace(case, teacher_TV=truncated)
    assert_as_good_as_plain(body, case, 256, dtype)
    assert implementation(body, case, 256, dtype).kl_T.isfinite().all()


@pytest.mark.parametrize("num_masked", [9, 600, 3000])
@pytest.mark.parametrize("dtype", dtypes_of("native"), ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_logits_may_be_masked_with_the_smallest_number(
    body: str, dtype: torch.dtype, num_masked: int
) -> None:
    """From the first column on, so that a whole block of columns has nothing else in it."""
    case = make_case(6, 4096)
    assert case.teacher_TV is not None
    student, teacher = case.student_TV.clone(), case.teacher_TV.clone()
    student[:, :num_masked] = teacher[:, :num_masked] = torch.finfo(dtype).min
    case = replace(
        case, student_TV=student, teacher_TV=teacher, labels_T=case.labels_T.clamp(min=num_masked)
    )
    assert_as_good_as_plain(body, case, 4096, dtype)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 2.0)])
@pytest.mark.parametrize(("body", "dtype"), BODIES_AND_DTYPES, ids=str)
def test_student_that_equals_its_teacher_is_at_rest(
    body: str, dtype: torch.dtype, a: float, b: float
) -> None:
    case = make_case(16, 507, a=a, b=b)
    no_ce = torch.zeros_like(case.ce_weight_T)
    case = replace(case, teacher_TV=case.student_TV, ce_weight_T=no_ce)
    got = implementation(body, case, 512, dtype)
    assert (got.kl_T == 0).all() and got.loss == 0
    assert (got.grad_TV == 0).all()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("b", [1.0, 2.0])
def test_zero_weight_is_exactly_nothing(body: str, bad: float, b: float) -> None:
    case = make_case(12, 123, b=b)
    assert case.teacher_TV is not None
    good = implementation(body, case, 128, torch.float32)
    student, teacher = case.student_TV.clone(), case.teacher_TV.clone()
    student[4, 7], teacher[4, 9] = bad, bad  # rows 4 and 5 weigh nothing
    student[5], teacher[5] = bad, bad
    got = implementation(
        body, replace(case, student_TV=student, teacher_TV=teacher), 128, torch.float32
    )
    assert (got.grad_TV[4:6] == 0).all()
    assert torch.equal(got.grad_TV, good.grad_TV) and got.loss == good.loss


@pytest.mark.parametrize("body", BODIES)
def test_token_with_ce_alone_ignores_a_broken_teacher(body: str) -> None:
    case = make_case(12, 123)
    assert case.teacher_TV is not None
    teacher = case.teacher_TV.clone()
    teacher[3] = torch.nan  # row 3 has no KD weight
    case = replace(case, ce_weight_T=torch.ones(12, dtype=torch.float64))
    exact = plain(case, torch.float64)
    got = implementation(body, replace(case, teacher_TV=teacher), 128, torch.float32)
    assert error(got.grad_TV, exact.grad_TV) < 1e-6
    assert error(got.loss, exact.loss) < 1e-6


@pytest.mark.parametrize("body", BODIES)
def test_ce_is_at_temperature_1_whatever_the_students(body: str) -> None:
    case = make_case(12, 123)
    warm = implementation(body, replace(case, b=3.0), 123, torch.float32)
    cold = implementation(body, case, 123, torch.float32)
    assert torch.allclose(warm.ce_T, cold.ce_T, atol=2e-6)
    assert not torch.allclose(warm.kl_T, cold.kl_T, atol=1e-3)


@pytest.mark.parametrize(("body", "dtype"), BODIES_AND_DTYPES, ids=str)
def test_without_teacher_it_is_cross_entropy(body: str, dtype: torch.dtype) -> None:
    case = replace(make_case(24, 252), teacher_TV=None, kd_weight_T=torch.zeros(24), b=2.0)
    assert_as_good_as_plain(body, case, 256, dtype)
    got = implementation(body, case, 256, dtype)
    expected = torch.nn.functional.cross_entropy(
        case.student_TV.to(dtype).double(), case.labels_T, reduction="none"
    )
    assert error(got.ce_T, expected) < 1e-6
    assert (got.kl_T == 0).all()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_tokens(body: str, with_teacher: bool) -> None:
    case = make_case(0, 123)
    case = case if with_teacher else replace(case, teacher_TV=None)
    got = implementation(body, case, 128, torch.bfloat16)
    assert got.loss == 0 and got.ce_T.shape == got.kl_T.shape == (0,)
    assert got.grad_TV.shape == (0, 123)


def call(case: Case, **changes: Any) -> KdLoss:
    V = case.student_TV.shape[1]
    arguments: dict[str, Any] = dict(
        student_logits_TW=case.student_TV.float(),
        teacher_logits_TW=None if case.teacher_TV is None else case.teacher_TV.float(),
        labels_T=case.labels_T,
        ce_weight_T=case.ce_weight_T,
        kd_weight_T=case.kd_weight_T,
        vocab=VocabShard(size=V, start=0, stop=V),
    )
    arguments.update(changes)
    return kd_loss(
        arguments.pop("student_logits_TW"), arguments.pop("teacher_logits_TW"),
        arguments.pop("labels_T"), **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 1.0), (1.0, 0.0)])
def test_scalar_weights_hold_for_every_token(weights: tuple[float, float]) -> None:
    case = make_case(8, 123)
    ce, kd = weights
    every = call(case, ce_weight_T=torch.full((8,), ce), kd_weight_T=torch.full((8,), kd))
    for kind in (float, torch.tensor):
        scalar = call(case, ce_weight_T=kind(ce), kd_weight_T=kind(kd))
        assert scalar.loss == every.loss
    assert float(every.loss) == pytest.approx(
        ce * float(every.ce_T.sum()) + kd * float(every.kl_T.sum()), rel=1e-6
    )


def test_gradient_follows_what_is_upstream_and_nothing_is_changed_in_place() -> None:
    case = make_case(8, 123, b=2.0)
    student, teacher = case.student_TV.float().requires_grad_(), padded(
        case.teacher_TV, 128, torch.bfloat16  # type: ignore[arg-type]
    )  # fmt: skip
    before = [x.detach().clone() for x in (student, teacher, case.labels_T, case.ce_weight_T)]
    result = call(
        case, student_logits_TW=student, teacher_logits_TW=teacher, student_temperature=2.0
    )
    (once,) = torch.autograd.grad(result.loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(-3.0 * result.loss, student)
    assert torch.allclose(twice, -3.0 * once, rtol=1e-6)
    after = [student.detach(), teacher, case.labels_T, case.ce_weight_T]
    assert all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(before, after, strict=True)
    )
    assert not result.ce_T.requires_grad and not result.kl_T.requires_grad
    assert result.loss.dtype == result.ce_T.dtype == result.kl_T.dtype == torch.float32


@pytest.mark.parametrize("body", BODIES)
def test_result_does_not_depend_on_how_tokens_are_cut(body: str) -> None:
    """Weights carry the normaliser, so the loss of a batch is the sum over its pieces."""
    case = make_case(24, 123)
    dtype = torch.float64 if body == "reference" else torch.float32
    whole = implementation(body, case, 128, dtype)
    pieces = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 24)):
        assert case.teacher_TV is not None
        piece = replace(
            case, student_TV=case.student_TV[rows], teacher_TV=case.teacher_TV[rows],
            labels_T=case.labels_T[rows], ce_weight_T=case.ce_weight_T[rows],
            kd_weight_T=case.kd_weight_T[rows],
        )  # fmt: skip
        pieces.append(implementation(body, piece, 128, dtype))
    total = float(sum(piece.loss for piece in pieces))
    assert total == pytest.approx(float(whole.loss), rel=1e-13 if body == "reference" else 1e-6)
    assert torch.equal(torch.cat([piece.grad_TV for piece in pieces]), whole.grad_TV)


MIXED = [
    (student, teacher)
    for student in dtypes_of("native")
    for teacher in dtypes_of("native")
    if student != teacher
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("dtype", "teacher_dtype"), MIXED, ids=str)
def test_student_and_teacher_may_have_different_dtypes(
    body: str, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    case = make_case(8, 123, a=2.0)
    assert case.teacher_TV is not None
    # The oracle sees the teacher as it was rounded: the student's rounding is what is judged.
    rounded = case.teacher_TV.to(teacher_dtype).double()
    exact = plain(replace(case, teacher_TV=rounded), torch.float64)
    got = implementation(body, case, 125, dtype, teacher_dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    for name in ("ce_T", "kl_T", "grad_TV"):
        assert error(getattr(got, name), getattr(exact, name)) < tolerance, name


@pytest.mark.parametrize("dtype", dtypes_of("native"), ids=str)
@pytest.mark.parametrize("body", BODIES[1:])
def test_rows_may_start_anywhere(body: str, dtype: torch.dtype) -> None:
    """Views whose rows lie at every offset from a multiple of 16 bytes, alike and unalike."""
    T, V = 5, 75
    case = make_case(T, V)
    assert case.teacher_TV is not None
    expected = implementation(body, case, V, dtype)
    for student_offset, teacher_offset, stride in [(0, 0, 75), (1, 1, 83), (3, 3, 96), (1, 4, 81)]:
        views = []
        for logits, offset in (
            (case.student_TV, student_offset),
            (case.teacher_TV, teacher_offset),
        ):
            storage = torch.full((offset + T * stride,), torch.nan, dtype=dtype)
            view = storage[offset:].view(T, stride)[:, :V]
            views.append(view.copy_(logits))
        student = views[0].requires_grad_()
        with chosen(body):
            result = kd_loss(
                student, views[1], case.labels_T, ce_weight_T=case.ce_weight_T,
                kd_weight_T=case.kd_weight_T, vocab=VocabShard(size=V, start=0, stop=V),
            )  # fmt: skip
        (gradient,) = torch.autograd.grad(result.loss, student)
        # The columns are grouped by their addresses, so sums may differ in their last bits.
        unit = torch.finfo(dtype).eps
        assert torch.allclose(result.kl_T, expected.kl_T, rtol=1e-5, atol=1e-6)
        assert torch.allclose(gradient, expected.grad_TV, rtol=2 * unit, atol=1e-7)


@pytest.mark.parametrize("V", [123, 2049, 5000])
def test_cuda_kernels_need_no_barrier_that_is_missing(V: int) -> None:
    """With the threads of a block run in the opposite order nothing may change."""
    case = make_case(3, V, b=2.0)
    forwards = implementation("cuda on cpu", case, V + 2, torch.float32)
    with threads_backwards():
        backwards = implementation("cuda on cpu", case, V + 2, torch.float32)
    for name in ("loss", "ce_T", "kl_T", "grad_TV"):
        assert torch.equal(getattr(forwards, name), getattr(backwards, name)), name


@pytest.mark.parametrize("V", [3, 1023, 1024, 1025, 4099])
def test_cpu_and_cuda_code_compute_the_same(V: int) -> None:
    """Two loops over one header: block edges, odd sizes, more columns than a block has threads."""
    case = make_case(4, V)
    native = implementation("native", case, V, torch.float32)
    cuda = implementation("cuda on cpu", case, V, torch.float32)
    for name in ("ce_T", "kl_T", "grad_TV"):
        assert torch.allclose(getattr(native, name), getattr(cuda, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_native_result_does_not_depend_on_threads(num_threads: int) -> None:
    # In a process of its own: a thread pool must not be alive when tests fork ranks.
    script = (
        "import torch\n"
        "from megatron_salt.kernels import VocabShard, kd_loss\n"
        "torch.manual_seed(0)\n"
        "student, teacher = torch.randn(2, 37, 2051)\n"
        "found = []\n"
        f"for num_threads in (1, {num_threads}):\n"
        "    torch.set_num_threads(num_threads)\n"
        "    leaf = student.clone().requires_grad_()\n"
        "    result = kd_loss(leaf, teacher, torch.arange(37), ce_weight_T=0.5, kd_weight_T=0.5,\n"
        "        vocab=VocabShard(size=2051, start=0, stop=2051), impl='native')\n"
        "    result.loss.backward()\n"
        "    found.append((result.loss.detach(), result.kl_T, leaf.grad))\n"
        "assert all(torch.equal(a, b) for a, b in zip(*found))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
def test_gradcheck(a: float, b: float, divergence: Divergence) -> None:
    case = make_case(5, 7, a=a, b=b)

    def loss(student_TW: Tensor) -> Tensor:
        return call(
            case, student_logits_TW=student_TW, teacher_logits_TW=case.teacher_TV,
            teacher_temperature=a, student_temperature=b, divergence=divergence, impl="reference",
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (case.student_TV.clone().requires_grad_(),))


def textbook(divergence: Divergence, case: Case) -> Tensor:
    """The divergence per token, from probabilities, in fp64."""
    assert case.teacher_TV is not None
    s, z = case.student_TV / case.b, case.teacher_TV / case.a
    q, p = s.softmax(1), z.softmax(1)
    m = (p + q) / 2
    kl = lambda x, y: (x * (x / y).log()).sum(1)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: (kl(p, m) + kl(q, m)) / 2,
        "mse": lambda: ((s - z) ** 2).mean(1),
    }[divergence]()


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
def test_divergences_are_the_textbooks(a: float, b: float, divergence: Divergence) -> None:
    case = make_case(8, 123, a=a, b=b)
    got = call(
        case, student_logits_TW=padded(case.student_TV, 128, torch.float64),
        teacher_logits_TW=padded(case.teacher_TV, 128, torch.float64),  # type: ignore[arg-type]
        teacher_temperature=a, student_temperature=b, divergence=divergence,
    )  # fmt: skip
    assert torch.allclose(got.kl_T, textbook(divergence, case), rtol=1e-10)


def test_compiled_code_refuses_other_divergences_and_auto_says_that_it_falls_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _say_once.cache_clear()
    case = make_case(8, 123)
    with pytest.raises(ValueError, match="impl = 'native' does not compute.*'reverse_kl'"):
        call(case, divergence="reverse_kl", impl="native")
    for _ in range(2):
        call(case, divergence="jensen_shannon")
    said = [r.message for r in caplog.records if "jensen_shannon" in r.message]
    assert len(said) == 1 and "slow reference" in said[0]


def test_auto_is_native_on_the_cpu() -> None:
    body = choose_backend("auto", device=torch.device("cpu"), dtypes=frozenset({torch.bfloat16}))
    assert body.name == "native"


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    body_and_dtype=st.sampled_from(BODIES_AND_DTYPES),
    T=st.integers(0, 9),
    V=st.integers(1, 70),
    padding=st.integers(0, 9),
    a=st.sampled_from([0.25, 1.0, 2.0]),
    b=st.sampled_from([0.5, 1.0, 4.0]),
    teacher=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_option(
    body_and_dtype: tuple[str, torch.dtype], T: int, V: int, padding: int, a: float, b: float,
    teacher: bool, seed: int,
) -> None:  # fmt: skip
    body, dtype = body_and_dtype
    case = make_case(T, V, a=a, b=b, seed=seed)
    if not teacher:
        case = replace(case, teacher_TV=None, kd_weight_T=torch.zeros(T))
    exact, reference = plain(case, torch.float64), plain(case, dtype)
    got = implementation(body, case, V + padding, dtype)
    for name in ("ce_T", "kl_T", "loss", "grad_TV"):
        ours, theirs, wanted = (getattr(x, name).double() for x in (got, reference, exact))
        # Absolute: with one or two columns the exact values are 0 or tiny.
        gap, allowed = (ours - wanted).abs(), (theirs - wanted).abs().max() if T else 0.0
        unit = 1e-13 if dtype == torch.float64 else 1e-5
        assert (gap <= 2 * allowed + unit * (1 + wanted.abs().max() if T else 1)).all(), name
    if teacher and T:
        assert (got.kl_T >= -1e-5).all()
        rows = got.grad_TV.double().sum(dim=1)
        slack = 1e-6 + V * 4 * torch.finfo(dtype).eps / min(1.0, b)
        assert (rows.abs() <= slack).all(), "each row's gradient sums to 0"


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("impl", dict(impl="fast"), "impl = 'fast'.*auto.*reference"),
    ("impl of another device", dict(impl="cuda"), "impl = 'cuda' cannot serve tensors on cpu"),
    ("divergence", dict(divergence="kl"), "divergence = 'kl'.*forward_kl.*mse"),
    ("temperature below fp32", dict(teacher_temperature=1e-39), "temperatures.*1e-39"),
    ("infinite temperature", dict(teacher_temperature=math.inf), "temperatures.*inf"),
    ("student's strides", dict(student_logits_TW=torch.zeros(9, 8).t()), "student.*strides.*adjac"),
    ("teacher's strides", dict(teacher_logits_TW=torch.zeros(8, 18)[:, ::2]), "teacher.*strides"),
    ("teacher's axes", dict(teacher_logits_TW=torch.zeros(8)), r"teacher.*must be \[T, W\]"),
    ("label's device", dict(labels_T=torch.zeros(8, device="meta").long()), "labels_T is on meta"),
    ("precise teacher", dict(teacher_logits_TW=torch.zeros(8, 9).double()), "teacher.*is fp64"),
    ("cold teacher", dict(teacher_temperature=0.0), "temperatures.*teacher 0.0"),
    ("cold student", dict(student_temperature=-1.0), "temperatures.*student -1.0"),
    ("nan temperature", dict(student_temperature=math.nan), "temperatures.*nan"),
    ("one axis", dict(student_logits_TW=torch.zeros(8)), r"must be \[T, W\]"),
    ("whole numbers", dict(student_logits_TW=torch.zeros(8, 9, dtype=torch.int64)), "floating"),
    ("teacher's dtype", dict(teacher_logits_TW=torch.zeros(8, 9).long()), "teacher.*floating"),
    ("part of a vocabulary", dict(vocab=VocabShard(size=10, start=0, stop=9)), "no tp_group"),
    ("empty shard", dict(student_logits_TW=torch.zeros(8, 0)), "student.*no columns.*padded_vocab"),
    ("narrow student", dict(student_logits_TW=torch.zeros(8, 8)), "student.*8 columns, fewer"),
    ("narrow teacher", dict(teacher_logits_TW=torch.zeros(8, 5)), "teacher.*5 columns, fewer"),
    ("teacher's tokens", dict(teacher_logits_TW=torch.zeros(7, 9)), r"\(7, 9\).*must be the same"),
    ("label's dtype", dict(labels_T=torch.zeros(8, dtype=torch.int32)), "int64.*int32"),
    ("label's shape", dict(labels_T=torch.zeros(7, dtype=torch.int64)), r"\(8,\).*\(7,\)"),
    ("label too large", dict(labels_T=torch.full((8,), 9)), "label 9 .* vocabulary of 9"),
    ("ignore index", dict(labels_T=torch.full((8,), -100)), "label -100"),
    ("ce weight", dict(ce_weight_T=torch.ones(7)), r"ce_weight_T has shape \(7,\)"),
    ("kd weight", dict(kd_weight_T=torch.ones(8, 1)), r"kd_weight_T has shape \(8, 1\)"),
    ("device", dict(teacher_logits_TW=torch.zeros(8, 9, device="meta")), "teacher.*on meta"),
    ("weight's device", dict(ce_weight_T=torch.ones(8, device="meta")), "ce_weight_T is on meta"),
    ("no teacher", dict(teacher_logits_TW=None), "kd_weight_T.*no teacher"),
    ("no teacher, scalar", dict(teacher_logits_TW=None, kd_weight_T=0.1), "kd_weight_T.*no teach"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(make_case(8, 9), **changes)


@pytest.mark.parametrize("bounds", [(-1, 4), (5, 4), (3, 11)])
def test_shard_outside_the_vocabulary_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a range inside the vocabulary"):
        VocabShard(size=10, start=bounds[0], stop=bounds[1])


@pytest.mark.parametrize("size", [1, 123, 252, 507, 512])
@pytest.mark.parametrize("divisible_by", [1, 64, 128])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_shards_partition_the_vocabulary(size: int, divisible_by: int, tp_size: int) -> None:
    padded_size = padded_vocab_size(size, divisible_by, tp_size)
    assert padded_size % (divisible_by * tp_size) == 0
    assert size <= padded_size < size + divisible_by * tp_size
    shards = [
        VocabShard.of_rank(size=size, padded_size=padded_size, tp_rank=rank, tp_size=tp_size)
        for rank in range(tp_size)
    ]
    columns = [column for shard in shards for column in range(shard.start, shard.stop)]
    assert columns == list(range(size))
    width = padded_size // tp_size
    assert all(shard.start in (rank * width, size) for rank, shard in enumerate(shards))
