"""The compiled backends of the loss: `native` (csrc/kd_loss.cpp) and `cuda` (csrc/kd_loss.cu).

Calls the libraries of `build.py` through their C interface, csrc/kd_loss.h. Letters: T tokens,
W vocabulary columns on this rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.kernels import build
from megatron_salt.kernels.backend import (
    BackendScores,
    LossBackend,
    LossInputs,
    LossOptions,
    all_reduce,
    tp_size_of,
)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _SaltRows(ctypes.Structure):
    """struct SaltRows of csrc/kd_loss.h, field by field."""

    _fields_ = (
        *((x, _POINTER) for x in ("student", "teacher", "labels", "ce_weights", "kd_weights")),
        *((name, _POINTER) for name in ("ids", "targets", "masses", "ghosts")),
        *((name, _LONG) for name in ("student_stride", "teacher_stride")),
        *((name, _LONG) for name in ("num_tokens", "num_columns", "num_kept")),
        *((name, _LONG) for name in ("vocab_start", "vocab_size")),
        *((name, ctypes.c_float) for name in ("teacher_temperature", "student_temperature")),
        *((name, _INT) for name in ("student_dtype", "teacher_dtype", "num_threads")),
        ("stream", _POINTER),
    )


_ROWS = ctypes.POINTER(_SaltRows)
_FUNCTIONS = {
    "salt_probe": (),
    "salt_local_sums": (_ROWS, _POINTER, _POINTER, _POINTER),
    "salt_rescale": (_ROWS, _POINTER, _POINTER, _POINTER),
    "salt_finish": (_ROWS, _POINTER, _POINTER, _POINTER),
    "salt_gradient": (_ROWS, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT),
    "salt_values_and_gradient": (_ROWS, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT),
}


class CompiledBackend(LossBackend):
    """A library with the interface of csrc/kd_loss.h.

    Args:
        name: what `impl` calls it.
        path: the shared library.
    Raises: OSError if the library cannot be loaded or cannot run on the current device.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.checks_values = name == "cuda"
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.salt_error.restype = ctypes.c_char_p
        for function, arguments in _FUNCTIONS.items():
            getattr(self._library, function).argtypes = arguments
        code = self._library.salt_probe()
        if code:
            words = self._library.salt_error(code).decode()
            raise OSError(f"{path} cannot run here: {words} (CUDA error {code})")

    def scores(self, inputs: LossInputs, options: LossOptions) -> BackendScores:
        """See `LossBackend.scores`. Memory: 10 floats a token at most, 12 over several ranks."""
        num_tokens = inputs.student_TW.shape[0]
        num_maxima, num_sums = 1, 2
        if inputs.has_teacher:
            num_maxima = 1 if inputs.teacher_TW is None else 2
            num_sums = 2 + num_maxima + (options.student_temperature != 1.0)
            num_sums += inputs.ghost_T is not None
        maxima = inputs.student_TW.new_empty((num_maxima, num_tokens), dtype=torch.float32)
        sums = maxima.new_empty((num_sums, num_tokens))
        values = maxima.new_empty((3, num_tokens))
        tp_group = options.tp_group
        alone = tp_size_of(tp_group) == 1
        with self._described(inputs, options) as described:
            self._call("salt_local_sums", described, maxima, sums, values if alone else None)
            if not alone:
                global_maxima = all_reduce(maxima.clone(), dist.ReduceOp.MAX, tp_group)
                self._call("salt_rescale", described, global_maxima, maxima, sums)
                all_reduce(sums, dist.ReduceOp.SUM, tp_group)
                self._call("salt_finish", described, maxima, sums, values)
        loss_T, ce_T, kl_T = values
        return BackendScores(loss_T, ce_T, kl_T, (maxima, sums))

    def gradient_(
        self,
        inputs: LossInputs,
        options: LossOptions,
        saved: tuple[Tensor, ...],
        upstream: Tensor,
        out_TW: Tensor,
    ) -> None:
        maxima, sums = saved
        with self._described(inputs, options) as described:
            self._call("salt_gradient", described, maxima, sums, upstream, *_target(out_TW))

    def scores_and_gradient_(
        self, inputs: LossInputs, options: LossOptions, upstream: Tensor, out_TW: Tensor
    ) -> BackendScores:
        """See `LossBackend.scores_and_gradient_`. One launch on one rank, token by token."""
        if tp_size_of(options.tp_group) > 1:
            return super().scores_and_gradient_(inputs, options, upstream, out_TW)
        student_TW = inputs.student_TW
        values = student_TW.new_empty((3, student_TW.shape[0]), dtype=torch.float32)
        with self._described(inputs, options) as described:
            self._call("salt_values_and_gradient", described, values, upstream, *_target(out_TW))
        loss_T, ce_T, kl_T = values
        return BackendScores(loss_T, ce_T, kl_T, ())

    @contextlib.contextmanager
    def _described(self, inputs: LossInputs, options: LossOptions):  # type: ignore[no-untyped-def]
        """The inputs as the library wants them, with their device current while it is called."""
        student_TW, teacher_TW, labels_T, ce_weight_T, kd_weight_T = inputs[:5]
        ids_TK, target_TK, ghost_T = inputs[5:]
        # A single weight is an expanded view of stride 0, and labels may be strided.
        held = [tensor.contiguous() for tensor in (labels_T, ce_weight_T, kd_weight_T)]
        mass_T = None if target_TK is None else target_TK.sum(dim=1)
        pointer = lambda tensor: None if tensor is None else tensor.data_ptr()
        described = _SaltRows(
            student=student_TW.data_ptr(),
            teacher=pointer(teacher_TW),
            labels=held[0].data_ptr(),
            ce_weights=held[1].data_ptr(),
            kd_weights=held[2].data_ptr(),
            ids=pointer(ids_TK),
            targets=pointer(target_TK),
            masses=pointer(mass_T),
            ghosts=pointer(ghost_T),
            student_stride=student_TW.stride(0),
            teacher_stride=0 if teacher_TW is None else teacher_TW.stride(0),
            num_tokens=student_TW.shape[0],
            num_columns=options.vocab.num_columns,
            num_kept=0 if ids_TK is None else ids_TK.shape[1],
            vocab_start=options.vocab.start,
            vocab_size=options.vocab.size,
            teacher_temperature=options.teacher_temperature,
            student_temperature=options.student_temperature,
            student_dtype=DTYPE_CODES[student_TW.dtype],
            teacher_dtype=0 if teacher_TW is None else DTYPE_CODES[teacher_TW.dtype],
            num_threads=min(torch.get_num_threads(), max(student_TW.shape[0], 1)),
            stream=None,
        )
        if student_TW.is_cuda:
            with torch.cuda.device(student_TW.device):
                described.stream = torch.cuda.current_stream().cuda_stream
                yield described
        else:
            yield described

    def _call(self, function: str, described: _SaltRows, *arguments: Tensor | int | None) -> None:
        if described.num_tokens == 0:
            return
        code = getattr(self._library, function)(
            described, *(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
        )
        if code:
            words = self._library.salt_error(code).decode()
            raise RuntimeError(f"{function} of {self.path}: {words} (code {code})")


def _target(out_TW: Tensor) -> tuple[Tensor, int, int, int]:
    return out_TW, out_TW.stride(0), out_TW.shape[1], DTYPE_CODES[out_TW.dtype]


@functools.cache
def load(kind: build.LibraryKind, architecture: int | None = None) -> CompiledBackend | str:
    """The library, built if need be; where it cannot be had or cannot run, the reason why.

    Args:
        architecture: of the current CUDA device, e.g. 90.
    """
    architectures = build.CUDA_ARCHITECTURES if architecture is None else (architecture,)
    try:
        return CompiledBackend(kind, build.find_or_build(kind, architectures))
    except (build.BuildError, OSError) as error:
        return str(error)
