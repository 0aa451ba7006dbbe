"""Seconds and bytes of this rank; on CUDA by events, so that measuring does not synchronise."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch


class Stopwatch:
    """Seconds between start and stop; on CUDA by events, so that measuring does not synchronise."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
        self._started = self._stopped = 0.0

    def start(self) -> None:
        if self._events:
            self._events[0].record()
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._events:
            self._events[1].record()
        self._stopped = time.perf_counter()

    def seconds(self) -> float:
        """The last interval. Host sync: waits for the stop event on CUDA."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000.0
        return self._stopped - self._started


class LapTimer:
    """Adds up what lies between `start` and `stop`; on CUDA by events, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._laps.append((first, last))

    def take_s(self) -> float:
        """Seconds since the last call. Host sync: waits for the last lap on CUDA."""
        seconds, self._seconds = self._seconds, 0.0
        for first, last in self._laps:
            last.synchronize()
            seconds += first.elapsed_time(last) / 1000.0
        self._laps.clear()
        return seconds


def allocated_bytes(device: torch.device) -> int:
    """Memory of this rank: allocated on the GPU, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
