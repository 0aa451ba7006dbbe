"""Where in a pipeline step the teacher's chunks go: into the waits, as far as they fit.

Pure functions of sizes and costs, so every rank finds the same answer. The bound that nothing can
beat, with M micro-batches, p equal stages, a backward of twice the forward and a teacher of r times
the student's work: max(0, r M - 3 (p - 1)) / (3 (M + p - 1)) of a plain step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_salt.teacher.simulator import Clock, Op, Program, StepTimes, Timeline, simulate

# Simulated instructions of the student that a search may take: seconds of Python.
SEARCH_BUDGET = 500_000
DEADLINES = 9  # how many are tried
# A step this near to the bound, as a share of it, ends the search.
BOUND_TOLERANCE = 0.001
# Which share of a chunk may run past the end of the wait that the plain step has at that place.
# More values than these take their time and find next to nothing.
MAX_OVERRUNS = (0.5, float("inf"))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The teacher's instructions of one step, on every stage, and what the simulation says.

    Times are in the unit of the `Times` that it was made of.
    """

    before: tuple[dict[int, tuple[Op, ...]], ...]
    """By stage: number of one of DeepSpeed's instructions -> the teacher's before it."""
    plain_time: float
    """Of the same step without a teacher."""
    step_time: float
    bound: float
    """No step with this division of the rows can be shorter; without the update."""

    @property
    def overhead(self) -> float:
        """How much longer the step is than the plain one, as a share of it."""
        return self.step_time / self.plain_time - 1.0


def work_bound(
    times: StepTimes, programs: Sequence[Program], teacher_work: Sequence[float]
) -> float:
    """Time of the longest stage if it never waited, at least that of the plain step.

    Args:
        teacher_work: time of all of a stage's chunks.
    """
    plain = simulate(programs, times).backward_end
    num_micro = sum(op.kind == "forward" for op in programs[0])
    busy = [
        num_micro * (forward + backward) + work
        for forward, backward, work in zip(times.forward, times.backward, teacher_work, strict=True)
    ]
    return max(plain, *busy)


