"""The integer arithmetic of parallelism: which rank has which coordinates, and even parts.

No torch, no DeepSpeed. All intervals are half-open.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


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
        # megatron-core's order and DeepSpeed's alike: tensor fastest, then data, then pipeline.
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


def split_evenly(num_items: int, num_parts: int) -> list[tuple[int, int]]:
    """Cut `[0, num_items)` into contiguous parts, longest first, sizes differing by at most one."""
    size, extra = divmod(num_items, num_parts)
    bounds = [part * size + min(part, extra) for part in range(num_parts + 1)]
    return list(pairwise(bounds))
