"""What the planner is told: config, DeepSpeed JSON, vocabulary, teacher, GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.config.command_line import check_yaml_keys
from megatron_salt.config.deepspeed import (
    DeepSpeedSettings,
    check_against_run,
    load_deepspeed_config,
    positive_int,
    read_json,
)
from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.config.problems import model_problems, spreading_problems
from megatron_salt.huggingface.teacher_folder import describe
from megatron_salt.parallel.layout import Layout, layout_for_world
from megatron_salt.planner.sizes import Sizes, TeacherSize


@dataclass(frozen=True, kw_only=True)
class PlannerInputs:
    """Everything about the run that does not depend on its layout."""

    config: RunConfig
    settings: DeepSpeedSettings
    """Its micro-batch size and number of micro-batches are those of one layout of many."""
    vocab_size: int
    teacher: TeacherSize | None
    world_size: int
    own: Layout | None
    """The config's own layout, if the GPUs allow it."""
    own_problem: str = ""

    def at(self, layout: Layout, micro_batch_size: int) -> Sizes:
        """The run at a layout, with the same global batch size.

        Raises: ValueError naming the settings that contradict it.
        """
        config, settings = self.config, self.settings
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=layout.tp_size,
            pipeline_model_parallel_size=layout.pp_size,
            sequence_parallel=config.parallel.sequence_parallel and layout.tp_size > 1,
        )
        for problem in model_problems(config.model, config.data.seq_length, parallel):
            raise ValueError(problem)
        config = replace(config, parallel=parallel)
        if self.teacher is not None:
            for problem in spreading_problems(self.teacher.model, config.teacher_tp_size):
                raise ValueError(problem)
        rows = layout.dp_size * micro_batch_size
        if settings.global_batch_size % rows:
            raise ValueError(
                f"{settings.path}: a global batch of {settings.global_batch_size} sequences is no "
                f"multiple of micro-batch size {micro_batch_size} * data-parallel size "
                f"{layout.dp_size}"
            )
        settings = replace(
            settings,
            micro_batch_size=micro_batch_size,
            num_micro_batches=settings.global_batch_size // rows,
        )
        check_against_run(settings, config)
        return Sizes(
            config=config, settings=settings, layout=layout, vocab_size=self.vocab_size,
            teacher=self.teacher,
        )  # fmt: skip


def read_inputs(
    config: RunConfig, deepspeed_config: str, world_size: int, *, vocab_size: int | None,
    teacher_config: str | None,
) -> PlannerInputs:  # fmt: skip
    """Read what there is, and ask for what there is not yet.

    Raises: ValueError naming the file or option.
    """
    if world_size < 1:
        raise ValueError(f"--gpus {world_size}: must be at least 1")
    parallel, problem, own = config.parallel, "", None
    try:
        own = layout_for_world(
            world_size, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        )
        settings = load_deepspeed_config(deepspeed_config, own.dp_size)
        check_against_run(settings, config)
    except ValueError as error:
        problem, own = str(error), None
        settings = _settings_of_some_layout(deepspeed_config, problem)
    size = vocab_size or _vocab_size(config)
    return PlannerInputs(
        config=config, settings=settings, vocab_size=size,
        teacher=_teacher(config, teacher_config, size), world_size=world_size, own=own,
        own_problem=problem,
    )  # fmt: skip


def _settings_of_some_layout(path: str, problem: str) -> DeepSpeedSettings:
    """With the global batch size, where the config's own layout does not work out."""
    values = read_json(path)
    total = positive_int(values, "train_batch_size", path)
    if total is None:
        raise ValueError(f"{problem}; or give train_batch_size in {path}, to compare other layouts")
    micro = positive_int(values, "train_micro_batch_size_per_gpu", path) or 1
    steps = positive_int(values, "gradient_accumulation_steps", path)
    return load_deepspeed_config(path, max(1, total // (micro * steps)) if steps else 1)


def _vocab_size(config: RunConfig) -> int:
    # megatron-core's datasets take seconds to import, and are not needed with --vocab-size.
    from megatron_salt.data.dataset import find_tokenizer

    try:
        return find_tokenizer(config.data).vocab_size
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer yet ({error}): give --vocab-size") from error


def _teacher(config: RunConfig, teacher_config: str | None, vocab_size: int) -> TeacherSize | None:
    if teacher_config is not None:
        return _teacher_of_yaml(teacher_config, vocab_size, config.data.seq_length)
    teacher = config.teacher
    try:
        if teacher.hf is not None:
            return TeacherSize.of(describe(Path(teacher.hf), config.data.seq_length, vocab_size))
        if teacher.checkpoint is None:
            return None
        folder = resolve(teacher.checkpoint, what="teacher.checkpoint")
        return TeacherSize.of(read_checkpoint_manifest(folder).model)
    except (OSError, ValueError) as error:
        raise ValueError(f"no teacher yet ({error}): give its YAML by --teacher-config") from error


def _teacher_of_yaml(path: str, vocab_size: int, seq_length: int) -> TeacherSize:
    check_yaml_keys(path)
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        model = ModelConfig(**values["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"--teacher-config {path}: section model: {error}") from error
    rows = model.max_position_embeddings or values.get("data", {}).get("seq_length") or seq_length
    if model.position_embedding_type != "rope" and rows < seq_length:
        raise ValueError(
            f"--teacher-config {path}: a position table of {rows} rows cannot read sequences of "
            f"data.seq_length = {seq_length}"
        )
    return TeacherSize(model=model, vocab_size=vocab_size, num_positions=rows)
