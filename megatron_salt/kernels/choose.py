"""Which backend computes a loss: `reference`, `native` (compiled, CPU) or `cuda`."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch

from megatron_salt.kernels import compiled
from megatron_salt.kernels.backend import Divergence, LossBackend
from megatron_salt.kernels.reference import ReferenceBackend

Impl = Literal["auto", "reference", "native", "cuda"]
IMPLS = ("auto", "reference", "native", "cuda")

_logger = logging.getLogger(__name__)


def choose_backend(
    impl: Impl,
    *,
    device: torch.device,
    dtypes: frozenset[torch.dtype],
    divergence: Divergence = "forward_kl",
) -> LossBackend:
    """The backend for tensors of a device and dtypes.

    `auto` takes the compiled one of the device and falls back to the reference with one log line
    that says why; a choice by name is that or an error.

    Raises: ValueError for an unknown impl, or one that cannot serve these tensors;
        RuntimeError where its library cannot be built.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl = {impl!r}: choose one of {', '.join(map(repr, IMPLS))}")
    if impl == "reference":
        return ReferenceBackend()
    wanted: Literal["native", "cuda"] = "cuda" if device.type == "cuda" else "native"
    if impl != "auto" and impl != wanted:
        raise ValueError(f"impl = {impl!r} cannot serve tensors on {device}; 'reference' can")
    problem = _unserved(device, dtypes, divergence)
    if problem is None:
        backend = load_for(device)
        if not isinstance(backend, str):
            return backend
        if impl != "auto":
            raise RuntimeError(f"impl = {impl!r} is not available: {backend}")
        problem = f"is not available: {backend}"
    elif impl != "auto":
        raise ValueError(f"impl = {impl!r} {problem}; 'reference' does")
    _say_once(f"the loss uses the slow reference: {wanted} {problem}")
    return ReferenceBackend()


def _unserved(
    device: torch.device, dtypes: frozenset[torch.dtype], divergence: Divergence
) -> str | None:
    """What the compiled backend of this device does not do, if these tensors need it."""
    if device.type not in ("cpu", "cuda"):
        return f"does not serve tensors on {device}"
    if divergence != "forward_kl":
        return f"does not compute divergence = {divergence!r}"
    foreign = dtypes - compiled.DTYPE_CODES.keys()
    if foreign:
        return f"does not serve {', '.join(sorted(map(str, foreign)))}"
    return None


def load_for(device: torch.device) -> compiled.CompiledBackend | str:
    """The compiled backend of a device, built if need be, or the reason why there is none."""
    if device.type == "cpu":
        return compiled.load("native")
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        return compiled.load("cuda", 10 * major + minor)


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)
