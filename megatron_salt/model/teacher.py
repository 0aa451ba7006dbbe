"""The teacher: a frozen replica on every rank, its work divided, its hidden states collected.

Letters: R rows (sequences) of a data-parallel replica's step, S sequence, E teacher width,
V vocabulary, W the student's vocabulary columns on this rank.

The teacher never travels as logits: last hidden states go to the last pipeline stage, where its
output head is sharded in the student's columns.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_salt.checkpoint import CheckpointManifest, read_weights
from megatron_salt.kernels import VocabShard
from megatron_salt.metrics import Stopwatch
from megatron_salt.model.layers import (
    Embedding,
    ModelParts,
    body_layers,
    canonical_parameters,
)
from megatron_salt.model.weights import output_weight_name, shard, weight_table
from megatron_salt.parallel.groups import Groups, same_error_everywhere
from megatron_salt.parallel.layout import split_rows, teacher_rows


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
        self._clock = Stopwatch(groups.device)

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

    @torch.no_grad()
    def hidden_states(self, tokens_RS: Tensor, prefix_R: Tensor | None = None) -> Tensor | None:
        """Last hidden states of all R rows on the last stage's ranks, [R, S, E]; None elsewhere.

        Each of the tp * pp ranks of this replica runs its share of the rows, `micro_batch_size` at
        a time; it reads the first `prefix_R` (on the CPU) tokens of a row in both directions, as
        the student does.
        Collectives: a gather of R/(tp pp) rows over pp, an all-gather over tp on the last stage.
        Memory: R S E elements; up to 3 times that on the last stage while they are put in order.
        """
        self._clock.start()
        layout, (num_rows, seq_length) = self.groups.layout, tokens_RS.shape
        start, stop = teacher_rows(num_rows, layout, self.groups.tp_rank, self.groups.pp_rank)
        longest = split_rows(num_rows, layout.tp_size * layout.pp_size)[0][1]
        width = self.parts.model.hidden_size
        mine_RSE = torch.zeros(
            (longest, seq_length, width), dtype=self.dtype, device=tokens_RS.device
        )
        size = self.micro_batch_size
        parts = [slice(row, min(row + size, stop)) for row in range(start, stop, size)]
        prefixes = [None if prefix_R is None else prefix_R[part] for part in parts]
        with self.parts.prefix_masks.of_step(prefixes):
            for part in parts:
                mine_RSE[part.start - start : part.stop - start] = self.forward(tokens_RS[part])
        self._clock.stop()
        return self._collect(mine_RSE, num_rows)

    @torch.no_grad()
    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Last hidden states [B, S, E] of these rows, on this rank alone; S at most seq_length."""
        self.parts.prefix_masks.advance(tokens_BS.device)
        hidden = tokens_BS
        for layer in self.body:
            hidden = layer(hidden)
        return hidden.transpose(0, 1)

    def _collect(self, mine_RSE: Tensor, num_rows: int) -> Tensor | None:
        """Bring all parts to the last stage, in row order and without the filling rows."""
        groups, layout = self.groups, self.groups.layout
        if layout.pp_size * layout.tp_size == 1:
            return mine_RSE
        stages = [mine_RSE]
        if layout.pp_size > 1:
            last = layout.rank(groups.tp_rank, groups.dp_rank, layout.pp_size - 1)
            receives = groups.is_last_stage
            stages = [torch.empty_like(mine_RSE) for _ in range(layout.pp_size)] if receives else []
            dist.gather(mine_RSE, stages if receives else None, dst=last, group=groups.pp)
        if not groups.is_last_stage:
            return None
        column = torch.stack(stages)  # [pp, longest, S, E] of this tensor-parallel rank
        stages.clear()
        columns = [column]
        if layout.tp_size > 1:
            columns = [torch.empty_like(column) for _ in range(layout.tp_size)]
            dist.all_gather(columns, column, group=groups.tp)
        parts = split_rows(num_rows, layout.tp_size * layout.pp_size)
        ordered = [
            columns[index % layout.tp_size][index // layout.tp_size, : stop - start]
            for index, (start, stop) in enumerate(parts)
        ]
        return torch.cat(ordered)

    def forward_time_s(self) -> float:
        """Seconds of this rank's last forward passes, without the collection. Waits for them."""
        return self._clock.seconds()

    def num_bytes(self) -> int:
        """Bytes of the teacher's weights on this rank, head shard included."""
        tensors = [*self.body.parameters(), *([] if self.head_WE is None else [self.head_WE])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def release(self) -> None:
        """Let go of every tensor; the object is of no use afterwards."""
        self.body = nn.ModuleList()
        self.head_WE = None
        self.parts.rotary = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
