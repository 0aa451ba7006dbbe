"""Schedules that also teach, where every transfer of hidden states blocks: nobody waits for ever.

A step is built so that sending and receiving hidden states hold up nobody. These tests take that
away. docs/bubbles.md proves that nothing can go wrong then; here it is tried out, on every rank of
a replica, with the collectives of tensor-parallel ranks and the meeting before the update.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from megatron_salt.config.fields import ModelConfig
from megatron_salt.parallel.layout import Layout
from megatron_salt.teacher import placement
from megatron_salt.teacher import plan as teaching
from megatron_salt.teacher.passes import TeacherPass
from megatron_salt.teacher.pieces import assign_pieces, teacher_pieces
from megatron_salt.teacher.plan import StepShape, TeacherPlan, multiply_adds, plan_teacher
from megatron_salt.teacher.schedule import plain_programs, teaching_programs
from megatron_salt.teacher.simulator import Op, StepTimes, channel

NUM_SHAPES = 200  # divided by the number of stages
NUM_MUTANTS = 400
NUM_TIED = 500


@dataclass(frozen=True)
class Step:
    """A step that teaches: the programs of all stages, which each tp rank reads in its own way."""

    programs: list[list[Op]]
    plan: TeacherPlan
    tp_size: int
    spread: bool = False
    """Whether the tensor-parallel ranks run the teacher's layers together."""


class Meeting(NamedTuple):
    """Something that a rank can only do together with others."""

    name: Hashable
    ends: int
    hidden: bool = False


def meetings(step: Step, stage: int, tp_rank: int) -> list[Meeting]:
    """What a rank meets others for, in its order; what it does alone holds up nobody."""
    found = []
    num_ranks = len(step.programs) * step.tp_size
    for op in step.programs[stage]:
        link = channel(op, stage)
        if link is not None:
            found.append(Meeting((link, tp_rank), 2))
        elif op.kind in ("send_hidden", "recv_hidden"):
            piece = step.plan.of_tp_rank(op.number, tp_rank)
            if piece is not None:  # of a teacher that is spread every tensor-parallel rank has it
                found.append(Meeting(("hidden", piece, tp_rank), 2, hidden=True))
        elif op.kind == "teacher" and step.spread:  # its collectives
            found.append(Meeting((op, stage), step.tp_size))
        elif op.kind in ("forward", "backward"):  # collectives of the tensor-parallel ranks
            found.append(Meeting((op.kind, stage, op.number), step.tp_size))
        elif op.kind == "reduce_tied":
            found.append(Meeting("reduce_tied", num_ranks))
    return found


def stuck(step: Step, *, one_queue: bool) -> dict[tuple[int, int], Meeting]:
    """Ranks (stage, tp_rank) that wait for ever, and for what.

    Every rank does one thing after the other. What is not about hidden states ends when all have
    come. Hidden states, with `one_queue`: they are handed over to one stream, which does one
    transfer at a time; the next one stands in the device's only queue until it is over, and so does
    all that is behind it. Without: both ends wait until both have come, the host as well.
    """
    ranks = [(s, t) for s in range(len(step.programs)) for t in range(step.tp_size)]
    ahead = {rank: list(reversed(meetings(step, *rank))) for rank in ranks}
    asked: Counter[Hashable] = Counter()
    has_come: set[tuple[int, int]] = set()
    on_stream: dict[tuple[int, int], Meeting] = {}
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while ahead[rank]:
                here = ahead[rank][-1]
                queued = one_queue and here.hidden
                before = on_stream.get(rank)
                if queued and before is not None and asked[before.name] < before.ends:
                    break
                if rank not in has_come:
                    asked[here.name] += 1
                    has_come.add(rank)
                    moved = True
                if queued:
                    on_stream[rank] = here
                elif asked[here.name] < here.ends:
                    break
                ahead[rank].pop()
                has_come.remove(rank)
    return {rank: left[-1] for rank, left in ahead.items() if left}


