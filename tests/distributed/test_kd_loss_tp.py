"""`kd_loss` and `vocab_parallel_argmax` with the vocabulary cut over 2 and 4 gloo ranks.

Values and gradients are compared with plain fp64 autograd over the whole vocabulary and with one
rank. Four ranks are forked once; they form one group of 4 and two groups of 2, and run every case.
Letters: T tokens, W columns on a rank, V real vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bodies import BODIES, chosen, cuda_on_cpu, dtypes_of
from ranks import run_ranks
from torch import Tensor

from megatron_salt.kernels import VocabShard, kd_loss, padded_vocab_size, vocab_parallel_argmax
from megatron_salt.kernels.backend import Divergence

pytestmark = pytest.mark.distributed

T = 24
WORLD_SIZE = 4
TP_SIZES = (2, 4)


@dataclass(frozen=True, kw_only=True)
class Case:
    V: int = 252
    divisible_by: int = 64
    a: float = 1.0
    b: float = 1.0
    dtype: torch.dtype = torch.float32
    teacher: bool = True
    kind: str = "near"
    divergence: Divergence = "forward_kl"


CASES = {
    "plain": Case(),
    "teacher at 2": Case(a=2.0),
    "student at 2": Case(b=2.0),
    "both": Case(a=0.5, b=3.0, V=507),
    "bf16": Case(dtype=torch.bfloat16, V=507),
    "fp16, student at 3": Case(dtype=torch.float16, V=507, b=3.0),
    "fp64": Case(dtype=torch.float64, b=2.0),
    "no padding": Case(V=256),
    # 4 shards of 64: two of them hold nothing real.
    "empty shards": Case(V=123),
    "empty shards, student at 2": Case(V=123, b=2.0),
    "one token": Case(V=1, divisible_by=1),
    "no teacher": Case(teacher=False, V=507),
    "no teacher, empty shards": Case(teacher=False, V=123, b=2.0),
    "spikes": Case(kind="spikes", V=507),
    "spikes, bf16": Case(kind="spikes", V=507, dtype=torch.bfloat16, b=2.0),
    "far from 0": Case(kind="far", a=2.0),
    "far below 0, empty shards": Case(kind="low", V=123, b=2.0),
    "masked shards": Case(kind="masked", V=252),
    "truncated teacher": Case(kind="truncated", V=507),
    "equal": Case(kind="equal"),
    "equal, bf16": Case(kind="equal", dtype=torch.bfloat16, V=123, a=2.0, b=2.0),
    "reverse": Case(divergence="reverse_kl", V=123, a=2.0, b=3.0),
    "Jensen-Shannon": Case(divergence="jensen_shannon", V=507, a=0.5),
    "mse": Case(divergence="mse", V=123, b=2.0),
}


RUNS = [
    (body, name)
    for body in BODIES
    for name, case in CASES.items()
    if case.dtype in dtypes_of(body)
    if case.divergence == "forward_kl" or body == "reference"
]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    student_TV: Tensor
    teacher_TV: Tensor | None
    labels_T: Tensor
    ce_weight_T: Tensor
    kd_weight_T: Tensor


def make_inputs(case: Case) -> Inputs:
    """The same on every rank: mixed weights, 20 % masked, masked rows, labels at shards' edges."""
    rng = torch.Generator().manual_seed(7)
    student = torch.randn(T, case.V, generator=rng, dtype=torch.float64) * 3
    teacher = student + torch.randn(T, case.V, generator=rng, dtype=torch.float64)
    labels = torch.randint(case.V, (T,), generator=rng)
    edges = [column for column in (0, 63, 64, 127, 128, 191, 192, case.V - 1) if column < case.V]
    labels[8 : 8 + len(edges)] = torch.tensor(edges)
    mask = (torch.rand(T, generator=rng) > 0.2).double()
    ce_weight, kd_weight = (torch.rand(2, T, generator=rng, dtype=torch.float64) + 0.1) * mask
    ce_weight[2:3], kd_weight[3:4] = 0.0, 0.0
    ce_weight[4:6], kd_weight[4:6] = 0.0, 0.0
    if case.kind == "spikes":
        student[:, 5::97] += 50
        teacher[:, 70::101] += 50
        student[::3, -1] = 1e4
    elif case.kind == "far":
        student, teacher = student + 1e4, teacher - 1e4
    elif case.kind == "low":
        student, teacher = student - 300, teacher - 300
    elif case.kind == "masked":
        # Everything before the last shard of 4 is masked, as with a restricted vocabulary.
        student[:, :192] = teacher[:, :192] = torch.finfo(torch.float32).min
        labels = labels.clamp(min=192)
    elif case.kind == "truncated":
        # All of the teacher's probability lies in few columns, on some ranks in none.
        teacher = teacher.where(teacher >= teacher.topk(3, dim=1).values[:, -1:], -torch.inf)
    elif case.kind == "equal":
        teacher, ce_weight = student.clone(), torch.zeros_like(ce_weight)
    if not case.teacher:
        kd_weight = torch.zeros_like(kd_weight)
    return Inputs(
        student_TV=student, teacher_TV=teacher if case.teacher else None, labels_T=labels,
        ce_weight_T=ce_weight, kd_weight_T=kd_weight,
    )  # fmt: skip


