"""A pipeline step on a virtual clock: when every stage does what, and where it waits.

What is simulated are the instruction lists that training runs (`schedule.teaching_programs`);
`placement.py` uses the same clock to decide where the teacher's work goes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

OpKind = Literal["load", "forward", "backward", "send_activation", "recv_activation", "send_grad",
               "recv_grad", "reduce_tied", "reduce", "update", "teacher", "send_hidden",
               "recv_hidden"]  # fmt: skip


class Op(NamedTuple):
    """One instruction of a stage."""

    kind: OpKind
    number: int = 0
    """Micro-batch of the student, or piece of the teacher's rows."""
    chunk: int = 0
    """Number of the part of the teacher's layers."""


Program = Sequence[Op]
"""What one stage does in a step, in its order."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What the parts of a step cost, in any one unit of time (seconds, or multiply-adds)."""

    forward: Sequence[float]
    """Of one micro-batch, by stage; the loss belongs to the last stage's."""
    backward: Sequence[float]
    teacher: Callable[[int, int], float] = lambda piece, chunk: 0.0
    """Of one chunk of the teacher's layers on one piece of rows."""
    transfer: float = 0.0
    """Of a micro-batch's activation or gradient to the neighbouring stage."""
    hidden_transfer: float = 0.0
    """Of a piece's hidden states to the last stage."""
    update: float = 0.0
    """Of gradient reduction and optimizer, after all stages have met."""

    def teacher_work(self, pieces: Sequence[int], num_chunks: int) -> float:
        """Of all the teacher's layers on these pieces."""
        return sum(self.teacher(piece, chunk) for piece in pieces for chunk in range(num_chunks))


class OpSpan(NamedTuple):
    """An instruction on the clock. Waiting is not part of it: a transfer starts when both meet."""

    op: Op
    start: float
    stop: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A simulated step."""

    spans: list[list[OpSpan]]
    """By stage, in the order of the stage's program."""
    backward_end: float
    """When the last stage to arrive meets the others before the update."""
    step_time: float

    def busy(self, stage: int) -> float:
        """Time in which the stage computes, for the student or the teacher."""
        computing = ("forward", "backward", "teacher")
        return sum(s.stop - s.start for s in self.spans[stage] if s.op.kind in computing)

    def idle(self, stage: int) -> float:
        """Time before the update in which the stage neither computes nor sends nor receives."""
        moving = ("send_activation", "recv_activation", "send_grad", "recv_grad")
        sent = sum(s.stop - s.start for s in self.spans[stage] if s.op.kind in moving)
        return self.backward_end - self.busy(stage) - sent


def channel(op: Op, stage: int) -> tuple[str, int, int] | None:
    """What both ends of a transfer between neighbours have in common; None for other work."""
    match op.kind:
        case "send_activation":
            return "activation", stage, op.number
        case "recv_activation":
            return "activation", stage - 1, op.number
        case "send_grad":
            return "grad", stage - 1, op.number
        case "recv_grad":
            return "grad", stage, op.number
    return None


FillWait = Callable[[int, float, int], float | None]
"""(stage, now, number of the instruction before which it waits) -> how long it does something else
instead of waiting, or None to wait."""

# Two stages that reach a transfer at the same moment must not be told apart by rounding.
TIE = 1e-9


def simulate(programs: Sequence[Program], times: StepTimes) -> Timeline:
    """Run the programs of all stages of a pipeline on one clock.

    Raises: RuntimeError saying where every stage stands if none can go on, or if a program does
        what it cannot: a backward before its forward, hidden states that are not there yet.
    """
    timeline = Clock(programs, times).run()
    _check(timeline)
    return timeline


