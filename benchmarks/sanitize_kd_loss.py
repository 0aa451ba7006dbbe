"""Runs every kernel of the loss at small awkward sizes, for NVIDIA's compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize_kd_loss.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize_kd_loss.py

All dtypes of student, teacher and gradient; rows that start anywhere; tempered or not; without a
teacher; padding; both ways to the gradient; and a vocabulary in three parts, one of them padding
alone, with torch.maximum and a sum in place of the collectives. Every tensor has memory of its own
that ends with its last row, so that an access beyond it is seen. Results are compared with the
reference in fp64 on the CPU; a mismatch is printed and makes the exit code 1.

`--device cpu` runs the CPU's library through the same calls.

Its cases are its own, not those of tests/loss_cases.py: a checker makes every launch many times
slower, so they are small; they call the library's functions one by one; and their memory must end
where the last row does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

# Before CUDA starts: the caching allocator would put tensors next to each other in one allocation,
# where no checker sees an access beyond one of them.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from torch import Tensor

from megatron_salt.kernels import VocabShard
from megatron_salt.kernels.backend import LossInputs, LossOptions
from megatron_salt.kernels.compiled import CompiledBackend, load
from megatron_salt.kernels.reference import ReferenceBackend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 6
# One column; ragged groups; blocks of 128, 256 and 512 threads.
COLUMNS = (1, 7, 123, 2049, 8200, 16411)
TEMPERATURES = ((1.0, 1.0), (2.0, 0.5))
UPSTREAM = -1.5


class Kind(NamedTuple):
    """Which template of the kernels."""

    student: torch.dtype
    teacher: torch.dtype | None
    gradient: torch.dtype


class Place(NamedTuple):
    """Columns after the real ones, elements between rows, elements before the first one."""

    padding: int
    gap: int
    offset: int


PLACES = (Place(0, 0, 0), Place(5, 0, 0), Place(0, 1, 1), Place(3, 2, 7))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("sanitize_kd_loss.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    backend = load_backend(args.device)
    if isinstance(backend, str):
        print(f"the kernels cannot be loaded: {backend}", file=sys.stderr)
        return 2
    mismatches = []
    num_cases = num_comparisons = 0
    for kind in kinds():
        # Temperatures and places change with the size and the kind, so that all of them meet.
        for i, num_columns in enumerate(COLUMNS):
            variant = num_cases + i
            a, b = TEMPERATURES[variant % len(TEMPERATURES)]
            student_place = PLACES[variant % len(PLACES)]
            teacher_place = PLACES[(variant // 2 + 1) % len(PLACES)]
            case = Case(kind, num_columns, a, b, student_place, teacher_place, args.device)
            for name, got, exact, allowed in case.compared(backend):
                num_comparisons += 1
                if not bool(((got - exact).abs() <= allowed).all()):  # false for nan
                    mismatches.append(f"{kind}, {num_columns} columns, a = {a}, b = {b}: {name}")
        num_cases += len(COLUMNS)
    if args.device == "cuda":
        torch.cuda.synchronize()
    for mismatch in mismatches:
        print(f"MISMATCH: {mismatch}", file=sys.stderr)
    print(f"{backend.name}: {num_cases} cases, {num_comparisons} comparisons, "
          f"{len(mismatches)} mismatches")  # fmt: skip
    return 1 if mismatches else 0


def load_backend(device: str) -> CompiledBackend | str:
    if device == "cpu":
        return load("native")
    major, minor = torch.cuda.get_device_capability()
    return load("cuda", 10 * major + minor)


def kinds() -> Iterator[Kind]:
    for student, teacher in itertools.product(DTYPES, (*DTYPES, None)):
        yield Kind(student, teacher, student)
        if student == torch.float32:
            yield Kind(student, teacher, torch.bfloat16)
            yield Kind(student, teacher, torch.float16)


class Case:
    """Some tokens on the device, and what the reference says of them."""

    def __init__(
        self,
        kind: Kind,
        num_columns: int,
        a: float,
        b: float,
        student_place: Place,
        teacher_place: Place,
        device: str,
    ) -> None:
        self.kind, self.num_columns, self.device = kind, num_columns, device
        rng = torch.Generator().manual_seed(num_columns)
        student = torch.randn(TOKENS, num_columns, generator=rng) * 3
        teacher = student + torch.randn(TOKENS, num_columns, generator=rng)
        labels = torch.randint(num_columns, (TOKENS,), generator=rng)
        labels[0], labels[1] = 0, num_columns - 1
        # Both losses, only the CE, only the KL, neither, both.
        ce_weight = torch.tensor([0.7, 0.4, 0.0, 0.0, 1.0, 0.9])
        kd_weight = torch.tensor([0.6, 0.0, 1.1, 0.0, 0.5, 0.8])
        self.student_TW = placed(student.to(kind.student), student_place, device)
        self.teacher_TW = None
        if kind.teacher is not None:
            self.teacher_TW = placed(teacher.to(kind.teacher), teacher_place, device)
        else:
            kd_weight = torch.zeros(TOKENS)
        self.small = [x.to(device) for x in (labels, ce_weight, kd_weight)]
        self.upstream = torch.tensor(UPSTREAM, device=device)
        self.vocab = VocabShard(size=num_columns, start=0, stop=num_columns)
        self.temperatures = {"teacher_temperature": a, "student_temperature": b}

    def rows(self, vocab: VocabShard) -> LossInputs:
        """The tokens with the columns of one part of the vocabulary, padding after the last."""
        if vocab.num_columns == 0:
            return LossInputs(*self.padding_alone(), *self.small)
        columns = slice(vocab.start, None if vocab.stop == vocab.size else vocab.stop)
        teacher_TW = None if self.teacher_TW is None else self.teacher_TW[:, columns]
        return LossInputs(self.student_TW[:, columns], teacher_TW, *self.small)

    def padding_alone(self) -> tuple[Tensor, Tensor | None]:
        """Logits of a rank whose columns are all padding."""
        student_TW, teacher_TW = (
            placed(torch.empty(TOKENS, 0, dtype=dtype), Place(3, 0, 0), self.device)
            for dtype in (self.kind.student, self.kind.teacher or torch.float32)
        )
        return student_TW, teacher_TW if self.kind.teacher else None

    def options(self, vocab: VocabShard) -> LossOptions:
        return LossOptions(vocab=vocab, **self.temperatures)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Values [3, T] and the gradient of the real columns, in fp64."""
        rows = LossInputs(
            *(None if x is None else x.cpu().double() for x in self.rows(self.vocab)[:2]),
            self.small[0].cpu(),
            *(weight.cpu().double() for weight in self.small[1:]),
        )
        options, backend = self.options(self.vocab), ReferenceBackend()
        scores = backend.scores(rows, options)
        gradient = torch.empty_like(rows.student_TW, memory_format=torch.contiguous_format)
        upstream = self.upstream.cpu().double()
        backend.gradient_(rows, options, scores.saved, upstream, gradient)
        return torch.stack(scores[:3]), gradient[:, : self.num_columns]

    def compared(self, backend: CompiledBackend) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """name, result, exact result, allowed deviation, for each way of computing it."""
        values, gradient = self.exact()
        finfo = torch.finfo(self.kind.gradient)
        slack = 2e-6 * float(gradient.abs().max()) + finfo.smallest_normal * finfo.eps
        allowed = {
            "values": 2e-6 * values.abs().amax(dim=1, keepdim=True) + 1e-6,
            "gradient": finfo.eps * gradient.abs() + slack,
        }
        for way in (self.two_passes, self.one_launch, self.in_parts):
            got_values, got_TW = way(backend)
            yield f"values of {way.__name__}", got_values.cpu().double(), values, allowed["values"]
            got = got_TW.cpu().double()
            padding = got[:, self.num_columns :]
            yield f"padding of {way.__name__}", padding, torch.zeros_like(padding), torch.zeros(())
            got = got[:, : self.num_columns]
            yield f"gradient of {way.__name__}", got, gradient, allowed["gradient"]

    def empty_gradient(self) -> Tensor:
        """Of whole rows, poisoned."""
        shape = self.student_TW.shape
        return torch.full(shape, torch.nan, dtype=self.kind.gradient, device=self.device)

    def two_passes(self, backend: CompiledBackend) -> tuple[Tensor, Tensor]:
        rows, options = self.rows(self.vocab), self.options(self.vocab)
        loss_T, ce_T, kl_T, saved = backend.scores(rows, options)
        out_TW = self.empty_gradient()
        backend.gradient_(rows, options, saved, self.upstream, out_TW)
        return torch.stack([loss_T, ce_T, kl_T]), out_TW

    def one_launch(self, backend: CompiledBackend) -> tuple[Tensor, Tensor]:
        """Over a copy of the logits where the gradient has their dtype."""
        rows, options = self.rows(self.vocab), self.options(self.vocab)
        out_TW = self.empty_gradient()
        if self.kind.gradient == self.kind.student:
            out_TW = copy_in_place(self.student_TW)
            rows = rows._replace(student_TW=out_TW)
        scores = backend.scores_and_gradient_(rows, options, self.upstream, out_TW)
        return torch.stack(scores[:3]), out_TW

    def in_parts(self, backend: CompiledBackend) -> tuple[Tensor, Tensor]:
        """As ranks of a tensor-parallel group compute it, one after the other."""
        size = self.num_columns
        cuts = (0, size // 3, size, size)  # the last part is empty
        parts = [
            VocabShard(size=size, start=start, stop=stop)
            for start, stop in itertools.pairwise(cuts)
        ]
        num_sums = 4 if self.temperatures["student_temperature"] == 1.0 else 5
        num_maxima = 2
        if self.teacher_TW is None:
            num_maxima, num_sums = 1, 2
        maxima = [self.small[1].new_empty((num_maxima, TOKENS)) for _ in parts]
        sums = [self.small[1].new_empty((num_sums, TOKENS)) for _ in parts]
        for vocab, maximum, total in zip(parts, maxima, sums, strict=True):
            with backend._described(self.rows(vocab), self.options(vocab)) as described:
                backend._call("salt_local_sums", described, maximum, total, None)
        global_maxima = maxima[0].clone()
        for maximum in maxima[1:]:
            global_maxima = torch.maximum(global_maxima, maximum)
        for vocab, maximum, total in zip(parts, maxima, sums, strict=True):
            with backend._described(self.rows(vocab), self.options(vocab)) as described:
                backend._call("salt_rescale", described, global_maxima, maximum, total)
        global_sums = sums[0] + sums[1] + sums[2]
        values = self.small[1].new_empty((3, TOKENS))
        with backend._described(self.rows(parts[0]), self.options(parts[0])) as described:
            backend._call("salt_finish", described, global_maxima, global_sums, values)
        out_TW = self.empty_gradient()
        saved = (global_maxima, global_sums)
        for vocab in parts:
            rows, options = self.rows(vocab), self.options(vocab)
            width = rows.student_TW.shape[1]
            if vocab.num_columns:
                part_TW = out_TW[:, vocab.start : vocab.start + width]
                backend.gradient_(rows, options, saved, self.upstream, part_TW)
                continue
            nothing_TW = out_TW.new_full((TOKENS, width), torch.nan)
            backend.gradient_(rows, options, saved, self.upstream, nothing_TW)
            if not bool((nothing_TW == 0).all()):
                out_TW.fill_(torch.nan)  # a mismatch, then
        return values, out_TW


def placed(logits_TC: Tensor, place: Place, device: str) -> Tensor:
    """A copy whose last row ends where its memory does; padding and gaps full of nan."""
    num_tokens, num_columns = logits_TC.shape
    width = num_columns + place.padding
    stride = width + place.gap
    memory = torch.full((place.offset + num_tokens * stride - place.gap,), torch.nan)
    memory = memory.to(logits_TC.dtype).to(device)
    logits_TW = memory.as_strided((num_tokens, width), (stride, 1), place.offset)
    logits_TW[:, :num_columns] = logits_TC.to(device)
    return logits_TW


def copy_in_place(logits_TW: Tensor) -> Tensor:
    """A copy of the memory with the rows where they were."""
    memory = logits_TW._base
    assert memory is not None
    return memory.clone().as_strided(
        logits_TW.shape, logits_TW.stride(), logits_TW.storage_offset()
    )


if __name__ == "__main__":
    sys.exit(main())
