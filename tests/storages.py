"""Counting what tensors hold: storages that are alive, each once, and the most that ever were."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Address and bytes of every storage; views of one count once, empty ones not at all."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)
    return found


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(storages(tensors).values())


def alive() -> int:
    """Bytes of all tensors that Python can reach, and of their gradients."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf]
    return num_bytes([*tensors, *gradients])


def most_allocated(function: Callable[[], object]) -> int:
    """Bytes that were allocated at once, at most, while a function ran; from its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    result = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in result.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most
