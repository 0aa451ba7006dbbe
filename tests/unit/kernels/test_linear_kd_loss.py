"""`linear_kd_loss` on one rank: values and gradients of whole logits, in a budget.

The oracle is plain fp64 autograd on logits made from the un-rounded hidden states.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_backends import BACKENDS, BACKENDS_AND_DTYPES, chosen, threads_backwards
from loss_cases import (
    LinearCase,
    LinearResult,
    assert_as_exact_as_autograd,
    autograd_linear_result,
    linear_arguments,
    make_linear_case,
    masked_out,
    relative_error,
    without_ce,
    without_teacher,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_salt.kernels import Chunking, KdLoss, VocabShard, linear_kd_loss
from megatron_salt.kernels.chunks import even_chunk
from megatron_salt.kernels.head import Head

torch.set_num_threads(1)

T, V, W, D, E = 70, 251, 256, 24, 20
HALF = torch.bfloat16


def make_case(num_tokens: int = T, *, near: bool = False) -> LinearCase:
    return make_linear_case(num_tokens, V, D, E, near=near)


def call(case: LinearCase, dtype: torch.dtype, **changes: Any) -> tuple[KdLoss, Tensor, Tensor]:
    """The result, and the hidden states and the head that it can be differentiated in."""
    arguments = linear_arguments(case, dtype, W) | changes
    hidden, head = arguments["student_hidden_TD"], arguments["student_weight_WD"]
    return linear_kd_loss(**arguments), hidden, head


def fused(
    backend: str, case: LinearCase, dtype: torch.dtype, *, scale: float = 1.0, **changes: Any
) -> LinearResult:
    """`scale` is upstream of the loss, as a loss scale is."""
    with chosen(backend):
        result, hidden, head = call(case, dtype, **changes)
    (result.loss * scale).backward()
    assert hidden.grad is not None and head.grad is not None
    assert hidden.grad.dtype == head.grad.dtype == dtype
    assert (head.grad[V:] == 0).all(), "padding must have exactly no gradient"
    return LinearResult(result.loss.detach(), result.ce_T, result.kl_T, hidden.grad, head.grad[:V])


def error(got: Tensor, exact: Tensor) -> float:
    return relative_error(got, exact, norm=2)


WAYS = {
    "one chunk": (True, Chunking()),
    "chunks, own logits": (True, Chunking(chunk_bytes=40_000, logits_dtype=None)),
    "chunks, no teacher": (False, Chunking(chunk_bytes=40_000)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
def test_is_as_exact_as_whole_logits(backend: str, dtype: torch.dtype, way: str) -> None:
    teacher, chunking = WAYS[way]
    case = make_case() if teacher else without_teacher(make_case())
    exact, plain = autograd_linear_result(case.rounded(dtype)), autograd_linear_result(case, dtype)
    if dtype == HALF:
        assert error(plain.hidden_grad_TD, exact.hidden_grad_TD) > 1e-3, "rounding is being tested"
    # Hidden states' gradients are rounded once more than the plain version's.
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    got = fused(backend, case, dtype, chunking=chunking)
    assert_as_exact_as_autograd(got, plain, exact, tolerance=tolerance, norm=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_change_nothing_per_token(backend: str) -> None:
    case = make_case()
    whole = fused(backend, case, torch.float32)
    for chunk_bytes in (3_000, 20_000, 100_000):
        cut = fused(backend, case, torch.float32, chunking=Chunking(chunk_bytes=chunk_bytes))
        assert torch.allclose(cut.ce_T, whole.ce_T, rtol=1e-6, atol=1e-6)
        assert torch.allclose(cut.hidden_grad_TD, whole.hidden_grad_TD, rtol=1e-5, atol=1e-7)
        assert torch.allclose(cut.head_grad_VD, whole.head_grad_VD, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_may_be_in_16_bits_beside_an_fp32_student(backend: str) -> None:
    case = make_case()
    rounded = case.rounded(HALF)
    exact = autograd_linear_result(replace(rounded, hidden_TD=case.hidden_TD, head_VD=case.head_VD))
    teacher = {
        name: x for name, x in linear_arguments(case, HALF, W).items() if name.startswith("teacher")
    }
    got = fused(backend, case, torch.float32, **teacher)
    for name in ("loss", "kl_T", "hidden_grad_TD", "head_grad_VD"):
        assert error(getattr(got, name), getattr(exact, name)) < 2e-6, name
    precise = {name: x.float() for name, x in teacher.items() if isinstance(x, Tensor)}
    with pytest.raises(ValueError, match=r"teacher_hidden_TE is torch.float32.*torch.bfloat16"):
        call(case, HALF, **precise, chunking=Chunking(logits_dtype=None))


def test_fp32_logits_keep_what_bf16_logits_round_away() -> None:
    """Near its teacher the student's gradient is a small difference of probabilities."""
    case = without_ce(make_case(near=True)).rounded(HALF)
    exact = autograd_linear_result(case)
    errors = {}
    for logits_dtype in (torch.float32, None):
        got = fused("native", case, HALF, chunking=Chunking(logits_dtype=logits_dtype))
        errors[logits_dtype] = error(got.hidden_grad_TD, exact.hidden_grad_TD)
    assert errors[torch.float32] < 0.01 < 0.05 < errors[None]


