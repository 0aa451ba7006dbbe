"""The integer arithmetic of parallelism: who owns which rows and layers. No torch, no DeepSpeed.

Rank order is megatron-core's and DeepSpeed's alike: tensor fastest, then data, then pipeline.
All intervals are half-open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from megatron_salt.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the three axes; turns ranks into coordinates and back."""

    tp_size: int
    pp_size: int
    dp_size: int

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, dp_rank, pp_rank) of a global rank."""
        tp_rank = rank % self.tp_size
        dp_rank = rank // self.tp_size % self.dp_size
        return tp_rank, dp_rank, rank // (self.tp_size * self.dp_size)

    def rank(self, tp_rank: int, dp_rank: int, pp_rank: int) -> int:
        return (pp_rank * self.dp_size + dp_rank) * self.tp_size + tp_rank


def layout_for_world(world_size: int, tp_size: int, pp_size: int) -> Layout:
    """The layout whose data-parallel size fills the world.

    Raises: ValueError naming the sizes if the world is not a multiple of tp * pp.
    """
    if world_size % (tp_size * pp_size):
        raise ValueError(
            f"world size {world_size} is not a multiple of parallel.tensor_model_parallel_size = "
            f"{tp_size} * parallel.pipeline_model_parallel_size = {pp_size}; start a multiple of "
            f"{tp_size * pp_size} ranks or change the sizes"
        )
    return Layout(tp_size=tp_size, pp_size=pp_size, dp_size=world_size // (tp_size * pp_size))


def split_rows(num_rows: int, num_parts: int) -> list[tuple[int, int]]:
    """Cut `[0, num_rows)` into contiguous parts, longest first, sizes differing by at most one."""
    size, extra = divmod(num_rows, num_parts)
    bounds = [part * size + min(part, extra) for part in range(num_parts + 1)]
    return list(pairwise(bounds))


def teacher_pieces(num_rows: int, micro_batch_size: int, layout: Layout) -> list[tuple[int, int]]:
    """Rows of a replica's step in the pieces in which the teacher reads them, one forward each.

    The pieces do not depend on who computes them or when, so neither do the hidden states. They
    have at most `micro_batch_size` rows, and a size at which the tp * pp ranks of the replica can
    share them most evenly; the last one may be shorter.
    """
    num_ranks = layout.tp_size * layout.pp_size

    def most_rows(size: int) -> int:
        num_pieces = math.ceil(num_rows / size)
        return size * math.ceil(num_pieces / num_ranks)

    sizes = range(1, min(micro_batch_size, num_rows) + 1)
    size = min(sizes, key=lambda size: (most_rows(size), -size), default=1)
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def share_pieces(
    pieces: Sequence[tuple[int, int]],
    layout: Layout,
    stage_work: Sequence[float],
    row_work: float,
) -> list[list[range]]:
    """Which pieces each rank of a replica teaches, `[pp_rank][tp_rank]`, as ranges of numbers.

    Tensor-parallel ranks take contiguous blocks, and stages contiguous parts of a block, so that
    a block is one interval of rows on the last stage. Within a block each piece goes to the stage
    that has least to do, its own work included; where that is equal earlier stages come first:
    they have the longest wait before their next forward.

    Args:
        stage_work: what each stage computes in a step besides; zeros for equal shares.
        row_work: what one row costs the teacher, in the same unit.
    """
    shares: list[list[range]] = [[] for _ in range(layout.pp_size)]
    for start, stop in split_rows(len(pieces), layout.tp_size):
        work = list(stage_work)
        counts = [0] * layout.pp_size
        for first, end in pieces[start:stop]:
            least = min(range(layout.pp_size), key=lambda stage: (work[stage], stage))
            work[least] += (end - first) * row_work
            counts[least] += 1
        for stage, count in enumerate(counts):
            shares[stage].append(range(start, start + count))
            start += count
    return shares


def layer_costs(model: ModelConfig, vocab_size: int, seq_length: int) -> list[float]:
    """Multiply-adds per token and layer of the pipeline's parts: embedding, L layers, head.

    Linear layers cost their weights; attention S * H * C per token for scores and values together
    (causal: half of 2 S); the embedding is a look-up; the head costs D * V.
    """
    d, head = model.hidden_size, model.head_size
    query_size = model.num_attention_heads * head
    qkv = d * (query_size + 2 * model.query_groups * head)
    mlp = d * model.ffn_size * (3 if model.activation == "swiglu" else 2)
    layer = qkv + query_size * d + mlp + seq_length * query_size
    return [0.0, *[float(layer)] * model.num_layers, float(d * vocab_size)]


def balanced_stages(costs: Sequence[float], num_stages: int) -> list[int]:
    """Stage bounds over transformer layers, minimising the slowest stage's cost, then the next.

    `costs` is `layer_costs`: the embedding stays on the first stage, the head on the last, every
    stage has at least one layer. Where a heavy head sets the pace the others are still even: the
    first stage holds the most activations. Among equally good splits later stages get fewer layers,
    because the last one also computes the loss.

    Returns: `num_stages + 1` bounds over the L layers, from 0 to L.
    """
    num_layers = len(costs) - 2
    if num_stages > num_layers:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} pipeline stages")
    prefix = [0.0]
    for cost in costs[1:-1]:
        prefix.append(prefix[-1] + cost)

    @cache
    def best(stage: int, start: int) -> tuple[tuple[float, ...], int]:
        """Costs of stages `stage`.. from layer `start`, largest first, and where this one stops."""
        extra = costs[0] if stage == 0 else 0.0
        if stage == num_stages - 1:
            return (prefix[-1] - prefix[start] + extra + costs[-1],), num_layers
        choices = []
        for stop in range(start + 1, num_layers - (num_stages - 2 - stage)):
            here = prefix[stop] - prefix[start] + extra
            rest = best(stage + 1, stop)[0]
            choices.append((tuple(sorted((here, *rest), reverse=True)), -stop))
        largest_first, negative_stop = min(choices)
        return largest_first, -negative_stop

    bounds = [0]
    for stage in range(num_stages):
        bounds.append(best(stage, bounds[-1])[1])
    return bounds
