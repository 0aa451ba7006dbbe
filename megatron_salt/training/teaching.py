"""The teacher's part in a run: brought, asked for hidden states, planned anew, released."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_salt.checkpoint.manifest import CheckpointManifest, weights_fingerprint
from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import Batch
from megatron_salt.data.tag_inputs import TagInputs
from megatron_salt.evaluation.held_out import HeldOut
from megatron_salt.files.disk import atomic_path
from megatron_salt.files.json_files import read_object
from megatron_salt.huggingface.teacher_folder import find_teacher_of
from megatron_salt.huggingface.teacher_model import load_hf_model
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import from_rank_0, same_error_everywhere
from megatron_salt.teacher.find import unseen_objectives
from megatron_salt.teacher.passes import TeacherModel, TeacherPass
from megatron_salt.teacher.plan import (
    StepShape,
    TeacherPlan,
    multiply_adds,
    plan_teacher,
    teaches_ahead,
)
from megatron_salt.teacher.schedule import Trace, measured_values
from megatron_salt.teacher.simulator import StepTimes
from megatron_salt.teacher.teacher import Teacher
from megatron_salt.training.console import Console
from megatron_salt.training.engine import StudentEngine
from megatron_salt.training.kd_phase import KdPhase
from megatron_salt.training.start import Start

Measure = Callable[
    [Sequence[Trace], Sequence[tuple[int, int]], Sequence[tuple[int, int]]], StepTimes
]


@dataclass(eq=False)
class Teaching:
    """The teacher of a run while there is one; without one every question is answered by None."""

    config: RunConfig
    student: StudentEngine
    kd: KdPhase
    console: Console
    measure: Measure
    """Makes times of traces; `schedule.measured_times`."""

    def __post_init__(self) -> None:
        self.groups = self.student.groups
        self.ahead = teaches_ahead(self.config.teacher.placement, self.groups.layout)
        """Whether the teacher works on the next batch during this one's step."""
        self.teacher: Teacher | None = None
        self.shape: StepShape | None = None
        self.fingerprint: str | None = None
        """Identity of the teacher's weights, of one that has gone too."""
        self._begun: tuple[int, TeacherPass] | None = None
        """The step for which the teacher has worked ahead, and its pass over that batch."""

    def teaches(self, step: int) -> bool:
        """Whether a step's tokens are taught, by a model or by stored logits."""
        stored = self.config.teacher.kind == "logits" and self.kd.phase(step) == "kd"
        return stored or self.teacher is not None

    def bring(self, agreed: Start, held_out: HeldOut) -> None:
        """Load the teacher, check its tokenizer, score it on the held-out samples, plan its work.

        Raises: ValueError on all ranks, naming the checkpoint and what does not fit.
        """
        if self.config.teacher.kind == "logits":
            self._bring_stored(agreed.tag_inputs, held_out)
            return
        tokenizer, resumed = agreed.tokenizer, agreed.resumed
        config, settings, groups = self.config, self.student.settings, self.groups
        found: tuple[Path, CheckpointManifest] | None = None
        with same_error_everywhere("checking the teacher"):
            if groups.rank == 0:
                found = find_teacher_of(config, tokenizer, resumed)
        folder, manifest = from_rank_0(found)
        self.console.warn(unseen_objectives(folder, manifest, config))
        self.fingerprint = weights_fingerprint(manifest)
        dtype = DTYPES[settings.precision]
        model = self._load(folder, manifest, dtype)
        self.teacher = Teacher(
            model, manifest.model, groups, source=str(folder),
            micro_batch_size=settings.micro_batch_size, dtype=dtype,
        )  # fmt: skip
        self.student.loss_function.teacher_head_WE = self.teacher.head_WE
        self.shape = StepShape.of_run(
            config, settings, groups.layout, tokenizer.vocab_size, manifest.model.config
        )
        costs = multiply_adds(self.shape)
        plan: TeacherPlan | None = None
        with same_error_everywhere("planning the teacher's work"):
            if groups.rank == 0:
                plan = plan_teacher(self.shape, costs, in_bubbles=self.ahead)
        plan = from_rank_0(plan)
        line, warnings = held_out.score_teacher(self.teacher)
        self.console.say(line)
        self.console.warn(warnings)
        self.teacher.take_time_s()  # steps count their own
        self.teacher.prepare(plan, ahead=self.ahead)
        self.console.say(f"teacher: {plan.describe('multiply-adds')}")

    def _bring_stored(self, stored: TagInputs, held_out: HeldOut) -> None:
        """The teacher's held-out losses, if they were stored beside its logits.

        Raises: ValueError on all ranks if the adaptive switch has to go by them and cannot.
        """
        self.fingerprint = stored.teacher_fingerprint
        problem = held_out.take_stored(self.config.teacher.logits)
        if problem and self.config.salt.switch == "adaptive":
            raise ValueError(f"salt.switch = adaptive goes by the teacher's losses; {problem}")
        self.console.warn(
            [f"evaluations go on without the teacher's losses: {problem}"] * bool(problem)
        )

    def _load(self, folder: Path, manifest: CheckpointManifest, dtype: torch.dtype) -> TeacherModel:
        """The frozen model on every rank, its head on those of the last stage."""
        parts, groups, data = self.student.parts, self.groups, self.config.data
        sizes: dict[str, Any] = {
            "seq_length": data.seq_length, "dtype": dtype,
            "head": parts.vocab if groups.is_last_stage else None,
            "head_columns": parts.padded_vocab // parts.tp_size,
        }  # fmt: skip
        if self.config.teacher.hf is None:
            spread = self.config.teacher.tensor_parallel
            return load_frozen(folder, manifest, groups, tensor_parallel=spread, **sizes)
        return load_hf_model(folder, manifest, groups, **sizes)

    def hidden_for(self, step: int, batch: Batch) -> Tensor | None:
        """The teacher's hidden states of this step's rows, [R, S, E] on the last stage; None
        elsewhere, and without a teacher.

        They have been made during the step before, if the teacher has worked ahead (`begin`). If
        not, it runs over this batch before the step, visibly.
        """
        if self.teacher is None:
            return None
        if self._begun is not None:
            begun_for, teacher_pass = self._begun
            assert begun_for == step, f"the teacher has read step {begun_for}, not {step}"
            self._begun = None
            return teacher_pass.finish()
        if self.ahead:
            self.console.say(f"step {step}: the teacher reads this batch before the step")
        teacher_pass = self.teacher.begin_pass(batch.tokens_RS, batch.prefix_R)
        teacher_pass.run_all()
        return teacher_pass.finish()

    def begin(self, step: int, peek: Callable[[int], Batch]) -> TeacherPass | None:
        """The teacher's pass for `step`, to be run during the one before it; None if there is none.

        Args:
            peek: the batch of a step; called only where there is a pass.
        """
        untaught = step >= self.config.train.steps or self.kd.phase(step) == "lm"
        if self.teacher is None or not self.ahead or untaught:
            return None
        batch = peek(step)
        teacher_pass = self.teacher.begin_pass(batch.tokens_RS, batch.prefix_R)
        self._begun = step, teacher_pass
        return teacher_pass

    def replan(self, traces: Sequence[Trace]) -> None:
        """Plan the teacher's work by the times of a traced step of all stages.

        Multiply-adds know nothing of how well a device does them. Pieces stay, so the numbers do
        too, whoever computes them and when.

        Also writes measured_times.json into output_dir, for `megatron-salt plan --measured`.
        """
        if self.teacher is None or not self.ahead:
            return
        assert self.shape is not None
        plan: TeacherPlan | None = None
        with same_error_everywhere("planning the teacher's work"):
            if self.groups.rank == 0:
                times = self.measure(traces, self.shape.pieces, self.shape.chunk_bounds)
                plan = plan_teacher(self.shape, times, in_bubbles=True)
                self._write_measured(measured_values(times, self.shape.pieces, plan.num_chunks))
        plan = from_rank_0(plan)
        self.teacher.prepare(plan, ahead=True)
        self.console.say(f"teacher, placed anew: {plan.describe('measured times')}")

    def note_plain_step(self, traces: Sequence[Trace]) -> None:
        """Add the forward times of a traced LM step to measured_times.json, if the KD phase has
        left one: with them the planner compares the two phases."""
        with same_error_everywhere("writing measured_times.json"):
            if self.groups.rank == 0 and self.measured_path.exists():
                values = read_object(self.measured_path)
                values["forward_s"] = list(self.measure(traces, [], []).forward)
                self._write_measured(values)

    @property
    def measured_path(self) -> Path:
        return Path(self.config.train.output_dir) / "measured_times.json"

    def _write_measured(self, values: dict[str, Any]) -> None:
        with atomic_path(self.measured_path) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def take_time_s(self) -> float:
        """Seconds of the teacher's forward passes on this rank since the last call."""
        return self.teacher.take_time_s() if self.teacher else 0.0

    def end_if_over(self, step: int) -> None:
        """The switch, before the first step of the LM phase: the teacher goes, the rest stays."""
        if self.teacher is not None and self.kd.phase(step) == "lm":
            self.release(step)
        elif step == self.kd.salt.kd_steps > 0:
            self.console.say(f"step {step}: KD phase over")

    def release(self, step: int) -> None:
        """Let go of the teacher and its buffers."""
        assert self.teacher is not None
        before, size = self.console.memory_of_ranks(), self.teacher.num_bytes()
        self.student.loss_function.teacher_head_WE = None
        if self._begun is not None:  # an adaptive end came after the next batch had been taught
            self._begun[1].finish()
            self._begun = None
        self.teacher.release()
        self.teacher = None
        self.console.say(
            f"step {step}: KD phase over, teacher released ({size / 2**30:.2f} GiB of weights on "
            f"rank 0); {before} before, {self.console.memory_of_ranks()} after"
        )
