"""Cases of the loss, and what is right for them: plain formulas and autograd in fp64.

The oracle sees un-rounded fp64 numbers; the loss, and the autograd version in its dtype that bounds
its error, see them rounded. A case is the same on every rank and for every backend. Letters:
T tokens, V real vocabulary, W columns with padding or of one shard, D and E widths of student and
teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron_salt.kernels import (
    KdLoss,
    SparseTeacher,
    Truncation,
    VocabShard,
    kd_loss,
    top_logprobs,
)
from megatron_salt.kernels.backend import Divergence

GARBAGE = (torch.inf, torch.nan, -torch.inf, 1e4)
"""What padding columns hold."""

TEMPERATURES = [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (0.5, 3.0)]
"""Of teacher and student: `a` and `b` of a case."""

OUTLIERS = ["spikes of 50", "one at 1e4", "all near 1e4", "all near -300"]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is asked of each token."""

    labels_T: Tensor
    ce_weight_T: Tensor
    kd_weight_T: Tensor
    a: float = 1.0
    b: float = 1.0
    divergence: Divergence = "forward_kl"

    def arguments(self) -> dict[str, Any]:
        """Of `kd_loss` and `linear_kd_loss`."""
        return dict(
            labels_T=self.labels_T, ce_weight_T=self.ce_weight_T, kd_weight_T=self.kd_weight_T,
            teacher_temperature=self.a, student_temperature=self.b, divergence=self.divergence,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossCase(Targets):
    """Logits of some tokens in fp64, real vocabulary columns only."""

    student_TV: Tensor
    teacher_TV: Tensor | None
    sparse: SparseTeacher | None = None

    @property
    def V(self) -> int:
        return self.student_TV.shape[1]

    @property
    def teacher(self) -> Tensor:
        assert self.teacher_TV is not None
        return self.teacher_TV


@dataclass(frozen=True, kw_only=True)
class LinearCase(Targets):
    """Hidden states and heads in fp64, real rows of the heads only."""

    hidden_TD: Tensor
    head_VD: Tensor
    teacher_hidden_TE: Tensor | None
    teacher_head_VE: Tensor | None

    def rounded(self, dtype: torch.dtype) -> LinearCase:
        """What is left of hidden states and heads in a dtype, again in fp64."""
        names = ("hidden_TD", "head_VD", "teacher_hidden_TE", "teacher_head_VE")
        values = {name: getattr(self, name) for name in names}
        return replace(
            self, **{n: None if x is None else x.to(dtype).double() for n, x in values.items()}
        )


class LossResult(NamedTuple):
    loss: Tensor
    ce_T: Tensor
    kl_T: Tensor
    grad_TV: Tensor


class LinearResult(NamedTuple):
    loss: Tensor
    ce_T: Tensor
    kl_T: Tensor
    hidden_grad_TD: Tensor
    head_grad_VD: Tensor


Result = LossResult | LinearResult
AnyCase = TypeVar("AnyCase", LossCase, LinearCase)


def make_targets(T: int, V: int, rng: torch.Generator, **settings: Any) -> dict[str, Any]:
    """Labels at both ends and at shards' edges; 20 % of the tokens masked, and some in part."""
    options: dict[str, Any] = {"generator": rng, "device": rng.device}
    labels = torch.randint(V, (T,), **options)
    edges = [column for column in (63, 64, 127, 128, 191, 192) if column < V]
    for first, ids in ((0, [0, V - 1]), (8, edges)):
        here = labels[first : first + len(ids)]
        here.copy_(torch.tensor(ids, dtype=torch.int64)[: len(here)])
    mask = (torch.rand(T, dtype=torch.float64, **options) > 0.2).double()
    mask[:2] = mask[8:14] = 1.0
    ce, kd = (torch.rand(2, T, dtype=torch.float64, **options) + 0.1) * mask
    ce[2:3], kd[3:4] = 0.0, 0.0  # only KD, only CE
    ce[4:6], kd[4:6] = 0.0, 0.0  # neither
    return dict(labels_T=labels, ce_weight_T=ce, kd_weight_T=kd, **settings)


def make_case(T: int, V: int, *, seed: int = 0, device: str = "cpu", **settings: Any) -> LossCase:
    """A teacher near the student. `settings`: temperatures `a` and `b`, `divergence`."""
    rng = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": rng, "device": device, "dtype": torch.float64}
    student = torch.randn(T, V, **options).mul_(3)
    teacher = torch.randn(T, V, **options).add_(student)
    targets = make_targets(T, V, rng, **settings)
    return LossCase(student_TV=student, teacher_TV=teacher, **targets)


def make_linear_case(
    T: int, V: int, D: int, E: int, *, near: bool = False, device: str = "cpu", **settings: Any
) -> LinearCase:
    """`near`: a teacher of the student's width whose logits differ by a few thousandths."""
    rng = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng, device=device, dtype=torch.float64)
    hidden, head = normal(T, D), normal(V, D) * (1.5 / D**0.5)
    teacher_hidden, teacher_head = normal(T, E), normal(V, E) * (1.5 / E**0.5)
    if near:
        teacher_hidden, teacher_head = hidden + 1e-3 * normal(T, D), head
    return LinearCase(
        hidden_TD=hidden, head_VD=head, teacher_hidden_TE=teacher_hidden,
        teacher_head_VE=teacher_head, **make_targets(T, V, rng, **settings),
    )  # fmt: skip


