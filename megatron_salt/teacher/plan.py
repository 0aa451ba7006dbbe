"""Who teaches what and when in a step of the KD phase: which rows, in which chunks, at which place.

A plan is a function of sizes and costs. In multiply-adds these are known before the first step, and
every rank finds the same plan by itself. Later a run, and `megatron-salt plan`, put seconds in
their place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from megatron_salt.config.deepspeed import DeepSpeedSettings
from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.model.costs import balanced_stages, layer_costs
from megatron_salt.parallel.layout import Layout, split_evenly
from megatron_salt.teacher.pieces import assign_pieces, teacher_pieces
from megatron_salt.teacher.placement import Placement, place, work_bound
from megatron_salt.teacher.schedule import plain_programs
from megatron_salt.teacher.simulator import StepTimes


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The sizes that decide what a step costs."""

    student: ModelConfig
    teacher: ModelConfig | None
    vocab_size: int
    seq_length: int
    micro_batch_size: int
    num_micro_batches: int
    layout: Layout
    teacher_tp_size: int = 1
    """Over how many ranks the teacher is spread: 1, or all tensor-parallel ones."""
    recompute: bool = False
    num_chunks: int | None = None
    """Chunks of the teacher's layers; None: as many as make one at most a quarter of a stage's
    forward pass, at least 4. Never more than it has layers."""

    @classmethod
    def of_run(
        cls,
        config: RunConfig,
        settings: DeepSpeedSettings,
        layout: Layout,
        vocab_size: int,
        teacher: ModelConfig | None,
    ) -> StepShape:
        return cls(
            student=config.model, teacher=teacher, vocab_size=vocab_size,
            seq_length=config.data.seq_length, micro_batch_size=settings.micro_batch_size,
            num_micro_batches=settings.num_micro_batches, layout=layout,
            teacher_tp_size=config.teacher_tp_size,
            recompute=config.parallel.recompute_granularity == "full",
            num_chunks=1 if config.teacher.hf else config.teacher.forward_chunks,
        )  # fmt: skip

    @property
    def num_rows(self) -> int:
        """Rows that a data-parallel replica reads in a step."""
        return self.micro_batch_size * self.num_micro_batches

    @property
    def teachers_per_stage(self) -> int:
        """One on each tensor-parallel rank, with rows of its own; or one on all of them."""
        return self.layout.tp_size // self.teacher_tp_size

    @property
    def pieces(self) -> list[tuple[int, int]]:
        return teacher_pieces(
            self.num_rows, self.micro_batch_size, self.layout, self.teacher_tp_size
        )

    @property
    def stage_bounds(self) -> tuple[int, ...]:
        costs = layer_costs(self.student, self.vocab_size, self.seq_length)
        return balanced_stages(costs, self.layout.pp_size)

    @property
    def chunk_bounds(self) -> list[tuple[int, int]]:
        """The teacher's transformer layers in each chunk; embedding and last norm go along."""
        assert self.teacher is not None
        num_layers, num_chunks = self.teacher.num_layers, self.num_chunks
        if num_chunks is None:
            teacher = layer_costs(self.teacher, self.vocab_size, self.seq_length)[1] * num_layers
            student = sum(layer_costs(self.student, self.vocab_size, self.seq_length))
            # A whole forward of one teacher, in forwards of a stage of tp ranks.
            ratio = teacher / student * self.layout.pp_size * self.teachers_per_stage
            rows = self.pieces[0][1] - self.pieces[0][0]
            num_chunks = max(4, math.ceil(4.0 * ratio * rows / self.micro_batch_size))
        return split_evenly(num_layers, min(num_chunks, num_layers))


@dataclass(frozen=True)
class TeacherPlan:
    """The teacher's work on a batch: pieces of rows, who reads which, and where in a step."""

    pieces: list[tuple[int, int]]
    """Rows [start, stop) of each piece, the same for every placement."""
    pieces_of: list[list[range]]
    """Numbers of the pieces of each rank of a replica, [pp_rank][tp_rank]. Ranks that
    share a teacher have the same."""
    num_chunks: int
    placement: Placement | None
    """Where in the pipeline's step; None: everything before the student's step."""

    @property
    def work(self) -> str:
        """For people: `1 piece of 16 rows`."""
        counts = {"piece": len(self.pieces), "row": self.pieces[0][1] - self.pieces[0][0]}
        return " of ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in counts.items())

    def describe(self, costs: str) -> str:
        """For people: when the teacher works, and what that should cost by these `costs`."""
        work = f"{self.work} for each replica"
        if self.placement is None:
            return f"{work}, all at once"
        counts = [len({piece for mine in ranks for piece in mine}) for ranks in self.pieces_of]
        return (
            f"{work}, {counts} by stage, in {self.num_chunks} chunks each, where the pipeline "
            f"waits; by {costs} a step takes {self.placement.overhead:.1%} longer than without it"
        )

    def of_tp_rank(self, piece: int, tp_rank: int) -> int | None:
        """What a tensor-parallel rank does where the placement says `piece`, which is rank 0's.

        None: nothing to do there.
        """
        for ranks in self.pieces_of:
            if piece in ranks[0]:
                # They share one schedule, and rank 0 has the most pieces (`assign_pieces`).
                place = piece - ranks[0].start
                return ranks[tp_rank][place] if place < len(ranks[tp_rank]) else None
        raise ValueError(f"piece {piece} is not one of tensor-parallel rank 0's {self.pieces_of}")

    def rows(self, pp_rank: int, tp_rank: int) -> tuple[int, int]:
        """Rows [start, stop) that a rank teaches: its pieces are neighbours."""
        return _interval(self.pieces, self.pieces_of[pp_rank][tp_rank])

    def block(self, tp_rank: int) -> tuple[int, int]:
        """Rows [start, stop) that the ranks of one tensor-parallel rank, on all stages, teach."""
        first, last = self.pieces_of[0][tp_rank].start, self.pieces_of[-1][tp_rank].stop
        return _interval(self.pieces, range(first, last))


