"""A run at one layout, as far as its memory depends on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_salt.checkpoint.manifest import ModelRecord
from megatron_salt.config.deepspeed import DeepSpeedSettings
from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.config.values import parse_objective
from megatron_salt.model.weights import OUTPUT_LAYER, padded_vocab, shard_shape, weight_table
from megatron_salt.parallel.layout import Layout
from megatron_salt.teacher.plan import StepShape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class TeacherSize:
    """What decides how large a teacher is."""

    model: ModelConfig
    vocab_size: int
    num_positions: int
    parameters: int | None = None
    """See `ModelRecord`."""

    @classmethod
    def of(cls, record: ModelRecord) -> TeacherSize:
        return cls(
            model=record.config, vocab_size=record.vocab_size,
            num_positions=record.num_positions, parameters=record.parameters,
        )  # fmt: skip

    def numel(self, tp_size: int) -> int:
        """Parameters that each of `tp_size` ranks keeps: all but an output layer of its own.

        Source: `FrozenModel`; its embedding is padded like that many ranks'.
        """
        if self.parameters is not None:
            untied = self.model.untie_embeddings_and_output_weights
            return self.parameters - untied * self.vocab_size * self.model.hidden_size
        table = weight_table(self.model, self.vocab_size, self.num_positions)
        padded = padded_vocab(self.model, self.vocab_size, tp_size)
        kept = [spec for name, spec in table.items() if name != OUTPUT_LAYER]
        return sum(math.prod(shard_shape(spec, tp_size, padded)) for spec in kept)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    config: RunConfig
    """Its parallel sizes are `layout`'s."""
    settings: DeepSpeedSettings
    layout: Layout
    vocab_size: int
    teacher: TeacherSize | None = None
    """None: the LM phase."""
    on_cuda: bool = True
    """CUDA fuses the norms and SwiGLU and multiplies 16-bit operands as they are; the CPU keeps
    what lies in between."""

    @cached_property
    def width(self) -> int:
        return BYTES[self.settings.precision]

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch, B S."""
        return self.settings.micro_batch_size * self.config.data.seq_length

    @cached_property
    def local_tokens(self) -> int:
        """Of them, those of one rank between the layers."""
        return self.tokens // (self.layout.tp_size if self.config.parallel.sequence_parallel else 1)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Transformer layers of the stages (`costs.balanced_stages`)."""
        return self.shape.stage_bounds

    @cached_property
    def columns(self) -> int:
        """W: of the student's vocabulary on a rank, padding included."""
        tp_size = self.layout.tp_size
        return padded_vocab(self.config.model, self.vocab_size, tp_size) // tp_size

    @cached_property
    def shape(self) -> StepShape:
        teacher = None if self.teacher is None else self.teacher.model
        return StepShape.of_run(self.config, self.settings, self.layout, self.vocab_size, teacher)

    @cached_property
    def hidden_bytes(self) -> int:
        """Of one micro-batch's hidden state between two layers."""
        return self.local_tokens * self.config.model.hidden_size * self.width

    @property
    def hidden_row_bytes(self) -> int:
        """Of the teacher's hidden states of one row: S E w."""
        assert self.teacher is not None
        return self.config.data.seq_length * self.teacher.model.hidden_size * self.width

    @cached_property
    def has_prefixes(self) -> bool:
        """Whether rows may have a prefix, which is read in both directions."""
        objectives = parse_objective(self.config.data.objective)
        return not {"prefix", "span_corruption"}.isdisjoint(objectives)

    @property
    def partitioned(self) -> bool:
        """Whether tensor-parallel ranks send each other's stage 1/tp of a hidden state each.

        Source: DeepSpeed's `pipeline.pipe_partitioned`, on by default; off with sequence
        parallelism (`engine_config`).
        """
        values = self.settings.values.get("pipeline", {})
        possible = self.layout.tp_size > 1 and not self.config.parallel.sequence_parallel
        return possible and bool(values.get("pipe_partitioned", True))

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage keeps at most (1F1B: arXiv 2006.09503)."""
        return min(self.layout.pp_size - stage, self.settings.num_micro_batches)
