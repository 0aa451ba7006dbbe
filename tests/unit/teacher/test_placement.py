"""The teacher in the pipeline's waits, on a virtual clock: nothing lost, nothing early, near the
bound."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    RecvActivation,
    SendActivation,
)

from megatron_salt.config.fields import ModelConfig
from megatron_salt.parallel.layout import Layout
from megatron_salt.teacher.placement import Placement, work_bound
from megatron_salt.teacher.plan import StepShape, TeacherPlan, multiply_adds, plan_teacher
from megatron_salt.teacher.schedule import (
    TeacherForward,
    measured_times,
    measured_values,
    plain_programs,
    teaching_programs,
)
from megatron_salt.teacher.simulator import Op, StepTimes, channel, simulate

MODEL = ModelConfig(num_layers=32, hidden_size=64, num_attention_heads=4)


def shape_of(stages: int, micro_batches: int, **values: int | None) -> StepShape:
    given = {"micro_batch_size": 1, "num_chunks": 4, "tp": 1, **values}
    layout = Layout(tp_size=given.pop("tp") or 1, pp_size=stages, dp_size=1)
    return StepShape(
        student=MODEL, teacher=MODEL, vocab_size=512, seq_length=32,
        num_micro_batches=micro_batches, layout=layout, **given,
    )  # fmt: skip


def times_of(shape: StepShape, forward: Sequence[float], ratio: float, chunks: int) -> StepTimes:
    """A teacher of `ratio` times the student's work, whole on a rank, in `chunks` equal parts."""
    whole = ratio * sum(forward) / shape.micro_batch_size
    pieces = shape.pieces

    def teacher(piece: int, chunk: int) -> float:
        start, stop = pieces[piece]
        return whole * (stop - start) / chunks

    return StepTimes(forward=forward, backward=[2.0 * one for one in forward], teacher=teacher)


def check(plan: TeacherPlan, times: StepTimes, stages: int, micro_batches: int) -> Placement:
    """What holds of every placement: it is DeepSpeed's schedule, and each chunk runs just once."""
    placement = plan.placement
    assert placement is not None
    programs = teaching_programs(micro_batches, stages, placement)
    teaching = ("teacher", "send_hidden", "recv_hidden")
    bare = [[op for op in ops if op.kind not in teaching] for ops in programs]
    assert bare == plain_programs(micro_batches, stages)
    # Training runs these programs, and the simulator says the same of them.
    timeline = simulate(programs, times)
    assert timeline.step_time == pytest.approx(placement.step_time, rel=1e-9)
    received = [op.number for op in programs[-1] if op.kind == "recv_hidden"]
    sent_at: dict[int, float] = {}
    for stage, ops in enumerate(programs):
        work = [(op.number, op.chunk) for op in ops if op.kind == "teacher"]
        # Piece after piece, so a rank holds the inner state of one of them at most.
        assert work == list(itertools.product(plan.pieces_of[stage][0], range(plan.num_chunks)))
        sent = [op.number for op in ops if op.kind == "send_hidden"]
        assert sent == (list(plan.pieces_of[stage][0]) if stage < stages - 1 else [])
        # Between one pair of ranks both ends name the pieces in the same order.
        assert [piece for piece in received if piece in plan.pieces_of[stage][0]] == sent
        for span in timeline.spans[stage]:
            if span.op.kind == "send_hidden":
                sent_at[span.op.number] = span.start
    # No end is open while the stage has something else to do: what follows it starts later.
    upcoming = float("inf")
    for op, start, _ in reversed(timeline.spans[-1]):
        if op.kind == "recv_hidden":
            assert upcoming >= sent_at[op.number] - 1e-6
        elif op.kind not in ("reduce_tied", "reduce", "update"):
            upcoming = start
    return placement


def formula(ratio: float, micro_batches: int, stages: int) -> float:
    """The bound of the overhead for equal stages and a backward of two forwards."""
    left = ratio * micro_batches - 3 * (stages - 1)
    return max(0.0, left) / (3 * (micro_batches + stages - 1))


GRID = [(p, k * p) for p in (2, 4, 8) for k in (1, 2, 3, 5, 8)]


@pytest.mark.parametrize(("stages", "micro_batches"), GRID)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.54, 1.0])
def test_overhead_is_near_the_bound_with_four_chunks(
    stages: int, micro_batches: int, ratio: float
) -> None:
    shape = shape_of(stages, micro_batches)
    times = times_of(shape, [1.0] * stages, ratio, 4)
    placement = check(plan_teacher(shape, times, in_bubbles=True), times, stages, micro_batches)
    bound = formula(ratio, micro_batches, stages)
    share = placement.bound / placement.plain_time - 1.0
    assert share == pytest.approx(bound, abs=1e-9)
    assert bound - 1e-9 <= placement.overhead <= bound + 0.015


