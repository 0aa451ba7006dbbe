"""A teacher of K tokens: what is kept of its logits, their weights, and every backend's loss.

The oracle is plain fp64 autograd over the whole vocabulary (`loss_cases.textbook_loss`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from loss_backends import (
    BACKENDS,
    BACKENDS_AND_DTYPES,
    chosen,
    cuda_on_cpu,
    dtypes_of,
    threads_backwards,
)
from loss_cases import (
    LossCase,
    LossResult,
    Placement,
    assert_as_exact_as_autograd,
    autograd_result,
    loss_arguments,
    loss_result,
    make_case,
    place,
    relative_error,
    textbook_loss,
    with_outliers,
    with_sparse_teacher,
    with_truncated_teacher,
    without_ce,
)
from torch import Tensor

from megatron_salt.kernels import (
    Chunking,
    KeptLogprobs,
    SparseTeacher,
    Truncation,
    VocabShard,
    kd_loss,
    linear_kd_loss,
    top_logprobs,
)
from megatron_salt.kernels.backend import LossBackend, LossInputs, LossOptions
from megatron_salt.kernels.choose import choose_backend
from megatron_salt.kernels.sparse import LostMass

torch.set_num_threads(1)


def with_far_others(case: LossCase, nats: float = 40.0) -> LossCase:
    """The student gives all tokens that are not kept less than fp32's rounding of 1 together."""
    assert case.sparse is not None
    ids_TK, target_TK, _ = case.sparse
    student = torch.nn.functional.pad(case.student_TV, (0, 1))
    columns = torch.where(target_TK > 0, ids_TK.long(), case.V)
    student = student.scatter_add(1, columns, torch.full_like(target_TK, nats))
    return replace(case, student_TV=student[:, :-1])


def with_impossible_columns(case: LossCase) -> LossCase:
    """The student's logits at -inf where the teacher gives no weight and the label is not."""
    assert case.sparse is not None
    student = case.student_TV.clone()
    taught = torch.zeros(len(student), case.V + 1, dtype=torch.bool)
    ids_TK, target_TK, _ = case.sparse
    taught.scatter_(1, torch.where(target_TK > 0, ids_TK.long(), case.V), True)
    taught.scatter_(1, case.labels_T[:, None], True)
    student[:, ::2] = student[:, ::2].masked_fill(~taught[:, :-1:2], -torch.inf)
    return replace(case, student_TV=student)


def sparse_case(how: str, num_kept: int, T: int = 20, V: int = 252, **settings: Any) -> LossCase:
    return with_sparse_teacher(make_case(T, V, **settings), how, num_kept)


CASES = {
    "renormalise, a 2": sparse_case("renormalise", 12, a=2.0),
    "raw, b 2": sparse_case("raw", 12, b=2.0),
    "to_label, K 1": sparse_case("to_label", 1, V=123),
    "to_label, b 0.5": sparse_case("to_label", 12, b=0.5),
    "ghost": sparse_case("ghost", 12),
    "ghost, b 2, wide": sparse_case("ghost", 50, T=4, V=5000, b=2.0),
    "ghost, K 1": sparse_case("ghost", 1, V=507),
    "ghost, K = V": sparse_case("ghost", 123, V=123),
    "renormalise, K = V": sparse_case("renormalise", 252, b=2.0),
    "sampled": sparse_case("sampled", 40),
    "sampled, wide": sparse_case("sampled", 300, T=3, V=2049),
    "one token": sparse_case("raw", 1, T=3, V=1),
    # More columns than CUDA's bitmap has bits for.
    "ghost, V 200000": sparse_case("ghost", 50, T=3, V=200_000),
    "far others": with_far_others(sparse_case("ghost", 12)),
    "far others, b 3": with_far_others(sparse_case("ghost", 12, b=3.0), 60.0),
    "-inf columns": with_impossible_columns(sparse_case("ghost", 12)),
    "teacher of 5": with_sparse_teacher(with_truncated_teacher(make_case(12, 123), 5), "raw", 12),
    "near 1e4": with_sparse_teacher(with_outliers(make_case(12, 252), "all near 1e4"), "ghost", 9),
    "spikes": with_sparse_teacher(with_outliers(make_case(12, 252), "spikes of 50"), "raw", 30),
    "no CE": without_ce(sparse_case("ghost", 12)),
}


