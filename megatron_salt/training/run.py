"""A run: its parts, built in a few lines that show every owner, then the loop over steps.

Read `Run.step` to follow one training step; docs/architecture.md walks through it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import comm

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import Evaluation
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import Batch
from megatron_salt.data.order import rows_of_rank
from megatron_salt.data.read_ahead import ReadAhead
from megatron_salt.evaluation.held_out import HeldOut
from megatron_salt.model.loss import LossSums
from megatron_salt.parallel.groups import same_error_everywhere
from megatron_salt.parallel.timers import Stopwatch
from megatron_salt.parallel.watchdog import StepWatchdog
from megatron_salt.teacher.schedule import measured_times, times_table
from megatron_salt.teacher.teacher import Teacher
from megatron_salt.training import start
from megatron_salt.training.checks import Diverged, StepChecks
from megatron_salt.training.console import Console
from megatron_salt.training.engine import StudentEngine
from megatron_salt.training.initial import export_last, initial_weights
from megatron_salt.training.kd_phase import KdPhase
from megatron_salt.training.learning_rate import learning_rate
from megatron_salt.training.saving import Saver
from megatron_salt.training.student_logits import StudentLogits
from megatron_salt.training.teaching import Measure, Teaching

# The first steps of a process are slower than the others; this one's times decide where in a step
# the teacher works.
MEASURED_STEP = 2


def prepare(
    config: RunConfig,
    deepspeed_config: str,
    *,
    watchdog: type[StepWatchdog] = StepWatchdog,
    measure: Measure = measured_times,
) -> Run:
    """Join the ranks, check everything there is to check, and build the run up to its first step.

    Raises: ValueError or FileNotFoundError naming the setting or file that is wrong;
        `start.NothingToDo`.
    """
    settings, groups = start.join_ranks(config, deepspeed_config)
    console = Console(config.train, groups)
    agreed = start.agree_on_start(config, settings, groups, console)
    data = start.build_data(config, settings, agreed, console, teaches=groups.is_last_stage)
    start.prepare_loss(config, settings, groups, console)
    console.say(start.announce_build(settings))
    student = StudentEngine(
        config, settings, groups, vocab_size=agreed.tokenizer.vocab_size,
        watchdog=watchdog(groups, config.parallel.timeout_minutes),
        weights=initial_weights(agreed.initial, groups, console),
    )  # fmt: skip
    start.resume_student(student, config, agreed, console)
    log = start.open_log(config, student, agreed.step)
    kd = KdPhase(config.salt, agreed.switch)
    held_out = HeldOut(config, data, student)
    teaching = Teaching(config, student, kd, console, measure)
    if agreed.resumed:
        teaching.fingerprint = agreed.resumed.run.teacher_fingerprint
    if config.teacher.kind and kd.phase(agreed.step) == "kd":
        teaching.bring(agreed, held_out)
    elif config.teacher.kind and agreed.resume_from and agreed.resumed:
        console.warn(held_out.resume(agreed.resume_from, agreed.resumed))
    saver = Saver(config, student, held_out, kd, agreed.init_fingerprint, log, console, agreed.lock)
    captured = None
    if config.train.cache_logits:
        captured = StudentLogits(config, data, student, agreed.step)
    run = Run(config, agreed, student, teaching, held_out, saver, captured)
    if agreed.step == 0:
        # The untrained student's score: where every curve begins.
        with console.timed("evaluation"):
            values = held_out.evaluate()
        if log:
            log.write({"step": 0, "tokens": 0, **values})
    return run


def train(run: Run) -> None:
    """Train from the checkpoint that train.resume names, or from the start, to train.steps."""
    with run.student.watchdog.watched():
        try:
            for step in run.console.progress(run.first_step):
                run.step(step)
        except Diverged:
            run.saver.drain()
            raise
        run.finish()


@dataclass(eq=False)
class Run:
    """The parts of a run on this rank and what happens from step to step."""

    config: RunConfig
    agreed: start.Start
    student: StudentEngine
    teaching: Teaching
    held_out: HeldOut
    saver: Saver
    captured: StudentLogits | None = None

    def __post_init__(self) -> None:
        self.groups, self.settings = self.student.groups, self.student.settings
        self.data, self.log = self.held_out.data, self.saver.log
        self.kd, self.console = self.teaching.kd, self.teaching.console
        train, device = self.config.train, self.groups.device
        self.first_step = self.done = self.agreed.step
        resumed = self.agreed.resumed
        self.tokens = resumed.run.tokens if resumed else 0
        self.evaluation = resumed.model.evaluation if resumed else None
        self.checks = StepChecks(self.student, Path(train.output_dir))
        self.batches = ReadAhead(self._read, self.first_step, train.steps, device)
        self.clock = Stopwatch(device)
        self.console.start_clock(self.first_step)

    @property
    def teacher(self) -> Teacher | None:
        return self.teaching.teacher

    def where_it_is(self) -> str:
        """For whoever interrupts the run: what is done, what is kept, and how to go on."""
        found = list_checkpoints(self.config.train.output_dir)
        how = "the same command" if self.config.train.resume == "auto" else "train.resume auto"
        if not found:
            return f"after step {self.done}; there is no checkpoint yet: {how} begins anew"
        return f"after step {self.done}; the newest checkpoint is {found[-1]}: {how} goes on there"

    def _read(self, step: int) -> Batch:
        """This rank's rows of a step, on the CPU."""
        groups = self.groups
        rows = rows_of_rank(
            step, self.settings.global_batch_size, groups.dp_rank, groups.layout.dp_size
        )
        return self.data.read(rows, self.kd.phase(step))

    def step(self, step: int) -> None:
        """One optimizer step (counted from 0), its metrics, and what is due after it."""
        self.teaching.end_if_over(step)
        with self.student.watchdog.in_step(step):
            self.clock.start()
            batch = self.batches.take(step)
            weight = self.kd.weight(step)
            hidden_RSE = self.teaching.hidden_for(step, batch)
            micro_batches = self.student.micro_batches(
                batch, weight, hidden_RSE, self.kd.phase(step)
            )
            lr = learning_rate(self.config.train, self.settings.learning_rate, step)
            traced = self._start_trace(step)
            # The teacher's work on the next batch, done where this one's pipeline waits.
            next_pass = self.teaching.begin(step + 1, self.batches.peek)
            self.student.train_step(micro_batches, lr, next_pass)
            if self.captured:
                self.captured.write(step, batch)
            del hidden_RSE, micro_batches
            self.student.watchdog.enter("the sums of the step")
            sums, saved = self.student.reduce_sums(*self.saver.flags())
            self.clock.stop()
            if traced:
                self._use_trace(step)
            record = self._record(step, sums, weight, lr)
            self.tokens = record["tokens"]
            self.saver.look(*saved)
            self.checks.look(step + 1, sums.loss, record["grad_norm"])
            self.done = step + 1
            self._after_step(step + 1, record)

    def _after_step(self, done: int, record: dict[str, Any]) -> None:
        """What is due after a step: evaluation, a line of metrics, a line for people, saving."""
        train, last = self.config.train, done == self.config.train.steps
        if last or (train.eval_interval and done % train.eval_interval == 0):
            self.student.watchdog.enter("the evaluation after it")
            with self.console.timed("evaluation"):
                record.update(self._evaluate(done))
        if self.log:
            self.log.write(record)
        first = done == self.first_step + 1
        if done % train.log_interval == 0 or first or "valid_ce_nats" in record:
            self.console.step_line(record)
        if last or (train.checkpoint_interval and done % train.checkpoint_interval == 0):
            self.student.watchdog.enter("the checkpoint after it")
            with self.console.timed("checkpoint"):
                self.save(done)

    def _start_trace(self, step: int) -> bool:
        """Note the times of this step's instructions, if somebody wants them."""
        traced = step in (self.first_step + MEASURED_STEP, self._plain_measured_step)
        if self.student.says_times:
            traced = traced or (step + 1) % self.config.train.log_interval == 0
        if traced:
            self.student.start_trace()
        return traced

    def _use_trace(self, step: int) -> None:
        """Of a step that was traced: say its times if that is wanted, plan by them if it is time.

        Rank 0's pipeline is taken for all.
        Collectives: an all-gather of the traces over pp, a broadcast of a new plan over all ranks.
        """
        trace = self.student.take_trace()
        if trace is None:
            return
        traces: list[Any] = [None] * self.groups.layout.pp_size
        dist.all_gather_object(traces, trace, group=self.groups.pp)
        if self.student.says_times:
            self.console.say(f"step {step + 1}, ms by stage: {times_table(traces)}")
        # After the next step there may be nothing more to be taught ahead.
        if step == self.first_step + MEASURED_STEP and self.kd.phase(step + 2) == "kd":
            self.teaching.replan(traces)
        elif step == self._plain_measured_step:
            self.teaching.note_plain_step(traces)

    @property
    def _plain_measured_step(self) -> int:
        """The step after the switch whose times stand for the LM phase."""
        return self.kd.salt.kd_steps + MEASURED_STEP

    def _record(self, step: int, sums: LossSums, weight: float, lr: float) -> dict[str, Any]:
        """The metrics of a step; docs/metrics.md explains each."""
        count = max(sums.tokens, 1.0)
        seconds = self.clock.seconds()
        return {
            "step": step + 1,
            "phase": self.kd.phase(step),
            "ce_nats": sums.ce_nats / count,
            "kl_nats": sums.kl_nats / count if self.teaching.teaches(step) else None,
            "kd_weight": weight,
            "taught_share": sums.taught / count,
            "ce_share": sums.ce_counted / count,
            "loss": sums.loss,
            "lr": lr,
            "grad_norm": self.student.grad_norm(),
            "tokens": self.tokens + int(sums.tokens),
            "step_time_s": seconds,
            "tokens_per_s": sums.tokens / seconds,
            "teacher_time_s": self.teaching.take_time_s(),
        }

    def _evaluate(self, done: int) -> dict[str, float]:
        """Score the student on the held-out samples; decide the switch by it, where it is due."""
        values = self.held_out.evaluate()
        self.evaluation = Evaluation(
            step=done, ce_nats=values["valid_ce_nats"], accuracy=values["valid_accuracy"],
            tokens=int(values["valid_tokens"]), data=self.held_out.fingerprint,
        )  # fmt: skip
        if not math.isfinite(values["valid_ce_nats"]):
            raise Diverged(f"step {done}: the held-out CE is {values['valid_ce_nats']}")
        if self.config.salt.switch == "adaptive":
            teaches = self.teaching.teaches(done - 1)
            decided = self.kd.update(done, values) if teaches else None
            if decided:
                # What was read ahead went by another end of the KD phase.
                self.batches.restart(done)
                self.saver.drain()
                self.console.say(decided)
            values["switch_streak"] = self.kd.state.streak
            values["kd_end_step"] = self.kd.salt.kd_steps
        return values

    def save(self, done: int) -> None:
        """Begin a checkpoint after `done` steps; see `Saver.save`."""
        self.saver.save(done, self.tokens, self.evaluation, self.teaching.fingerprint)

    def finish(self) -> None:
        """Close files and threads; what was trained lies in the last checkpoint."""
        self.batches.close()
        self.saver.close()
        if self.settings.values.get("comms_logger", {}).get("enabled"):
            comm.log_summary()
        if self.captured:
            self.captured.finish(self.console)
        if self.config.train.export_hf:
            with same_error_everywhere("exporting the last checkpoint"):
                if self.groups.rank == 0:
                    self.console.say(export_last(self.config))
        for file in (self.log, self.agreed.lock):
            if file is not None:
                file.close()
        if self.evaluation is not None and math.isfinite(self.evaluation.ce_nats):
            self.console.say(
                f"held-out CE after step {self.evaluation.step}: "
                f"{self.evaluation.ce_nats:.4f} nats/token"
            )
        dist.barrier()
