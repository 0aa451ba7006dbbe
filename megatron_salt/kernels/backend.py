"""What the loss's backends (its interchangeable code) share: inputs, scores, interface.

Letters: T tokens, W vocabulary columns on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_salt.kernels.vocab import VocabShard

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse", "mse_probabilities"]
SPARSE_DIVERGENCES = ("forward_kl", "mse_probabilities")
"""Those that a teacher of K tokens has: the others ask for probabilities that it gives nobody."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What holds for every token of a call."""

    vocab: VocabShard
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    tp_group: ProcessGroup | None = None

    def check(self) -> None:
        """Raises: ValueError."""
        if tp_size_of(self.tp_group) == 1 and self.vocab.num_columns != self.vocab.size:
            raise ValueError(
                f"{self.vocab} is a part of the vocabulary, but there is no tp_group of several "
                "ranks whose parts would be added to it"
            )
        a, b = self.teacher_temperature, self.student_temperature
        if not (1e-6 <= a <= 1e6 and 1e-6 <= b <= 1e6):
            raise ValueError(
                f"temperatures must be above 0, from 1e-6 to 1e6: teacher {a}, student {b}"
            )
        known = get_args(Divergence)
        if self.divergence not in known:
            raise ValueError(f"divergence = {self.divergence!r}: choose one of {', '.join(known)}")


class LossInputs(NamedTuple):
    """The tensors of a call, checked. A tuple, so that autograd can save it."""

    student_TW: Tensor
    teacher_TW: Tensor | None
    labels_T: Tensor
    """Ids in the whole vocabulary, int64."""
    ce_weight_T: Tensor
    """fp32 (fp64 with fp64 logits); so is kd_weight_T."""
    kd_weight_T: Tensor
    ids_TK: Tensor | None = None
    """Of a sparse teacher (`sparse.SparseTeacher`), which stands in place of teacher_TW."""
    target_TK: Tensor | None = None
    """In the dtype of the weights."""
    ghost_T: Tensor | None = None

    @property
    def has_teacher(self) -> bool:
        return self.teacher_TW is not None or self.target_TK is not None


class BackendScores(NamedTuple):
    """What a backend's forward gives. All [T], in the dtype of the weights."""

    loss_T: Tensor
    """ce_weight * ce + kd_weight * kl."""
    ce_T: Tensor
    kl_T: Tensor
    saved: tuple[Tensor, ...]
    """What the backend's gradient needs besides the inputs: some numbers per token."""


class LossBackend(Protocol):
    """Code that computes the loss. Collectives happen in `scores` and nowhere else."""

    name: str
    checks_values: bool
    """Whether it looks at labels and weights itself, where that needs no waiting for the device."""

    def scores(self, inputs: LossInputs, options: LossOptions) -> BackendScores:
        """Values of every token, and what the gradient needs."""

    def gradient_(
        self,
        inputs: LossInputs,
        options: LossOptions,
        saved: tuple[Tensor, ...],
        upstream: Tensor,
        out_TW: Tensor,
    ) -> None:
        """Write d(upstream * sum of loss_T) / d student_TW to out_TW, which may be student_TW.

        Padding columns get 0. Mutates: out_TW.
        """

    def scores_and_gradient_(
        self, inputs: LossInputs, options: LossOptions, upstream: Tensor, out_TW: Tensor
    ) -> BackendScores:
        """Both at once; `saved` is empty. Mutates: out_TW, which may be student_TW."""
        scores = self.scores(inputs, options)
        self.gradient_(inputs, options, scores.saved, upstream, out_TW)
        return scores._replace(saved=())


def tp_size_of(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def all_reduce(packed: Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> Tensor:
    """In place over the group, if there is one of several ranks."""
    if tp_size_of(group) > 1:
        dist.all_reduce(packed, op=op, group=group)
    return packed


def arithmetic_dtype(logits: Tensor) -> torch.dtype:
    """fp32, but fp64 for fp64 logits, which are for tests."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
