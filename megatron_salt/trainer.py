"""The run: builds every object in sight, then the loop over steps.

Read `Run.step` to follow one training step; docs/architecture.md walks through it.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm
from torch import Tensor
from tqdm import tqdm

from megatron_salt import checkpoint as ckpt
from megatron_salt.config import RunConfig, SaltConfig, write_config
from megatron_salt.data.dataset import (
    Batch,
    Choice,
    DataSource,
    find_tokenizer,
    load_choice,
    reads_reference_loss,
    reads_tags,
    verify_all,
)
from megatron_salt.data.objective import check_sentinels
from megatron_salt.data.order import rows_of_rank
from megatron_salt.data.read_ahead import ReadAhead
from megatron_salt.deepspeed_config import (
    DeepSpeedSettings,
    check_against_run,
    load_deepspeed_config,
    read_json,
)
from megatron_salt.held_out import HeldOut
from megatron_salt.machine import check_fused_adam, fused_adam_facts
from megatron_salt.metrics import MetricsLog, Stopwatch, allocated_bytes, console_line
from megatron_salt.model.attention import device_attention_backends
from megatron_salt.model.loss import LossSums, loss_body
from megatron_salt.model.teacher import Lesson, Teacher
from megatron_salt.parallel.engine import DTYPES, StudentEngine
from megatron_salt.parallel.gradients import not_finite
from megatron_salt.parallel.groups import (
    Groups,
    from_rank_0,
    initialize,
    make_deterministic,
    same_error_everywhere,
)
from megatron_salt.parallel.schedule import Trace, measured_times, measured_values, times_table
from megatron_salt.parallel.teaching import (
    StepShape,
    TeachingPlan,
    multiply_adds,
    plan_teaching,
    teaches_ahead,
)
from megatron_salt.resume import (
    changed_deepspeed,
    changed_settings,
    check_same_choice,
    decide_start,
    find_teacher,
    lock_output_dir,
    unseen_objectives,
)
from megatron_salt.salt import kd_weight, learning_rate, phase
from megatron_salt.switch import SwitchState, carried_over, effective, update

# With a loss scale that starts at 2^16 and halves every second overflow, more is no search.
MAX_SKIPPED_FP16_STEPS = 64
# The first steps of a process are slower than the others; this one's times decide where in a step
# the teacher works.
MEASURED_STEP = 2


def prepare(config: RunConfig, deepspeed_config: str) -> Run:
    """Join the ranks, check everything there is to check, and build the run up to its first step.

    Raises: ValueError or FileNotFoundError naming the setting or file that is wrong.
    """
    parallel = config.parallel
    if config.train.deterministic:
        make_deterministic()
    groups = initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.timeout_minutes,
    )
    with same_error_everywhere("reading the DeepSpeed config"):
        settings = load_deepspeed_config(deepspeed_config, groups.layout.dp_size)
        check_against_run(settings, config)
        if groups.device.type == "cuda":
            check_fused_adam(settings.values, settings.path, fused_adam_facts())
    return Run(config, settings, groups)


def train(run: Run) -> None:
    """Train from the checkpoint that train.resume names, or from the start, to train.steps."""
    with run.student.whereabouts.watched():
        for step in run.progress(range(run.first_step, run.config.train.steps)):
            run.step(step)
        run.finish()


class Run:
    """The objects of a run on this rank and what happens between two steps."""

    def __init__(self, config: RunConfig, settings: DeepSpeedSettings, groups: Groups) -> None:
        self.config, self.settings, self.groups = config, settings, groups
        self.output_dir = Path(config.train.output_dir)
        with same_error_everywhere("checking data and checkpoint"):
            self.tokenizer = find_tokenizer(config.data)
            start = choice = None
            if groups.rank == 0:
                verify_all(config.data, self.tokenizer)
                check_sentinels(config.data, self.tokenizer)
                choice = load_choice(config, self.tokenizer)
                self.lock = lock_output_dir(config.train.output_dir)
                fingerprint = self.tokenizer.fingerprint
                start = decide_start(config, groups.layout, settings, fingerprint)
                if start[1] is not None:
                    check_same_choice(config, start[1], choice)
        # One rank looks and decides: shared file systems show different ranks different folders.
        resume_from, resumed, warnings = from_rank_0(start)
        self.choice: Choice = from_rank_0(choice)
        for warning in warnings:
            self.say(f"WARNING {warning}")
        with same_error_everywhere("verifying the checkpoint to resume from"):
            if resumed:
                share = sorted(resumed.files)[groups.rank :: groups.layout.world_size]
                ckpt.verify_hashes(resume_from, resumed, share)
        self.first_step = resumed.step if resumed else 0
        self.tokens = resumed.tokens if resumed else 0
        self.evaluation = resumed.evaluation if resumed else None
        self.switch = SwitchState()
        if resumed:
            self.switch = carried_over(resumed.switch, resumed.config.salt, config.salt)
        self.data = DataSource(
            config.data,
            self.tokenizer,
            num_samples=config.train.steps * settings.global_batch_size,
            seed=config.train.seed,
            cache_path=Path(config.data.cache_path or self.output_dir / "index_cache"),
            num_selected=config.salt.kd_steps * settings.global_batch_size,
            choice=self.choice,
            with_reference_loss=reads_reference_loss(config),
        )
        for line in self.data.epochs_needed():
            self.say(f"data: {line}")
        for line in self.choice.describe():
            self.say(f"data: {line}")
        if config.data.tags and not reads_tags(config):
            self.say(
                "WARNING data.tags has no effect: neither salt.kd_tokens nor salt.ce_tokens reads "
                "the tags"
            )
        if resumed and resumed.data != self.data.fingerprints():
            raise ValueError(
                f"{resume_from}: was trained on other data than data.train_data_path now names; "
                "a resumed run must read the same files (or start anew in another output_dir)"
            )
        self._prepare_loss()
        self.student = StudentEngine(config, settings, groups, vocab_size=self.tokenizer.vocab_size)
        if resumed:
            self.student.load(resume_from)
            self.say(f"resumed from {resume_from} at step {self.first_step}")
            before = read_json(str(resume_from / "deepspeed.json"))
            changes = changed_settings(resumed.config, config)
            for change in [*changes, *changed_deepspeed(before, settings.values)]:
                self.say(f"  changed since then: {change}")
        self.log = self._open_log()
        self.teacher: Teacher | None = None
        self.teaches_ahead = teaches_ahead(config.teacher.placement, groups.layout)
        self.lesson: tuple[int, Lesson] | None = None
        """The step whose hidden states the teacher has made ahead, and where they are."""
        self.held_out = HeldOut(config, settings, groups, self.data, self.student)
        self.teacher_fingerprint = resumed.teacher_fingerprint if resumed else None
        if config.teacher.checkpoint and phase(self.salt, self.first_step) == "kd":
            self._bring_teacher(resumed)
        elif config.teacher.checkpoint and resumed:
            for warning in self.held_out.resume(resume_from, resumed):
                self.say(f"WARNING {warning}")
        if self.first_step == 0:
            # The untrained student's score, as step 0: where every curve begins.
            values = self.held_out.evaluate()
            if self.log:
                self.log.write({"step": 0, "tokens": 0, **values})
        self.batches = ReadAhead(self._read, self.first_step, config.train.steps, groups.device)
        self.clock = Stopwatch(groups.device)
        self.started = time.perf_counter()
        self.skipped_steps = 0

    def _open_log(self) -> MetricsLog | None:
        """On rank 0: write the resolved configs, and go on with the metrics of the steps done."""
        if self.groups.rank != 0:
            return None
        write_config(self.config, self.output_dir / "config.json")
        text = json.dumps(dict(self.settings.values), indent=2) + "\n"
        (self.output_dir / "deepspeed.json").write_text(text, encoding="utf-8")
        return MetricsLog(
            self.output_dir,
            resumed_step=self.first_step,
            tensorboard=self.config.train.tensorboard,
        )

    def _prepare_loss(self) -> None:
        """Build the loss's code before the first step, and see that all ranks run the same.

        Raises: ValueError or RuntimeError on all ranks.
        """
        salt, groups = self.config.salt, self.groups
        with same_error_everywhere("preparing the loss"):
            name = loss_body(salt, DTYPES[self.settings.precision], groups.device).name
        first = from_rank_0(name)
        with same_error_everywhere("preparing the loss"):
            if name != first:
                raise ValueError(
                    f"rank {groups.rank} on {platform.node()} would compute the loss by its "
                    f"{name} code, rank 0 by {first}: `python -m megatron_salt.kernels` there says "
                    "why; mend that, or set salt.loss_impl"
                )
        self.say(f"loss: {name} code, logits in {salt.logits_dtype}")
        backends = device_attention_backends()
        if backends is not None:
            order = ", ".join(each.name.removesuffix("_ATTENTION") for each in backends)
            self.say(f"attention: the first of {order} that serves the tensors at hand")

    def say(self, text: str) -> None:
        if self.groups.rank == 0:
            # Goes above the progress bar where there is one.
            tqdm.write(text, file=sys.stderr)

    def progress(self, steps: range) -> Iterable[int]:
        """The steps, with a bar on rank 0's terminal; log files get the console lines alone."""
        visible = self.groups.rank == 0 and sys.stderr.isatty()
        return tqdm(
            steps,
            desc=self.output_dir.name,
            initial=steps.start,
            total=steps.stop,
            unit="step",
            disable=not visible,
            dynamic_ncols=True,
        )

    def _bring_teacher(self, resumed: ckpt.CheckpointManifest | None) -> None:
        """Load the teacher, check its tokenizer, score it on the held-out samples."""
        path = self.config.teacher.checkpoint
        assert path is not None  # check_config
        settings, parts = self.settings, self.student.parts
        found: tuple[Path, ckpt.CheckpointManifest] | None = None
        with same_error_everywhere("checking the teacher"):
            if self.groups.rank == 0:
                seq_length = self.config.data.seq_length
                found = find_teacher(path, self.tokenizer, seq_length, resumed)
        folder, manifest = from_rank_0(found)
        for warning in unseen_objectives(folder, manifest, self.config):
            self.say(f"WARNING {warning}")
        self.teacher_fingerprint = ckpt.weights_fingerprint(manifest)
        self.teacher = Teacher(
            folder,
            manifest,
            self.groups,
            vocab=parts.vocab,
            head_columns=parts.padded_vocab // parts.tp_size,
            seq_length=self.config.data.seq_length,
            micro_batch_size=settings.micro_batch_size,
            dtype=DTYPES[settings.precision],
        )
        self.student.loss_function.teacher_head_WE = self.teacher.head_WE
        self.shape = StepShape.of_run(
            self.config, settings, self.groups.layout, self.tokenizer.vocab_size,
            manifest.config.model,
        )  # fmt: skip
        costs = multiply_adds(self.shape)
        plan: TeachingPlan | None = None
        with same_error_everywhere("planning the teacher's work"):
            if self.groups.rank == 0:
                plan = plan_teaching(self.shape, costs, in_bubbles=self.teaches_ahead)
        plan = from_rank_0(plan)
        self.say(self.held_out.score_teacher(self.teacher))
        self.teacher.take_time_s()  # steps count their own
        self.teacher.prepare(plan, ahead=self.teaches_ahead)
        self.say(f"teacher: {plan.describe('multiply-adds')}")

    @property
    def salt(self) -> SaltConfig:
        """The method's settings, with the end of the KD phase as far as it is known by now."""
        return effective(self.config.salt, self.switch)

    def _read(self, step: int) -> Batch:
        """This rank's rows of a step, on the CPU."""
        groups = self.groups
        rows = rows_of_rank(
            step, self.settings.global_batch_size, groups.dp_rank, groups.layout.dp_size
        )
        return self.data.read(rows, phase(self.salt, step))

    def _restart_reading(self, step: int) -> None:
        """Read on from `step`, anew: what was read ahead went by another end of the KD phase."""
        self.batches.restart(step)

    def step(self, step: int) -> None:
        """One optimiser step (counted from 0), its metrics, and what is due after it."""
        salt, train = self.salt, self.config.train
        if self.teacher is not None and phase(salt, step) == "lm":
            self._release_teacher(step)
        elif step == salt.kd_steps > 0 and self.teacher is None:
            self.say(f"step {step}: KD phase over")
        with self.student.whereabouts.of_step(step):
            self.clock.start()
            batch = self.batches.take(step)
            weight = kd_weight(salt, step)
            hidden_RSE = self._taught(step, batch)
            micro_batches = self.student.micro_batches(batch, weight, hidden_RSE, phase(salt, step))
            lr = learning_rate(train, self.settings.learning_rate, step)
            traced = step == self.first_step + MEASURED_STEP
            if self.student.says_times:
                traced = traced or (step + 1) % train.log_interval == 0
            if traced:
                self.student.start_trace()
            self.student.train_step(micro_batches, lr, self._lesson_for(step + 1))
            del hidden_RSE, micro_batches
            self.student.whereabouts.enter("the sums of the step")
            sums = self.student.reduce_sums()
            self.clock.stop()
            done = step + 1
            if traced:
                self._use_trace(step)
            record = self._record(done, sums, weight, lr)
            self.tokens = record["tokens"]
            self._stop_if_untrained(done, sums.loss, record["grad_norm"])
            self._stop_if_diverged(done, sums.loss, record["grad_norm"])
            last = done == train.steps
            if last or (train.eval_interval and done % train.eval_interval == 0):
                self.student.whereabouts.enter("the evaluation after it")
                record.update(self._evaluate(done))
            if self.log:
                self.log.write(record)
            if done % train.log_interval == 0 or last or done == self.first_step + 1:
                self._console(record)
            if last or (train.checkpoint_interval and done % train.checkpoint_interval == 0):
                self.student.whereabouts.enter("the checkpoint after it")
                self.save(done)

    def _taught(self, step: int, batch: Batch) -> Tensor | None:
        """The teacher's hidden states of this step's rows, on the last stage; None elsewhere.

        They have been made during the step before, if that has taught ahead (`_lesson_for`). If
        not, the teacher fills this batch before the step, visibly.
        """
        if self.teacher is None:
            return None
        if self.lesson is not None:
            ahead, lesson = self.lesson
            assert ahead == step, f"the teacher has read step {ahead}, not {step}"
            self.lesson = None
            return lesson.finish()
        if self.teaches_ahead:
            self.say(f"step {step}: the teacher reads this batch before the step")
        lesson = self.teacher.lesson(batch.tokens_RS, batch.prefix_R)
        lesson.run_all()
        return lesson.finish()

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
            self.say(f"step {step + 1}, ms by stage: {times_table(traces)}")
        # After the next step there may be nothing more to be taught ahead.
        if step == self.first_step + MEASURED_STEP and phase(self.salt, step + 2) == "kd":
            self._place_anew(traces)

    def _place_anew(self, traces: Sequence[Trace]) -> None:
        """Plan the teacher's work by the times of a traced step of all stages.

        Multiply-adds know nothing of how well a device does them. Pieces stay, so the numbers do
        too, whoever computes them and when.

        Also writes measured_times.json into output_dir, for `tools/plan.py --measured`.
        """
        teacher = self.teacher
        if teacher is None or not self.teaches_ahead:
            return
        plan: TeachingPlan | None = None
        with same_error_everywhere("planning the teacher's work"):
            if self.groups.rank == 0:
                times = measured_times(traces, self.shape.pieces, self.shape.chunk_bounds)
                plan = plan_teaching(self.shape, times, in_bubbles=True)
                text = json.dumps(
                    measured_values(times, self.shape.pieces, plan.num_chunks), indent=2
                )
                (self.output_dir / "measured_times.json").write_text(text + "\n", encoding="utf-8")
        plan = from_rank_0(plan)
        teacher.prepare(plan, ahead=True)
        self.say(f"teacher, placed anew: {plan.describe('measured times')}")

    def _lesson_for(self, step: int) -> Lesson | None:
        """What the teacher does ahead for `step` during the one before it; None if nothing."""
        if self.teacher is None or not self.teaches_ahead or step >= self.config.train.steps:
            return None
        if phase(self.salt, step) == "lm":
            return None
        batch = self.batches.peek(step)
        lesson = self.teacher.lesson(batch.tokens_RS, batch.prefix_R)
        self.lesson = step, lesson
        return lesson

    def _stop_if_diverged(self, done: int, loss: float, grad_norm: float | None) -> None:
        """Raise RuntimeError for a loss or gradient that is not finite, before anything is saved.

        DeepSpeed's 16-bit optimisers skip such a step without a word, and fp32 applies it. Only
        fp16 may skip a few in a row, while it looks for its loss scale.
        """
        finite = grad_norm is None or math.isfinite(grad_norm)
        self.skipped_steps = 0 if finite else self.skipped_steps + 1
        allowed = MAX_SKIPPED_FP16_STEPS if self.settings.precision == "fp16" else 0
        if math.isfinite(loss) and self.skipped_steps <= allowed:
            return
        raise RuntimeError(
            f"step {done}: the loss is {loss}, the gradient norm {grad_norm}, "
            f"{self.skipped_steps} steps in a row without an update; stopping instead of training "
            f"on. The last checkpoint is the newest in {ckpt.checkpoints_dir(self.output_dir)}"
        )

    def _stop_if_untrained(self, done: int, loss: float, grad_norm: float | None) -> None:
        """Raise RuntimeError on all ranks if the optimizer is not given every weight's gradient.

        Once in a process: in its first step that has something to learn (not all tokens masked or
        routed away, no loss of 0) and, in fp16, whose gradients have not overflowed.
        """
        check, overflown = self.student.gradient_check, False
        if self.settings.precision == "fp16" and grad_norm is not None:
            overflown = not math.isfinite(grad_norm)
        if check is None or loss == 0.0 or not math.isfinite(loss) or overflown:
            return
        self.student.gradient_check = None
        with same_error_everywhere("checking the gradients"):
            problem = check.problem()
            if problem:
                raise RuntimeError(
                    f"step {done}: {problem}: the model would not train as a whole. If that is "
                    "meant, set train.check_gradients to false"
                )

    def _record(self, done: int, sums: LossSums, weight: float, lr: float) -> dict[str, Any]:
        teaching = self.teacher is not None
        count = max(sums.tokens, 1.0)
        seconds = self.clock.seconds()
        return {
            "step": done,
            "phase": phase(self.salt, done - 1),
            "ce_nats": sums.ce_nats / count,
            "kl_nats": sums.kl_nats / count if teaching else None,
            "kd_weight": weight,
            "taught_share": sums.taught / count,
            "ce_share": sums.ce_counted / count,
            "loss": sums.loss,
            "lr": lr,
            "grad_norm": self.student.grad_norm(),
            "tokens": self.tokens + int(sums.tokens),
            "step_time_s": seconds,
            "tokens_per_s": sums.tokens / seconds,
            "teacher_time_s": self.teacher.take_time_s() if self.teacher else 0.0,
        }

    def _evaluate(self, done: int) -> dict[str, float]:
        """Score the student on the held-out samples; decide the switch by it, where it is due."""
        values = self.held_out.evaluate()
        self.evaluation = ckpt.Evaluation(
            step=done,
            ce_nats=values["valid_ce_nats"],
            accuracy=values["valid_accuracy"],
            tokens=int(values["valid_tokens"]),
            data=self.held_out.fingerprint,
        )
        if not math.isfinite(values["valid_ce_nats"]):
            raise RuntimeError(f"step {done}: the held-out CE is {values['valid_ce_nats']}")
        if self.config.salt.switch == "adaptive":
            if self.teacher is not None:
                self._update_switch(done, values)
            values["switch_streak"] = self.switch.streak
            values["kd_end_step"] = self.salt.kd_steps
        return values

    def _update_switch(self, done: int, values: dict[str, float]) -> None:
        """Take an evaluation into the adaptive switch; at its decision read on by the new end.

        Collectives: one broadcast from rank 0, so that no last bit can part the ranks.
        """
        undecided = self.switch.kd_end is None
        self.switch = from_rank_0(
            update(
                self.switch,
                self.config.salt,
                done,
                student_ce_nats=values["valid_ce_nats"],
                teacher_ce_nats=values["teacher_valid_ce_nats"],
                better_share=values["teacher_better_share"],
            )
        )
        if undecided and self.switch.kd_end is not None:
            self._restart_reading(done)
            self.say(
                f"step {done}: the teacher has not helped at {self.switch.streak} evaluations in a "
                f"row (held-out CE {values['valid_ce_nats']:.4f}, the teacher's "
                f"{values['teacher_valid_ce_nats']:.4f}, better on "
                f"{values['teacher_better_share']:.1%} of the tokens): the KD phase ends after "
                f"step {self.switch.kd_end}"
            )

    def _console(self, record: dict[str, Any]) -> None:
        done = record["step"] - self.first_step
        elapsed = time.perf_counter() - self.started
        left = elapsed / done * (self.config.train.steps - record["step"])
        memory = self._memory_of_ranks()
        self.say(f"{console_line(record, self.config.train.steps, left)} | {memory}")

    def _memory_of_ranks(self) -> str:
        """Collective: every rank's allocated memory, as a short text."""
        mine = torch.tensor([allocated_bytes(self.groups.device) / 2**30], dtype=torch.float64)
        mine = mine.to(self.groups.device)
        every = [torch.zeros_like(mine) for _ in range(self.groups.layout.world_size)]
        dist.all_gather(every, mine)
        sizes = [value.item() for value in every]
        return f"memory {min(sizes):.2f} to {max(sizes):.2f} GiB per rank"

    def _release_teacher(self, step: int) -> None:
        """The switch: the teacher and its buffers go, everything else stays as it is."""
        assert self.teacher is not None
        before, size = self._memory_of_ranks(), self.teacher.num_bytes()
        self.student.loss_function.teacher_head_WE = None
        if self.lesson is not None:  # an adaptive end came after the next batch had been taught
            self.lesson[1].finish()
            self.lesson = None
        self.teacher.release()
        self.teacher = None
        self.say(
            f"step {step}: KD phase over, teacher released ({size / 2**30:.2f} GiB of weights on "
            f"rank 0); {before} before, {self._memory_of_ranks()} after"
        )

    def save(self, done: int) -> Path:
        """Write a checkpoint after `done` steps; see `checkpoint.py` for its form.

        Raises: OSError on the rank that could not write (a full disk, say); the others end with
            RuntimeError or the launcher ends them. RuntimeError on all ranks for a weight that is
            not finite. The newest complete checkpoint is untouched.
        """
        groups, config, settings = self.groups, self.config, self.settings
        partial = ckpt.partial_dir(self.output_dir, done)
        with same_error_everywhere("checking the weights"):
            problem = not_finite(self.student.module, groups)
            if problem:
                raise RuntimeError(
                    f"step {done}: {problem}: no checkpoint is made of it. "
                    f"The last good one is the newest in {ckpt.checkpoints_dir(self.output_dir)}; "
                    "look at the learning rate and the gradient norms before this step"
                )
        with same_error_everywhere("starting a checkpoint"):
            if groups.rank == 0:
                ckpt.start_partial(self.output_dir, done)
                self.tokenizer.save(partial / "tokenizer")
                text = json.dumps(dict(settings.values), indent=2)
                (partial / "deepspeed.json").write_text(text, encoding="utf-8")
                self.held_out.write(partial)
                if self.log:
                    self.log.sync()
        self.student.save(partial)
        dist.barrier()  # every file is there before any is read back
        records: list[dict[str, Any]] = [{}] * groups.layout.world_size
        names = from_rank_0(ckpt.list_files(partial) if groups.rank == 0 else None)
        with same_error_everywhere("verifying a checkpoint"):
            mine = ckpt.hash_files(partial, names[groups.rank :: groups.layout.world_size])
        dist.all_gather_object(records, mine)
        with same_error_everywhere("publishing a checkpoint"):
            if groups.rank == 0:
                manifest = self._manifest(done, {k: v for part in records for k, v in part.items()})
                final = ckpt.publish(partial, manifest, self.output_dir)
                self.say(f"saved {final}")
                for problem in ckpt.remove_old(self.output_dir, config.train.keep_checkpoints):
                    self.say(f"WARNING {problem}")
        return ckpt.checkpoints_dir(self.output_dir) / ckpt.step_name(done)

    def _manifest(self, done: int, files: dict[str, dict[str, Any]]) -> ckpt.CheckpointManifest:
        layout = self.groups.layout
        tags, selection = self.choice.fingerprints()
        return ckpt.CheckpointManifest(
            step=done,
            phase=phase(self.salt, done),
            tokens=self.tokens,
            data_rows=done * self.settings.global_batch_size,
            data=self.data.fingerprints(),
            config=self.config,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            tp_size=layout.tp_size,
            pp_size=layout.pp_size,
            dp_size=layout.dp_size,
            zero_stage=self.settings.zero_stage,
            precision=self.settings.precision,
            evaluation=self.evaluation,
            teacher_valid_ce_nats=self.held_out.teacher_ce_nats,
            teacher_fingerprint=self.teacher_fingerprint,
            tags=tags,
            selection=selection,
            switch=self.switch,
            versions=ckpt.installed_versions(),
            files=dict(sorted(files.items())),
        )

    def finish(self) -> None:
        """Close files and threads; what was trained lies in the last checkpoint."""
        self.batches.close()
        if self.settings.values.get("comms_logger", {}).get("enabled"):
            comm.log_summary()
        if self.log:
            self.log.close()
            self.lock.close()
        if self.evaluation is not None and math.isfinite(self.evaluation.ce_nats):
            self.say(f"held-out CE after step {self.evaluation.step}: "
                     f"{self.evaluation.ce_nats:.4f} nats/token")  # fmt: skip
        dist.barrier()