UNEVEN = {
    "a heavy head": lambda p: [1.0] * (p - 1) + [1.3],
    "one layer fewer": lambda p: [1.0 if 2 * s < p else 0.75 for s in range(p)],
    "every other": lambda p: [1.0 if s % 2 else 0.8 for s in range(p)],
}


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 7), (4, 13), (4, 32), (8, 24), (8, 43)])
@pytest.mark.parametrize(("ratio", "chunks"), [(0.3, 4), (0.54, 4), (1.0, 16)])
def test_uneven_stages_and_numbers_that_do_not_divide(
    stages: int, micro_batches: int, ratio: float, chunks: int, kind: str
) -> None:
    """Against the bound for equal shares; giving more rows to stages with less to do beats it.

    A chunk of a teacher as large as the student is as long as p/4 forwards of a stage with 4
    chunks: too long for the waits. With 16 it fits.
    """
    shape = shape_of(stages, micro_batches, micro_batch_size=4, num_chunks=chunks)
    times = times_of(shape, UNEVEN[kind](stages), ratio, chunks)
    placement = check(plan_teacher(shape, times, in_bubbles=True), times, stages, micro_batches)
    equal = plan_teacher(shape, times, in_bubbles=False)
    work = [
        sum(times.teacher(piece, chunk) for piece in ranks[0] for chunk in range(chunks))
        for ranks in equal.pieces_of
    ]
    bound = work_bound(times, plain_programs(micro_batches, stages), work)
    plain = placement.plain_time
    assert placement.overhead <= bound / plain - 1.0 + 0.015
    if kind == "a heavy head" and (micro_batches, ratio) == (32, 0.54):
        assert bound / plain - 1.0 > 0.05 > 0.01 > placement.overhead


def test_number_of_chunks_follows_the_teacher() -> None:
    """Without a setting a chunk is at most a quarter of a stage's forward, as far as layers go."""
    for stages in (2, 4, 8):
        shape = shape_of(stages, 4 * stages, num_chunks=None)
        times = multiply_adds(shape)
        longest = max(times.teacher(0, chunk) for chunk in range(len(shape.chunk_bounds)))
        assert longest <= 0.28 * min(times.forward)
        assert len(shape.chunk_bounds) >= 4
    assert len(shape_of(2, 8, num_chunks=100).chunk_bounds) == MODEL.num_layers
    assert shape_of(2, 8, num_chunks=5).chunk_bounds == [
        (0, 7), (7, 14), (14, 20), (20, 26), (26, 32)
    ]  # fmt: skip


def test_ranks_that_share_a_teacher_are_as_one() -> None:
    """The same pieces and places as of stages of one rank, in half the time and as many chunks as
    that needs; for people each piece counts once."""
    shape, alone = (shape_of(2, 8, tp=tp, num_chunks=None) for tp in (2, 1))
    spread = dataclasses.replace(shape, teacher_tp_size=2)
    times = multiply_adds(spread)
    assert spread.pieces == alone.pieces
    assert spread.chunk_bounds == alone.chunk_bounds
    assert len(shape.chunk_bounds) == 2 * len(spread.chunk_bounds)
    assert times.teacher(0, 0) == multiply_adds(alone).teacher(0, 0) / 2
    plan = plan_teacher(spread, times, in_bubbles=True)
    expected = plan_teacher(alone, multiply_adds(alone), in_bubbles=True)
    assert plan.pieces_of == [ranks * 2 for ranks in expected.pieces_of]
    assert plan.placement is not None and expected.placement is not None
    assert plan.placement.before == expected.placement.before
    assert plan.describe("") == expected.describe("")
    for piece in range(len(plan.pieces)):
        assert plan.of_tp_rank(piece, 0) == plan.of_tp_rank(piece, 1) == piece


