"""One layout: its steps on the simulator's clock, its memory, and how long the whole run takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_salt.planner.hardware import Machine
from megatron_salt.planner.memory import StageMemory, stage_memory
from megatron_salt.planner.sizes import Sizes
from megatron_salt.planner.times import MeasuredTimes, hidden_exchange_s, step_times
from megatron_salt.teacher.placement import with_teacher, work_bound
from megatron_salt.teacher.plan import TeacherPlan, plan_teacher, teaches_ahead
from megatron_salt.teacher.schedule import plain_programs
from megatron_salt.teacher.simulator import Op, Program, StepTimes, Timeline, simulate

# p times M up to which the search for the teacher's places takes about a second.
SIMULATED_UP_TO = 512


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Seconds of a step in each phase and placement, and what the simulator saw; one stage has no
    bubbles."""

    lm_s: float
    """NaN where a KD step was measured and the plain forward was not."""
    lm: Timeline | None
    kd_before_s: float | None = None
    kd_before: Timeline | None = None
    kd_bubble_s: float | None = None
    kd_bubble: Timeline | None = None
    kd_bound_s: float | None = None
    """No step in the bubbles with this division of the rows can be shorter."""
    plan: TeacherPlan | None = None
    """Of the bubbles, made as training makes it, by these seconds."""

    def kd_s(self, *, ahead: bool) -> float:
        """Of a KD step; without a teacher it is a plain one."""
        chosen = self.kd_bubble_s if ahead else self.kd_before_s
        return self.lm_s if chosen is None else chosen


def simulated(sizes: Sizes, machine: Machine, measured: MeasuredTimes | None = None) -> Steps:
    """The steps of a layout, by the instruction lists that training runs."""

    def times_of(some: Sizes) -> StepTimes:
        return measured.step_times(some) if measured else step_times(some, machine)

    programs = plain_programs(sizes.settings.num_micro_batches, sizes.layout.pp_size)
    lm, lm_s = None, math.nan
    if sizes.teacher is None or measured is None or measured.forward_s is not None:
        lm = simulate(programs, times_of(replace(sizes, teacher=None)))
        lm_s = lm.step_time
    if sizes.teacher is None:
        return Steps(lm_s=lm_s, lm=lm)
    times = times_of(sizes)
    exchange = 0.0 if measured else hidden_exchange_s(sizes, machine)
    kd_before = _before_the_step(sizes, times, programs)
    arrival = times.hidden_transfer if measured else _arrival(sizes, machine, times)
    steps = Steps(
        lm_s=lm_s, lm=lm, kd_before=kd_before, kd_before_s=kd_before.step_time + exchange + arrival
    )
    plan = plan_teacher(sizes.shape, times, in_bubbles=True)
    if plan.placement is None:  # one stage
        return steps
    kd_bubble = simulate(with_teacher(programs, plan.placement.before), times)
    bound = work_bound(times, programs, teacher_work(plan, times)) + times.update
    return replace(
        steps, kd_bubble_s=kd_bubble.step_time + exchange, kd_bubble=kd_bubble,
        kd_bound_s=bound + exchange, plan=plan,
    )  # fmt: skip


def teacher_work(plan: TeacherPlan, times: StepTimes) -> list[float]:
    """Seconds that the first tensor-parallel rank of every stage teaches."""
    return [times.teacher_work(ranks[0], plan.num_chunks) for ranks in plan.pieces_of]


def _before_the_step(sizes: Sizes, times: StepTimes, programs: Sequence[Program]) -> Timeline:
    plan = plan_teacher(sizes.shape, times, in_bubbles=False)
    passes = [
        {0: tuple(Op("teacher", piece, k) for piece in ranks[0] for k in range(plan.num_chunks))}
        for ranks in plan.pieces_of
    ]
    return simulate(with_teacher(programs, passes), times)


def _arrival(sizes: Sizes, machine: Machine, times: StepTimes) -> float:
    """How much later than the teacher's work its hidden states are all on the last stage: the last
    piece, or all that this rank receives, if the link is slower than the work."""
    pp = sizes.layout.pp_size
    if pp == 1:
        return 0.0
    rows = sizes.shape.num_rows / sizes.shape.teachers_per_stage * (pp - 1) / pp
    rate = machine.link_bytes_s(sizes.layout.world_size)
    received = rows * sizes.hidden_row_bytes / rate
    plan = plan_teacher(sizes.shape, times, in_bubbles=False)
    return max(times.hidden_transfer, received - teacher_work(plan, times)[-1])


