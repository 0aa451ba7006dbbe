"""Which samples a step reads, as pure functions: nothing to save, nothing to get out of step.

A row is a sequence of the step. All steps read one endless order of rows, pass after pass over the
data. Intervals are half-open.
"""

from __future__ import annotations

import numpy as np


def rows_of_rank(step: int, global_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Rows of the endless order that one data-parallel rank reads at a step (counted from 0)."""
    # Step t reads [t G, (t + 1) G), G the global batch size; each rank one of n equal parts.
    per_rank = global_batch_size // dp_size
    start = step * global_batch_size + dp_rank * per_rank
    return range(start, start + per_rank)


def evaluation_rows(
    num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Held-out rows per micro-batch of one data-parallel rank; -1 fills the last ones up.

    Each of the `num_samples` rows appears exactly once over all ranks.
    """
    rows_per_round = micro_batch_size * dp_size
    # Rounded up alike on every rank, because the ranks run collectives together.
    num_rounds = -(-num_samples // rows_per_round)
    micro_batches = []
    for index in range(num_rounds):
        start = index * rows_per_round + dp_rank * micro_batch_size
        rows = range(start, start + micro_batch_size)
        micro_batches.append([row if row < num_samples else -1 for row in rows])
    return micro_batches


def epoch_seed(seed: int, epoch: int) -> int:
    """Shuffling seed of one pass."""
    # Mixed and not added, so that (seed 1, epoch 1) is not (seed 2, epoch 0).
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