def scaled(case: LinearCase, factor: float) -> LinearCase:
    return replace(
        case, ce_weight_T=case.ce_weight_T * factor, kd_weight_T=case.kd_weight_T * factor
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, HALF], ids=str)
def test_weights_of_one_over_millions_of_tokens_do_not_vanish(
    backend: str, dtype: torch.dtype
) -> None:
    """fp16 ends at 6e-8; the loss scale multiplies what is upstream, after the logits' gradient."""
    case = make_case()
    exact = autograd_linear_result(case.rounded(dtype))
    got = fused(backend, scaled(case, 1 / 4e6), dtype, scale=4e6)
    for name in ("hidden_grad_TD", "head_grad_VD"):
        assert error(getattr(got, name), getattr(exact, name)) < 4 * torch.finfo(dtype).eps, name


def test_what_is_upstream_is_not_rounded_to_the_gradients_dtype() -> None:
    once, third = (fused("native", make_case(), HALF, scale=scale) for scale in (1.0, 1 / 3))
    ratio = third.hidden_grad_TD.double() / once.hidden_grad_TD.double()
    assert abs(float(ratio.nan_to_num(1 / 3).mean()) * 3 - 1) < 1e-4  # bf16(1/3) is 2e-3 off


def test_frozen_head_and_frozen_body_get_no_gradient() -> None:
    case = make_case()
    full = fused("native", case, torch.float32)
    frozen = linear_arguments(case, torch.float32, W)
    result, hidden, _ = call(
        case, torch.float32, student_weight_WD=frozen["student_weight_WD"].detach()
    )
    result.loss.backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, full.hidden_grad_TD)
    result, _, head = call(
        case, torch.float32, student_hidden_TD=frozen["student_hidden_TD"].detach()
    )
    result.loss.backward()
    assert head.grad is not None and torch.equal(head.grad[:V], full.head_grad_VD)
    with torch.no_grad():
        result, _, _ = call(case, torch.float32)
    assert not result.loss.requires_grad and torch.equal(result.loss, full.loss)


def test_nothing_of_the_teacher_is_kept_for_backward() -> None:
    result, _, _ = call(make_case(), torch.float32)
    function = result.loss.grad_fn
    assert function is not None and function.saved_tensors == ()
    kept = [x for x in function.gradients if x is not None]
    assert sorted(tuple(x.shape) for x in kept) == [(T, D), (W, D)]


def test_differentiating_twice_is_refused() -> None:
    result, _, _ = call(make_case(), torch.float32)
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        result.loss.backward()