def place(
    programs: Sequence[Program], times: StepTimes, pieces: Sequence[Sequence[int]], num_chunks: int
) -> Placement:
    """Find a place for every chunk of the teacher's work: in a wait if it fits, else at the end.

    Args:
        programs: DeepSpeed's instructions of every stage (`schedule.plain_programs`).
        pieces: numbers of the pieces of rows that each stage teaches, in its order.
    """
    plain = simulate(programs, times)
    work = [times.teacher_work(mine, num_chunks) for mine in pieces]
    bound = work_bound(times, programs, work)
    remaining = _critical_paths(programs, times)
    attempts = max(6, SEARCH_BUDGET // max(1, sum(map(len, programs))))
    best: tuple[float, list[dict[int, list[Op]]]] | None = None
    # Two limits decide whether a chunk fits (`_BubbleFiller._fits`). Some pairs are simulated, the
    # best one is kept; a large pipeline tries only every second pair, or third, ...
    limits = [(k / (DEADLINES - 1), o) for o in MAX_OVERRUNS for k in range(DEADLINES)]
    for share, overrun in limits[:: max(1, -(-len(limits) // attempts))]:
        # At first the step in which nothing fits: all of it at the end, on all stages at once.
        shortest = best[0] if best else plain.backward_end + max(work)
        if best and shortest <= bound * (1 + BOUND_TOLERANCE):
            break
        deadline = plain.backward_end + share * (shortest - plain.backward_end)
        filler = _BubbleFiller(programs, times, pieces, num_chunks, plain, remaining, deadline,
                               overrun)  # fmt: skip
        found = Clock(programs, times, filler).run().backward_end
        if best is None or found < best[0]:
            best = found, filler.before
    assert best is not None
    before = _with_transfers(programs, times, best[1], num_chunks)
    timeline = simulate(with_teacher(programs, before), times)
    return Placement(
        before=before, plain_time=plain.step_time, step_time=timeline.step_time, bound=bound
    )


def with_teacher(
    programs: Sequence[Program], before: Sequence[dict[int, tuple[Op, ...]]]
) -> list[list[Op]]:
    """Programs with the teacher's instructions at their places."""
    return [
        [each for number, op in enumerate(ops) for each in (*own.get(number, ()), op)]
        for ops, own in zip(programs, before, strict=True)
    ]


def _critical_paths(programs: Sequence[Program], times: StepTimes) -> list[list[float]]:
    """Length of the longest chain of work from each instruction, included, to the update."""
    # The step run backwards: each instruction as early as all that depends on it allows.
    reversed_programs = []
    for ops in programs:
        meeting = next(n for n, op in enumerate(ops) if op.kind == "reduce_tied")
        reversed_programs.append([*reversed(ops[:meeting]), ops[meeting]])
    spans = Clock(reversed_programs, replace(times, update=0.0)).run().spans
    return [[span.stop for span in reversed(own[:-1])] + [0.0] for own in spans]


@dataclass(eq=False)
class _BubbleFiller:
    """Answers the clock's question whether a chunk runs instead of a wait; notes where it did."""

    programs: Sequence[Program]
    times: StepTimes
    pieces: Sequence[Sequence[int]]
    num_chunks: int
    plain: Timeline
    remaining: Sequence[Sequence[float]]
    deadline: float
    overrun: float

    def __post_init__(self) -> None:
        self.waiting = [
            deque(Op("teacher", piece, chunk) for piece in mine for chunk in range(self.num_chunks))
            for mine in self.pieces
        ]
        self.tie = 1e-9 * self.deadline
        self.before: list[dict[int, list[Op]]] = [{} for _ in self.programs]
        self.delay = 0.0
        """How late the stages are, compared with the plain step, at most."""

    def __call__(self, stage: int, now: float, number: int) -> float | None:
        if number > 0:
            free_in_plain = self.plain.spans[stage][number - 1].stop
            self.delay = max(self.delay, now - free_in_plain)
        if not self.waiting[stage]:
            return None
        op = self.waiting[stage][0]
        duration = self.times.teacher(op.number, op.chunk)
        # What never fits runs at the end, before the update.
        at_the_end = self.programs[stage][number].kind == "reduce_tied"
        if not at_the_end and not self._fits(stage, now + duration, number, duration):
            return None
        self.waiting[stage].popleft()
        self.before[stage].setdefault(number, []).append(op)
        return duration

    def _fits(self, stage: int, stop: float, number: int, duration: float) -> bool:
        # Latest start of an instruction: the deadline less the longest chain that depends on it.
        if stop > self.deadline - self.remaining[stage][number] + self.tie:
            return False
        # The wait ends as in the plain step, as much later as any stage is by now.
        wait_ends = self.plain.spans[stage][number].start + self.delay
        return stop <= wait_ends + self.overrun * duration + self.tie


def _with_transfers(
    programs: Sequence[Program],
    times: StepTimes,
    chunks: Sequence[dict[int, list[Op]]],
    num_chunks: int,
) -> tuple[dict[int, tuple[Op, ...]], ...]:
    """The chunks, and the transfers of the hidden states that they make."""
    last = len(programs) - 1
    before: list[dict[int, tuple[Op, ...]]] = []
    for stage, own in enumerate(chunks):
        done: dict[int, tuple[Op, ...]] = {}
        for number, ops in own.items():
            extended: list[Op] = []
            for op in ops:
                extended.append(op)
                if op.chunk == num_chunks - 1 and stage < last:  # the piece is complete
                    extended.append(Op("send_hidden", op.number))
            done[number] = tuple(extended)
        before.append(done)
    # Both ends of a transfer stand at one place in the order in which the step takes place without
    # receiving ends, and so does all else that ranks wait for together. Whoever waits, whatever
    # the real times, then waits for what comes earlier in it, and no ring of waiting ranks can
    # close, even if each transfer held up both hosts: docs/bubbles.md, "Why it cannot deadlock".
    # Comparing the times of both ends would leave the places of equal ones open.
    clock = Clock(with_teacher(programs, before), times)
    clock.run_programs()
    receiving: dict[int, tuple[Op, ...]] = {}
    number, waiting = 0, []
    for stage, op in clock.order:
        if op.kind == "send_hidden":
            waiting.append(Op("recv_hidden", op.number))
        elif stage == last and op.kind == "teacher":
            waiting.append(op)
        elif stage == last:
            # Its first instruction after the send: neither end waits for the other for long.
            if waiting:
                receiving[number] = tuple(waiting)
            number, waiting = number + 1, []
    return (*before[:last], receiving)
