"""`linear_kd_loss` with the head cut over 2 and 4 gloo ranks; hidden states whole and cut, too.

Compared with the reference `kd_loss` on whole logits in one process, in fp64. Four ranks are forked
once; they form one group of 4 and two groups of 2. Letters: T tokens, D and E widths, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bodies import BODIES, chosen, cuda_on_cpu
from ranks import run_ranks
from torch import Tensor

from megatron_salt.kernels import Chunking, VocabShard, kd_loss, linear_kd_loss, padded_vocab_size

pytestmark = pytest.mark.distributed

WORLD_SIZE = 4
T, D, E = 48, 12, 20


@dataclass(frozen=True, kw_only=True)
class Case:
    V: int = 251
    tp_size: int
    sequence_parallel: bool = False
    chunk_bytes: int = 1 << 30
    dtype: torch.dtype = torch.float32
    teacher: bool = True
    b: float = 1.0
    strided: bool = False


CASES = {
    f"{name}, tp {tp_size}{', sequence parallel' * sequence_parallel}": Case(
        tp_size=tp_size, sequence_parallel=sequence_parallel, **settings
    )
    for name, settings in {
        "one chunk": dict(),
        "chunks": dict(chunk_bytes=6_000),
        "smallest chunks": dict(chunk_bytes=3_200),
        "chunks, b = 2": dict(chunk_bytes=6_000, b=2.0),
        "empty shards": dict(V=123, chunk_bytes=6_000),
        "bf16": dict(dtype=torch.bfloat16, chunk_bytes=8_000),
        "strided hidden states": dict(strided=True, chunk_bytes=6_000),
        "no teacher": dict(teacher=False, chunk_bytes=6_000),
    }.items()
    for tp_size in (2, 4)
    for sequence_parallel in (False, True)
}
RUNS = [(body, name) for body in BODIES for name in CASES]


def make_inputs(case: Case) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(11)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    labels = torch.randint(case.V, (T,), generator=rng)
    edges = [column for column in (0, 63, 64, 127, 128, case.V - 1) if column < case.V]
    labels[: len(edges)] = torch.tensor(edges)
    mask = (torch.rand(T, generator=rng) > 0.2).double()
    inputs = {
        "hidden": normal(T, D), "weight": normal(case.V, D) / 2, "teacher_hidden": normal(T, E),
        "teacher_weight": normal(case.V, E) / 2,
    }  # fmt: skip
    inputs = {name: value.to(case.dtype).double() for name, value in inputs.items()}
    ce_weight, kd_weight = (torch.rand(2, T, generator=rng, dtype=torch.float64) + 0.1) * mask
    return inputs | {
        "labels": labels, "ce_weight": ce_weight, "kd_weight": kd_weight * float(case.teacher)
    }  # fmt: skip


def whole(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """(loss, ce_T, kl_T, hidden gradient, head gradient) of one process with whole logits."""
    x = make_inputs(case)
    hidden, weight = (x[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    teacher = None
    if case.teacher:
        teacher = x["teacher_hidden"].to(dtype) @ x["teacher_weight"].to(dtype).t()
    result = kd_loss(
        hidden @ weight.t(), teacher, x["labels"], ce_weight_T=x["ce_weight"],
        kd_weight_T=x["kd_weight"], vocab=VocabShard(size=case.V, start=0, stop=case.V),
        student_temperature=case.b, impl="reference",
    )  # fmt: skip
    hidden_grad, weight_grad = torch.autograd.grad(result.loss, (hidden, weight))
    return [result.loss.detach(), result.ce_T, result.kl_T, hidden_grad, weight_grad]


def run_case(body: str, case: Case, group: dist.ProcessGroup) -> list[Any]:
    """The same five, put together from all ranks of the group."""
    x = make_inputs(case)
    tp_rank = dist.get_rank(group)
    padded_size = padded_vocab_size(case.V, 64, case.tp_size)
    shards = [
        VocabShard.of_rank(size=case.V, padded_size=padded_size, tp_rank=rank, tp_size=case.tp_size)
        for rank in range(case.tp_size)
    ]
    vocab, W = shards[tp_rank], padded_size // case.tp_size

    def head_shard(weight: Tensor) -> Tensor:
        shard = torch.full((W, weight.shape[1]), 7.0, dtype=case.dtype)  # padding is not zeros
        shard[: vocab.num_columns] = weight[vocab.start : vocab.stop]
        return shard

    hidden = x["hidden"].to(case.dtype)
    if case.sequence_parallel:
        hidden = hidden.chunk(case.tp_size)[tp_rank].clone()
    if case.strided:
        hidden = hidden.t().contiguous().t()
    hidden.requires_grad_()
    weight = head_shard(x["weight"]).requires_grad_()
    chunking = Chunking(
        chunk_bytes=case.chunk_bytes, tp_group=group, sequence_parallel=case.sequence_parallel
    )
    with chosen(body):
        result = linear_kd_loss(
            hidden, weight, x["teacher_hidden"].to(case.dtype) if case.teacher else None,
            head_shard(x["teacher_weight"]) if case.teacher else None, x["labels"],
            ce_weight_T=x["ce_weight"], kd_weight_T=x["kd_weight"], vocab=vocab,
            student_temperature=case.b, chunking=chunking,
        )  # fmt: skip
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (weight.grad[vocab.num_columns :] == 0).all(), "padding must have no gradient"
    heads = _gathered(weight.grad, group)
    weight_grad = torch.cat([g[: s.num_columns] for g, s in zip(heads, shards, strict=True)])
    parts = _gathered(hidden.grad, group)
    if not case.sequence_parallel:
        assert all(torch.equal(part, parts[0]) for part in parts), "alike on every rank"
        parts = parts[:1]
    values = [result.loss.detach(), result.ce_T, result.kl_T, torch.cat(parts), weight_grad]
    return [value.double().numpy() for value in values]


def _gathered(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return found


def run_everything() -> dict[tuple[str, str], list[np.ndarray]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    world = dist.group.WORLD
    assert world is not None
    groups = {2: pairs[dist.get_rank() // 2], 4: world}
    return {
        (body, name): run_case(body, CASES[name], groups[CASES[name].tp_size])
        for body, name in RUNS
    }


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[str, str], list[np.ndarray]]]:
    cuda_on_cpu()  # built once, before there are ranks
    return run_ranks(WORLD_SIZE, run_everything)


NAMES = ("loss", "ce", "kl", "hidden gradient", "head gradient")


@pytest.mark.parametrize(("body", "name"), RUNS)
def test_values_and_gradients_match_one_process(body: str, name: str, by_rank: list[Any]) -> None:
    case = CASES[name]
    exact, plain = whole(case, torch.float64), whole(case, case.dtype)
    for rank in range(WORLD_SIZE):
        for what, got, wanted, theirs in zip(
            NAMES, by_rank[rank][body, name], exact, plain, strict=True
        ):
            error = lambda x, exact=wanted: float((x.double() - exact).norm() / exact.norm())
            if what == "kl" and not case.teacher:
                assert (got == 0).all()
                continue
            bound = 2 * error(theirs) + 1e-6
            assert error(torch.from_numpy(got)) <= bound, f"rank {rank}: {what}"


@pytest.mark.parametrize(("body", "name"), RUNS)
def test_every_rank_of_a_group_has_the_same(body: str, name: str, by_rank: list[Any]) -> None:
    for rank in range(1, WORLD_SIZE):
        for what, mine, first in zip(
            NAMES, by_rank[rank][body, name], by_rank[0][body, name], strict=True
        ):
            assert np.array_equal(mine, first), what


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_chunks_do_not_change_values(
    body: str, sequence_parallel: bool, by_rank: list[Any]
) -> None:
    for tp_size in (2, 4):
        end = f", tp {tp_size}{', sequence parallel' * sequence_parallel}"
        one, many, single = (
            by_rank[0][body, name + end] for name in ("one chunk", "chunks", "smallest chunks")
        )
        for cut in (many, single):
            for a, b in zip(one, cut, strict=True):
                assert np.allclose(a, b, rtol=1e-5, atol=1e-6)
