"""`kd_loss` and `vocab_parallel_argmax` with the vocabulary cut over 2 and 4 gloo ranks.

Values and gradients are compared with plain fp64 autograd over the whole vocabulary and with one
process. Four ranks are forked once; they form one group of 4 and two groups of 2, and run every
case. Letters: T tokens, W columns on a rank, V real vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loss_backends import BACKENDS, chosen, cuda_on_cpu, dtypes_of
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
    with_masked_columns,
    with_outliers,
    with_sparse_teacher,
    with_truncated_teacher,
    without_ce,
    without_teacher,
)
from ranks import run_ranks
from torch import Tensor

from megatron_salt.kernels import (
    VocabShard,
    padded_vocab_size,
    top_logprobs,
    vocab_parallel_argmax,
)
from megatron_salt.kernels.backend import Divergence

pytestmark = pytest.mark.distributed

T = 24
WORLD_SIZE = 4
TP_SIZES = (2, 4)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A case, and how its vocabulary is padded."""

    V: int = 252
    divisible_by: int = 64
    a: float = 1.0
    b: float = 1.0
    dtype: torch.dtype = torch.float32
    kind: str = "near"
    divergence: Divergence = "forward_kl"
    sparse: tuple[str, int] | None = None
    """How the teacher is cut to how many tokens."""

    @functools.cached_property
    def case(self) -> LossCase:
        case = make_case(T, self.V, seed=7, a=self.a, b=self.b, divergence=self.divergence)
        if self.sparse:
            case = case if self.kind == "near" else with_outliers(case, self.kind)
            return with_sparse_teacher(case, *self.sparse)
        if self.kind == "near":
            return case
        if self.kind == "no teacher":
            return without_teacher(case)
        if self.kind == "masked":  # everything before the last shard of 4
            return with_masked_columns(case, 192, torch.float32)
        if self.kind == "truncated":  # the teacher's probability, on some ranks none
            return with_truncated_teacher(case, 3)
        if self.kind == "equal":
            return without_ce(replace(case, teacher_TV=case.student_TV))
        return with_outliers(case, self.kind)

    @functools.cached_property
    def exact(self) -> LossResult:
        return autograd_result(self.case)

    @functools.cached_property
    def plain(self) -> LossResult:
        return autograd_result(self.case, self.dtype)

    def shards(self, tp_size: int) -> tuple[list[VocabShard], int]:
        """Every rank's shard, and how wide they are."""
        size = padded_vocab_size(self.V, self.divisible_by, tp_size)
        of_rank = functools.partial(VocabShard.of_rank, size=self.V, padded_size=size)
        shards = [of_rank(tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
        return shards, size // tp_size


CUTS = {
    "plain": Cut(),
    "both temperatures": Cut(a=0.5, b=3.0, V=507),
    "fp16, student at 3": Cut(dtype=torch.float16, V=507, b=3.0),
    "fp64": Cut(dtype=torch.float64, b=2.0),
    "no padding": Cut(V=256, a=2.0),
    # 4 shards of 64: two of them hold nothing real.
    "empty shards, student at 2": Cut(V=123, b=2.0),
    "one token": Cut(V=1, divisible_by=1),
    "no teacher, empty shards": Cut(kind="no teacher", V=123, b=2.0),
    "spikes": Cut(kind="spikes of 50", V=507),
    "one spike, bf16": Cut(kind="one at 1e4", V=507, dtype=torch.bfloat16, b=2.0),
    "far from 0": Cut(kind="all near 1e4", a=2.0),
    "far below 0, empty shards": Cut(kind="all near -300", V=123, b=2.0),
    "masked shards": Cut(kind="masked"),
    "truncated teacher": Cut(kind="truncated", V=507),
    "equal": Cut(kind="equal"),
    "equal, bf16": Cut(kind="equal", dtype=torch.bfloat16, V=123, a=2.0, b=2.0),
    "reverse": Cut(divergence="reverse_kl", V=123, a=2.0, b=3.0),
    "Jensen-Shannon": Cut(divergence="jensen_shannon", V=507, a=0.5),
    "mse": Cut(divergence="mse", V=123, b=2.0),
    "sparse": Cut(sparse=("renormalise", 12), V=507, a=2.0),
    "sparse, empty shards, student at 2": Cut(sparse=("raw", 12), V=123, b=2.0),
    "sparse, fp64": Cut(sparse=("to_label", 12), b=2.0, dtype=torch.float64),
    "sparse, to label, bf16": Cut(sparse=("to_label", 1), dtype=torch.bfloat16),
    "sampled": Cut(sparse=("sampled", 40)),
    "ghost": Cut(sparse=("ghost", 12), V=507),
    "ghost, empty shards, student at 2, fp16": Cut(
        sparse=("ghost", 12), V=123, b=2.0, dtype=torch.float16
    ),
    "ghost, one spike": Cut(sparse=("ghost", 3), kind="one at 1e4"),
    "ghost, K = V": Cut(sparse=("ghost", 252), kind="all near 1e4"),
    "squares": Cut(sparse=("raw", 12), V=123, b=2.0, divergence="mse_probabilities"),
}
RUNS = [
    (backend, name)
    for backend in BACKENDS
    for name, cut in CUTS.items()
    if cut.dtype in dtypes_of(backend)
    if cut.divergence == "forward_kl" or backend == "reference"
]


def run_cut(backend: str, cut: Cut, group: dist.ProcessGroup) -> dict[str, Any]:
    """This rank's results, with the gradient put together from all ranks, and its collectives."""
    shards, W = cut.shards(dist.get_world_size(group))
    vocab = shards[dist.get_rank(group)]
    where = Placement(padding=W - vocab.num_columns, first_garbage=dist.get_rank())
    arguments = loss_arguments(cut.case, cut.dtype, where, vocab=vocab) | {"tp_group": group}
    calls: list[tuple[str, int, torch.dtype]] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **rest: Any) -> Any:
        name = "MAX" if op == dist.ReduceOp.MAX else "SUM" if op == dist.ReduceOp.SUM else str(op)
        calls.append((name, tensor.numel(), tensor.dtype))
        return original(tensor, op=op, **rest)

    dist.all_reduce = counted
    try:
        with chosen(backend):
            got = loss_result(arguments)
    finally:
        dist.all_reduce = original
    whole = torch.zeros(T, W, dtype=cut.dtype)
    whole[:, : vocab.num_columns] = got.grad_TV
    parts = [torch.empty_like(whole) for _ in shards]
    dist.all_gather(parts, whole, group=group)
    grad_TV = torch.cat([x[:, : y.num_columns] for x, y in zip(parts, shards, strict=True)], dim=1)
    # As NumPy, because a tensor in a pipe needs its sender alive; fp64 holds them exactly.
    values = [x.double().numpy() for x in (*got[:3], grad_TV)]
    return {"values": values, "calls": calls, "columns": vocab.num_columns}


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
    shards, W = Cut(V=V).shards(1 if group is None else dist.get_world_size(group))
    vocab = shards[0 if group is None else dist.get_rank(group)]
    where = Placement(padding=W - vocab.num_columns)
    shard = place(logits[:, vocab.start : vocab.stop], torch.float32, where)
    return vocab_parallel_argmax(shard, vocab, group).tolist(), expected.tolist()


def kept_case(group: dist.ProcessGroup | None) -> dict[str, list[Any]]:
    """What `top_logprobs` keeps of logits with many equals, on uneven and on empty shards."""
    found = {}
    for V, num_kept, dtype in ((507, 12, torch.bfloat16), (123, 70, torch.float32),
                               (123, 200, torch.float64)):  # fmt: skip
        rng = torch.Generator().manual_seed(9)
        logits = (torch.randn(T, V, generator=rng) * 2).round().div(4)
        logits[0], logits[1, V // 2 :], logits[2, ::3] = 0.25, -torch.inf, -torch.inf
        shards, W = Cut(V=V).shards(1 if group is None else dist.get_world_size(group))
        vocab = shards[0 if group is None else dist.get_rank(group)]
        where = Placement(padding=W - vocab.num_columns)
        shard = place(logits[:, vocab.start : vocab.stop], dtype, where)
        kept = top_logprobs(shard, num_kept, vocab, group)
        found[f"{V} {dtype}"] = [x.tolist() for x in kept]
    return found


def run_everything() -> dict[tuple[str | int, ...], Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    assert dist.group.WORLD is not None
    groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    found: dict[tuple[str | int, ...], Any] = {}
    for size, group in groups.items():
        for backend, name in RUNS:
            found[backend, name, size] = run_cut(backend, CUTS[name], group)
        backend = BACKENDS[dist.get_rank() % len(BACKENDS)]
        found["mixed", size] = run_cut(backend, CUTS["both temperatures"], group)
        found["mixed, sparse", size] = run_cut(backend, CUTS["ghost"], group)
        found["argmax", size] = argmax_case(group)
        found["kept", size] = kept_case(group)
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[str | int, ...], Any]]:
    cuda_on_cpu()  # loaded once, before there are ranks
    results = run_ranks(WORLD_SIZE, run_everything)
    for found in results:
        for value in found.values():
            if isinstance(value, dict) and "values" in value:
                value["values"] = LossResult(*map(torch.from_numpy, value["values"]))
    return results


def assert_exact(got: LossResult, cut: Cut, tp_size: int) -> None:
    """As exact as autograd; where the exact values are 0, at rest."""
    tolerance = 1e-14 if cut.dtype == torch.float64 else 1e-6
    exact, plain = cut.exact, cut.plain
    if cut.V == 1 or cut.kind == "equal":
        # Four ranks' numbers may be added in another order for the teacher's sum than for the
        # student's, so the two can differ in their last bit.
        limit = 2e-6 if tp_size > 2 else 0.0
        for name in ("loss", "kl_T", "grad_TV"):
            assert getattr(exact, name).abs().max() < 1e-8
            assert getattr(got, name).abs().max() <= limit, f"{name} must be 0"
        if cut.V == 1:
            assert (got.ce_T == 0).all(), "the only token there is has probability 1"
            return
        plain, exact = (x._replace(loss=got.loss, kl_T=got.kl_T, grad_TV=got.grad_TV)
                        for x in (plain, exact))  # fmt: skip
    assert_as_exact_as_autograd(got, plain, exact, tolerance=tolerance)


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_values_and_gradients_match_fp64_alike_on_every_rank(
    backend: str, name: str, tp_size: int, by_rank: list[Any]
) -> None:
    """Bit by bit: ranks that disagree would drift apart or scale their gradients differently."""
    first = by_rank[0][backend, name, tp_size]["values"]
    assert_exact(first, CUTS[name], tp_size)
    for found in by_rank[1:]:
        got = found[backend, name, tp_size]["values"]
        for what, mine, theirs in zip(LossResult._fields, got, first, strict=True):
            assert torch.equal(mine, theirs), what


@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_cut_vocabulary_gives_what_one_process_gives(
    backend: str, name: str, by_rank: list[Any]
) -> None:
    cut = CUTS[name]
    _, W = cut.shards(1)
    with chosen(backend):
        one = loss_result(loss_arguments(cut.case, cut.dtype, Placement(padding=W - cut.V)))
    assert_exact(one, cut, 1)
    for tp_size in TP_SIZES:
        got = by_rank[0][backend, name, tp_size]["values"]
        for what, a, b in zip(LossResult._fields, one, got, strict=True):
            # The order of summation differs; a gradient may then round to its other neighbour.
            unit = torch.finfo(cut.dtype).eps if what == "grad_TV" else 0.0
            tolerance = unit + (1e-13 if cut.dtype == torch.float64 else 2e-6)
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max())), what


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_ranks_may_run_different_backends(tp_size: int, by_rank: list[Any]) -> None:
    """What travels between ranks means the same in every backend."""
    for found in by_rank:
        for name, cut in (("mixed", "both temperatures"), ("mixed, sparse", "ghost")):
            got = found[name, tp_size]["values"]
            for ours, wanted in zip(got, CUTS[cut].exact, strict=True):
                assert relative_error(ours, wanted) < 2e-6


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_collectives_are_one_max_and_one_sum_in_forward_and_none_in_backward(
    backend: str, name: str, tp_size: int, by_rank: list[Any]
) -> None:
    cut = CUTS[name]
    num_max, num_sum = (1, 2) if cut.kind == "no teacher" else (2, 4 if cut.b == 1.0 else 5)
    if cut.sparse:
        num_max, num_sum = 1, 3 + (cut.sparse[0] == "ghost") + (cut.b != 1.0)
    dtype = torch.float64 if cut.dtype == torch.float64 else torch.float32
    expected = [("MAX", num_max * T, dtype), ("SUM", num_sum * T, dtype)]
    if cut.divergence != "forward_kl":
        expected.append(("SUM", 2 * T, dtype))
    for found in by_rank:
        assert found[backend, name, tp_size]["calls"] == expected


