"""`linear_kd_loss` on one rank: the same values and gradients as `kd_loss` on whole logits.

The oracle is `kd_loss` in fp64 on logits made from the un-rounded hidden states. Letters: T tokens,
D and E widths, W vocabulary columns, V real vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from bodies import BODIES, BODIES_AND_DTYPES, chosen, threads_backwards
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_salt.kernels import Chunking, KdLoss, VocabShard, kd_loss, linear_kd_loss
from megatron_salt.kernels.chunks import even_chunk
from megatron_salt.kernels.head import Head

torch.set_num_threads(1)

T, V, W, D, E = 70, 251, 256, 24, 20
VOCAB = VocabShard(size=V, start=0, stop=V)
HALF = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Case:
    """Hidden states and heads in fp64, 20 % masked tokens, labels at both ends."""

    hidden_TD: Tensor
    weight_WD: Tensor
    teacher_hidden_TE: Tensor | None
    teacher_weight_WE: Tensor | None
    labels_T: Tensor
    ce_weight_T: Tensor
    kd_weight_T: Tensor

    def rounded(self, dtype: torch.dtype) -> Case:
        """What is left of hidden states and heads in a dtype, again in fp64."""
        names = ("hidden_TD", "weight_WD", "teacher_hidden_TE", "teacher_weight_WE")
        values = {name: getattr(self, name) for name in names}
        return replace(
            self, **{n: None if x is None else x.to(dtype).double() for n, x in values.items()}
        )


def make_case(num_tokens: int = T, *, near: bool = False, seed: int = 0) -> Case:
    """`near`: a teacher of the student's width whose logits differ by a few thousandths."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    hidden, weight = normal(num_tokens, D), normal(W, D) * 0.3
    teacher_hidden, teacher_weight = normal(num_tokens, E), normal(W, E) * 0.3
    if near:
        teacher_hidden, teacher_weight = hidden + 1e-3 * normal(num_tokens, D), weight
    labels = torch.randint(V, (num_tokens,), generator=rng)
    labels[:2] = torch.tensor([0, V - 1])[:num_tokens]
    mask = (torch.rand(num_tokens, generator=rng) > 0.2).double()
    return Case(
        hidden_TD=hidden, weight_WD=weight, teacher_hidden_TE=teacher_hidden,
        teacher_weight_WE=teacher_weight, labels_T=labels,
        ce_weight_T=torch.rand(num_tokens, generator=rng).double() * mask,
        kd_weight_T=torch.rand(num_tokens, generator=rng).double() * mask,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loss: Tensor
    ce_T: Tensor
    kl_T: Tensor
    hidden_grad_TD: Tensor
    weight_grad_WD: Tensor


def unfused(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> Outcome:
    """Whole logits by autograd's own matrix products, in `dtype`, and the reference `kd_loss`."""
    hidden = case.hidden_TD.to(dtype, copy=True).requires_grad_()
    weight = case.weight_WD.to(dtype, copy=True).requires_grad_()
    teacher = None
    if case.teacher_hidden_TE is not None and case.teacher_weight_WE is not None:
        teacher = case.teacher_hidden_TE.to(dtype) @ case.teacher_weight_WE.to(dtype).t()
    result = kd_loss(
        hidden @ weight.t(), teacher, case.labels_T, ce_weight_T=case.ce_weight_T,
        kd_weight_T=case.kd_weight_T, vocab=VOCAB, impl="reference", **options,
    )  # fmt: skip
    result.loss.backward()
    return outcome(result, hidden, weight)


def outcome(result: KdLoss, hidden: Tensor, weight: Tensor) -> Outcome:
    assert hidden.grad is not None and weight.grad is not None
    return Outcome(
        loss=result.loss.detach(), ce_T=result.ce_T, kl_T=result.kl_T, hidden_grad_TD=hidden.grad,
        weight_grad_WD=weight.grad,
    )  # fmt: skip


def call(case: Case, dtype: torch.dtype, **changes: Any) -> tuple[KdLoss, Tensor, Tensor]:
    hidden = case.hidden_TD.to(dtype, copy=True).requires_grad_()
    weight = case.weight_WD.to(dtype, copy=True).requires_grad_()
    arguments: dict[str, Any] = {
        "student_hidden_TD": hidden,
        "student_weight_WD": weight,
        "teacher_hidden_TE": _to(case.teacher_hidden_TE, dtype),
        "teacher_weight_WE": _to(case.teacher_weight_WE, dtype),
        "labels_T": case.labels_T,
        "ce_weight_T": case.ce_weight_T,
        "kd_weight_T": case.kd_weight_T,
        "vocab": VOCAB,
    }
    return linear_kd_loss(**(arguments | changes)), hidden, weight


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def fused(body: str, case: Case, dtype: torch.dtype, **changes: Any) -> Outcome:
    with chosen(body):
        result, hidden, weight = call(case, dtype, **changes)
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    return outcome(result, hidden, weight)


def error(got: Tensor, exact: Tensor) -> float:
    """Norm of the deviation, relative to the norm of the exact value."""
    return float((got.double() - exact).norm()) / max(float(exact.norm()), 1e-30)


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 40_000], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "own logits"])
@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "no teacher"])
@pytest.mark.parametrize(("body", "dtype"), BODIES_AND_DTYPES, ids=str)
def test_is_as_exact_as_whole_logits(
    body: str, dtype: torch.dtype, teacher: bool, logits_dtype: torch.dtype | None, chunk_bytes: int
) -> None:
    case = make_case()
    if not teacher:
        no_kd = torch.zeros_like(case.kd_weight_T)
        case = replace(case, teacher_hidden_TE=None, teacher_weight_WE=None, kd_weight_T=no_kd)
    exact, plain = unfused(case.rounded(dtype)), unfused(case, dtype)
    if dtype == HALF and body == "reference" and chunk_bytes == 1 << 30:
        assert error(plain.hidden_grad_TD, exact.hidden_grad_TD) > 1e-3, "rounding is being tested"
    got = fused(
        body, case, dtype, chunking=Chunking(chunk_bytes=chunk_bytes, logits_dtype=logits_dtype)
    )
    for name in ("loss", "ce_T", "kl_T", "hidden_grad_TD", "weight_grad_WD"):
        wanted = getattr(exact, name)
        # Hidden states' gradients are rounded once more than the plain version's.
        bound = 2 * error(getattr(plain, name), wanted) + (
            1e-14 if dtype == torch.float64 else 1e-6
        )
        assert error(getattr(got, name), wanted) <= bound, name


