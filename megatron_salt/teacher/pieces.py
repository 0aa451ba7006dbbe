"""The teacher's rows of a step: in which pieces they are read, and which rank runs which."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_salt.parallel.layout import Layout, split_evenly


def teacher_pieces(
    num_rows: int, micro_batch_size: int, layout: Layout, teacher_tp_size: int = 1
) -> list[tuple[int, int]]:
    """Rows of a replica's step in the pieces in which the teacher reads them, one forward each.

    Of at most `micro_batch_size` rows; the last one may be shorter.
    """
    # Sizes alone decide, not who computes a piece or when: the hidden states are always the same.
    num_teachers = layout.tp_size // teacher_tp_size * layout.pp_size

    def rows_of_busiest(size: int) -> int:
        num_pieces = math.ceil(num_rows / size)
        return size * math.ceil(num_pieces / num_teachers)

    sizes = range(1, min(micro_batch_size, num_rows) + 1)
    # The size that all teachers can share most evenly; of such sizes the largest.
    size = min(sizes, key=lambda size: (rows_of_busiest(size), -size), default=1)
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def assign_pieces(
    pieces: Sequence[tuple[int, int]], layout: Layout, stage_work: Sequence[float],
    row_work: float, teacher_tp_size: int = 1,
) -> list[list[range]]:  # fmt: skip
    """Which pieces each rank of a replica teaches, `[pp_rank][tp_rank]`, as ranges of numbers.

    Args:
        stage_work: what each stage computes in a step besides; zeros for equal shares.
        row_work: what one row costs the teacher, in the same unit.
        teacher_tp_size: over how many ranks a teacher is spread: 1, or all tensor-parallel ones of
            a stage, which then teach the same pieces.
    """
    pieces_of: list[list[range]] = [[] for _ in range(layout.pp_size)]
    # A contiguous block for each tensor-parallel rank, or for all together, a contiguous part of it
    # for each stage: so a block is one interval of rows on the last stage.
    for start, stop in split_evenly(len(pieces), layout.tp_size // teacher_tp_size):
        work = list(stage_work)
        counts = [0] * layout.pp_size
        for first, end in pieces[start:stop]:
            # Ties go to earlier stages: they have the longest wait before their next forward.
            least = min(range(layout.pp_size), key=lambda stage: (work[stage], stage))
            work[least] += (end - first) * row_work
            counts[least] += 1
        for stage, count in enumerate(counts):
            pieces_of[stage].append(range(start, start + count))
            start += count
    return [ranges * teacher_tp_size for ranges in pieces_of]
