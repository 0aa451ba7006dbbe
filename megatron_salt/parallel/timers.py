"""Seconds and bytes of this rank; on CUDA by events, so that measuring does not synchronise."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch

Moment = float | torch.cuda.Event
"""On this rank: `perf_counter`'s seconds, or an event on the stream."""


def moment_now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Moment, stop: Moment) -> float:
    """Host sync: waits for `stop` on CUDA."""
    if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
        stop.synchronize()
        return start.elapsed_time(stop) / 1000.0
    assert isinstance(start, float) and isinstance(stop, float)
    return stop - start


class Stopwatch:
    """Seconds between start and stop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: Moment = 0.0
        self._stopped: Moment = 0.0

    def start(self) -> None:
        self._started = moment_now(self._device)

    def stop(self) -> None:
        self._stopped = moment_now(self._device)

    def seconds(self) -> float:
        """The last interval. Host sync: waits for the stop event on CUDA."""
        return seconds_between(self._started, self._stopped)


class LapTimer:
    """Adds up the seconds of laps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[Moment, Moment]] = []

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
        start = moment_now(self._device)
        yield
        self._laps.append((start, moment_now(self._device)))

    def take_s(self) -> float:
        """Seconds since the last call. Host sync: waits for the last lap on CUDA."""
        laps, self._laps = self._laps, []
        return sum((seconds_between(*lap) for lap in laps), 0.0)


def allocated_bytes(device: torch.device) -> int:
    """Memory of this rank: allocated on the GPU, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
