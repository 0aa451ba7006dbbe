"""How far a long task is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class Progress(tqdm):
    """A tqdm bar where stderr is a terminal; elsewhere whole lines that say the same.

    There is a line at each tenth of the total, and one after a minute without any.
    """

    def __init__(self, total: int, unit: str, description: str, *, visible: bool = True) -> None:
        terminal = sys.stderr.isatty()
        self._prints, self._printed_s = visible and not terminal, time.monotonic()
        super().__init__(
            total=total, unit=unit, unit_scale=True, desc=description, disable=not visible,
            dynamic_ncols=terminal, file=sys.stderr if terminal else io.StringIO(),
            mininterval=0.5 if terminal else float("inf"),  # without a terminal the bar only counts
        )  # fmt: skip

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, of which each counts for one when it is done."""
        with self:
            for item in items:
                yield item
                self.update()

    def update(self, amount: float = 1) -> None:
        before = self.n
        super().update(amount)
        tenth = self.total and before * 10 // self.total < self.n * 10 // self.total
        if self._prints and (tenth or time.monotonic() - self._printed_s >= 60.0):
            self._printed_s = time.monotonic()
            print(self, file=sys.stderr, flush=True)