def test_tensor_parallel_ranks_share_a_schedule() -> None:
    shape = shape_of(2, 5, tp=2)
    plan = plan_teacher(shape, multiply_adds(shape), in_bubbles=True)
    assert [len(ranks[0]) for ranks in plan.pieces_of] != [
        len(ranks[1]) for ranks in plan.pieces_of
    ]
    assert plan.placement is not None
    for tp_rank in range(2):
        done = []
        for ops in teaching_programs(5, 2, plan.placement):
            named = [op.number for op in ops if op.kind == "teacher" and op.chunk == 0]
            done += [plan.of_tp_rank(piece, tp_rank) for piece in named]
        expected = [piece for ranks in plan.pieces_of for piece in ranks[tp_rank]]
        assert [piece for piece in done if piece is not None] == expected
        rows = [row for stage in range(2) for row in range(*plan.rows(stage, tp_rank))]
        assert rows == list(range(*plan.block(tp_rank)))
    assert plan.block(0)[1] == plan.block(1)[0]
    with pytest.raises(ValueError, match="piece 99"):
        plan.of_tp_rank(99, 0)


@pytest.mark.parametrize("seed", range(40))
def test_every_rank_of_a_stage_does_its_share_once(seed: int) -> None:
    """Sizes and times by chance: fewer pieces than ranks, a short last piece, one layer, no waits.

    Of every tensor-parallel rank: all rows once, in the plan's order, each piece sent when it is
    whole, and received in the order in which its stage sends. However bad the times, the step is
    never longer than with all of the teacher's work at its end.
    """
    rng = random.Random(seed)
    stages, tp, micro_batches = rng.choice([2, 3, 5]), rng.choice([1, 2, 3]), rng.randint(1, 9)
    shape = StepShape(
        student=ModelConfig(num_layers=7, hidden_size=64, num_attention_heads=4),
        teacher=ModelConfig(num_layers=rng.choice([1, 3]), hidden_size=64, num_attention_heads=4),
        vocab_size=rng.choice([64, 5000]), seq_length=16, micro_batch_size=rng.randint(1, 4),
        num_micro_batches=micro_batches, num_chunks=rng.choice([None, 1, 1000]),
        layout=Layout(tp_size=tp, pp_size=stages, dp_size=1),
    )  # fmt: skip
    times = multiply_adds(shape)
    if seed % 2:
        chunk = rng.choice([0.0, 0.01, 0.3, 5.0])
        times = StepTimes(
            forward=[rng.uniform(0.1, 3.0) for _ in range(stages)],
            backward=[rng.uniform(0.1, 5.0) for _ in range(stages)],
            teacher=lambda piece, _: chunk * (shape.pieces[piece][1] - shape.pieces[piece][0]),
            transfer=rng.choice([0.0, 0.5]),
        )
    plan = plan_teacher(shape, times, in_bubbles=True)
    placement = check(plan, times, stages, micro_batches)
    work = max(
        sum(times.teacher(piece, chunk) for piece in ranks[0] for chunk in range(plan.num_chunks))
        for ranks in plan.pieces_of
    )
    assert placement.bound <= placement.step_time * (1 + 1e-9)
    assert placement.step_time <= (placement.plain_time + work) * (1 + 1e-9)
    taught: list[int] = []
    for tp_rank in range(tp):
        received: list[int] = []
        for stage, ops in enumerate(teaching_programs(micro_batches, stages, placement)):
            done: dict[int, int] = {}
            sent: list[int] = []
            for kind, number, chunk in ops:
                if kind not in ("teacher", "send_hidden", "recv_hidden"):
                    continue
                own = plan.of_tp_rank(number, tp_rank)
                if own is None:
                    continue
                if kind == "teacher":
                    assert done.get(own, 0) == chunk
                    done[own] = chunk + 1
                elif kind == "send_hidden":
                    assert done[own] == plan.num_chunks
                    sent.append(own)
                else:
                    received.append(own)
            share = plan.pieces_of[stage][tp_rank]
            assert done == dict.fromkeys(share, plan.num_chunks)
            assert sent == (list(share) if stage < stages - 1 else [])
            taught += [row for piece in done for row in range(*plan.pieces[piece])]
        for ranks in plan.pieces_of[:-1]:
            assert [piece for piece in received if piece in ranks[tp_rank]] == list(ranks[tp_rank])
        rows = [row for stage in range(stages) for row in range(*plan.rows(stage, tp_rank))]
        assert rows == list(range(*plan.block(tp_rank)))
    assert taught == list(range(shape.num_rows))