def without_teacher(case: AnyCase) -> AnyCase:
    kd_weight_T = torch.zeros_like(case.kd_weight_T)
    if isinstance(case, LossCase):
        return replace(case, teacher_TV=None, kd_weight_T=kd_weight_T)
    return replace(case, teacher_hidden_TE=None, teacher_head_VE=None, kd_weight_T=kd_weight_T)


def without_ce(case: AnyCase) -> AnyCase:
    return replace(case, ce_weight_T=torch.zeros_like(case.ce_weight_T))


def masked_out(case: AnyCase) -> AnyCase:
    return replace(without_ce(case), kd_weight_T=torch.zeros_like(case.kd_weight_T))


def with_outliers(case: LossCase, kind: str) -> LossCase:
    """The case with one of the OUTLIERS: far from 0, or far from each other."""
    student, teacher = case.student_TV.clone(), case.teacher.clone()
    if kind == "spikes of 50":
        student[:, 5::17] += 50
        student[:, 6::19] -= 50
        teacher[:, 5::13] += 50
    elif kind == "one at 1e4":
        student[::2, 7] = 1e4
        teacher[::3, case.V * 9 // 10] = -1e4
    else:
        # A constant changes no probability, so nothing may get worse in fp32.
        student += 1e4 if kind == "all near 1e4" else -300
        teacher += 1e4 if kind == "all near 1e4" else -300
    return replace(case, student_TV=student, teacher_TV=teacher)


def with_masked_columns(case: LossCase, num_columns: int, dtype: torch.dtype) -> LossCase:
    """The first columns at a dtype's smallest number, as with a restricted vocabulary."""
    student, teacher = case.student_TV.clone(), case.teacher.clone()
    student[:, :num_columns] = teacher[:, :num_columns] = torch.finfo(dtype).min
    labels_T = case.labels_T.clamp(min=num_columns)
    return replace(case, student_TV=student, teacher_TV=teacher, labels_T=labels_T)


def with_truncated_teacher(case: LossCase, num_kept: int) -> LossCase:
    """All of the teacher's probability in few columns; the others at -inf."""
    lowest_T1 = case.teacher.topk(num_kept, dim=1).values[:, -1:]
    return replace(case, teacher_TV=case.teacher.where(case.teacher >= lowest_T1, -torch.inf))


def with_sparse_teacher(case: LossCase, how: str, num_kept: int) -> LossCase:
    """The teacher's logits give place to K tokens: the likeliest by one of Truncation's policies,
    or draws, of which many repeat (`sampled`). Some entries more have no weight, and any id."""
    if how == "sampled":
        p_TV = torch.softmax(case.teacher / case.a, dim=1)
        rng = torch.Generator(p_TV.device).manual_seed(1)
        ids = torch.multinomial(p_TV, num_kept, replacement=True, generator=rng).int()
        sparse = SparseTeacher(ids, torch.full_like(ids, 1 / num_kept, dtype=torch.float64))
    else:
        kept = top_logprobs(case.teacher, num_kept, VocabShard(size=case.V, start=0, stop=case.V),
                            None)  # fmt: skip
        a = case.a if how == "renormalise" else 1.0
        sparse = Truncation(lost_mass=how, temperature=a).target(kept, case.labels_T)  # type: ignore[arg-type]
    fill = torch.tensor([-1, case.V, 2**31 - 1, -(2**31), 0], device=sparse.ids_TK.device)
    fill = fill.int().expand(len(sparse.ids_TK), -1)
    ids = torch.cat([fill[:, :2], sparse.ids_TK, fill[:, 2:]], dim=1)
    target = torch.nn.functional.pad(sparse.target_TK, (2, 3))
    return replace(case, teacher_TV=None, sparse=sparse._replace(ids_TK=ids, target_TK=target))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where logits lie: rows of W = V + padding columns, `gap` elements between them."""

    padding: int = 5
    gap: int = 0
    offset: int = 0
    """Elements before the first row."""
    first_garbage: int = 0
    """Which of GARBAGE comes first: another one on each rank."""


PACKED = Placement()


def place(logits_TV: Tensor, dtype: torch.dtype, where: Placement = PACKED) -> Tensor:
    """Rounded to `dtype`; padding full of GARBAGE, the memory around the rows full of nan."""
    T, V = logits_TV.shape
    stride = V + where.padding + where.gap
    size = where.offset + T * stride
    memory = torch.full((size,), torch.nan, dtype=dtype, device=logits_TV.device)
    logits_TW = memory[where.offset :].view(T, stride)[:, : V + where.padding]
    logits_TW[:, :V] = logits_TV.to(dtype)
    for i in range(where.padding):
        logits_TW[:, V + i] = GARBAGE[(i + where.first_garbage) % len(GARBAGE)]
    return logits_TW


def loss_arguments(
    case: LossCase,
    dtype: torch.dtype,
    where: Placement = PACKED,
    *,
    teacher_dtype: torch.dtype | None = None,
    teacher_where: Placement | None = None,
    vocab: VocabShard | None = None,
) -> dict[str, Any]:
    """Of `kd_loss`: for the whole vocabulary, or the columns of one shard."""
    vocab = vocab or VocabShard(size=case.V, start=0, stop=case.V)
    columns = slice(vocab.start, vocab.stop)
    teacher_TW = None
    if case.teacher_TV is not None:
        teacher_where = teacher_where or where
        teacher_TW = place(case.teacher_TV[:, columns], teacher_dtype or dtype, teacher_where)
    student_TW = place(case.student_TV[:, columns], dtype, where).requires_grad_()
    logits = dict(student_logits_TW=student_TW, teacher_logits_TW=teacher_TW, vocab=vocab)
    return case.arguments() | logits | {"sparse_teacher": case.sparse}


def head_shard(head_VD: Tensor, dtype: torch.dtype, vocab: VocabShard, W: int) -> Tensor:
    """Rows of one shard; padding rows are not zeros."""
    shard_WD = head_VD.new_full((W, head_VD.shape[1]), 7.0, dtype=dtype)
    shard_WD[: vocab.num_columns] = head_VD[vocab.start : vocab.stop].to(dtype)
    return shard_WD


def linear_arguments(
    case: LinearCase, dtype: torch.dtype, W: int, vocab: VocabShard | None = None
) -> dict[str, Any]:
    """Of `linear_kd_loss`: for the whole vocabulary, or the rows of one shard."""
    vocab = vocab or VocabShard(size=len(case.head_VD), start=0, stop=len(case.head_VD))
    teacher_hidden, teacher_head = case.teacher_hidden_TE, case.teacher_head_VE
    return case.arguments() | dict(
        student_hidden_TD=case.hidden_TD.to(dtype, copy=True).requires_grad_(),
        student_weight_WD=head_shard(case.head_VD, dtype, vocab, W).requires_grad_(),
        teacher_hidden_TE=None if teacher_hidden is None else teacher_hidden.to(dtype),
        teacher_weight_WE=None
        if teacher_head is None
        else head_shard(teacher_head, dtype, vocab, W),
        vocab=vocab,
    )


def loss_result(arguments: dict[str, Any]) -> LossResult:
    """Values and gradient of a call of `kd_loss`, the padding checked."""
    student_TW, V = arguments["student_logits_TW"], arguments["vocab"].num_columns
    result: KdLoss = kd_loss(**arguments)
    (grad_TW,) = torch.autograd.grad(result.loss, student_TW)
    assert grad_TW.dtype == student_TW.dtype and grad_TW.shape == student_TW.shape
    assert (grad_TW[:, V:] == 0).all(), "padding must have exactly no gradient"
    return LossResult(result.loss.detach(), result.ce_T, result.kl_T, grad_TW[:, :V])


def textbook_loss(
    student_TV: Tensor,
    teacher_TV: Tensor | None,
    targets: Targets,
    sparse: SparseTeacher | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce_T, kl_T) of logits by log-softmax over the whole vocabulary; at least fp32."""
    inner = torch.promote_types(student_TV.dtype, torch.float32)
    student_TV = student_TV.to(inner)
    ce_T = -student_TV.log_softmax(dim=1).gather(1, targets.labels_T[:, None]).squeeze(1)
    kl_T = torch.zeros_like(ce_T)
    if teacher_TV is not None:
        z_TV, s_TV = teacher_TV.to(inner) / targets.a, student_TV / targets.b
        log_p, log_q = z_TV.log_softmax(dim=1), s_TV.log_softmax(dim=1)
        kl_of = lambda x, y: torch.where(x.exp() > 0, x.exp() * (x - y), 0.0).sum(dim=1)
        if targets.divergence == "forward_kl":
            kl_T = kl_of(log_p, log_q)
        elif targets.divergence == "reverse_kl":
            kl_T = kl_of(log_q, log_p)
        elif targets.divergence == "jensen_shannon":
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            kl_T = (kl_of(log_p, log_m) + kl_of(log_q, log_m)) / 2
        elif targets.divergence == "mse_probabilities":
            kl_T = ((log_q.exp() - log_p.exp()) ** 2).sum(dim=1)
        else:
            kl_T = ((s_TV - z_TV) ** 2).mean(dim=1)
    if sparse is not None:
        log_q = (student_TV / targets.b).log_softmax(dim=1)
        t_TK, ids_TK = sparse.target_TK.to(inner), sparse.ids_TK.long()
        # Columns behind the real ones take what has no weight.
        ids_TK = torch.where(t_TK > 0, ids_TK, log_q.shape[1])
        t_TV = torch.nn.functional.pad(torch.zeros_like(log_q), (0, 1)).scatter_add(1, ids_TK, t_TK)
        if targets.divergence == "mse_probabilities":
            kl_T = ((log_q.exp() - t_TV[:, :-1]) ** 2).sum(dim=1)
        else:
            cross_TV = torch.where(t_TV[:, :-1] > 0, t_TV[:, :-1] * log_q, 0.0)
            kl_T = torch.where(t_TK > 0, t_TK * t_TK.log(), 0.0).sum(dim=1) - cross_TV.sum(dim=1)
        if sparse.ghost_T is not None:
            rest_T = log_q.masked_fill(t_TV[:, :-1] > 0, -torch.inf).logsumexp(dim=1)
            g_T = sparse.ghost_T.to(inner)
            kl_T = kl_T + torch.where(g_T > 0, g_T * (g_T.log() - rest_T), 0.0)
    ce_weight_T, kd_weight_T = targets.ce_weight_T.to(inner), targets.kd_weight_T.to(inner)
    return (ce_weight_T * ce_T + kd_weight_T * kl_T).sum(), ce_T.detach(), kl_T.detach()


def autograd_result(
    case: LossCase, dtype: torch.dtype = torch.float64, teacher_dtype: torch.dtype | None = None
) -> LossResult:
    """The textbook's formulas and autograd, of logits rounded to dtypes."""
    student_TV = case.student_TV.to(dtype, copy=True).requires_grad_()
    teacher_TV = case.teacher_TV
    if teacher_TV is not None:
        teacher_TV = teacher_TV.to(teacher_dtype or dtype)
    loss, ce_T, kl_T = textbook_loss(student_TV, teacher_TV, case, case.sparse)
    return LossResult(loss.detach(), ce_T, kl_T, *torch.autograd.grad(loss, student_TV))


def autograd_linear_result(case: LinearCase, dtype: torch.dtype = torch.float64) -> LinearResult:
    """Whole logits by autograd's own matrix products in a dtype, and the textbook's formulas."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (case.hidden_TD, case.head_VD)]
    teacher_TV = None
    if case.teacher_hidden_TE is not None and case.teacher_head_VE is not None:
        teacher_TV = case.teacher_hidden_TE.to(dtype) @ case.teacher_head_VE.to(dtype).t()
    loss, ce_T, kl_T = textbook_loss(leaves[0] @ leaves[1].t(), teacher_TV, case)
    return LinearResult(loss.detach(), ce_T, kl_T, *torch.autograd.grad(loss, leaves))


def relative_error(got: Tensor, exact: Tensor, *, norm: float = math.inf) -> float:
    """Norm of the deviation (the largest one), relative to that of the exact value."""
    if not exact.numel():
        return 0.0
    size = lambda x: float(torch.linalg.vector_norm(x, norm))
    return size(got.double() - exact) / max(size(exact), 1e-30)


def assert_as_exact_as_autograd(
    got: Result, plain: Result, exact: Result, *, tolerance: float, norm: float = math.inf
) -> None:
    """Everything in `got` has at most twice the error of `plain`, plus a tolerance.

    Args:
        plain: autograd's result in the same dtype.
        exact: autograd's in fp64.
    """
    assert got._fields == plain._fields == exact._fields
    for name, ours, theirs, wanted in zip(exact._fields, got, plain, exact, strict=True):
        error = relative_error(ours, wanted, norm=norm)
        bound = 2 * relative_error(theirs, wanted, norm=norm) + tolerance
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"