def plain(inputs: Inputs, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, ce_T, kl_T, gradient) by log-softmax over the whole vocabulary and autograd."""
    student = inputs.student_TV.to(dtype, copy=True).requires_grad_()
    inner = torch.promote_types(dtype, torch.float32)
    ce = -student.to(inner).log_softmax(dim=1)[torch.arange(T), inputs.labels_T]
    kl = torch.zeros_like(ce)
    if inputs.teacher_TV is not None:
        z, s = inputs.teacher_TV.to(dtype).to(inner) / case.a, student.to(inner) / case.b
        log_p, log_q = z.log_softmax(dim=1), s.log_softmax(dim=1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        kl_of = lambda x, y: torch.where(x.exp() > 0, x.exp() * (x - y), 0.0).sum(dim=1)
        kl = {
            "forward_kl": lambda: kl_of(log_p, log_q),
            "reverse_kl": lambda: kl_of(log_q, log_p),
            "jensen_shannon": lambda: (kl_of(log_p, log_m) + kl_of(log_q, log_m)) / 2,
            "mse": lambda: ((s - z) ** 2).mean(dim=1),
        }[case.divergence]()
    weights = inputs.ce_weight_T.to(inner), inputs.kd_weight_T.to(inner)
    loss = (weights[0] * ce + weights[1] * kl).sum()
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), ce.detach(), kl.detach(), grad


def shard_of(logits_TV: Tensor, vocab: VocabShard, W: int, dtype: torch.dtype) -> Tensor:
    """This rank's columns and, in padding, garbage that differs from rank to rank."""
    garbage = torch.tensor([torch.inf, torch.nan, 1e4, -torch.inf]).roll(dist.get_rank())
    filling = garbage.repeat(W // 4 + 1)[: W - vocab.num_columns].expand(T, -1)
    return torch.cat([logits_TV[:, vocab.start : vocab.stop], filling], dim=1).to(dtype)


def run_case(body: str, case: Case, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """This rank's results, and the gradient of the whole vocabulary put together from all ranks."""
    inputs = make_inputs(case)
    tp_size = 1 if group is None else dist.get_world_size(group)
    tp_rank = 0 if group is None else dist.get_rank(group)
    padded_size = padded_vocab_size(case.V, case.divisible_by, tp_size)
    shards = [
        VocabShard.of_rank(size=case.V, padded_size=padded_size, tp_rank=rank, tp_size=tp_size)
        for rank in range(tp_size)
    ]
    W = padded_size // tp_size
    student = shard_of(inputs.student_TV, shards[tp_rank], W, case.dtype).requires_grad_()
    teacher = None
    if inputs.teacher_TV is not None:
        teacher = shard_of(inputs.teacher_TV, shards[tp_rank], W, case.dtype)
    calls: list[tuple[str, int, str]] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **rest: Any) -> Any:
        name = "MAX" if op == dist.ReduceOp.MAX else "SUM" if op == dist.ReduceOp.SUM else str(op)
        calls.append((name, tensor.numel(), str(tensor.dtype)))
        return original(tensor, op=op, **rest)

    dist.all_reduce = counted
    try:
        with chosen(body):
            result = kd_loss(
                student, teacher, inputs.labels_T, ce_weight_T=inputs.ce_weight_T,
                kd_weight_T=inputs.kd_weight_T, vocab=shards[tp_rank], teacher_temperature=case.a,
                student_temperature=case.b, divergence=case.divergence, tp_group=group,
            )  # fmt: skip
        in_forward = list(calls)
        result.loss.backward()
        in_backward = calls[len(in_forward) :]
    finally:
        dist.all_reduce = original
    assert student.grad is not None
    padding = student.grad[:, shards[tp_rank].num_columns :]
    gradients = [student.grad]
    if tp_size > 1:
        gradients = [torch.empty_like(student.grad) for _ in range(tp_size)]
        dist.all_gather(gradients, student.grad, group=group)
    grad_TV = torch.cat(
        [grad[:, : shard.num_columns] for grad, shard in zip(gradients, shards, strict=True)], dim=1
    )
    return {
        # As NumPy, because a tensor in a pipe needs its sender alive; fp64 holds them exactly.
        "values": tuple(
            value.detach().double().numpy()
            for value in (result.loss, result.ce_T, result.kl_T, grad_TV)
        ),
        "padding": float(padding.abs().sum()),
        "forward": in_forward,
        "backward": in_backward,
        "columns": shards[tp_rank].num_columns,
    }


def argmax_case(group: dist.ProcessGroup | None) -> tuple[list[int], list[int]]:
    """(found, expected) ids over logits with ties within a shard, across shards and everywhere."""
    V = 123
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(T, V, generator=rng)
    expected = logits.argmax(dim=1)
    for row, columns in enumerate([(3, 5), (0, 122), (63, 64), (31, 32, 90), (64, 122)]):
        logits[row, list(columns)] = 9.0
        expected[row] = columns[0]
    logits[5], expected[5] = 0.5, 0
    logits[6], expected[6] = -torch.inf, 0
    logits[7], logits[7, 100], expected[7] = -torch.inf, -1e30, 100
    tp_size = 1 if group is None else dist.get_world_size(group)
    tp_rank = 0 if group is None else dist.get_rank(group)
    padded_size = padded_vocab_size(V, 64, tp_size)
    vocab = VocabShard.of_rank(size=V, padded_size=padded_size, tp_rank=tp_rank, tp_size=tp_size)
    shard = shard_of(logits, vocab, padded_size // tp_size, torch.float32)
    return vocab_parallel_argmax(shard, vocab, group).tolist(), expected.tolist()


def run_everything() -> dict[tuple[str | int, ...], Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    found: dict[tuple[str | int, ...], Any] = {}
    for size, group in groups.items():
        for body, name in RUNS:
            found[body, name, size] = run_case(body, CASES[name], group)
        body = BODIES[dist.get_rank() % len(BODIES)]
        found["mixed", "both", size] = run_case(body, CASES["both"], group)
        found["argmax", size] = argmax_case(group)
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[str | int, ...], Any]]:
    cuda_on_cpu()  # built once, before there are ranks
    results = run_ranks(WORLD_SIZE, run_everything)
    for found in results:
        for value in found.values():
            if isinstance(value, dict):
                value["values"] = tuple(torch.from_numpy(array) for array in value["values"])
    return results


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max()) / max(float(exact.abs().max()), 1e-30)