def slow_reference(programs: list[list[Op]], times: StepTimes) -> list[list[tuple[float, float]]]:
    """Start and end of every instruction by repeated relaxation: each begins when all that it
    needs has ended, whatever the order in which one looks."""
    spans = [[(0.0, 0.0)] * len(ops) for ops in programs]
    partner: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for stage, ops in enumerate(programs):
        for number, op in enumerate(ops):
            key = ("meeting", 0, 0) if op.kind == "reduce_tied" else channel(op, stage)
            if key is not None:
                partner.setdefault(key, []).append((stage, number))
    together = {place: places for places in partner.values() for place in places}
    moved = True
    while moved:
        moved = False
        for stage, ops in enumerate(programs):
            for number, op in enumerate(ops):
                places = together.get((stage, number), [(stage, number)])
                start = max(spans[s][n - 1][1] if n else 0.0 for s, n in places)
                duration = {
                    "forward": times.forward[stage],
                    "backward": times.backward[stage],
                    "reduce_tied": times.update,
                }.get(op.kind, 0.0)
                if op.kind == "teacher":
                    duration = times.teacher(op.number, op.chunk)
                if channel(op, stage) is not None:
                    duration = times.transfer
                if spans[stage][number] != (start, start + duration):
                    spans[stage][number] = (start, start + duration)
                    moved = True
    return spans


@pytest.mark.parametrize("seed", range(6))
def test_clock_agrees_with_a_slow_reference(seed: int) -> None:
    rng = random.Random(seed)
    stages, micro_batches = rng.choice([(2, 3), (3, 5), (4, 4), (4, 9)])
    shape = shape_of(stages, micro_batches)
    plan = plan_teacher(shape, times_of(shape, [1.0] * stages, 0.5, 4), in_bubbles=True)
    assert plan.placement is not None
    times = StepTimes(
        forward=[rng.uniform(0.5, 2.0) for _ in range(stages)],
        backward=[rng.uniform(1.0, 4.0) for _ in range(stages)],
        teacher=lambda piece, chunk: 0.3 + 0.1 * piece + 0.05 * chunk,
        transfer=rng.uniform(0.0, 0.3),
        update=0.7,
    )
    # Planned for other times than those it meets: the order holds whatever they are.
    programs = teaching_programs(micro_batches, stages, plan.placement)
    timeline = simulate(programs, times)
    expected = slow_reference(programs, times)
    for stage, spans in enumerate(timeline.spans):
        assert [span.op for span in spans] == programs[stage]
        for span, (start, stop) in zip(spans, expected[stage], strict=True):
            assert (span.start, span.stop) == pytest.approx((start, stop))
        busy = micro_batches * (times.forward[stage] + times.backward[stage])
        work = sum(times.teacher(op.number, op.chunk) for op in programs[stage]
                   if op.kind == "teacher")  # fmt: skip
        assert timeline.busy(stage) == pytest.approx(busy + work)
        assert 0 <= timeline.idle(stage) < timeline.backward_end


def test_plain_step_has_the_length_of_1f1b() -> None:
    for stages, micro_batches in itertools.product([2, 3, 8], [1, 2, 8, 20]):
        times = StepTimes(forward=[1.0] * stages, backward=[2.0] * stages, update=0.5)
        timeline = simulate(plain_programs(micro_batches, stages), times)
        assert timeline.step_time == pytest.approx(3.0 * (micro_batches + stages - 1) + 0.5)
        for stage in range(stages):
            assert timeline.idle(stage) == pytest.approx(3.0 * (stages - 1))


def test_hidden_states_may_arrive_after_the_last_backward() -> None:
    shape = shape_of(2, 4)
    times = times_of(shape, [1.0, 1.0], 1.0, 4)
    plan = plan_teacher(shape, times, in_bubbles=True)
    assert plan.placement is not None
    programs = teaching_programs(4, 2, plan.placement)
    fast = simulate(programs, times)
    slow = simulate(programs, StepTimes(forward=[1.0, 1.0], backward=[2.0, 2.0],
                                    teacher=times.teacher, hidden_transfer=5.0))  # fmt: skip
    assert slow.backward_end == fast.backward_end
    assert slow.step_time > fast.step_time


def move(ops: list[Op], source: int, destination: int) -> None:
    ops.insert(destination, ops.pop(source))


