"""The teacher's rows of a step: in which pieces they are read, and which rank runs which."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_salt.parallel.layout import Layout, split_evenly


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


def assign_pieces(
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
    pieces_of: list[list[range]] = [[] for _ in range(layout.pp_size)]
    for start, stop in split_evenly(len(pieces), layout.tp_size):
        work = list(stage_work)
        counts = [0] * layout.pp_size
        for first, end in pieces[start:stop]:
            least = min(range(layout.pp_size), key=lambda stage: (work[stage], stage))
            work[least] += (end - first) * row_work
            counts[least] += 1
        for stage, count in enumerate(counts):
            pieces_of[stage].append(range(start, start + count))
            start += count
    return pieces_of