@pytest.mark.parametrize("body", BODIES)
def test_chunks_change_nothing_per_token(body: str) -> None:
    case = make_case()
    whole = fused(body, case, torch.float32)
    for chunk_bytes in (3_000, 20_000, 100_000):
        cut = fused(body, case, torch.float32, chunking=Chunking(chunk_bytes=chunk_bytes))
        assert torch.allclose(cut.ce_T, whole.ce_T, rtol=1e-6, atol=1e-6)
        assert torch.allclose(cut.hidden_grad_TD, whole.hidden_grad_TD, rtol=1e-5, atol=1e-7)
        assert torch.allclose(cut.weight_grad_WD, whole.weight_grad_WD, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("body", BODIES)
def test_teacher_may_be_in_16_bits_beside_an_fp32_student(body: str) -> None:
    case = make_case()
    assert case.teacher_hidden_TE is not None and case.teacher_weight_WE is not None
    teacher = [case.teacher_hidden_TE.to(HALF), case.teacher_weight_WE.to(HALF)]
    exact = unfused(
        replace(case, teacher_hidden_TE=teacher[0].double(), teacher_weight_WE=teacher[1].double())
    )
    changes = {"teacher_hidden_TE": teacher[0], "teacher_weight_WE": teacher[1]}
    got = fused(body, case, torch.float32, **changes)
    for name in ("loss", "kl_T", "hidden_grad_TD", "weight_grad_WD"):
        assert error(getattr(got, name), getattr(exact, name)) < 2e-6, name
    with pytest.raises(ValueError, match=r"teacher_hidden_TE is torch.float32.*torch.bfloat16"):
        call(
            case, HALF, teacher_hidden_TE=teacher[0].float(), teacher_weight_WE=teacher[1].float(),
            chunking=Chunking(logits_dtype=None),
        )  # fmt: skip


def test_fp32_logits_keep_what_bf16_logits_round_away() -> None:
    """Near its teacher the student's gradient is a small difference of probabilities."""
    case = make_case(near=True)
    case = replace(case, ce_weight_T=torch.zeros_like(case.ce_weight_T)).rounded(HALF)
    exact = unfused(case)
    errors = {
        logits_dtype: error(
            fused(
                "native", case, HALF, chunking=Chunking(logits_dtype=logits_dtype)
            ).hidden_grad_TD,
            exact.hidden_grad_TD,
        )
        for logits_dtype in (torch.float32, None)
    }
    assert errors[torch.float32] < 0.01 < 0.05 < errors[None]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.float16, HALF], ids=str)
