"""DeepSpeed's 1F1B schedule, with the teacher's work for the next batch where stages would wait.

The teacher is frozen, so its forward for the *next* batch needs nothing from this step's update.
This generator is what training runs and what the simulator is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule, TrainSchedule

from megatron_salt.teacher.placement import Placement
from megatron_salt.teacher.simulator import Op, OpKind, StepTimes, channel


class TeacherForward(PipeInstruction):
    """Run one chunk of the teacher's layers on one piece of the next batch's rows."""


class SendHidden(PipeInstruction):
    """Start sending a piece's hidden states to the last stage; holds up nobody."""


class RecvHidden(PipeInstruction):
    """Start receiving a piece's hidden states on the last stage; holds up nobody."""


KINDS: dict[str, OpKind] = {
    "LoadMicroBatch": "load",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "SendActivation": "send_activation",
    "RecvActivation": "recv_activation",
    "SendGrad": "send_grad",
    "RecvGrad": "recv_grad",
    "ReduceTiedGrads": "reduce_tied",
    "ReduceGrads": "reduce",
    "OptimizerStep": "update",
    "TeacherForward": "teacher",
    "SendHidden": "send_hidden",
    "RecvHidden": "recv_hidden",
}


class TeachingSchedule(TrainSchedule):
    """One stage's step: DeepSpeed's instructions in their order, and the teacher's between them.

    Args:
        placement: before which of DeepSpeed's instructions the teacher's stand, on every stage.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, placement: Placement):
        super().__init__(micro_batches, stages, stage_id)
        self._before = placement.before[stage_id]

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """DeepSpeed's steps, none of its instructions moved, changed or left out."""
        number = 0
        for commands in super().steps():
            extended = []
            for command in commands:
                extended += [_instruction(op) for op in self._before.get(number, ())]
                extended.append(command)
                number += 1
            yield extended


def _instruction(op: Op) -> PipeInstruction:
    match op.kind:
        case "teacher":
            return TeacherForward(piece=op.number, chunk=op.chunk)
        case "send_hidden":
            return SendHidden(piece=op.number)
        case "recv_hidden":
            return RecvHidden(piece=op.number)
    raise ValueError(f"{op} is not the teacher's")


def program(schedule: PipeSchedule) -> list[Op]:
    """A stage's schedule as the simulator reads it."""
    # DeepSpeed's instructions name a buffer, not a micro-batch; each kind of them treats the
    # micro-batches in their order.
    count: dict[str, int] = {}
    ops = []
    for commands in schedule.steps():
        for command in commands:
            kind = KINDS[type(command).__name__]
            if kind == "teacher":
                ops.append(Op(kind, command.piece, command.chunk))
            elif kind in ("send_hidden", "recv_hidden"):
                ops.append(Op(kind, command.piece))
            else:
                ops.append(Op(kind, count.get(kind, 0)))
                count[kind] = count.get(kind, 0) + 1
    return ops


def plain_programs(micro_batches: int, stages: int) -> list[list[Op]]:
    """The step of the LM phase: DeepSpeed's own schedule, on every stage."""
    return [program(TrainSchedule(micro_batches, stages, stage)) for stage in range(stages)]


def teaching_programs(micro_batches: int, stages: int, placement: Placement) -> list[list[Op]]:
    """The step of the KD phase that also teaches the next batch, on every stage."""
    return [
        program(TeachingSchedule(micro_batches, stages, stage, placement))
        for stage in range(stages)
    ]


Trace = Sequence[tuple[PipeInstruction, float, float]]
"""A stage's instructions of one step, with the seconds at which each began and ended."""


def measured_times(
    traces: Sequence[Trace],
    pieces: Sequence[tuple[int, int]],
    chunk_bounds: Sequence[tuple[int, int]],
) -> StepTimes:
    """Times for the simulator from a traced step of all stages: medians by stage.

    Args:
        traces: as `Instructions.take_trace` gives them.
        pieces, chunk_bounds: rows and layers [start, stop) of the teacher's pieces and chunks.
    """
    forward: list[float] = []
    backward: list[float] = []
    row_layers: list[float] = []
    ends: dict[tuple[str, int, int], list[float]] = {}
    for stage, trace in enumerate(traces):
        taken: dict[OpKind, list[float]] = {}
        for instruction, start, stop in trace:
            kind = KINDS[type(instruction).__name__]
            if kind == "teacher":
                rows, layers = pieces[instruction.piece], chunk_bounds[instruction.chunk]
                row_layers.append((stop - start) / ((rows[1] - rows[0]) * (layers[1] - layers[0])))
            link = channel(Op(kind, len(taken.get(kind, ()))), stage)
            if link is not None:
                ends.setdefault(link, []).append(stop - start)
            taken.setdefault(kind, []).append(stop - start)
        forward.append(median(taken["forward"]))
        backward.append(median(taken["backward"]))
    # The end that came later to a transfer has not waited: its time is the transfer's.
    transfers = [min(both) for both in ends.values()]
    # The teacher's time for one row in one layer, the same on every stage.
    row_layer = median(row_layers) if row_layers else 0.0

    def teacher(piece: int, chunk: int) -> float:
        rows, layers = pieces[piece], chunk_bounds[chunk]
        return row_layer * (rows[1] - rows[0]) * (layers[1] - layers[0])

    return StepTimes(
        forward=forward, backward=backward, teacher=teacher,
        transfer=median(transfers) if transfers else 0.0,
    )  # fmt: skip


def times_table(traces: Sequence[Trace]) -> str:
    """What every stage did in a traced step, for people: milliseconds of each kind of instruction,
    by stage; transfers with the waits for the other end."""
    totals: dict[OpKind, list[float]] = {}
    for stage, trace in enumerate(traces):
        for instruction, start, stop in trace:
            of_kind = totals.setdefault(KINDS[type(instruction).__name__], [0.0] * len(traces))
            of_kind[stage] += 1000.0 * (stop - start)
    return " | ".join(
        f"{kind} " + " ".join(f"{value:.1f}" for value in totals[kind])
        for kind in dict.fromkeys(KINDS.values())
        if kind in totals
    )


def measured_values(
    times: StepTimes, pieces: Sequence[tuple[int, int]], num_chunks: int
) -> dict[str, float | list[float]]:
    """Measured times of the KD phase as `megatron-salt plan --measured` reads them; seconds."""
    rows = pieces[0][1] - pieces[0][0]
    return {
        "forward_kd_s": list(times.forward),
        "backward_s": list(times.backward),
        "teacher_row_s": times.teacher_work([0], num_chunks) / rows,
        "transfer_s": times.transfer,
    }
