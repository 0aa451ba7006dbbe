"""`linear_kd_loss` with the head cut over 2 and 4 gloo ranks; hidden states whole and cut, too.

Compared with plain autograd on whole logits in one process, in fp64. Four ranks are forked once;
they form one group of 4 and two groups of 2. Letters: T tokens, D and E widths, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loss_backends import BACKENDS, chosen, cuda_on_cpu
from loss_cases import (
    LinearCase,
    LinearResult,
    assert_as_exact_as_autograd,
    autograd_linear_result,
    linear_arguments,
    make_linear_case,
    without_teacher,
)
from ranks import run_ranks
from torch import Tensor

from megatron_salt.kernels import Chunking, VocabShard, linear_kd_loss, padded_vocab_size

pytestmark = pytest.mark.distributed

WORLD_SIZE = 4
T, D, E = 48, 12, 20


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A case, and how its head and its tokens are cut."""

    V: int = 251
    tp_size: int
    sequence_parallel: bool
    chunk_bytes: int = 6_000
    dtype: torch.dtype = torch.float32
    teacher: bool = True
    b: float = 1.0
    strided: bool = False

    @functools.cached_property
    def case(self) -> LinearCase:
        case = make_linear_case(T, self.V, D, E, b=self.b).rounded(self.dtype)
        return case if self.teacher else without_teacher(case)


CUTS = {
    f"{name}, tp {tp_size}{', sequence parallel' * sequence_parallel}": Cut(
        tp_size=tp_size, sequence_parallel=sequence_parallel, **settings
    )
    for name, settings in {
        "one chunk": dict(chunk_bytes=1 << 30),
        "chunks": dict(),
        "smallest chunks": dict(chunk_bytes=3_200),
        "empty shards, b = 2": dict(V=123, b=2.0),
        "bf16": dict(dtype=torch.bfloat16, chunk_bytes=8_000),
        "strided hidden states, no teacher": dict(strided=True, teacher=False),
    }.items()
    for tp_size in (2, 4)
    for sequence_parallel in (False, True)
}
RUNS = [(backend, name) for backend in BACKENDS for name in CUTS]


def run_cut(backend: str, cut: Cut, group: dist.ProcessGroup) -> list[Any]:
    """A `LinearResult`, put together from all ranks of the group."""
    tp_rank = dist.get_rank(group)
    size = padded_vocab_size(cut.V, 64, cut.tp_size)
    of_rank = functools.partial(VocabShard.of_rank, size=cut.V, padded_size=size)
    shards = [of_rank(tp_rank=rank, tp_size=cut.tp_size) for rank in range(cut.tp_size)]
    vocab = shards[tp_rank]
    arguments = linear_arguments(cut.case, cut.dtype, size // cut.tp_size, vocab)
    hidden, head = arguments["student_hidden_TD"].detach(), arguments["student_weight_WD"]
    if cut.sequence_parallel:
        hidden = hidden.chunk(cut.tp_size)[tp_rank].clone()
    if cut.strided:
        hidden = hidden.t().contiguous().t()
    hidden.requires_grad_()
    chunking = Chunking(
        chunk_bytes=cut.chunk_bytes, tp_group=group, sequence_parallel=cut.sequence_parallel
    )
    with chosen(backend):
        changes = {"student_hidden_TD": hidden, "chunking": chunking}
        result = linear_kd_loss(**(arguments | changes))
    result.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    assert (head.grad[vocab.num_columns :] == 0).all(), "padding must have no gradient"
    heads = _gathered(head.grad, group)
    head_grad = torch.cat([g[: s.num_columns] for g, s in zip(heads, shards, strict=True)])
    parts = _gathered(hidden.grad, group)
    if not cut.sequence_parallel:
        assert all(torch.equal(part, parts[0]) for part in parts), "alike on every rank"
        parts = parts[:1]
    values = [result.loss.detach(), result.ce_T, result.kl_T, torch.cat(parts), head_grad]
    return [value.double().numpy() for value in values]


def _gathered(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return found


def run_everything() -> dict[tuple[str, str], list[Any]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    world = dist.group.WORLD
    assert world is not None
    groups = {2: pairs[dist.get_rank() // 2], 4: world}
    return {(backend, name): run_cut(backend, CUTS[name], groups[CUTS[name].tp_size])
            for backend, name in RUNS}  # fmt: skip


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[str, str], LinearResult]]:
    cuda_on_cpu()  # loaded once, before there are ranks
    return [
        {run: LinearResult(*map(torch.from_numpy, values)) for run, values in found.items()}
        for found in run_ranks(WORLD_SIZE, run_everything)
    ]


@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_values_and_gradients_match_one_process_alike_on_every_rank(
    backend: str, name: str, by_rank: list[Any]
) -> None:
    cut, got = CUTS[name], by_rank[0][backend, name]
    exact, plain = (autograd_linear_result(cut.case, x) for x in (torch.float64, cut.dtype))
    assert_as_exact_as_autograd(got, plain, exact, tolerance=1e-6, norm=2)
    for found in by_rank[1:]:
        for what, mine, first in zip(LinearResult._fields, found[backend, name], got, strict=True):
            assert torch.equal(mine, first), what


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_do_not_change_values(
    backend: str, sequence_parallel: bool, by_rank: list[Any]
) -> None:
    for tp_size in (2, 4):
        end = f", tp {tp_size}{', sequence parallel' * sequence_parallel}"
        one, many, single = (
            by_rank[0][backend, name + end] for name in ("one chunk", "chunks", "smallest chunks")
        )
        for cut in (many, single):
            for a, b in zip(one, cut, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
