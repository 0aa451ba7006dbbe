"""Which samples a step reads, as pure functions: nothing to save, nothing to get out of step.

Rows are sequences. Step t reads rows `[t * G, (t + 1) * G)` of an endless order, G the global batch
size; data-parallel rank r of n reads the r-th of n equal parts of them. Intervals are half-open.
"""

from __future__ import annotations

import numpy as np


def rows_of_rank(step: int, global_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Rows of the endless order that one data-parallel rank reads at a step (counted from 0)."""
    per_rank = global_batch_size // dp_size
    start = step * global_batch_size + dp_rank * per_rank
    return range(start, start + per_rank)


def evaluation_rows(
    num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Held-out rows per micro-batch of one data-parallel rank; -1 fills the last ones up.

    Every rank gets the same number of micro-batches (they run collectives together); each of the
    `num_samples` rows appears exactly once over all ranks.
    """
    rows_per_round = micro_batch_size * dp_size
    num_rounds = -(-num_samples // rows_per_round)
    rounds = []
    for index in range(num_rounds):
        start = index * rows_per_round + dp_rank * micro_batch_size
        rows = range(start, start + micro_batch_size)
        rounds.append([row if row < num_samples else -1 for row in rows])
    return rounds


def epoch_seed(seed: int, epoch: int) -> int:
    """Shuffling seed of one pass. Mixed, so that (seed 1, epoch 1) is not (seed 2, epoch 0)."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