@pytest.mark.parametrize("tp_size", [1, *TP_SIZES])
@pytest.mark.parametrize(("body", "name"), RUNS)
def test_values_and_gradients_match_fp64(
    body: str, name: str, tp_size: int, by_rank: list[Any]
) -> None:
    case = CASES[name]
    exact = plain(make_inputs(case), case, torch.float64)
    reference = plain(make_inputs(case), case, case.dtype)
    tolerance = 1e-14 if case.dtype == torch.float64 else 1e-6
    for rank in range(WORLD_SIZE):
        found = by_rank[rank][body, name, tp_size]
        assert found["padding"] == 0.0, "padding must have exactly no gradient"
        for what, got, wanted, theirs in zip(
            ("loss", "ce", "kl", "gradient"), found["values"], exact, reference, strict=True
        ):
            if what != "ce" and (case.V == 1 or case.kind == "equal"):
                assert wanted.abs().max() < 1e-8
                # Four ranks' numbers may be added in another order for the teacher's sum than for
                # the student's, so the two can differ in their last bit.
                limit = 2e-6 if tp_size > 2 else 0.0
                assert got.abs().max() <= limit, f"{what} must be 0"
                continue
            if case.V == 1:
                assert (got == 0).all(), "the only token there is has probability 1"
                continue
            bound = 2 * error(theirs, wanted) + tolerance
            assert error(got, wanted) <= bound, f"rank {rank}: {what}"


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize(("body", "name"), RUNS)
def test_cut_vocabulary_gives_what_one_rank_gives(
    body: str, name: str, tp_size: int, by_rank: list[Any]
) -> None:
    dtype = CASES[name].dtype
    for rank in range(WORLD_SIZE):
        one, cut = (
            by_rank[rank][body, name, 1]["values"],
            by_rank[rank][body, name, tp_size]["values"],
        )
        for what, a, b in zip(("loss", "ce", "kl", "gradient"), one, cut, strict=True):
            # The order of summation differs; a gradient may then round to its other neighbour.
            unit = torch.finfo(dtype).eps if what == "gradient" else 0.0
            tolerance = unit + (1e-13 if dtype == torch.float64 else 2e-6)
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max())), what


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize(("body", "name"), RUNS)
def test_every_rank_of_a_group_has_the_same_loss(
    body: str, name: str, tp_size: int, by_rank: list[Any]
) -> None:
    """Bit by bit: ranks that disagree would drift apart or scale their gradients differently."""
    first = by_rank[0][body, name, tp_size]["values"][:3]
    for rank in range(1, WORLD_SIZE):
        for mine, theirs in zip(
            by_rank[rank][body, name, tp_size]["values"][:3], first, strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_ranks_may_run_different_bodies(tp_size: int, by_rank: list[Any]) -> None:
    """What travels between ranks means the same in every body."""
    exact = plain(make_inputs(CASES["both"]), CASES["both"], torch.float64)
    for rank in range(WORLD_SIZE):
        for got, wanted in zip(
            by_rank[rank]["mixed", "both", tp_size]["values"], exact, strict=True
        ):
            assert error(got, wanted) < 2e-6


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize(("body", "name"), RUNS)
def test_collectives_are_one_max_and_one_sum_in_forward_and_none_in_backward(
    body: str, name: str, tp_size: int, by_rank: list[Any]
) -> None:
    case = CASES[name]
    num_max, num_sum = (2, 4 if case.b == 1.0 else 5) if case.teacher else (1, 2)
    dtype = str(torch.float64 if case.dtype == torch.float64 else torch.float32)
    expected = [("MAX", num_max * T, dtype), ("SUM", num_sum * T, dtype)]
    if case.divergence != "forward_kl":
        expected.append(("SUM", 2 * T, dtype))
    for rank in range(WORLD_SIZE):
        assert by_rank[rank][body, name, tp_size]["forward"] == expected
        assert by_rank[rank][body, name, tp_size]["backward"] == []
        assert by_rank[rank][body, name, 1]["forward"] == []


def test_cases_cover_what_they_name(by_rank: list[Any]) -> None:
    """Shards without real columns, uneven shards, and a label on every rank that has columns."""
    columns = [by_rank[rank]["native", "empty shards", 4]["columns"] for rank in range(WORLD_SIZE)]
    assert columns == [64, 59, 0, 0]
    assert [by_rank[rank]["native", "both", 4]["columns"] for rank in range(WORLD_SIZE)] == [
        128,
        128,
        128,
        123,
    ]
    labels = make_inputs(CASES["plain"]).labels_T
    assert set((labels // 64).tolist()) == {0, 1, 2, 3}
    assert {dataclasses.astuple(case)[4] for case in CASES.values()} >= {
        torch.float32, torch.bfloat16, torch.float16, torch.float64,
    }  # fmt: skip


@pytest.mark.parametrize("tp_size", [1, *TP_SIZES])
def test_argmax_is_global_and_the_smallest_id_on_a_tie(tp_size: int, by_rank: list[Any]) -> None:
    for rank in range(WORLD_SIZE):
        found, expected = by_rank[rank]["argmax", tp_size]
        assert found == expected
