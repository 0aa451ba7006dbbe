"""The integer arithmetic of parallelism: who owns which rows and layers. No torch, no DeepSpeed.

Rank order is megatron-core's and DeepSpeed's alike: tensor fastest, then data, then pipeline.
All intervals are half-open.
"""

from __future__ import annotations

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


def teacher_rows(num_rows: int, layout: Layout, tp_rank: int, pp_rank: int) -> tuple[int, int]:
    """Rows of a data-parallel replica's step that one of its model-parallel ranks teaches.

    Every replica of the teacher, one per rank, takes an equal share: tp * pp of them work on the
    step's M * B rows. Earlier stages come first: they have the longest wait before their next
    forward.
    """
    parts = split_rows(num_rows, layout.tp_size * layout.pp_size)
    return parts[pp_rank * layout.tp_size + tp_rank]


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
