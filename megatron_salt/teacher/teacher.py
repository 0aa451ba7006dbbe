"""The teacher of a run, on every rank or spread over a stage's; its work divided among them.

Letters: R rows (sequences) of a data-parallel replica's step, S sequence, E teacher width,
V vocabulary, W the student's vocabulary columns on this rank.

The teacher never travels as logits: last hidden states go to the last pipeline stage, where its
output head is sharded in the student's columns.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.checkpoint.manifest import ModelRecord
from megatron_salt.parallel.groups import Groups
from megatron_salt.parallel.timers import LapTimer
from megatron_salt.teacher.passes import TeacherModel, TeacherPass
from megatron_salt.teacher.pieces import assign_pieces, teacher_pieces
from megatron_salt.teacher.plan import TeacherPlan


class Teacher:
    """A frozen model that teaches: the model, its place in a plan, buffers for hidden states.

    Args:
        record: what the model says about itself.
        source: where it is from, for people.
        micro_batch_size: rows per forward pass.
    """

    def __init__(
        self,
        model: TeacherModel,
        record: ModelRecord,
        groups: Groups,
        *,
        source: str,
        micro_batch_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.groups, self.dtype, self.micro_batch_size = groups, dtype, micro_batch_size
        self.model, self.record, self.source = model, record, source
        self._connect()
        self.timer = LapTimer(groups.device)
        self.plan: TeacherPlan | None = None
        self._buffers: deque[Tensor] = deque()

    @property
    def head_WE(self) -> Tensor | None:
        return self.model.head_WE

    def _connect(self) -> None:
        """Send something between every pair of ranks that hidden states may ever pass.

        NCCL connects a pair at its first transfer, and both hosts wait for that. In a step that
        would be safe (docs/bubbles.md) but slow, and a pair that cannot connect is found at once.
        """
        groups, layout = self.groups, self.groups.layout
        token = torch.zeros(1, device=groups.device)
        if groups.is_last_stage:
            for stage in range(layout.pp_size - 1):
                source = layout.rank(groups.tp_rank, groups.dp_rank, stage)
                dist.recv(token, source, group=groups.hidden)
        else:
            last = layout.rank(groups.tp_rank, groups.dp_rank, layout.pp_size - 1)
            dist.send(token, last, group=groups.hidden)

    @torch.no_grad()
    def hidden_states(self, tokens_RS: Tensor, prefix_R: Tensor | None = None) -> Tensor | None:
        """Last hidden states of all R rows on the last stage's ranks, [R, S, E]; None elsewhere.

        All at once, in equal shares of the replica's ranks and in memory of its own: for
        evaluations, and for what wants them now.
        Collectives: those of `TeacherPass`.
        """
        layout = self.groups.layout
        tp_size = self.model.tp_size
        pieces = teacher_pieces(len(tokens_RS), self.micro_batch_size, layout, tp_size)
        pieces_of = assign_pieces(pieces, layout, [0.0] * layout.pp_size, 1.0, tp_size)
        plan = TeacherPlan(pieces=pieces, pieces_of=pieces_of, num_chunks=1, placement=None)
        out_RSE = self._empty(self._buffer_shape(plan, tokens_RS.shape[1]))
        forward = self._pass(plan, tokens_RS, prefix_R, out_RSE)
        forward.run_all()
        return forward.finish()

    def _pass(
        self, plan: TeacherPlan, tokens_RS: Tensor, prefix_R: Tensor | None, out_RSE: Tensor
    ) -> TeacherPass:
        return TeacherPass(
            model=self.model, groups=self.groups, timer=self.timer, plan=plan,
            tokens_RS=tokens_RS, prefix_R=prefix_R, out_RSE=out_RSE,
        )  # fmt: skip

    def prepare(self, plan: TeacherPlan, *, ahead: bool) -> None:
        """Allocate what the steps of the KD phase need for hidden states, and keep it.

        On the last stage [R, S, E] for a whole step, elsewhere this rank's rows; on the last stage
        twice if the next batch is taught `ahead`, while the student still reads this one's. With
        another plan of the same pieces only a rank that has other rows gets another buffer.
        """
        self.plan = plan
        count = 2 if ahead and self.groups.is_last_stage else 1
        shape = self._buffer_shape(plan, self.model.seq_length)
        if [tuple(buffer.shape) for buffer in self._buffers] != [shape] * count:
            self._buffers = deque(self._empty(shape) for _ in range(count))

    def _buffer_shape(self, plan: TeacherPlan, seq_length: int) -> tuple[int, int, int]:
        num_rows = plan.pieces[-1][1]
        if not self.groups.is_last_stage:
            start, stop = plan.rows(self.groups.pp_rank, self.groups.tp_rank)
            num_rows = stop - start
        return num_rows, seq_length, self.model.hidden_size

    def _empty(self, shape: tuple[int, int, int]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.groups.device)

    def begin_pass(self, tokens_RS: Tensor, prefix_R: Tensor | None) -> TeacherPass:
        """The work on a training batch, into the buffer that has not been used for longest."""
        assert self.plan is not None  # prepare
        self._buffers.rotate()
        return self._pass(self.plan, tokens_RS, prefix_R, self._buffers[0])

    def take_time_s(self) -> float:
        """Seconds of this rank's forward passes since the last call, without the exchange of hidden
        states. Waits for them."""
        return self.timer.take_s()

    def num_bytes(self) -> int:
        """Bytes of the teacher on this rank: weights, head shard, buffers for hidden states."""
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)
        return self.model.num_bytes() + buffers

    def release(self) -> None:
        """Let go of every tensor; the object is of no use afterwards."""
        self.model.release()
        self._buffers.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