def _interval(pieces: list[tuple[int, int]], numbers: range) -> tuple[int, int]:
    if not numbers:
        return 0, 0
    return pieces[numbers[0]][0], pieces[numbers[-1]][1]


def multiply_adds(shape: StepShape) -> StepTimes:
    """What the parts of a step cost on one rank, in multiply-adds; transfers cost nothing here."""
    tokens = shape.micro_batch_size * shape.seq_length / shape.layout.tp_size
    costs = layer_costs(shape.student, shape.vocab_size, shape.seq_length)
    layers = [
        sum(costs[1 + start : 1 + stop]) * tokens for start, stop in pairwise(shape.stage_bounds)
    ]
    forward = list(layers)
    # `linear_kd_loss` makes the head's gradients in the forward: the student's head counts three
    # times there, the teacher's once.
    forward[-1] += 3.0 * costs[-1] * tokens
    if shape.teacher is not None:
        forward[-1] += shape.teacher.hidden_size * shape.vocab_size * tokens
    # A backward is two forwards; recomputation is one more.
    forwards = 3.0 if shape.recompute else 2.0
    backward = [forwards * cost for cost in layers]
    if shape.teacher is None:
        return StepTimes(forward=forward, backward=backward)
    layer = layer_costs(shape.teacher, shape.vocab_size, shape.seq_length)[1]
    pieces, chunks = shape.pieces, shape.chunk_bounds

    def teacher(piece: int, chunk: int) -> float:
        (row, row_stop), (first, stop) = pieces[piece], chunks[chunk]
        work = (row_stop - row) * shape.seq_length * layer * (stop - first)
        return work / shape.teacher_tp_size

    return StepTimes(forward=forward, backward=backward, teacher=teacher)


def plan_teacher(shape: StepShape, times: StepTimes, *, in_bubbles: bool) -> TeacherPlan:
    """Divide the teacher's rows over the ranks of a replica, and find its places in the step.

    Args:
        times: `multiply_adds`, or seconds.
    """
    num_chunks, pp_size = len(shape.chunk_bounds), shape.layout.pp_size
    pieces = shape.pieces
    if not in_bubbles or pp_size == 1:
        # Before the step all ranks take equally many rows.
        pieces_of = _pieces_of(shape, times, 0.0)
        return TeacherPlan(pieces, pieces_of, num_chunks, placement=None)
    programs = plain_programs(shape.num_micro_batches, pp_size)
    plans: list[TeacherPlan] = []
    shortest = math.inf
    # A stage that has less to do for the student may take more rows. How many more is best is found
    # by trying, because chunks do not fit everywhere.
    for level in LEVELLING_STEPS:
        pieces_of = _pieces_of(shape, times, level)
        of_first_tp_rank = [ranks[0] for ranks in pieces_of]
        work = [times.teacher_work(mine, num_chunks) for mine in of_first_tp_rank]
        if work_bound(times, programs, work) >= shortest * (1.0 - MIN_GAIN):
            continue
        placement = place(programs, times, of_first_tp_rank, num_chunks)
        shortest = min(shortest, placement.step_time - times.update)
        plans.append(TeacherPlan(pieces, pieces_of, num_chunks, placement))
    return min(plans, key=lambda plan: plan.placement.overhead if plan.placement else 0.0)


def teaches_ahead(placement: str, layout: Layout) -> bool:
    """Whether the teacher works on the next batch during this one's step: only in waits, which one
    stage has none of."""
    return placement != "before_step" and layout.pp_size > 1


# Which share of a stage's own work counts when rows are assigned: none, as before the step, to all.
LEVELLING_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
# A smaller gain, as a share of the step, is not looked for.
MIN_GAIN = 0.001


def _pieces_of(shape: StepShape, times: StepTimes, level: float) -> list[list[range]]:
    pieces = shape.pieces
    stage_work = [
        level * shape.num_micro_batches * (forward + backward)
        for forward, backward in zip(times.forward, times.backward, strict=True)
    ]
    rows = pieces[0][1] - pieces[0][0]
    row_work = times.teacher_work([0], len(shape.chunk_bounds)) / rows
    return assign_pieces(pieces, shape.layout, stage_work, row_work, shape.teacher_tp_size)
