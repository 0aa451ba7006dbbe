"""The batches of a run, read by a thread while the steps before them run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_salt.data.dataset import Batch

DEPTH = 2  # The teacher works on the next batch, so the one after it is being read.


class ReadAhead:
    """Hands out the batch of each step from `first` to `stop`, on the device.

    Args:
        read: makes the batch of a step on the CPU; called by one thread, in the order of steps.
    """

    def __init__(
        self, read: Callable[[int], Batch], first: int, stop: int, device: torch.device
    ) -> None:
        pins = device.type == "cuda"
        self._read = (lambda step: read(step).pinned()) if pins else read
        self._stop, self._device = stop, device
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._pending: dict[int, Future[Batch]] = {}
        self._on_device: dict[int, Batch] = {}
        self.restart(first)

    def restart(self, step: int) -> None:
        """Forget what has been read: the steps from `step` on read something else now."""
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()
        self._on_device.clear()
        self._next = step

    def close(self) -> None:
        """End the thread; what it has read is let go."""
        self.restart(self._stop)
        self._reader.shutdown()

    def _submit(self, stop: int) -> None:
        while self._next < min(stop, self._stop):
            self._pending[self._next] = self._reader.submit(self._read, self._next)
            self._next += 1

    def peek(self, step: int) -> Batch:
        """A batch that a later `take` will hand out. Raises what reading it has raised."""
        if step not in self._on_device:
            self._submit(step + 1)
            self._on_device[step] = self._pending.pop(step).result().to(self._device)
        return self._on_device[step]

    def take(self, step: int) -> Batch:
        batch = self.peek(step)
        del self._on_device[step]
        self._submit(step + 1 + DEPTH)
        return batch