def random_step(rng: random.Random, stages: int, tp_size: int, *, spread: bool) -> Step:
    """By the code that plans a run, for sizes and times by chance.

    Of its search one division of the rows and a few limits: which of its plans is the best does not
    matter here.
    """

    def model(num_layers: int, widths: list[int]) -> ModelConfig:
        width = rng.choice(widths)
        return ModelConfig(num_layers=num_layers, hidden_size=width, num_attention_heads=4)

    micro_batches = rng.randint(2, 4 * stages)
    shape = StepShape(
        student=model(stages + rng.randint(0, 2 * stages), [512, 1024]),
        teacher=model(rng.choice([2, 4, 8, 12]), [256, 512, 768]),
        vocab_size=rng.choice([1000, 32000]), seq_length=128,
        micro_batch_size=rng.choice([1, 2, 4]), num_micro_batches=micro_batches,
        layout=Layout(tp_size=tp_size, pp_size=stages, dp_size=1),
        teacher_tp_size=tp_size if spread else 1,
    )  # fmt: skip
    counted = multiply_adds(shape)
    factor = rng.uniform(0.3, 3.0)
    times = {
        "as counted": counted,
        "all at the same moment": StepTimes(
            forward=[1.0] * stages, backward=[2.0] * stages, teacher=lambda piece, chunk: 0.25
        ),
        "by chance": replace(
            counted,
            forward=[one * rng.uniform(0.6, 1.6) for one in counted.forward],
            backward=[one * rng.uniform(0.6, 1.6) for one in counted.backward],
            teacher=lambda piece, chunk: counted.teacher(piece, chunk) * factor,
            transfer=rng.choice([0.0, 0.05]) * counted.forward[0],
        ),
    }[rng.choice(["as counted", "all at the same moment", *["by chance"] * 4])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "LEVELLING_STEPS", (rng.choice(teaching.LEVELLING_STEPS),))
        patch.setattr(placement, "DEADLINES", 2)
        plan = plan_teacher(shape, times, in_bubbles=True)
    assert plan.placement is not None
    return Step(teaching_programs(micro_batches, stages, plan.placement), plan, tp_size, spread)


@cache
def steps_of(stages: int) -> list[Step]:
    rng, found = random.Random(stages), []
    while len(found) < NUM_SHAPES // stages:
        tp_size, spread = rng.choice([(1, False), (2, False), (2, True)])
        step = random_step(rng, stages, tp_size, spread=spread)
        # Where the last stage teaches everything nothing travels.
        if any(op.kind == "recv_hidden" for op in step.programs[-1]):
            found.append(step)
    return found


@pytest.mark.parametrize("stages", range(2, 9))
@pytest.mark.parametrize("one_queue", [False, True], ids=["blocking-hosts", "one-queue"])
def test_nobody_waits_for_ever(stages: int, one_queue: bool) -> None:
    for number, step in enumerate(steps_of(stages)):
        assert not stuck(step, one_queue=one_queue), number


def step_with_chunks_anywhere(rng: random.Random) -> Step:
    """No search has chosen the places of the teacher's chunks, and much happens at one moment."""
    stages, micro_batches, num_chunks = rng.randint(2, 5), rng.randint(1, 6), rng.randint(1, 2)
    programs = plain_programs(micro_batches, stages)
    num_pieces, shares = 0, []
    chunks: list[dict[int, list[Op]]] = []
    for ops in programs:
        shares.append([range(num_pieces, num_pieces + rng.randint(0, 3))])
        num_pieces = shares[-1][0].stop
        end = next(place for place, op in enumerate(ops) if op.kind == "reduce_tied")
        work = list(itertools.product(shares[-1][0], range(num_chunks)))
        before: dict[int, list[Op]] = {}
        for place, (piece, chunk) in zip(
            sorted(rng.choices(range(end + 1), k=len(work))), work, strict=True
        ):
            before.setdefault(place, []).append(Op("teacher", piece, chunk))
        chunks.append(before)
    chunk_time = rng.choice([0.0, 1.0])
    times = StepTimes(
        forward=[rng.choice([0.0, 1.0]) for _ in range(stages)],
        backward=[rng.choice([0.0, 1.0, 2.0]) for _ in range(stages)],
        teacher=lambda piece, chunk: chunk_time, transfer=rng.choice([0.0, 1.0]),
    )  # fmt: skip
    found = placement._with_transfers(programs, times, chunks, num_chunks)
    plan = TeacherPlan(
        pieces=[(row, row + 1) for row in range(num_pieces)], pieces_of=shares,
        num_chunks=num_chunks, placement=None,
    )  # fmt: skip
    return Step(placement.with_teacher(programs, found), plan, 1)


def test_chunks_may_stand_anywhere_and_all_happen_at_one_moment() -> None:
    rng = random.Random(0)
    for number in range(NUM_TIED):
        step = step_with_chunks_anywhere(rng)
        assert not stuck(step, one_queue=False), number


