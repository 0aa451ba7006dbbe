"""Every backend of `kd_loss` on one rank against plain fp64 autograd: values, gradients, errors."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_backends import BACKENDS, BACKENDS_AND_DTYPES, chosen, dtypes_of, threads_backwards
from loss_cases import (
    OUTLIERS,
    TEMPERATURES,
    LossCase,
    LossResult,
    Placement,
    assert_as_exact_as_autograd,
    autograd_result,
    loss_arguments,
    loss_result,
    make_case,
    relative_error,
    with_masked_columns,
    with_outliers,
    with_truncated_teacher,
    without_ce,
    without_teacher,
)

from megatron_salt.kernels import KdLoss, VocabShard, kd_loss, padded_vocab_size
from megatron_salt.kernels.backend import Divergence
from megatron_salt.kernels.choose import _say_once, choose_backend

torch.set_num_threads(1)  # these tensors are too small to share, and other tests run beside us

SIZES = [(252, 4), (507, 133), (123, 0), (252, 4)]
"""Real columns and padding."""


def result_of(
    backend: str,
    case: LossCase,
    dtype: torch.dtype,
    padding: int = 5,
    teacher_dtype: torch.dtype | None = None,
) -> LossResult:
    with chosen(backend):
        where = Placement(padding=padding)
        return loss_result(loss_arguments(case, dtype, where, teacher_dtype=teacher_dtype))


def check(backend: str, case: LossCase, dtype: torch.dtype, padding: int = 5) -> LossResult:
    """The result, found to be as exact as plain autograd's."""
    got = result_of(backend, case, dtype, padding)
    assert_as_exact_as_autograd(
        got, autograd_result(case, dtype), autograd_result(case),
        tolerance=1e-14 if dtype == torch.float64 else 5e-7,
    )  # fmt: skip
    return got


@pytest.mark.parametrize(
    ("size", "temperatures"), list(zip(SIZES, TEMPERATURES, strict=True)), ids=str
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
def test_is_as_exact_as_plain_autograd(
    backend: str, dtype: torch.dtype, size: tuple[int, int], temperatures: tuple[float, float]
) -> None:
    (V, padding), (a, b) = size, temperatures
    check(backend, make_case(24, V, a=a, b=b), dtype, padding)


@pytest.mark.parametrize("dtype", dtypes_of("native"), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "temperatures"), list(zip(OUTLIERS, reversed(TEMPERATURES), strict=True)), ids=str
)
def test_large_logits_cost_no_digits(
    kind: str, temperatures: tuple[float, float], backend: str, dtype: torch.dtype
) -> None:
    a, b = temperatures
    check(backend, with_outliers(make_case(16, 123, a=a, b=b), kind), dtype)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
def test_teacher_may_give_tokens_no_probability(backend: str, dtype: torch.dtype) -> None:
    got = check(backend, with_truncated_teacher(make_case(16, 252, a=2.0), 5), dtype)
    assert got.kl_T.isfinite().all()