def test_schedules_that_cannot_work_are_refused() -> None:
    times = StepTimes(forward=[1.0] * 2, backward=[2.0] * 2)

    def broken(stage: int, kind: str, number: int, destination: int) -> list[list[Op]]:
        programs = plain_programs(3, 2)
        ops = programs[stage]
        place = next(n for n, op in enumerate(ops) if (op.kind, op.number) == (kind, number))
        move(ops, place, destination)
        return programs

    with pytest.raises(RuntimeError, match=r"cannot go on: stage 0 .*; stage 1 at instruction 0"):
        simulate(broken(1, "send_grad", 0, 0), times)
    with pytest.raises(RuntimeError, match="stage 1: .*forward.* before .*recv_activation"):
        simulate(broken(1, "forward", 0, 0), times)
    with pytest.raises(RuntimeError, match=r"stage 1: .*backward.* before .*forward"):
        simulate(broken(1, "backward", 1, 4), times)
    programs = plain_programs(3, 2)
    programs[0].insert(0, Op("send_hidden", 0))
    with pytest.raises(RuntimeError, match=r"pieces \[0\] are sent or received alone"):
        simulate(programs, times)
    programs = plain_programs(3, 2)
    programs[0][0:0] = [Op("teacher", 0, 1), Op("teacher", 0, 0)]
    with pytest.raises(RuntimeError, match="out of order"):
        simulate(programs, times)
    programs = plain_programs(3, 2)
    programs[0][0:0] = [Op("teacher", 0, 0), Op("send_hidden", 0), Op("teacher", 0, 1)]
    programs[1][0:0] = [Op("recv_hidden", 0)]
    with pytest.raises(RuntimeError, match="after its hidden states were sent"):
        simulate(programs, times)


def test_work_that_takes_no_time_is_placed_too() -> None:
    shape = shape_of(2, 4)
    times = StepTimes(forward=[1.0, 1.0], backward=[2.0, 2.0])
    placement = check(plan_teacher(shape, times, in_bubbles=True), times, 2, 4)
    assert placement.overhead == 0.0


def test_costs_by_hand() -> None:
    """Two layers on two stages at tp 2: multiply-adds of a micro-batch on one rank."""
    student = ModelConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16,
        activation="gelu",
    )  # fmt: skip
    teacher = ModelConfig(
        num_layers=4, hidden_size=4, num_attention_heads=1, ffn_hidden_size=8, activation="gelu"
    )
    shape = StepShape(
        student=student, teacher=teacher, vocab_size=100, seq_length=10, micro_batch_size=3,
        num_micro_batches=4, layout=Layout(tp_size=2, pp_size=2, dp_size=1), num_chunks=2,
    )  # fmt: skip
    # Weights of queries, keys and values, output, and the two of the MLP; attention S * H * C.
    layer = 8 * 24 + 8 * 8 + 2 * 8 * 16 + 10 * 8
    head, tokens = 8 * 100, 3 * 10
    times = multiply_adds(shape)
    loss = 3 * head + 4 * 100  # the head's product and its two gradients; the teacher's head
    assert times.forward == [layer * tokens / 2, (layer + loss) * tokens / 2]
    assert times.backward == [2 * layer * tokens / 2] * 2
    again = multiply_adds(dataclasses.replace(shape, recompute=True))
    assert again.forward == times.forward
    assert again.backward == [3 * layer * tokens / 2] * 2
    # 12 rows over four ranks in pieces of three; two of the teacher's layers, whole on a rank.
    assert shape.pieces == [(0, 3), (3, 6), (6, 9), (9, 12)]
    teacher_layer = 4 * 12 + 4 * 4 + 2 * 4 * 8 + 10 * 4
    assert times.teacher(0, 1) == 3 * 10 * 2 * teacher_layer


def test_measured_times_by_hand() -> None:
    """Medians by stage; a transfer takes what its later end saw; the teacher by row and layer."""
    first = [
        (ForwardPass(buffer_id=0), 0.0, 1.0),
        (SendActivation(buffer_id=0), 1.0, 1.5),
        (ForwardPass(buffer_id=1), 1.5, 4.5),
        (ForwardPass(buffer_id=2), 4.5, 6.5),
        (TeacherForward(piece=0, chunk=0), 6.5, 12.5),
        (BackwardPass(buffer_id=0), 13.0, 17.0),
    ]
    second = [
        (RecvActivation(buffer_id=0), 0.0, 1.5),
        (ForwardPass(buffer_id=0), 1.5, 6.5),
        (BackwardPass(buffer_id=0), 6.5, 13.5),
        (TeacherForward(piece=1, chunk=1), 14.0, 16.0),
    ]
    times = measured_times([first, second], [(0, 2), (2, 3)], [(0, 3), (3, 5)])
    assert (times.forward, times.backward, times.transfer) == ([2.0, 5.0], [4.0, 7.0], 0.5)
    assert times.teacher(0, 0) == 2 * 3 * 1.0 and times.teacher(1, 1) == 1 * 2 * 1.0
    values = measured_values(times, [(0, 2), (2, 3)], 2)
    assert values["teacher_row_s"] == 5.0 and values["forward_kd_s"] == [2.0, 5.0]