def test_one_micro_batch_and_work_that_takes_no_time() -> None:
    """Receives placed by comparing times came before the activation that the sender waits for."""
    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    shape = StepShape(
        student=model, teacher=model, vocab_size=512, seq_length=32, micro_batch_size=1,
        num_micro_batches=1, layout=Layout(tp_size=1, pp_size=2, dp_size=1),
    )  # fmt: skip
    plan = plan_teacher(shape, StepTimes(forward=[1.0] * 2, backward=[2.0] * 2), in_bubbles=True)
    assert plan.placement is not None
    step = Step(teaching_programs(1, 2, plan.placement), plan, 1)
    assert [op.kind for op in step.programs[-1]].count("recv_hidden") == 1
    assert not stuck(step, one_queue=False)


def mutants(number: int) -> list[Step]:
    """Steps in which one receive stands 4 to 20 instructions earlier or later."""
    rng, found = random.Random(0), []
    steps = [step for stages in (2, 3, 4) for step in steps_of(stages)]
    for _ in range(number):
        step = rng.choice(steps)
        *others, last = step.programs
        receives = [place for place, op in enumerate(last) if op.kind == "recv_hidden"]
        place, distance = rng.choice(receives), rng.choice([-1, 1]) * rng.randint(4, 20)
        moved = [*last[:place], *last[place + 1 :]]
        # Not beyond the step: no plan has a receive there.
        end = next(place for place, op in enumerate(moved) if op.kind == "reduce_tied")
        moved.insert(max(0, min(end, place + distance)), last[place])
        if moved != last:
            found.append(replace(step, programs=[*others, moved]))
    return found


@pytest.mark.parametrize(("one_queue", "share"), [(False, 0.6), (True, 0.25)])
def test_most_schedules_with_a_receive_elsewhere_are_found(one_queue: bool, share: float) -> None:
    """The tests above can fail."""
    wrong = mutants(NUM_MUTANTS)
    found = sum(bool(stuck(step, one_queue=one_queue)) for step in wrong)
    assert len(wrong) > 0.9 * NUM_MUTANTS
    assert found >= share * len(wrong)


def test_a_receive_that_is_missing_is_found() -> None:
    step = steps_of(3)[0]
    *others, last = step.programs
    for op in last:
        if op.kind == "recv_hidden":
            left = replace(step, programs=[*others, [other for other in last if other != op]])
            missing = {
                ("hidden", step.plan.of_tp_rank(op.number, tp_rank), tp_rank)
                for tp_rank in range(step.tp_size)
            }
            assert missing & {each.name for each in stuck(left, one_queue=False).values()}


class NotedPass(TeacherPass):
    """Notes what a pass does, and does nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ops: list[Op] = []

    def run(self, piece: int, chunk: int) -> None:
        self.ops.append(Op("teacher", piece, chunk))

    def send(self, piece: int) -> None:
        self.ops.append(Op("send_hidden", piece))

    def receive(self, piece: int) -> None:
        self.ops.append(Op("recv_hidden", piece))


@pytest.mark.parametrize("one_queue", [False, True], ids=["blocking-hosts", "one-queue"])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_a_pass_before_the_step_blocks_nobody(stages: int, one_queue: bool) -> None:
    """`run_all` of a teacher that is spread: all receives stand before the last stage's own work,
    whose collectives wait behind them."""
    layout = Layout(tp_size=2, pp_size=stages, dp_size=1)
    for num_rows in (1, 2, 7, 20):
        pieces = teacher_pieces(num_rows, 2, layout, 2)
        shares = assign_pieces(pieces, layout, [0.0] * stages, 1.0, 2)
        plan = TeacherPlan(pieces, shares, num_chunks=2, placement=None)
        programs = []
        for stage in range(stages):
            place: Any = SimpleNamespace(
                layout=layout, pp_rank=stage, tp_rank=0, is_last_stage=stage == stages - 1
            )
            nothing: Any = None
            noted = NotedPass(
                model=nothing, groups=place, timer=nothing, plan=plan, tokens_RS=nothing,
                prefix_R=None, out_RSE=nothing,
            )  # fmt: skip
            noted.run_all()
            programs.append(noted.ops)
        assert sum(op.kind == "teacher" for ops in programs for op in ops) == 2 * len(pieces)
        step = Step(programs, plan, 2, spread=True)
        assert not stuck(step, one_queue=one_queue)
        assert stages == 1 or num_rows == 1 or any(
            op.kind == "recv_hidden" for op in programs[-1]
        )  # fmt: skip