def result_of(
    backend: str, case: LossCase, dtype: torch.dtype, where: Placement | None = None
) -> LossResult:
    with chosen(backend):
        return loss_result(loss_arguments(case, dtype, where or Placement()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
def test_is_as_exact_as_autograd_over_the_whole_vocabulary(
    backend: str, dtype: torch.dtype, name: str
) -> None:
    case = CASES[name]
    got = result_of(backend, case, dtype)
    assert got.kl_T.isfinite().all() and got.grad_TV.isfinite().all()
    assert_as_exact_as_autograd(
        got, autograd_result(case, dtype), autograd_result(case),
        tolerance=1e-13 if dtype == torch.float64 else 1e-6,
    )  # fmt: skip


def test_cases_cover_what_they_name() -> None:
    """Labels inside and outside the kept tokens, repeated ids, mass that fp32 rounds away."""
    case = CASES["ghost"]
    assert case.sparse is not None and case.sparse.ghost_T is not None
    inside = (case.sparse.ids_TK == case.labels_T[:, None]).any(dim=1)
    assert inside.any() and not inside.all()
    assert (case.sparse.ghost_T > 1e-3).any()
    sampled = CASES["sampled"].sparse
    assert sampled is not None
    assert all(len(set(row[2:-3].tolist())) < 40 for row in sampled.ids_TK)
    far = CASES["far others"]
    assert far.sparse is not None
    q = far.student_TV.softmax(dim=1)
    kept_TK = torch.where(far.sparse.target_TK > 0, far.sparse.ids_TK.long(), 0)
    inside_T = torch.where(far.sparse.target_TK > 0, q.gather(1, kept_TK), 0.0).sum(dim=1)
    assert (1 - inside_T < 1e-12).all()


@pytest.mark.parametrize("dtype", dtypes_of("native"), ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_rows_may_start_anywhere(backend: str, dtype: torch.dtype) -> None:
    """A vector of columns then lies across two groups of the bitmap, or begins before the row."""
    case = sparse_case("ghost", 12, T=6, V=75)
    expected, unit = result_of(backend, case, dtype), torch.finfo(dtype).eps
    for gap, offset in ((3, 1), (8, 5), (6, 3)):
        got = result_of(backend, case, dtype, Placement(padding=1, gap=gap, offset=offset))
        assert torch.allclose(got.kl_T, expected.kl_T, rtol=1e-5, atol=1e-6)
        assert torch.allclose(got.grad_TV, expected.grad_TV, rtol=2 * unit, atol=1e-7)


def test_an_id_that_repeats_counts_once_beside_the_ghost() -> None:
    """And its weights add up: the gradient is that of one entry with their sum."""
    case = sparse_case("ghost", 12)
    assert case.sparse is not None
    ids, target, ghost = case.sparse
    halves = SparseTeacher(torch.cat([ids, ids], 1), torch.cat([target, target], 1) / 2, ghost)
    for backend in BACKENDS:
        once = result_of(backend, case, torch.float32)
        twice = result_of(backend, replace(case, sparse=halves), torch.float32)
        assert torch.allclose(twice.grad_TV, once.grad_TV, rtol=1e-5, atol=1e-7)
        # t log t of each entry: two halves have ln 2 less, each half of the weight.
        less_T = target.sum(dim=1) * torch.tensor(2.0).log()
        assert torch.allclose(twice.kl_T, once.kl_T - less_T.float(), atol=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_weight_is_exactly_nothing(backend: str, bad: float) -> None:
    case = sparse_case("ghost", 12)  # rows 4 and 5 weigh nothing, row 3 has CE alone
    good = result_of(backend, case, torch.float32)
    assert case.sparse is not None
    student, target, ghost = case.student_TV.clone(), case.sparse.target_TK.clone(), case.sparse[2]
    student[4], student[5, 7] = bad, bad
    target[3:6, 4] = bad
    assert ghost is not None
    ghost = ghost.clone()
    ghost[3:5] = bad
    broken = SparseTeacher(case.sparse.ids_TK, target, ghost)
    got = result_of(backend, replace(case, student_TV=student, sparse=broken), torch.float32)
    assert (got.grad_TV[4:6] == 0).all()
    assert torch.equal(got.grad_TV, good.grad_TV) and got.loss == good.loss


def backend_named(name: str) -> LossBackend:
    if name == "cuda on cpu":
        return cuda_on_cpu()
    return choose_backend(name, device=torch.device("cpu"), dtypes=frozenset({torch.float32}))  # type: ignore[arg-type]


def backend_inputs(case: LossCase, dtype: torch.dtype) -> tuple[LossInputs, LossOptions]:
    assert case.sparse is not None
    ghost = None if case.sparse.ghost_T is None else case.sparse.ghost_T.float()
    inputs = LossInputs(
        place(case.student_TV, dtype), None, case.labels_T, case.ce_weight_T.float(),
        case.kd_weight_T.float(), case.sparse.ids_TK, case.sparse.target_TK.float(), ghost,
    )  # fmt: skip
    vocab = VocabShard(size=case.V, start=0, stop=case.V)
    return inputs, LossOptions(vocab=vocab, student_temperature=case.b)


IN_PLACE = ["ghost, b 2, wide", "sampled", "to_label, b 0.5", "sampled, wide"]


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", dtypes_of("native"), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_over_the_logits_is_the_gradient(
    backend: str, dtype: torch.dtype, name: str
) -> None:
    """Both passes in one call, and the second one alone: equal bits, rounded once."""
    loss, upstream = backend_named(backend), torch.tensor(0.5)
    inputs, options = backend_inputs(CASES[name], dtype)
    apart = torch.empty_like(inputs.student_TW)
    scores = loss.scores(inputs, options)
    loss.gradient_(inputs, options, scores.saved, upstream, apart)
    for alone in (False, True):
        ours, _ = backend_inputs(CASES[name], dtype)
        if alone:
            loss.gradient_(ours, options, scores.saved, upstream, ours.student_TW)
        else:
            both = loss.scores_and_gradient_(ours, options, upstream, ours.student_TW)
            assert all(torch.equal(x, y) for x, y in zip(both[:3], scores[:3], strict=True))
        assert torch.equal(ours.student_TW, apart)
    if dtype == torch.float32:
        return
    exact, _ = backend_inputs(CASES[name], dtype)
    exact = exact._replace(student_TW=exact.student_TW.float())
    wide = torch.empty_like(exact.student_TW)
    loss.scores_and_gradient_(exact, options, upstream, wide)
    assert (apart != wide.to(dtype)).double().mean() < 0.01


@pytest.mark.parametrize("name", IN_PLACE)
def test_cuda_kernels_need_no_barrier_that_is_missing(name: str) -> None:
    def run() -> list[Tensor]:
        inputs, options = backend_inputs(CASES[name], torch.float32)
        apart, loss = torch.empty_like(inputs.student_TW), cuda_on_cpu()
        scores = loss.scores(inputs, options)
        loss.gradient_(inputs, options, scores.saved, torch.tensor(1.0), apart)
        both = loss.scores_and_gradient_(inputs, options, torch.tensor(1.0), inputs.student_TW)
        return [*scores[:3], apart, *both[:3], inputs.student_TW]

    forwards = run()
    with threads_backwards():
        backwards = run()
    assert all(torch.equal(x, y) for x, y in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("how", get_args(LostMass))
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_are_taught_by_stored_and_by_cut_logits(
    backend: str, how: LostMass, stored: bool
) -> None:
    """In chunks, with the gradient written over bf16 logits or beside fp32 ones."""
    T, V, D, K = 30, 251, 24, 12
    case = make_case(T, V, seed=2)
    rng = torch.Generator().manual_seed(5)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(*shape, generator=rng) for shape in ((T, D), (V, D), (T, D), (V, D))
    )
    hidden /= 8.0
    teacher_hidden /= 8.0
    vocab, truncation = VocabShard(size=V, start=0, stop=V), Truncation(top_k=K, lost_mass=how)
    teacher_logits = teacher_hidden @ teacher_head.t()
    kept = top_logprobs(teacher_logits, K, vocab, None)
    teacher = (None, None) if stored else (teacher_hidden, teacher_head)
    exact = hidden.double().requires_grad_()
    sparse = truncation.target(kept, case.labels_T)
    loss, _, _ = textbook_loss(exact @ head.double().t(), None, case, sparse)
    (wanted,) = torch.autograd.grad(loss, exact)
    leaf = hidden.clone().requires_grad_()
    with chosen(backend):
        got = linear_kd_loss(
            leaf, head, *teacher, case.labels_T, ce_weight_T=case.ce_weight_T.float(),
            kd_weight_T=case.kd_weight_T.float(), vocab=vocab, truncation=truncation,
            stored=kept if stored else None, chunking=Chunking(chunk_bytes=20_000),
        )  # fmt: skip
    got.loss.backward()
    assert relative_error(got.loss.detach(), loss.detach()) < 1e-6
    assert leaf.grad is not None and relative_error(leaf.grad, wanted) < 2e-6


def test_squared_probabilities_are_left_to_the_reference() -> None:
    case = replace(sparse_case("raw", 12, b=2.0), divergence="mse_probabilities")
    exact = autograd_result(case)
    got = result_of("reference", case, torch.float64)
    assert_as_exact_as_autograd(got, exact, exact, tolerance=1e-13)
    with pytest.raises(ValueError, match="impl = 'native' does not compute.*mse_probabilities"):
        kd_loss(**loss_arguments(case, torch.float32), impl="native")


def test_auto_is_compiled_code() -> None:
    case = CASES["ghost"]
    arguments = loss_arguments(case, torch.float32)
    auto, native = (kd_loss(**arguments, impl=impl) for impl in ("auto", "native"))  # type: ignore[arg-type]
    assert torch.equal(auto.kl_T, native.kl_T)


def changed(case: LossCase, **fields: Any) -> dict[str, Any]:
    assert case.sparse is not None
    return dict(sparse_teacher=case.sparse._replace(**fields))


SMALL = sparse_case("ghost", 3, T=4, V=9)
IDS = torch.zeros(4, 3, dtype=torch.int32)
WEIGHTS = torch.full((4, 3), 0.25)
ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("id", changed(SMALL, ids_TK=IDS + 9, target_TK=WEIGHTS), "id 9, weight 0.25"),
    ("id below 0", changed(SMALL, ids_TK=IDS - 1, target_TK=WEIGHTS), "id -1, weight 0.25"),
    ("weight", changed(SMALL, ids_TK=IDS, target_TK=-WEIGHTS), "weight below 0: id 0, weight -0.2"),
    ("dtype", changed(SMALL, ids_TK=IDS.long(), target_TK=WEIGHTS), "must be int32.*int64"),
    ("shapes", changed(SMALL, ids_TK=IDS, target_TK=WEIGHTS[:, :2]), r"\(4, 3\).*\(4, 2\).*\[4, K"),
    ("tokens", changed(SMALL, ids_TK=IDS[:3], target_TK=WEIGHTS[:3]), r"both be \[4, K\]"),
    ("K of 0", changed(SMALL, ids_TK=IDS[:, :0], target_TK=WEIGHTS[:, :0]), "K at least 1"),
    ("ghost", changed(SMALL, ghost_T=torch.zeros(3)), r"ghost_T must be \[4\], is \(3,\)"),
    ("device", changed(SMALL, ghost_T=torch.zeros(4, device="meta")), "must be on cpu"),
    ("two teachers", dict(teacher_logits_TW=torch.zeros(4, 14)), "give one of them"),
    ("divergence", dict(divergence="reverse_kl"), "reverse_kl.*needs.*forward_kl"),
    ("squares", dict(divergence="mse_probabilities"), "no ghost bucket"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kd_loss(**(loss_arguments(SMALL, torch.float32) | changes))
    assert kd_loss(**loss_arguments(SMALL, torch.float32)).loss.isfinite()


def plain_kept(logits: Tensor, num_kept: int) -> KeptLogprobs:
    """By sorting all of the vocabulary: stable, so of equals the smaller id."""
    logp, ids = logits.double().log_softmax(dim=1).sort(dim=1, descending=True, stable=True)
    rest = torch.cat([logp, torch.full_like(logp[:, :1], -torch.inf)], 1)[:, num_kept:]
    return KeptLogprobs(ids[:, :num_kept].int(), logp[:, :num_kept], rest.logsumexp(dim=1))


@pytest.mark.parametrize("num_kept", [1, 12, 122, 123, 500])
@pytest.mark.parametrize("dtype", dtypes_of("reference"), ids=str)
def test_the_likeliest_are_kept_and_of_equals_the_smaller_ids(
    dtype: torch.dtype, num_kept: int
) -> None:
    rng = torch.Generator().manual_seed(4)
    logits = (torch.randn(16, 123, generator=rng) * 2).round().div(2)  # many equals
    logits[0], logits[1, 60:] = 0.5, -torch.inf
    logits = logits.to(dtype)
    vocab = VocabShard(size=123, start=0, stop=123)
    got = top_logprobs(place(logits, dtype), num_kept, vocab, None)
    wanted = plain_kept(logits, num_kept)
    assert got.ids_TK.dtype == torch.int32 and torch.equal(got.ids_TK, wanted.ids_TK)
    unit = 1e-13 if dtype == torch.float64 else 1e-5
    assert torch.allclose(got.logp_TK.double(), wanted.logp_TK, rtol=unit, atol=unit)
    assert torch.allclose(got.rest_T.double(), wanted.rest_T, rtol=unit, atol=unit)


def test_the_mass_of_the_others_is_known_far_below_fp32s_rounding_of_1() -> None:
    logits = torch.zeros(2, 50)
    logits[:, 7] = torch.tensor([40.0, 60.0])
    kept = top_logprobs(logits, 1, VocabShard(size=50, start=0, stop=50), None)
    others = torch.tensor(49.0).log() - torch.tensor([40.0, 60.0])
    assert torch.allclose(kept.rest_T, others, atol=1e-5)
    target = Truncation(lost_mass="ghost").target(kept, torch.tensor([7, 8]))
    assert target.ghost_T is not None and torch.allclose(target.ghost_T.log(), others, atol=1e-5)


LOGP = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.4, 0.3, 0.2, 0.0]]).log()
KEPT = KeptLogprobs(
    torch.tensor([[3, 1, 7, 0], [2, 5, 4, 99]], dtype=torch.int32), LOGP,
    torch.tensor([0.0625, 0.1]).log(),
)  # fmt: skip
TRUNCATIONS: dict[str, tuple[Truncation, list[list[float]], list[float] | None]] = {
    "renormalise": (
        Truncation(), [[8 / 15, 4 / 15, 2 / 15, 1 / 15], [4 / 9, 3 / 9, 2 / 9, 0]], None,
    ),
    "at 0.5": (Truncation(temperature=0.5, top_k=2), [[0.8, 0.2], [16 / 25, 9 / 25]], None),
    "raw, 3": (Truncation(lost_mass="raw", top_k=3), [[0.5, 0.25, 0.125], [0.4, 0.3, 0.2]], None),
    # 0.5 and 0.25 have 0.72 together: no third is needed; 0.4 and 0.3 have not.
    "top-p": (
        Truncation(lost_mass="raw", top_p=0.72), [[0.5, 0.25, 0, 0], [0.4, 0.3, 0.2, 0]], None,
    ),
    "top-p of 1": (Truncation(top_p=1e-9), [[1, 0, 0, 0], [1, 0, 0, 0]], None),
    "top-p, then top-k": (
        Truncation(lost_mass="raw", top_p=0.9, top_k=2), [[0.5, 0.25], [0.4, 0.3]], None,
    ),
    "ghost": (
        Truncation(lost_mass="ghost", top_k=2), [[0.5, 0.25], [0.4, 0.3]], [0.25, 0.3],
    ),
    "ghost of top-p": (
        Truncation(lost_mass="ghost", top_p=0.5), [[0.5, 0, 0, 0], [0.4, 0.3, 0, 0]], [0.5, 0.3],
    ),
    # The first row's label is kept, the second's is not.
    "to_label": (
        Truncation(lost_mass="to_label", top_k=2), [[0.5, 0.5, 0], [0.4, 0.3, 0.3]], None,
    ),
    # Token 4, of weight 0, is the second row's label all the same.
    "to_label of top-p": (
        Truncation(lost_mass="to_label", top_p=0.6), [[0.5, 0.5, 0, 0, 0], [0.4, 0.3, 0, 0, 0.3]],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncation_gives_the_weights_that_it_says(name: str) -> None:
    truncation, weights, ghost = TRUNCATIONS[name]
    truncation.check()
    got = truncation.target(KEPT, torch.tensor([1, 4]))
    assert torch.allclose(got.target_TK, torch.tensor(weights, dtype=torch.float32), atol=1e-6)
    wanted_ids = KEPT.ids_TK[:, : truncation.top_k]
    assert torch.equal(got.ids_TK[:, : wanted_ids.shape[1]], wanted_ids)
    if got.ids_TK.shape != wanted_ids.shape:
        assert truncation.lost_mass == "to_label" and got.ids_TK[:, -1].tolist() == [1, 4]
    assert (got.ghost_T is None) == (ghost is None)
    if ghost is not None and got.ghost_T is not None:
        assert torch.allclose(got.ghost_T, torch.tensor(ghost), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lost_mass="dropped"), "lost_mass = 'dropped'.*renormalise.*ghost"),
        (dict(lost_mass="raw", temperature=2.0), "lost_mass = raw needs.*temperature of 1, not 2"),
        (dict(top_k=0), "top_k = 0"),
        (dict(top_p=0.0), "top_p = 0.0"),
        (dict(top_p=1.5), "top_p = 1.5"),
    ],
)
def test_truncation_names_what_it_cannot_do(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Truncation(**settings).check()
