"""Three sizes never to be confused: the real vocabulary, its padded size, one rank's shard."""

from __future__ import annotations

from dataclasses import dataclass


def padded_vocab_size(size: int, divisible_by: int, tp_size: int) -> int:
    """The real size rounded up so that each of `tp_size` shards is a multiple of `divisible_by`."""
    multiple = divisible_by * tp_size
    return (size + multiple - 1) // multiple * multiple


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """This rank's real columns `[start, stop)` of a vocabulary of `size` real tokens.

    A shard of W columns stores its real columns first; columns from `stop - start` to W are padding
    and hold no probability, whatever is in them.
    """

    size: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.size:
            raise ValueError(f"not a range inside the vocabulary: {self}")

    @property
    def num_columns(self) -> int:
        return self.stop - self.start

    @classmethod
    def of_rank(cls, *, size: int, padded_size: int, tp_rank: int, tp_size: int) -> VocabShard:
        """The shard of rank `tp_rank` when `padded_size` columns are cut into equal parts."""
        width = padded_size // tp_size
        start, stop = (min(size, rank * width) for rank in (tp_rank, tp_rank + 1))
        return cls(size=size, start=start, stop=stop)