def test_cases_cover_what_they_name(by_rank: list[Any]) -> None:
    """Shards without real columns, uneven shards, and a label on every rank that has columns."""
    columns = lambda name: [found["native", name, 4]["columns"] for found in by_rank]
    assert columns("empty shards, student at 2") == [64, 59, 0, 0]
    assert columns("both temperatures") == [128, 128, 128, 123]
    assert set((CUTS["plain"].case.labels_T // 64).tolist()) == {0, 1, 2, 3}
    assert {cut.dtype for cut in CUTS.values()} == set(dtypes_of("reference"))


@pytest.mark.parametrize("tp_size", [1, *TP_SIZES])
def test_argmax_is_global_and_the_smallest_id_on_a_tie(tp_size: int, by_rank: list[Any]) -> None:
    for found in by_rank:
        got, expected = argmax_case(None) if tp_size == 1 else found["argmax", tp_size]
        assert got == expected


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_the_same_tokens_are_kept_at_every_tp(tp_size: int, by_rank: list[Any]) -> None:
    """Ids to the bit, also of equals; -inf has any id, and no probability."""
    alone = kept_case(None)
    for found in by_rank:
        for name, one in alone.items():
            ids, logp, rest = map(torch.tensor, found["kept", tp_size][name])
            ids_1, logp_1, rest_1 = map(torch.tensor, one)
            assert torch.equal(ids[logp > -torch.inf], ids_1[logp_1 > -torch.inf]), name
            assert torch.allclose(logp, logp_1, atol=1e-6), name
            assert torch.allclose(rest, rest_1, rtol=1e-5), name
