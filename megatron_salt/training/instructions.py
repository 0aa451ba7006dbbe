"""DeepSpeed's pipeline engine, taught the teacher's instructions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule, ReduceTiedGrads

from megatron_salt.parallel.timers import Moment, moment_now, seconds_between
from megatron_salt.parallel.watchdog import StepWatchdog
from megatron_salt.teacher.passes import TeacherPass
from megatron_salt.teacher.schedule import RecvHidden, SendHidden, TeacherForward, TeachingSchedule
from megatron_salt.training.gradients import reduce_tied

Handler = Callable[..., None]


class Instructions:
    """Hooks into DeepSpeed's two extension points: which schedule, and what its words mean.

    Without a teacher's pass the schedule is DeepSpeed's own, so a step of the LM phase is what it
    would be without this class. Every instruction is noted in `watchdog`.

    Args:
        engine: a `PipelineEngine`; only this object is changed, not its class.
    """

    def __init__(self, engine: Any, watchdog: StepWatchdog) -> None:
        self.engine, self.watchdog = engine, watchdog
        self.teacher_pass: TeacherPass | None = None
        self._marks: list[tuple[PipeInstruction, Moment, Moment]] | None = None
        own: dict[type[PipeInstruction], Handler] = {
            TeacherForward: self._of_own_piece(TeacherPass.run),
            SendHidden: self._of_own_piece(TeacherPass.send),
            RecvHidden: self._of_own_piece(TeacherPass.receive),
            ReduceTiedGrads: reduce_tied,
        }
        meanings = {**engine._INSTRUCTION_MAP, **own}
        engine._INSTRUCTION_MAP = {
            kind: self._noted(kind, meaning) for kind, meaning in meanings.items()
        }
        self._plain_schedule = engine._train_schedule
        engine._train_schedule = self._schedule

    @contextlib.contextmanager
    def teaching(self, teacher_pass: TeacherPass | None) -> Iterator[None]:
        """Within it a step also runs the teacher's pass over the next batch, if there is one."""
        self.teacher_pass = teacher_pass
        try:
            yield
        finally:
            self.teacher_pass = None

    def _schedule(self) -> PipeSchedule:
        if self.teacher_pass is None:
            return self._plain_schedule()
        placement = self.teacher_pass.plan.placement
        assert placement is not None
        engine = self.engine
        return TeachingSchedule(engine.micro_batches, engine.num_stages, engine.stage_id, placement)

    def _noted(self, kind: type[PipeInstruction], meaning: Handler) -> Handler:
        def run(engine: Any, **arguments: Any) -> None:
            instruction = kind(**arguments)
            self.watchdog.enter(repr(instruction))
            if self._marks is None:
                meaning(engine, **arguments)
                return
            start = moment_now(engine.device)
            meaning(engine, **arguments)
            self._marks.append((instruction, start, moment_now(engine.device)))

        return run

    def start_trace(self) -> None:
        """Note from now on when every instruction begins and ends; on CUDA by events."""
        self._marks = []

    def take_trace(self) -> list[tuple[PipeInstruction, float, float]] | None:
        """What was noted, in seconds of any one beginning, and stop; None without `start_trace`.

        Host sync: waits for the last event on CUDA.
        """
        marks, self._marks = self._marks, None
        if not marks:
            return None if marks is None else []
        beginning = marks[0][1]
        return [
            (instruction, seconds_between(beginning, start), seconds_between(beginning, stop))
            for instruction, start, stop in marks
        ]

    def _of_own_piece(self, action: Handler) -> Handler:
        """An action on the piece of this tensor-parallel rank where the schedule, shared by all of
        them, names the first one's."""

        def run(engine: Any, piece: int, **arguments: int) -> None:
            assert self.teacher_pass is not None
            own = self.teacher_pass.plan.of_tp_rank(piece, self.teacher_pass.groups.tp_rank)
            if own is not None:
                action(self.teacher_pass, own, **arguments)

        return run
