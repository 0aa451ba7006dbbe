"""Counting what tensors hold: storages that are alive, each once, and the most that ever were."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class Peak(TorchDispatchMode):
    """Within it, the bytes of new storages that are alive at once, at most, are in `most`.

    Every operation's results are seen, in the backward too; what an operation allocates and frees
    within itself is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # The operands' storages are from before, or have been seen as results.
        given = {
            each.untyped_storage()._cdata
            for each in tree_leaves((args, kwargs))
            if isinstance(each, Tensor)
        }
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device.type == "cpu":
                storage = each.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(address, None)

        self._known[address] = weakref.ref(storage, gone)


def most_allocated(function: Callable[[], object]) -> int:
    """Bytes that were allocated at once, at most, while a function ran; from its start."""
    with Peak() as peak:
        function()
    return peak.most
