"""The student in its DeepSpeed engine: one step, one evaluation, whatever the number of stages.

pp > 1 runs on DeepSpeed's `PipelineEngine`, pp = 1 on `DeepSpeedEngine`; this class is what makes
the rest of the code not care. Letters: B micro-batch, S sequence, R rows of a step, M micro-batches
per step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from megatron_salt.config.deepspeed import DeepSpeedSettings, engine_config
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import Batch
from megatron_salt.kernels import TokenScores
from megatron_salt.method.salt import Phase
from megatron_salt.method.token_weights import route_by_tags, token_weights
from megatron_salt.model import student
from megatron_salt.model.costs import balanced_stages, layer_costs
from megatron_salt.model.layers import ModelParts
from megatron_salt.model.loss import LossFunction, LossSums, Targets
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import Groups
from megatron_salt.parallel.watchdog import StepWatchdog
from megatron_salt.teacher.passes import TeacherPass
from megatron_salt.training import gradients
from megatron_salt.training.instructions import Instructions


class MicroBatch(NamedTuple):
    """What one forward pass takes."""

    tokens_BS: Tensor
    targets: Targets
    prefix_B: Tensor | None = None
    """Tokens of each row that are read in both directions, on the CPU; None: causal."""


def model_parallel_unit(groups: Groups) -> SimpleNamespace:
    """What DeepSpeed asks of an `mpu` when pp = 1: the tensor- and data-parallel groups."""
    return SimpleNamespace(
        get_model_parallel_rank=lambda: groups.tp_rank,
        get_model_parallel_world_size=lambda: groups.layout.tp_size,
        get_model_parallel_group=lambda: groups.tp,
        get_data_parallel_rank=lambda: groups.dp_rank,
        get_data_parallel_world_size=lambda: groups.layout.dp_size,
        get_data_parallel_group=lambda: groups.dp,
    )


class StudentEngine:
    """Owns the student, its optimiser and its loss function on this rank."""

    def __init__(
        self,
        config: RunConfig,
        settings: DeepSpeedSettings,
        groups: Groups,
        *,
        vocab_size: int,
        watchdog: StepWatchdog,
        weights: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        """Args: weights: what the student starts from; None: random ones of train.seed."""
        self.watchdog = watchdog
        if not settings.lets_deepspeed_speak:
            deepspeed_logger.setLevel(logging.WARNING)
        self.groups, self.settings = groups, settings
        parallel = config.parallel
        if parallel.gradient_accumulation_fusion:
            gradients.provide_accumulating_product()
        self.parts = ModelParts(
            config.model,
            vocab_size=vocab_size,
            seq_length=config.data.seq_length,
            num_positions=config.num_positions,
            groups=groups.student,
            sequence_parallel=parallel.sequence_parallel,
            dtype=DTYPES[settings.precision],
            recompute=parallel.recompute_granularity == "full",
            gradient_accumulation_fusion=parallel.gradient_accumulation_fusion,
        )
        self.loss_function = LossFunction(
            vocab=self.parts.vocab,
            salt=config.salt,
            tp_group=groups.tp,
            sequence_parallel=parallel.sequence_parallel,
            device=groups.device,
        )
        costs = layer_costs(config.model, vocab_size, config.data.seq_length)
        self.stage_bounds = balanced_stages(costs, groups.layout.pp_size)
        values = engine_config(settings, parallel)
        try:
            DeepSpeedConfig(values, mpu=model_parallel_unit(groups))
        except (ValueError, AssertionError) as error:  # which know no file
            raise ValueError(f"{settings.path}: DeepSpeed refuses it: {error}") from error
        module = self._build_module(values)
        table = student.initialize_weights(module, self.parts, config.train.seed, weights)
        if not settings.keeps_whole_sums:
            student.sum_partial_gradients(module, groups.tp)
        weight_decay = values["optimizer"].get("params", {}).get("weight_decay", 0.0)
        self.engine: Any = deepspeed.initialize(
            model=module,
            model_parameters=student.parameter_groups(module, weight_decay),
            config=values,
            mpu=None if self.is_pipeline else model_parallel_unit(groups),
            dist_init_required=False,
        )[0]
        # Where sums of gradients are looked for depends on it.
        assert isinstance(self.engine.optimizer, BF16_Optimizer) == settings.uses_bf16_optimizer
        self.fused = gradients.FusedAccumulation(module, self.engine.optimizer)
        self.engine.clip_fp32_gradients = partial(gradients.clip_fp32, self.engine, groups)
        self.before_update: Callable[[], None] = lambda: None
        """Holds the update back for whoever still reads the weights: a checkpoint's copies."""
        self._update = self.engine._take_model_step
        self.engine._take_model_step = self._take_model_step
        checks = config.train.check_gradients
        self.gradient_check = gradients.GradientCheck(module, table, groups) if checks else None
        self.instructions = Instructions(self.engine, watchdog) if self.is_pipeline else None

    @property
    def says_times(self) -> bool:
        """Whether wall_clock_breakdown asks for the stages' times; on one stage DeepSpeed tells."""
        return self.is_pipeline and bool(self.settings.values.get("wall_clock_breakdown"))

    @property
    def is_pipeline(self) -> bool:
        return self.groups.layout.pp_size > 1

    @property
    def module(self) -> torch.nn.Module:
        return self.engine.module

    def _build_module(self, values: dict[str, Any]) -> torch.nn.Module:
        os.environ.setdefault("LOCAL_RANK", "0")
        if self.is_pipeline:
            layout, bounds = self.groups.layout, self.stage_bounds
            return student.PipelineStudent(self.parts, self.loss_function, layout, bounds)
        with deepspeed.zero.Init(
            data_parallel_group=self.groups.dp,
            config_dict_or_path=values,
            enabled=self.settings.zero_stage == 3,
            mpu=model_parallel_unit(self.groups),
        ):
            return student.SingleStageStudent(self.parts, self.loss_function).to(self.groups.device)

    def micro_batches(
        self, batch: Batch, kd_weight: float, teacher_hidden_RSE: Tensor | None, phase: Phase = "kd"
    ) -> list[MicroBatch]:
        """Cut this rank's rows of a step into M micro-batches with the weights of their tokens.

        `token_weights` has the normaliser; in the KD phase tags then route the weights.

        Collectives: one all-reduce of N, one number, over dp.
        """
        dp_size, num_micro = self.groups.layout.dp_size, self.settings.num_micro_batches
        num_counted = batch.mask_RS.sum()
        dist.all_reduce(num_counted, group=self.groups.dp)
        ce_weight_RS, kd_weight_RS = token_weights(
            batch.mask_RS, kd_weight, num_counted, dp_size * num_micro
        )
        reference_RS = batch.tokens_RS.new_empty((len(batch.tokens_RS), 0), dtype=torch.float32)
        if phase == "kd":
            ce_weight_RS, kd_weight_RS = route_by_tags(
                ce_weight_RS, kd_weight_RS, batch.tag_RS, self.loss_function.salt
            )
            if batch.reference_loss_RS is not None:
                reference_RS = batch.reference_loss_RS
        # Stored logits: for the last stage alone, in the KD phase alone.
        stored = (batch.logits_ids_RSK, batch.logits_logp_RSK, batch.logits_rest_RS,
                  batch.logits_entropy_RS)  # fmt: skip
        size = self.settings.micro_batch_size
        result = []
        for start in range(0, size * num_micro, size):
            rows = slice(start, start + size)
            hidden = None if teacher_hidden_RSE is None else teacher_hidden_RSE[rows]
            prefix_B = None if batch.prefix_R is None else batch.prefix_R[rows]
            ids, logp, rest, entropy = (None if x is None else x[rows] for x in stored)
            targets = Targets(
                batch.labels_RS[rows], batch.mask_RS[rows], ce_weight_RS[rows], kd_weight_RS[rows],
                reference_RS[rows], hidden, ids, logp, rest, entropy,
            )  # fmt: skip
            result.append(MicroBatch(batch.tokens_RS[rows], targets, prefix_B))
        return result

    def scoring_batch(self, batch: Batch) -> MicroBatch:
        """A micro-batch to be evaluated: every counted token weighs 1 in the CE."""
        nothing = torch.zeros_like(batch.mask_RS)
        targets = Targets(batch.labels_RS, batch.mask_RS, batch.mask_RS, nothing, nothing[:, :0])
        return MicroBatch(batch.tokens_RS, targets, batch.prefix_R)

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        learning_rate: float,
        teacher_pass: TeacherPass | None = None,
    ) -> None:
        """Forward, backward and optimiser step over M micro-batches.

        Args:
            teacher_pass: the teacher's work on the next batch, done where the pipeline waits.
        Mutates: weights, optimiser state, the loss function's sums.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with self._waiting(micro_batches):
            if self.instructions:
                with self.instructions.teaching(teacher_pass):
                    self.engine.train_batch(data_iter=_pipeline_form(micro_batches))
                if "steps_per_print" not in self.settings.values:  # or two CUDA events a step stay
                    self.engine.timers(TRAIN_BATCH_TIMER).reset()
                return
            self.engine.train()
            for number, (tokens_BS, targets, _) in enumerate(micro_batches):
                self.watchdog.enter(f"micro-batch {number}")
                loss = self.engine(tokens_BS, targets)
                self.engine.backward(loss)
                self.engine.step()

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        """DeepSpeed's clipping and update, called when all gradients of a step are there."""
        self.fused.announce()
        if self.settings.keeps_whole_sums:
            gradients.sum_partial(self.module, self.engine.optimizer, self.groups.tp)
        if self.gradient_check is not None:
            self.gradient_check.look()
        self.before_update()
        self._update(lr_kwargs)

    def start_trace(self) -> None:
        """Note when every instruction of the pipeline begins and ends; see `Instructions`."""
        if self.instructions:
            self.instructions.start_trace()

    def take_trace(self) -> list[tuple[Any, float, float]] | None:
        return self.instructions.take_trace() if self.instructions else None

    @contextlib.contextmanager
    def _waiting(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        """What does not travel through the pipeline waits in the module while these run."""
        with contextlib.ExitStack() as stack:
            prefixes = [one.prefix_B for one in micro_batches]
            stack.enter_context(self.parts.prefix_masks.of_step(prefixes))
            if isinstance(self.module, student.PipelineStudent):
                targets = [one.targets for one in micro_batches]
                stack.enter_context(self.module.targets_of_step(targets))
            yield

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[TokenScores]:
        """Score micro-batches without gradients.

        Returns: on ranks of the last stage the scores of each micro-batch's tokens, sequence
            positions outermost, equal on all tp ranks; elsewhere nothing.
        Memory: 3 floats per token, besides those of a forward pass.
        """
        scored: list[TokenScores] = []
        self.loss_function.scored = scored
        try:
            with self._waiting(micro_batches):
                if self.is_pipeline:
                    self.engine.eval_batch(
                        _pipeline_form(micro_batches),
                        bcast_loss=False,
                        num_micro_batches=len(micro_batches),
                    )
                else:
                    self.engine.eval()
                    with torch.no_grad():
                        for tokens_BS, targets, _ in micro_batches:
                            self.engine(tokens_BS, targets)
        finally:
            self.loss_function.scored = None
        return scored

    def reduce_sums(self, *flags: float) -> tuple[LossSums, list[float]]:
        """Take the loss function's sums, added over dp, known on every rank; and `flags`, what else
        the ranks have to tell each other once per step, added over all ranks.

        Collectives: one all-reduce of 6 numbers and the flags over all ranks. Host sync: one.
        """
        sums = self.loss_function.take_sums()
        # Only the last stage has seen losses, and its tp ranks hold the same numbers.
        if self.groups.tp_rank != 0:
            sums.zero_()
        sums = torch.cat([sums, sums.new_tensor(flags)])
        dist.all_reduce(sums)
        values = sums.tolist()
        found, summed = LossSums(*values[: -len(flags) or None]), values[len(values) - len(flags) :]
        # The weights carried M * dp to undo DeepSpeed's means.
        num_means = self.groups.layout.dp_size * self.settings.num_micro_batches
        return replace(found, loss=found.loss / num_means), summed

    def grad_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None where DeepSpeed has none.

        DeepSpeed writes -1 for a norm that is not finite; here that is inf.
        """
        norm = self.engine.get_global_grad_norm()
        if norm is None:
            return None
        return math.inf if float(norm) < 0 else float(norm)


def _pipeline_form(micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, None]]:
    """DeepSpeed's pipeline takes (inputs, labels); what a step is scored against waits in the
    module (`PipelineStudent.targets_of_step`). DeepSpeed keeps the iterator until the next step, so
    it must hold nothing but tokens."""
    return iter([(one.tokens_BS, None) for one in micro_batches])