@pytest.mark.parametrize("num_masked", [9, 3000])
@pytest.mark.parametrize("dtype", dtypes_of("native"), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_may_be_masked_with_the_smallest_number(
    backend: str, dtype: torch.dtype, num_masked: int
) -> None:
    """From the first column on, so that whole blocks of columns have nothing else in them."""
    check(backend, with_masked_columns(make_case(6, 4096), num_masked, dtype), dtype, padding=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
def test_student_that_equals_its_teacher_is_at_rest(
    backend: str, dtype: torch.dtype, temperature: float
) -> None:
    case = without_ce(make_case(16, 507, a=temperature, b=temperature))
    got = result_of(backend, replace(case, teacher_TV=case.student_TV), dtype)
    assert (got.kl_T == 0).all() and got.loss == 0
    assert (got.grad_TV == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_zero_weight_is_exactly_nothing(backend: str, bad: float) -> None:
    case = make_case(12, 123, b=2.0)
    good = result_of(backend, case, torch.float32)
    student, teacher = case.student_TV.clone(), case.teacher.clone()
    student[4, 7], teacher[4, 9] = bad, bad  # rows 4 and 5 weigh nothing
    student[5], teacher[5] = bad, bad
    got = result_of(backend, replace(case, student_TV=student, teacher_TV=teacher), torch.float32)
    assert (got.grad_TV[4:6] == 0).all()
    assert torch.equal(got.grad_TV, good.grad_TV) and got.loss == good.loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_with_ce_alone_ignores_a_broken_teacher(backend: str) -> None:
    case = make_case(12, 123)
    case = replace(case, ce_weight_T=torch.ones_like(case.ce_weight_T))
    exact = autograd_result(case)
    teacher = case.teacher.clone()
    teacher[3] = torch.nan  # row 3 has no KD weight
    got = result_of(backend, replace(case, teacher_TV=teacher), torch.float32)
    assert relative_error(got.grad_TV, exact.grad_TV) < 1e-6
    assert relative_error(got.loss, exact.loss) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_ce_is_at_temperature_1_whatever_the_students(backend: str) -> None:
    case = make_case(12, 123)
    cold = result_of(backend, case, torch.float32, 0)
    warm = result_of(backend, replace(case, b=3.0), torch.float32, 0)
    assert torch.allclose(warm.ce_T, cold.ce_T, atol=2e-6)
    assert not torch.allclose(warm.kl_T, cold.kl_T, atol=1e-3)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
def test_without_teacher_it_is_cross_entropy(backend: str, dtype: torch.dtype) -> None:
    case = without_teacher(make_case(24, 252, b=2.0))
    got = check(backend, case, dtype)
    expected = torch.nn.functional.cross_entropy(
        case.student_TV.to(dtype).double(), case.labels_T, reduction="none"
    )
    assert relative_error(got.ce_T, expected) < 1e-6
    assert (got.kl_T == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_tokens(backend: str, with_teacher: bool) -> None:
    case = make_case(0, 123)
    got = result_of(backend, case if with_teacher else without_teacher(case), torch.bfloat16)
    assert got.loss == 0 and got.ce_T.shape == got.kl_T.shape == (0,)
    assert got.grad_TV.shape == (0, 123)


def call(case: LossCase, **changes: Any) -> KdLoss:
    arguments = loss_arguments(case, torch.float32, Placement(padding=0))
    return kd_loss(**(arguments | changes))


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 1.0), (1.0, 0.0)])
def test_scalar_weights_hold_for_every_token(weights: tuple[float, float]) -> None:
    case = make_case(8, 123)
    ce, kd = weights
    every = call(case, ce_weight_T=torch.full((8,), ce), kd_weight_T=torch.full((8,), kd))
    for kind in (float, torch.tensor):
        scalar = call(case, ce_weight_T=kind(ce), kd_weight_T=kind(kd))
        assert scalar.loss == every.loss
    assert float(every.loss.detach()) == pytest.approx(
        ce * float(every.ce_T.sum()) + kd * float(every.kl_T.sum()), rel=1e-6
    )


def test_gradient_follows_what_is_upstream_and_nothing_is_changed_in_place() -> None:
    case = make_case(8, 123, b=2.0)
    arguments = loss_arguments(case, torch.float32, teacher_dtype=torch.bfloat16)
    student = arguments["student_logits_TW"]
    given = [student, arguments["teacher_logits_TW"], case.labels_T, case.ce_weight_T]
    before = [x.detach().clone() for x in given]
    result = kd_loss(**arguments)
    (once,) = torch.autograd.grad(result.loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(-3.0 * result.loss, student)
    assert torch.allclose(twice, -3.0 * once, rtol=1e-6)
    for x, y in zip(before, given, strict=True):
        assert torch.equal(x.nan_to_num(), y.detach().nan_to_num())
    assert not result.ce_T.requires_grad and not result.kl_T.requires_grad
    assert result.loss.dtype == result.ce_T.dtype == result.kl_T.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_does_not_depend_on_how_tokens_are_cut(backend: str) -> None:
    """Weights carry the normaliser, so the loss of a batch is the sum over its pieces."""
    case = make_case(24, 123)
    dtype = torch.float64 if backend == "reference" else torch.float32
    whole = result_of(backend, case, dtype)
    pieces = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 24)):
        piece = replace(
            case, student_TV=case.student_TV[rows], teacher_TV=case.teacher[rows],
            labels_T=case.labels_T[rows], ce_weight_T=case.ce_weight_T[rows],
            kd_weight_T=case.kd_weight_T[rows],
        )  # fmt: skip
        pieces.append(result_of(backend, piece, dtype))
    total = float(sum(piece.loss for piece in pieces))
    assert total == pytest.approx(float(whole.loss), rel=1e-13 if backend == "reference" else 1e-6)
    assert torch.equal(torch.cat([piece.grad_TV for piece in pieces]), whole.grad_TV)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_are_rounded_to_nearest(backend: str, dtype: torch.dtype) -> None:
    """Truncated they would still have no more than twice the error of rounded ones."""
    case = make_case(24, 252)
    student, teacher = (x.to(dtype).double() for x in (case.student_TV, case.teacher))
    case = replace(case, student_TV=student, teacher_TV=teacher)
    expected = result_of(backend, case, torch.float32).grad_TV.to(dtype)
    # Columns are grouped by dtype, so a sum's last bit may differ, and what lies half-way with it.
    assert (result_of(backend, case, dtype).grad_TV != expected).double().mean() < 0.01