def test_weights_of_one_over_millions_of_tokens_do_not_vanish(
    body: str, dtype: torch.dtype
) -> None:
    """fp16 ends at 6e-8; the loss scale multiplies what is upstream, after the logits' gradient."""
    case = make_case()
    scaled = replace(case, ce_weight_T=case.ce_weight_T / 4e6, kd_weight_T=case.kd_weight_T / 4e6)
    exact = unfused(case.rounded(dtype))
    with chosen(body):
        result, hidden, weight = call(scaled, dtype)
    (result.loss * 4e6).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert error(hidden.grad, exact.hidden_grad_TD) < 4 * torch.finfo(dtype).eps
    assert error(weight.grad, exact.weight_grad_WD) < 4 * torch.finfo(dtype).eps


def test_what_is_upstream_is_not_rounded_to_the_gradients_dtype() -> None:
    case = make_case()
    once = fused("native", case, HALF)
    result, hidden, _ = call(case, HALF)
    (result.loss / 3).backward()
    assert hidden.grad is not None
    ratio = (hidden.grad.double() / once.hidden_grad_TD.double()).nan_to_num(1 / 3)
    assert abs(float(ratio.mean()) * 3 - 1) < 1e-4  # bf16(1/3) is 2e-3 off


def test_frozen_head_and_frozen_body_get_no_gradient() -> None:
    case = make_case()
    full = fused("native", case, torch.float32)
    result, hidden, weight = call(case, torch.float32, student_weight_WD=case.weight_WD.float())
    result.loss.backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, full.hidden_grad_TD)
    result, _, weight = call(case, torch.float32, student_hidden_TD=case.hidden_TD.float())
    result.loss.backward()
    assert weight.grad is not None and torch.equal(weight.grad, full.weight_grad_WD)
    with torch.no_grad():
        result, hidden, _ = call(case, torch.float32)
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
    hidden[5] = torch.nan
    masked = [w.clone() for w in (case.ce_weight_T, case.kd_weight_T)]
    for weight in masked:
        weight[5] = 0
    case = replace(case, ce_weight_T=masked[0], kd_weight_T=masked[1])
    good = fused("native", case, torch.float32)
    result, leaf, _ = call(replace(case, hidden_TD=hidden), torch.float32)
    result.loss.backward()
    assert leaf.grad is not None and (leaf.grad[5] == 0).all()
    assert torch.equal(result.loss, good.loss)
    nothing = torch.zeros(T)
    result, leaf, weight_leaf = call(case, torch.float32, ce_weight_T=nothing, kd_weight_T=nothing)
    result.loss.backward()
    assert result.loss == 0 and (leaf.grad == 0).all() and (weight_leaf.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    got = fused("native", make_case(0), dtype)
    assert got.loss == 0 and got.ce_T.shape == (0,)
    assert got.hidden_grad_TD.shape == (0, D) and (got.weight_grad_WD == 0).all()


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


@pytest.mark.parametrize("chunk_bytes", [1_000_000, 4_000_000])
@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "own logits"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_all_that_is_alive_fits_the_budget(
    dtype: torch.dtype, logits_dtype: torch.dtype | None, chunk_bytes: int
) -> None:
    num_tokens, num_columns, width = 2000, 3000, 64
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
    case = make_case(near=True)
    case = replace(case, ce_weight_T=torch.zeros_like(case.ce_weight_T)).rounded(torch.float16)
    exact = unfused(case)
    scaled = replace(case, kd_weight_T=case.kd_weight_T / 4e6)
    with mock.patch.object(Head, "operand_dtype", lambda head, dtype: head.weight_WD.dtype):
        result, hidden, _ = call(scaled, torch.float16)
        (result.loss * 4e6).backward()
        assert hidden.grad is not None
        kept = error(hidden.grad, exact.hidden_grad_TD)
        with mock.patch("megatron_salt.kernels.linear_kd_loss.FP16_HEADROOM", 1):
            result, hidden, _ = call(scaled, torch.float16)
            (result.loss * 4e6).backward()
            assert hidden.grad is not None
            lost = error(hidden.grad, exact.hidden_grad_TD)
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
    assert torch.equal(got.weight_grad_WD, expected.weight_grad_WD)


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