def test_zero_weights_send_exactly_nothing() -> None:
    case = make_case()
    hidden = case.hidden_TD.clone()
    hidden[5] = torch.nan  # row 5 weighs nothing
    good = fused("native", case, torch.float32)
    result, leaf, _ = call(replace(case, hidden_TD=hidden), torch.float32)
    result.loss.backward()
    assert leaf.grad is not None and (leaf.grad[5] == 0).all()
    assert torch.equal(result.loss, good.loss)
    got = fused("native", masked_out(case), torch.float32)
    assert got.loss == 0 and (got.hidden_grad_TD == 0).all() and (got.head_grad_VD == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    got = fused("native", make_case(0), dtype)
    assert got.loss == 0 and got.ce_T.shape == (0,)
    assert got.hidden_grad_TD.shape == (0, D) and (got.head_grad_VD == 0).all()


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes that tensors made inside hold at the same time."""

    def __init__(self, *given: Tensor | None) -> None:
        super().__init__()
        self._given = {x.untyped_storage().data_ptr() for x in given if x is not None}
        self._tensors: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self._tensors.append(weakref.ref(x))
        self._tensors = [ref for ref in self._tensors if ref() is not None]
        storages = [x.untyped_storage() for ref in self._tensors if (x := ref()) is not None]
        live = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak = max(self.peak, sum(n for p, n in live.items() if p not in self._given))
        return result


@pytest.mark.parametrize(
    ("dtype", "logits_dtype", "chunk_bytes"),
    [
        (torch.float32, torch.float32, 4_000_000),
        (HALF, torch.float32, 1_000_000),
        (HALF, None, 4_000_000),
    ],
    ids=str,
)
def test_all_that_is_alive_fits_the_budget(
    dtype: torch.dtype, logits_dtype: torch.dtype | None, chunk_bytes: int
) -> None:
    num_tokens, num_columns, width = 500, 3000, 64
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng).to(dtype)
    hidden, weight = normal(num_tokens, width), normal(num_columns, width)
    states = [hidden, weight, normal(num_tokens, width), normal(num_columns, width)]
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    with LiveBytes(*states, labels) as live:
        linear_kd_loss(
            *states, labels, ce_weight_T=1.0, kd_weight_T=1.0,
            vocab=VocabShard(size=num_columns, start=0, stop=num_columns),
            chunking=Chunking(chunk_bytes=chunk_bytes, logits_dtype=logits_dtype),
        )  # fmt: skip
    results = hidden.numel() * dtype.itemsize + weight.numel() * 4
    per_token = 4 * 8 * num_tokens  # values and weights
    extra = live.peak - results - per_token
    assert 0.5 * chunk_bytes < extra <= 1.1 * chunk_bytes


def test_fp16_gradients_keep_what_lies_far_below_their_weight() -> None:
    """As on CUDA, where the products want the logits' gradient in fp16."""
    case = without_ce(make_case(near=True)).rounded(torch.float16)
    exact = autograd_linear_result(case)

    def found() -> float:
        got = fused("native", scaled(case, 1 / 4e6), torch.float16, scale=4e6)
        return error(got.hidden_grad_TD, exact.hidden_grad_TD)

    with mock.patch.object(Head, "operand_dtype", lambda head, dtype: head.weight_WD.dtype):
        kept = found()
        with mock.patch("megatron_salt.kernels.linear_kd_loss.FP16_HEADROOM", 1):
            lost = found()
    assert kept < 2e-3 and kept < lost / 2


@pytest.mark.parametrize("weight", [1e-39, 1e-30, 1e30, 2e38])
def test_weights_at_the_ends_of_fp32(weight: float) -> None:
    case = make_case()
    result, hidden, head = call(case, torch.float32, ce_weight_T=weight, kd_weight_T=0.0)
    (result.loss / weight if weight > 1 else result.loss).backward()
    assert hidden.grad is not None and head.grad is not None
    assert hidden.grad.isfinite().all() and head.grad.isfinite().all()


@pytest.mark.parametrize("V", [123, 2049, 5000])
def test_cuda_kernel_of_both_passes_needs_no_barrier_that_is_missing(V: int) -> None:
    """The gradient goes over the logits, so nobody may write before the label has been read."""
    rng = torch.Generator().manual_seed(1)
    hidden, head, teacher = (torch.randn(*n, generator=rng) for n in ((5, 8), (V, 8), (V, 8)))

    def run() -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        with chosen("cuda on cpu"):
            result = linear_kd_loss(
                leaf, head, hidden, teacher, torch.tensor([0, 7, 90, V - 2, V - 1]),
                ce_weight_T=1.0, kd_weight_T=1.0, vocab=VocabShard(size=V, start=0, stop=V),
            )  # fmt: skip
        result.loss.backward()
        assert leaf.grad is not None
        return result.ce_T, leaf.grad

    forwards = run()
    with threads_backwards():
        backwards = run()
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_without_gradients_none_are_computed() -> None:
    case = make_case()
    path = "megatron_salt.kernels.linear_kd_loss._Gradients.add_"
    with mock.patch(path, side_effect=AssertionError("a gradient was computed")):
        with torch.no_grad():
            result, _, _ = call(case, torch.float32)
        assert not result.loss.requires_grad
        with pytest.raises(AssertionError, match="a gradient was computed"):
            call(case, torch.float32)


def test_autocast_changes_nothing() -> None:
    case = make_case()
    expected = fused("native", case, torch.float32)
    with torch.autocast("cpu", dtype=HALF):
        got = fused("native", case, torch.float32)
    assert torch.equal(got.hidden_grad_TD, expected.hidden_grad_TD)
    assert torch.equal(got.head_grad_VD, expected.head_grad_VD)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    num_tokens=st.integers(0, 10_000),
    bytes_per_token=st.integers(1, 5_000),
    budget=st.integers(1, 10**7),
    fixed=st.integers(0, 1000),
)
def test_chunks_fill_the_budget_and_never_exceed_it(
    num_tokens: int, bytes_per_token: int, budget: int, fixed: int
) -> None:
    chunk_bytes, budget = budget, budget - fixed
    if budget < bytes_per_token:
        with pytest.raises(
            ValueError, match=f"chunk_bytes = {chunk_bytes} cannot hold.*loss_chunk_mib"
        ):
            even_chunk(num_tokens, bytes_per_token, chunk_bytes, fixed_bytes=fixed)
        return
    size = even_chunk(num_tokens, bytes_per_token, chunk_bytes, fixed_bytes=fixed)
    assert size >= 1 and size * bytes_per_token <= budget
    fewest = -(-num_tokens // (budget // bytes_per_token))
    assert -(-num_tokens // size) <= max(fewest, 1), "no more chunks than needed"
    if num_tokens > 64 and fewest == 1:
        assert size >= num_tokens


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("width", dict(student_hidden_TD=torch.zeros(T, D + 1)), "25 wide, student_weight_WD 24"),
    ("axes", dict(student_hidden_TD=torch.zeros(2, T, D)), "student_hidden_TD must have two axes"),
    ("whole numbers", dict(student_weight_WD=torch.zeros(W, D).long()), "student_weight_WD.*float"),
    ("dtypes", dict(student_hidden_TD=torch.zeros(T, D).bfloat16()), "bfloat16.*float32.*agree"),
    ("device", dict(teacher_weight_WE=torch.zeros(W, E, device="meta")), "teacher.*meta.*agree"),
    ("empty shard", dict(student_weight_WD=torch.zeros(0, D)), "student_weight_WD has no rows"),
    ("narrow head", dict(student_weight_WD=torch.zeros(V - 1, D)), "250 rows, fewer than this"),
    ("teacher's tokens", dict(teacher_hidden_TE=torch.zeros(T - 1, E)), "69 tokens.* 70"),
    ("half a teacher", dict(teacher_weight_WE=None), "teacher_weight_WE is None, the teacher's"),
    ("labels", dict(labels_T=torch.zeros(T - 1).long()), r"int64 of shape \(70,\)"),
    ("label", dict(labels_T=torch.full((T,), V)), f"label {V} lies outside"),
    ("weights", dict(kd_weight_T=torch.ones(3)), r"kd_weight_T has shape \(3,\)"),
    ("temperature", dict(teacher_temperature=0.0), "temperatures must be above 0"),
    ("impl", dict(impl="cuda"), "impl = 'cuda' cannot serve"),
    ("part of a vocabulary", dict(vocab=VocabShard(size=V + 1, start=0, stop=V)), "is a part of"),
    ("precise teacher", dict(teacher_hidden_TE=torch.zeros(T, E).double(),
     teacher_weight_WE=torch.zeros(W, E).double()), "teacher_hidden_TE is torch.float64"),
    ("other logits", dict(chunking=Chunking(logits_dtype=HALF)), "logits_dtype = torch.bfloat16"),
    ("budget", dict(chunking=Chunking(chunk_bytes=100)), "cannot hold the smallest chunk"),
    ("no teacher", dict(teacher_hidden_TE=None, teacher_weight_WE=None), "kd_weight_T.*no teacher"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(make_case(), torch.float32, **changes)