def closed_form(sizes: Sizes, machine: Machine) -> tuple[float, float]:
    """Seconds of a plain step and of a KD step, without the simulator.

    Math: 1F1B takes sum(f + b) + (M - 1) max(f + b) over the stages, transfers included; the
    teacher in the bubbles what the stages' work, evened out, exceeds that by; before the step its
    share comes on top.
    """
    plain = step_times(replace(sizes, teacher=None), machine)
    lm_s = _one_forward_one_backward(sizes, plain) + plain.update
    if sizes.teacher is None:
        return lm_s, lm_s
    times, layout = step_times(sizes, machine), sizes.layout
    step = _one_forward_one_backward(sizes, times)
    pieces, chunks = sizes.shape.pieces, len(sizes.shape.chunk_bounds)
    rows = pieces[0][1] - pieces[0][0]
    row = sum(times.teacher(0, chunk) for chunk in range(chunks)) / rows
    work = row * sizes.shape.num_rows / sizes.shape.teachers_per_stage
    extra = times.update + hidden_exchange_s(sizes, machine)
    if not teaches_ahead(sizes.config.teacher.placement, layout):
        return lm_s, step + work / layout.pp_size + _arrival(sizes, machine, times) + extra
    num_micro = sizes.settings.num_micro_batches
    busy = [num_micro * (f + b) for f, b in zip(times.forward, times.backward, strict=True)]
    return lm_s, max(step, water_level(busy, work)) + extra


def _one_forward_one_backward(sizes: Sizes, times: StepTimes) -> float:
    both = [f + b + 2 * times.transfer for f, b in zip(times.forward, times.backward, strict=True)]
    return sum(both) + (sizes.settings.num_micro_batches - 1) * max(both)


def water_level(busy: Sequence[float], work: float) -> float:
    """How long the stages are busy if `work` is spread over them so that the longest is shortest.

    Math: the level L with sum(max(0, L - busy)) = work; at least max(busy).
    """
    lowest = sorted(busy)
    level = lowest[0]
    for count, upper in enumerate([*lowest[1:], float("inf")], start=1):
        room = count * (upper - level)
        if room >= work:
            return max(level + work / count, lowest[-1])
        work -= room
        level = upper
    raise AssertionError("the last stage has no upper limit")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A layout with its memory and its times."""

    sizes: Sizes
    memory: dict[str, list[StageMemory]]
    """By phase, KD (if there is a teacher) and LM, of every stage."""
    lm_s: float
    kd_s: float
    steps: Steps | None = None
    """What the simulator says; None: `lm_s` and `kd_s` are `closed_form`'s."""

    @property
    def largest_bytes(self) -> float:
        return max(part.total for parts in self.memory.values() for part in parts)

    @property
    def total_s(self) -> float:
        """Of the whole run, both phases."""
        kd_steps, steps = self.sizes.config.salt.kd_steps, self.sizes.config.train.steps
        return kd_steps * self.kd_s + (steps - kd_steps) * self.lm_s


def phases_memory(sizes: Sizes, plan: TeacherPlan | None = None) -> dict[str, list[StageMemory]]:
    found = {"KD": stage_memory(sizes, plan)} if sizes.teacher else {}
    return {**found, "LM": stage_memory(replace(sizes, teacher=None))}


def quick_estimate(sizes: Sizes, machine: Machine) -> Estimate:
    """By closed forms alone."""
    lm_s, kd_s = closed_form(sizes, machine)
    return Estimate(sizes=sizes, memory=phases_memory(sizes), lm_s=lm_s, kd_s=kd_s)


def full_estimate(
    sizes: Sizes, machine: Machine, measured: MeasuredTimes | None = None
) -> Estimate:
    """By the simulator."""
    steps = simulated(sizes, machine, measured)
    ahead = teaches_ahead(sizes.config.teacher.placement, sizes.layout)
    return Estimate(
        sizes=sizes, memory=phases_memory(sizes, steps.plan if ahead else None), lm_s=steps.lm_s,
        kd_s=steps.kd_s(ahead=ahead), steps=steps,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """How much longer than a plain step a KD step is at a number of micro-batches, as a share."""

    num_micro_batches: int
    lm_s: float
    before_step: float
    bubble: float
    bound: float


def overheads(sizes: Sizes, machine: Machine, own_steps: Steps | None = None) -> list[Overheads]:
    """At p, 2 p, 4 p, 8 p micro-batches and the run's own, with everything else as it is.

    Args:
        own_steps: those of the run's own number, if they are known.
    """
    if sizes.teacher is None or sizes.layout.pp_size == 1:
        return []
    p, own = sizes.layout.pp_size, sizes.settings.num_micro_batches
    found = []
    for num in sorted({own, *(p * k for k in (1, 2, 4, 8))}):
        if p * num > SIMULATED_UP_TO and num != own:
            continue
        if num == own and own_steps is not None:
            steps = own_steps
        else:
            settings = replace(sizes.settings, num_micro_batches=num)
            steps = simulated(replace(sizes, settings=settings), machine)
        assert steps.kd_before_s and steps.kd_bubble_s and steps.kd_bound_s
        lm_s = steps.lm_s
        found.append(
            Overheads(
                num_micro_batches=num, lm_s=lm_s, before_step=steps.kd_before_s / lm_s - 1,
                bubble=steps.kd_bubble_s / lm_s - 1, bound=steps.kd_bound_s / lm_s - 1,
            )
        )  # fmt: skip
    return found
