"""The teacher: a frozen replica on every rank, its work divided, its hidden states collected.

Letters: R rows (sequences) of a data-parallel replica's step, S sequence, E teacher width,
V vocabulary, W the student's vocabulary columns on this rank.

The teacher never travels as logits: last hidden states go to the last pipeline stage, where its
output head is sharded in the student's columns.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_salt.checkpoint import CheckpointManifest, read_weights
from megatron_salt.kernels import VocabShard
from megatron_salt.metrics import LapTimer
from megatron_salt.model.layers import (
    Embedding,
    ModelParts,
    body_layers,
    canonical_parameters,
)
from megatron_salt.model.weights import output_weight_name, shard, weight_table
from megatron_salt.parallel.groups import Groups, same_error_everywhere
from megatron_salt.parallel.layout import share_pieces, split_rows, teacher_pieces
from megatron_salt.parallel.teaching import TeachingPlan


class Teacher:
    """A frozen language model without gradient, optimiser or wrapper, built from its checkpoint.

    Everything about its shape comes from its own checkpoint; only the sequence length of the
    student's data is needed, because that is what it reads.

    Args:
        checkpoint: its directory; manifest: what it says about itself.
        vocab: the student's vocabulary columns on this rank.
        head_columns: W, the width of the student's shard with padding.
        micro_batch_size: rows per forward pass.
    Raises: ValueError naming the checkpoint and the weight, if one is missing, of another shape,
        all zeros or not finite. Call `resume.check_teacher_fits` first.
    """

    def __init__(
        self,
        checkpoint: Path,
        manifest: CheckpointManifest,
        groups: Groups,
        *,
        vocab: VocabShard,
        head_columns: int,
        seq_length: int,
        micro_batch_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.groups, self.dtype, self.micro_batch_size = groups, dtype, micro_batch_size
        self.checkpoint, self.manifest = checkpoint, manifest
        config = self.manifest.config
        self.parts = ModelParts(
            config.model,
            vocab_size=self.manifest.vocab_size,
            seq_length=seq_length,
            # A learned position table keeps the size that it was trained with.
            position_rows=config.position_rows,
            groups=groups.teacher,
            sequence_parallel=False,
            dtype=dtype,
        )
        self.body = self._build_body()
        self.head_WE: Tensor | None = None
        self._load(vocab, head_columns)
        self._connect()
        self.timer = LapTimer(groups.device)
        self.plan: TeachingPlan | None = None
        self._buffers: deque[Tensor] = deque()

    def _build_body(self) -> nn.ModuleList:
        inner = [kind(*arguments) for kind, arguments in body_layers(self.parts)]
        body = nn.ModuleList([Embedding(self.parts), *inner]).to(self.dtype).to(self.groups.device)
        return body.requires_grad_(False).eval()

    def _load(self, vocab: VocabShard, head_columns: int) -> None:
        """Fill the body and the head shard. Rank 0 reads; every weight is broadcast once.

        Collectives: one broadcast per weight over all ranks.
        """
        parts = self.parts
        table = weight_table(parts.model, parts.vocab_size, parts.position_rows)
        head_name = output_weight_name(parts.model)
        parameters = canonical_parameters(self.body)
        full: dict[str, Tensor] = {}
        with same_error_everywhere("loading the teacher"):
            if self.groups.rank == 0:
                full = read_weights(self.checkpoint, self.manifest)
                for name, weight in full.items():
                    if table[name].init != "zeros" and not weight.any():
                        raise ValueError(
                            f"teacher {self.checkpoint}: weight {name} is all zeros; this is not a "
                            "trained model"
                        )
                    if not weight.isfinite().all():
                        raise ValueError(f"teacher {self.checkpoint}: {name} has inf or nan")
        for name, spec in table.items():
            weight = torch.empty(spec.shape, dtype=self.dtype, device=self.groups.device)
            if self.groups.rank == 0:
                weight.copy_(full.pop(name))
            dist.broadcast(weight, src=0)
            if name in parameters:
                part = shard(weight, spec, 0, 1, parts.padded_vocab)
                with torch.no_grad():
                    parameters.pop(name).copy_(part)
            if name == head_name and self.groups.is_last_stage:
                self.head_WE = weight.new_zeros((head_columns, spec.shape[1]))
                self.head_WE[: vocab.num_columns] = weight[vocab.start : vocab.stop]
        if parameters:
            raise RuntimeError(f"teacher {self.checkpoint}: no weight for {sorted(parameters)}")

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
        Collectives: those of `Lesson`.
        """
        layout = self.groups.layout
        pieces = teacher_pieces(len(tokens_RS), self.micro_batch_size, layout)
        shares = share_pieces(pieces, layout, [0.0] * layout.pp_size, 1.0)
        plan = TeachingPlan(pieces=pieces, shares=shares, num_chunks=1, placement=None)
        out_RSE = self._empty(self._buffer_shape(plan, tokens_RS.shape[1]))
        lesson = Lesson(self, plan, tokens_RS, prefix_R, out_RSE)
        lesson.run_all()
        return lesson.finish()

    def prepare(self, plan: TeachingPlan, *, ahead: bool) -> None:
        """Allocate what the steps of the KD phase need for hidden states, and keep it.

        On the last stage [R, S, E] for a whole step, elsewhere this rank's rows; on the last stage
        twice if the next batch is taught `ahead`, while the student still reads this one's. With
        another plan of the same pieces only a rank that has other rows gets another buffer.
        """
        self.plan = plan
        count = 2 if ahead and self.groups.is_last_stage else 1
        shape = self._buffer_shape(plan, self.parts.seq_length)
        if [tuple(buffer.shape) for buffer in self._buffers] != [shape] * count:
            self._buffers = deque(self._empty(shape) for _ in range(count))

    def _buffer_shape(self, plan: TeachingPlan, seq_length: int) -> tuple[int, int, int]:
        num_rows = plan.pieces[-1][1]
        if not self.groups.is_last_stage:
            start, stop = plan.rows(self.groups.pp_rank, self.groups.tp_rank)
            num_rows = stop - start
        return num_rows, seq_length, self.parts.model.hidden_size

    def _empty(self, shape: tuple[int, int, int]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.groups.device)

    def lesson(self, tokens_RS: Tensor, prefix_R: Tensor | None) -> Lesson:
        """The work on a training batch, into the buffer that has not been used for longest."""
        assert self.plan is not None  # prepare
        self._buffers.rotate()
        return Lesson(self, self.plan, tokens_RS, prefix_R, self._buffers[0])

    def chunk(self, number: int, num_chunks: int) -> list[nn.Module]:
        """The layers of one part of a forward pass; embedding and last norm go with the ends."""
        num_layers = self.parts.model.num_layers
        before = len(self.body) - num_layers - 1  # embedding and, if any, the position table
        start, stop = split_rows(num_layers, num_chunks)[number]
        first = 0 if number == 0 else before + start
        last = len(self.body) if number == num_chunks - 1 else before + stop
        return list(self.body)[first:last]

    @torch.no_grad()
    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Last hidden states [B, S, E] of these rows, on this rank alone; S at most seq_length."""
        self.parts.prefix_masks.advance(tokens_BS.device)
        hidden = tokens_BS
        for layer in self.body:
            hidden = layer(hidden)
        return hidden.transpose(0, 1)

    def take_time_s(self) -> float:
        """Seconds of this rank's forward passes since the last call, without the exchange. Waits
        for them."""
        return self.timer.take_s()

    def num_bytes(self) -> int:
        """Bytes of the teacher on this rank: weights, head shard, buffers for hidden states."""
        tensors = [*self.body.parameters(), *self._buffers]
        tensors += [] if self.head_WE is None else [self.head_WE]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def release(self) -> None:
        """Let go of every tensor; the object is of no use afterwards."""
        self.body = nn.ModuleList()
        self.head_WE = None
        self._buffers.clear()
        self.parts.rotary = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Lesson:
    """One batch on one rank. `run`, `send` and `receive` are the schedule's instructions; `finish`
    is called before the hidden states are needed.

    Hidden states travel on process groups of their own, so they cannot meet the student's
    activations, and beside the computation. Between each pair of ranks pieces are sent and received
    in their order, whatever happens in between, so nobody waits for a transfer that has no partner.

    Args:
        out_RSE: where they are written: [R, S, E] on the last stage, this rank's rows elsewhere.
    """

    def __init__(
        self,
        teacher: Teacher,
        plan: TeachingPlan,
        tokens_RS: Tensor,
        prefix_R: Tensor | None,
        out_RSE: Tensor,
    ) -> None:
        self.teacher, self.plan, self.out_RSE = teacher, plan, out_RSE
        self.tokens_RS, self.prefix_R = tokens_RS, prefix_R
        groups = teacher.groups
        self.mine = plan.shares[groups.pp_rank][groups.tp_rank]
        own_start, _ = plan.rows(groups.pp_rank, groups.tp_rank)
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
        teacher = self.teacher
        start, stop = self.plan.pieces[piece]
        masks = teacher.parts.prefix_masks
        with teacher.timer.lap():
            if chunk == 0:
                self._hidden = self.tokens_RS[start:stop]
                masks.use(None if self.prefix_R is None else self.prefix_R[start:stop],
                          self.tokens_RS.device)  # fmt: skip
            assert self._hidden is not None  # the schedule runs the parts of a piece in order
            for layer in teacher.chunk(chunk, self.plan.num_chunks):
                self._hidden = layer(self._hidden)
            if chunk == self.plan.num_chunks - 1:
                self._slot(piece).copy_(self._hidden.transpose(0, 1))
                self._hidden = masks.mask_B1SS = None
                self.done.append(piece)

    def send(self, piece: int) -> None:
        """Start the way of one of this rank's pieces to the last stage."""
        groups = self.teacher.groups
        last = groups.layout.rank(groups.tp_rank, groups.dp_rank, groups.layout.pp_size - 1)
        self._transfers.append(dist.isend(self._slot(piece), last, group=groups.hidden))

    def receive(self, piece: int) -> None:
        """On the last stage: start to receive a piece of the same tensor-parallel rank's column."""
        groups = self.teacher.groups
        stage = next(
            stage for stage, ranks in enumerate(self.plan.shares) if piece in ranks[groups.tp_rank]
        )
        source = groups.layout.rank(groups.tp_rank, groups.dp_rank, stage)
        self._transfers.append(dist.irecv(self._slot(piece), source, group=groups.hidden))

    def run_all(self) -> None:
        """Everything at once, for a batch that no schedule has taught ahead."""
        groups = self.teacher.groups
        if groups.is_last_stage:
            for ranks in self.plan.shares[:-1]:
                for piece in ranks[groups.tp_rank]:
                    self.receive(piece)
        for piece in self.mine:
            for chunk in range(self.plan.num_chunks):
                self.run(piece, chunk)
            if not groups.is_last_stage:
                self.send(piece)

    def finish(self) -> Tensor | None:
        """All R rows on the last stage, [R, S, E]; None elsewhere. Waits for the transfers.

        Collectives: on the last stage one broadcast per tensor-parallel rank of R/tp rows over tp.
        Raises: RuntimeError if a piece of this rank was left out.
        """
        groups, layout = self.teacher.groups, self.teacher.groups.layout
        if self.done != list(self.mine):
            raise RuntimeError(f"the teacher has run pieces {self.done}, not {list(self.mine)}")
        for transfer in self._transfers:
            assert transfer is not None  # this rank belongs to the group
            transfer.wait()
        self._transfers.clear()
        if not groups.is_last_stage:
            return None
        if layout.tp_size > 1:
            for tp_rank in range(layout.tp_size):
                start, stop = self.plan.block(tp_rank)
                source = layout.rank(tp_rank, groups.dp_rank, groups.pp_rank)
                if stop > start:
                    dist.broadcast(self.out_RSE[start:stop], source, group=groups.tp)
        return self.out_RSE
