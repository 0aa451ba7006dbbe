"""The teacher's forward pass over one batch, in parts: run, send, receive, finish.

Letters: R rows (sequences) of a data-parallel replica's step, S sequence, E teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_salt.model.attention import PrefixMasks
from megatron_salt.parallel.groups import Groups
from megatron_salt.parallel.timers import LapTimer
from megatron_salt.teacher.plan import TeacherPlan


class TeacherModel(Protocol):
    """What teaches: a `FrozenModel`, or what can stand for one."""

    hidden_size: int
    seq_length: int
    tp_size: int
    """Over how many ranks it is spread: 1, or all of the student's tensor-parallel ones, which then
    run its layers together: the same rows in the same order."""
    prefix_masks: PrefixMasks
    head_WE: Tensor | None
    """The output head's columns that are the student's on this rank; on the last stage."""

    def chunk(self, number: int, num_chunks: int) -> Sequence[nn.Module]:
        """The layers of one part of a forward pass: of all, tokens [B, S] to hidden [S, B, E]."""

    def num_bytes(self) -> int: ...

    def release(self) -> None: ...


@dataclass(kw_only=True, eq=False)
class TeacherPass:
    """The forward pass over one batch, on one rank. `run`, `send` and `receive` are the schedule's
    instructions; `finish` is called before the hidden states are needed.

    Hidden states travel on process groups of their own, so they cannot meet the student's
    activations, and beside the computation. Between each pair of ranks pieces are sent and received
    in their order, whatever happens in between, so nobody waits for a transfer that has no partner.
    """

    model: TeacherModel
    groups: Groups
    timer: LapTimer
    plan: TeacherPlan
    tokens_RS: Tensor
    prefix_R: Tensor | None
    out_RSE: Tensor
    """Where they are written: [R, S, E] on the last stage, this rank's rows elsewhere."""

    def __post_init__(self) -> None:
        groups = self.groups
        self.mine = self.plan.pieces_of[groups.pp_rank][groups.tp_rank]
        own_start, _ = self.plan.rows(groups.pp_rank, groups.tp_rank)
        self._offset = 0 if groups.is_last_stage else own_start
        self._hidden: Tensor | None = None
        self._transfers: list[dist.Work | None] = []
        self.done: list[int] = []
        """Pieces that this rank has computed, in their order."""

    def _slot(self, piece: int) -> Tensor:
        start, stop = self.plan.pieces[piece]
        return self.out_RSE[start - self._offset : stop - self._offset]

    @torch.no_grad()
    def run(self, piece: int, chunk: int) -> None:
        """One part of the layers on one of this rank's pieces; parts of a piece in their order."""
        start, stop = self.plan.pieces[piece]
        masks = self.model.prefix_masks
        with self.timer.lap():
            if chunk == 0:
                self._hidden = self.tokens_RS[start:stop]
                masks.use(None if self.prefix_R is None else self.prefix_R[start:stop],
                          self.tokens_RS.device)  # fmt: skip
            assert self._hidden is not None  # the schedule runs the parts of a piece in order
            for layer in self.model.chunk(chunk, self.plan.num_chunks):
                self._hidden = layer(self._hidden)
            if chunk == self.plan.num_chunks - 1:
                self._slot(piece).copy_(self._hidden.transpose(0, 1))
                self._hidden = masks.mask_B1SS = None
                self.done.append(piece)

    def send(self, piece: int) -> None:
        """Start the way of one of this rank's pieces to the last stage."""
        groups = self.groups
        last = groups.layout.rank(groups.tp_rank, groups.dp_rank, groups.layout.pp_size - 1)
        self._transfers.append(dist.isend(self._slot(piece), last, group=groups.hidden))

    def receive(self, piece: int) -> None:
        """On the last stage: start to receive a piece of the same tensor-parallel rank's column."""
        groups = self.groups
        column = [ranks[groups.tp_rank] for ranks in self.plan.pieces_of]
        stage = next(stage for stage, pieces in enumerate(column) if piece in pieces)
        source = groups.layout.rank(groups.tp_rank, groups.dp_rank, stage)
        self._transfers.append(dist.irecv(self._slot(piece), source, group=groups.hidden))

    def run_all(self) -> None:
        """Everything at once, for a batch that no schedule has taught ahead."""
        groups = self.groups
        if groups.is_last_stage:
            for ranks in self.plan.pieces_of[:-1]:
                for piece in ranks[groups.tp_rank]:
                    self.receive(piece)
        for piece in self.mine:
            for chunk in range(self.plan.num_chunks):
                self.run(piece, chunk)
            if not groups.is_last_stage:
                self.send(piece)

    def finish(self) -> Tensor | None:
        """All R rows on the last stage, [R, S, E]; None elsewhere. Waits for the transfers.

        Collectives: on the last stage one broadcast per tensor-parallel rank of R/tp rows over tp;
            none of a teacher that is spread, whose ranks have all computed or received all rows.
        Raises: RuntimeError if a piece of this rank was left out.
        """
        groups, layout = self.groups, self.groups.layout
        if self.done != list(self.mine):
            raise RuntimeError(f"the teacher has run pieces {self.done}, not {list(self.mine)}")
        for transfer in self._transfers:
            assert transfer is not None  # this rank belongs to the group
            transfer.wait()
        self._transfers.clear()
        if not groups.is_last_stage:
            return None
        if layout.tp_size > self.model.tp_size:
            for tp_rank in range(layout.tp_size):
                start, stop = self.plan.block(tp_rank)
                source = layout.rank(tp_rank, groups.dp_rank, groups.pp_rank)
                if stop > start:
                    dist.broadcast(self.out_RSE[start:stop], source, group=groups.tp)
        return self.out_RSE