MIXED = [(x, y) for x in dtypes_of("native") for y in dtypes_of("native") if x != y]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "teacher_dtype"), MIXED, ids=str)
def test_student_and_teacher_may_have_different_dtypes(
    backend: str, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    case = make_case(8, 123, a=2.0)
    # The oracle sees the teacher as it was rounded: the student's rounding is what is judged.
    exact = autograd_result(replace(case, teacher_TV=case.teacher.to(teacher_dtype).double()))
    got = result_of(backend, case, dtype, 2, teacher_dtype)
    for name in ("ce_T", "kl_T", "grad_TV"):
        error = relative_error(getattr(got, name), getattr(exact, name))
        assert error < 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", dtypes_of("native"), ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_rows_may_start_anywhere(backend: str, dtype: torch.dtype) -> None:
    """Views whose rows lie at every offset from a multiple of 16 bytes, alike and unalike."""
    case = make_case(5, 75)
    expected = result_of(backend, case, dtype, 0)
    unit = torch.finfo(dtype).eps
    for student_offset, teacher_offset, gap in [(0, 0, 0), (1, 1, 8), (3, 3, 21), (1, 4, 6)]:
        ways = [
            Placement(padding=0, gap=gap, offset=offset)
            for offset in (student_offset, teacher_offset)
        ]
        with chosen(backend):
            got = loss_result(loss_arguments(case, dtype, ways[0], teacher_where=ways[1]))
        # The columns are grouped by their addresses, so sums may differ in their last bits.
        assert torch.allclose(got.kl_T, expected.kl_T, rtol=1e-5, atol=1e-6)
        assert torch.allclose(got.grad_TV, expected.grad_TV, rtol=2 * unit, atol=1e-7)


@pytest.mark.parametrize("V", [123, 2049, 5000])
def test_cuda_kernels_need_no_barrier_that_is_missing(V: int) -> None:
    """With the threads of a block run in the opposite order nothing may change."""
    case = make_case(3, V, b=2.0)
    forwards = result_of("cuda on cpu", case, torch.float32)
    with threads_backwards():
        backwards = result_of("cuda on cpu", case, torch.float32)
    for name, x, y in zip(LossResult._fields, forwards, backwards, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("V", [3, 1023, 1024, 1025, 4099])
def test_cpu_and_cuda_code_compute_the_same(V: int) -> None:
    """Two loops over one header: block edges, odd sizes, more columns than a block has threads."""
    case = make_case(4, V)
    native, cuda = (result_of(backend, case, torch.float32, 0) for backend in BACKENDS[1:])
    for name in ("ce_T", "kl_T", "grad_TV"):
        assert torch.allclose(getattr(native, name), getattr(cuda, name), rtol=1e-5, atol=1e-6)


def test_native_result_does_not_depend_on_threads() -> None:
    # In a process of its own: a thread pool must not be alive when tests fork ranks.
    script = (
        "import torch\n"
        "from megatron_salt.kernels import VocabShard, kd_loss\n"
        "torch.manual_seed(0)\n"
        "student, teacher = torch.randn(2, 37, 2051)\n"
        "found = []\n"
        "for num_threads in (1, 2, 3):\n"
        "    torch.set_num_threads(num_threads)\n"
        "    leaf = student.clone().requires_grad_()\n"
        "    result = kd_loss(leaf, teacher, torch.arange(37), ce_weight_T=0.5, kd_weight_T=0.5,\n"
        "        vocab=VocabShard(size=2051, start=0, stop=2051), impl='native')\n"
        "    result.loss.backward()\n"
        "    found.append((result.loss.detach(), result.kl_T, leaf.grad))\n"
        "for some in found[1:]:\n"
        "    assert all(torch.equal(a, b) for a, b in zip(found[0], some))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize(("a", "b"), TEMPERATURES)
def test_divergences_and_their_gradients_are_the_textbooks(
    a: float, b: float, divergence: Divergence
) -> None:
    case = make_case(8, 123, a=a, b=b, divergence=divergence)
    exact = autograd_result(case)
    got = result_of("reference", case, torch.float64)
    assert_as_exact_as_autograd(got, exact, exact, tolerance=1e-13)


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
    backend = choose_backend("auto", device=torch.device("cpu"), dtypes=frozenset({torch.bfloat16}))
    assert backend.name == "native"


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    body_and_dtype=st.sampled_from(BACKENDS_AND_DTYPES),
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
    backend, dtype = body_and_dtype
    case = make_case(T, V, a=a, b=b, seed=seed)
    case = case if teacher else without_teacher(case)
    exact, reference = autograd_result(case), autograd_result(case, dtype)
    got = result_of(backend, case, dtype, padding)
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