class Clock:
    """The state of `simulate`: a queue of stages by time, and who waits for whom.

    Args:
        fill: asked whenever a stage would wait, in the order of time (`placement`).
    """

    def __init__(
        self, programs: Sequence[Program], times: StepTimes, fill: FillWait | None = None
    ) -> None:
        self.programs, self.times, self.fill = programs, times, fill
        self.spans: list[list[OpSpan]] = [[] for _ in programs]
        self.order: list[tuple[int, Op]] = []
        """Every instruction with its stage, as they took place; both ends of a transfer at once."""
        self.position = [0] * len(programs)
        scale = max(max(times.forward), max(times.backward), 1e-30)
        self.tie = TIE * scale
        # By (sort key, second look, stage), with the time that it is.
        self.queue = [(0.0, False, stage, 0.0) for stage in range(len(programs))]
        self.waiting: dict[tuple[str, int, int], tuple[int, float]] = {}  # channel: stage, since
        self.before_update: dict[int, float] = {}  # stage: when it came there
        self.hidden_ends: dict[int, list[float]] = {}  # piece: when it was sent, and received

    def run_programs(self) -> None:
        """Run every stage to its end."""
        heapq.heapify(self.queue)
        while self.queue:
            _, second_look, stage, now = heapq.heappop(self.queue)
            if self.position[stage] < len(self.programs[stage]):
                self._next(stage, now, second_look)
        stuck = [s for s, place in enumerate(self.position) if place < len(self.programs[s])]
        if stuck:
            places = "; ".join(
                f"stage {stage} at instruction {self.position[stage]} of "
                f"{len(self.programs[stage])}, {self.programs[stage][self.position[stage]]}"
                for stage in stuck
            )
            raise RuntimeError(f"the schedule cannot go on: {places}")

    def run(self) -> Timeline:
        self.run_programs()
        last_stop = max((spans[-1].stop for spans in self.spans if spans), default=0.0)
        backward_end = max(self.before_update.values(), default=last_stop)
        arrived = [max(ends) + self.times.hidden_transfer for ends in self.hidden_ends.values()]
        single = [piece for piece, ends in self.hidden_ends.items() if len(ends) != 2]
        if single:
            raise RuntimeError(f"hidden states of pieces {single} are sent or received alone")
        # Hidden states hold up nobody, but the step ends only when all have arrived.
        step_time = max([backward_end + self.times.update, *arrived])
        return Timeline(spans=self.spans, backward_end=backward_end, step_time=step_time)

    def _resume(self, stage: int, when: float, *, second_look: bool = False) -> None:
        key = when + self.tie if second_look else when
        heapq.heappush(self.queue, (key, second_look, stage, when))

    def _finish(self, stage: int, op: Op, start: float, stop: float) -> None:
        self.spans[stage].append(OpSpan(op, start, stop))
        self.order.append((stage, op))
        self.position[stage] += 1
        self._resume(stage, stop)

    def _next(self, stage: int, now: float, second_look: bool) -> None:
        op = self.programs[stage][self.position[stage]]
        link = channel(op, stage)
        if link is None and op.kind != "reduce_tied":
            self._work(stage, op, now)
            return
        if link is not None and link in self.waiting:
            # `dist.send` and `dist.recv` hold up both ends (on CUDA: streams) until they have met.
            peer, since = self.waiting.pop(link)
            start = max(now, since)
            for end in (stage, peer):
                self._finish(end, self.programs[end][self.position[end]], start,
                             start + self.times.transfer)  # fmt: skip
            return
        if self.fill is not None:
            # It waits only if the other end has not come after all that happens at this moment.
            if not second_look:
                self._resume(stage, now, second_look=True)
                return
            filled = self.fill(stage, now, self.position[stage])
            if filled is not None:
                self._resume(stage, now + filled)
                return
        if link is not None:
            self.waiting[link] = (stage, now)
            return
        # "reduce_tied" is where all stages meet before the update.
        self.before_update[stage] = now
        if len(self.before_update) == len(self.programs):
            together = max(self.before_update.values())
            for each in range(len(self.programs)):
                here = self.programs[each][self.position[each]]
                self._finish(each, here, together, together + self.times.update)

    def _work(self, stage: int, op: Op, now: float) -> None:
        duration = 0.0
        match op.kind:
            case "forward":
                duration = self.times.forward[stage]
            case "backward":
                duration = self.times.backward[stage]
            case "teacher":
                duration = self.times.teacher(op.number, op.chunk)
            case "send_hidden" | "recv_hidden":
                self.hidden_ends.setdefault(op.number, []).append(now)
        self._finish(stage, op, now, now + duration)


def _check(timeline: Timeline) -> None:
    """Raise RuntimeError if a stage uses what is not there yet, or the teacher works out of order.

    Transfers cannot be wrong by construction: both ends finish together.
    """
    last = len(timeline.spans) - 1
    for stage, spans in enumerate(timeline.spans):
        seen: set[tuple[OpKind, int]] = set()
        chunks: dict[int, int] = {}
        for op, _, _ in spans:
            needs: list[tuple[OpKind, int]] = []
            if op.kind == "forward" and stage > 0:
                needs.append(("recv_activation", op.number))
            if op.kind == "backward":
                needs.append(("forward", op.number))
                if stage < last:
                    needs.append(("recv_grad", op.number))
            if op.kind == "teacher":
                if op.chunk != chunks.get(op.number, -1) + 1:
                    raise RuntimeError(f"stage {stage}: {op} is out of order")
                chunks[op.number] = op.chunk
                if ("send_hidden", op.number) in seen:
                    raise RuntimeError(f"stage {stage}: {op} after its hidden states were sent")
            if missing := [need for need in needs if need not in seen]:
                raise RuntimeError(f"stage {stage}: {op} before {missing[0]}")
            seen.add((op.kind, op.number))
