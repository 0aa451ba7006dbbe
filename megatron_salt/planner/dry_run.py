"""`--dry_run`: everything is read and checked, layout and memory are printed, nothing trains.

Works in one process for any number of ranks, because layout, stage split and sizes are arithmetic
(`parallel/layout.py`, `model/weights.py`); inside a launcher each rank would print the same.
"""

from __future__ import annotations

import dataclasses

from megatron_salt.checkpoint.folder import find_resume
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.config.deepspeed import (
    DeepSpeedSettings,
    check_against_run,
    load_deepspeed_config,
    positive_int,
    read_json,
)
from megatron_salt.config.fields import RunConfig
from megatron_salt.config.values import parse_blend, parse_objective
from megatron_salt.data.dataset import find_tokenizer, verify_datasets
from megatron_salt.data.manifest import read_dataset_manifest
from megatron_salt.data.objective import check_sentinels, spans_of_rows
from megatron_salt.data.tag_inputs import (
    TagInputs,
    load_tag_inputs,
    logits_warnings,
    with_logits,
)
from megatron_salt.files.markdown import BYTE_UNITS, unit_for
from megatron_salt.huggingface.teacher_folder import find_teacher_of
from megatron_salt.method.switch import carried_over, effective
from megatron_salt.model.costs import layer_costs
from megatron_salt.model.weights import num_parameters
from megatron_salt.parallel.groups import planned_world_size
from megatron_salt.parallel.layout import Layout, layout_for_world, split_evenly
from megatron_salt.planner.memory import stage_memory
from megatron_salt.planner.sizes import Sizes, TeacherSize
from megatron_salt.teacher.find import unseen_objectives
from megatron_salt.teacher.plan import TeacherPlan, multiply_adds, plan_teacher, teaches_ahead
from megatron_salt.training.initial import check_export, find_initial
from megatron_salt.training.resume import check_same_tag_inputs, check_start, kd_phase_is_over


def world_size_for(config: RunConfig, deepspeed_config: str) -> int:
    """World size of the launcher, else what the batch sizes imply, else one replica."""
    planned = planned_world_size()
    if planned is not None and planned > 1:
        return planned
    parallel = config.parallel
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    values = read_json(deepspeed_config)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (positive_int(values, key, deepspeed_config) for key in keys)
    dp_size = total // (micro * steps) if total and micro and steps else 1
    return model_ranks * max(1, dp_size)


def describe_run(config: RunConfig, deepspeed_config: str) -> str:
    """Check everything a run would check before its ranks start, and say what it would look like.

    Raises: ValueError or FileNotFoundError as the run itself would.
    """
    parallel = config.parallel
    layout = layout_for_world(
        world_size_for(config, deepspeed_config),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    settings = load_deepspeed_config(deepspeed_config, layout.dp_size)
    check_against_run(settings, config)
    tokenizer = find_tokenizer(config.data)
    verify_datasets(config.data, tokenizer)
    check_sentinels(config.data, tokenizer)
    tag_inputs = load_tag_inputs(config, tokenizer)
    fingerprint = tokenizer.fingerprint
    resume, warnings = find_resume(config.train.output_dir, config.train.resume)
    resumed = read_checkpoint_manifest(resume) if resume else None
    if config.teacher.logits and not kd_phase_is_over(config, resumed):
        tag_inputs = with_logits(tag_inputs, config, tokenizer)
        warnings = [*warnings, *logits_warnings(config, tag_inputs.logits)]
    check_start(config, settings, fingerprint, resume, resumed)
    if resumed is not None:
        if resumed.run.step < config.train.steps:
            check_same_tag_inputs(config, resumed, tag_inputs)
        switch = carried_over(resumed.run.switch, resumed.run.config.salt, config.salt)
        config = dataclasses.replace(config, salt=effective(config.salt, switch))
    if resumed is None:
        find_initial(config, tokenizer)
    if resumed is None or resumed.run.step < config.train.steps:
        check_export(config, tokenizer)
    teacher = None
    if config.teacher.path is not None:
        folder, teacher = find_teacher_of(config, tokenizer, resumed)
        warnings = [*warnings, *unseen_objectives(folder, teacher, config)]
    sizes = Sizes(
        config=config, settings=settings, layout=layout, vocab_size=tokenizer.vocab_size,
        teacher=None if teacher is None else TeacherSize.of(teacher.model),
    )  # fmt: skip
    lines = [
        *(f"WARNING {warning}" for warning in warnings),
        *_layout_lines(layout, settings),
        *_token_lines(config, settings, tag_inputs),
        f"start: {'new run' if resume is None else f'resume {resume}'}"
        + (", nothing is left to do" if resumed and resumed.run.step >= config.train.steps else ""),
        *_teacher_lines(sizes),
        *_stage_lines(sizes),
    ]
    return "\n".join(lines)


def _layout_lines(layout: Layout, settings: DeepSpeedSettings) -> list[str]:
    lines = [
        f"ranks: {layout.world_size} = tensor {layout.tp_size} x pipeline {layout.pp_size} x data "
        f"{layout.dp_size} (tensor fastest, then data, then pipeline)",
        f"batch: {settings.global_batch_size} sequences a step = {settings.micro_batch_size} x "
        f"{settings.num_micro_batches} micro-batches x {layout.dp_size} replicas; "
        f"{settings.precision}, ZeRO {settings.zero_stage}",
    ]
    for rank in range(min(layout.world_size, 8)):
        tp_rank, dp_rank, pp_rank = layout.coordinates(rank)
        lines.append(f"  rank {rank}: tp {tp_rank}, dp {dp_rank}, stage {pp_rank}")
    if layout.world_size > 8:
        lines.append(f"  … {layout.world_size - 8} more")
    return lines


def _token_lines(
    config: RunConfig, settings: DeepSpeedSettings, tag_inputs: TagInputs
) -> list[str]:
    per_step = settings.global_batch_size * config.data.seq_length
    total = per_step * config.train.steps
    most = "at most " if config.salt.switch == "adaptive" else ""
    lines = [
        f"tokens: {per_step:,} a step x {config.train.steps:,} steps = {total:,} "
        f"({most}{per_step * config.salt.kd_steps:,} of them in the KD phase)"
    ]
    lines += [f"  {line}" for line in tag_inputs.describe()]
    if tag_inputs.selections:
        total -= per_step * config.salt.kd_steps
    prefixes, weights = parse_blend(config.data.train_data_path, "data.train_data_path")
    for which, (prefix, weight) in enumerate(zip(prefixes, weights, strict=True)):
        manifest = read_dataset_manifest(prefix)
        share = weight / sum(weights)
        if tag_inputs.selections:
            chosen = tag_inputs.selections[which]
            epochs = per_step * config.salt.kd_steps * share / chosen.tokens
            lines.append(
                f"  {prefix}, KD phase: {len(chosen.sequences):,} selected sequences of "
                f"{chosen.tokens:,} tokens (held-out part included), about {epochs:.2f} epochs"
            )
        if manifest is None:
            lines.append(f"  {prefix}: {share:.1%} of the samples; no manifest")
            continue
        epochs = total * share / manifest.tokens
        lines.append(
            f"  {prefix}: {share:.1%} of the samples, {manifest.tokens:,} tokens "
            f"(held-out part included), about {epochs:.2f} epochs"
        )
    shares = parse_objective(config.data.objective)
    if list(shares) != ["causal"]:
        mixture = ", ".join(f"{share:.1%} {name}" for name, share in shares.items())
        lines.append(f"objective: {mixture}")
    if "span_corruption" in shares:
        counts = spans_of_rows(config.data)
        lines.append(
            f"  a row of span_corruption reads {counts.num_tokens} of its "
            f"{config.data.seq_length + 1} tokens and predicts {counts.num_noise} of them in "
            f"{counts.num_spans} spans"
        )
    return lines


def _teacher_lines(sizes: Sizes) -> list[str]:
    config, layout, teacher = sizes.config, sizes.layout, sizes.teacher
    if teacher is None:
        stored = config.teacher.kind == "logits"
        return ["teacher: its stored logits; no model is loaded" if stored else "teacher: none"]
    count = teacher.parameters or num_parameters(
        teacher.model, teacher.vocab_size, teacher.num_positions
    )
    rows = sizes.shape.num_rows
    parts = split_evenly(rows, sizes.shape.teachers_per_stage * layout.pp_size)
    counts = sorted({stop - start for start, stop in parts})
    most = "at most " if config.salt.switch == "adaptive" else ""
    share = " or ".join(map(str, counts))
    copies, sharers = f"a replica on each of {layout.world_size} ranks", "ranks"
    if config.teacher_tp_size > 1:
        copies = f"each stage's spread over its {layout.tp_size} tensor-parallel ranks"
        sharers = "stages"
    return [
        f"teacher: {count:,} parameters, {copies} for {most}{config.salt.kd_steps:,} steps",
        f"  its work: the {rows} sequences of a replica's step over {len(parts)} {sharers}, "
        f"{share} each, {max(counts) * config.data.seq_length:,} tokens at most",
    ]


def _stage_lines(sizes: Sizes) -> list[str]:
    """Layers, share of the work and bytes of every stage; in the KD phase if there is a teacher."""
    config, memory = sizes.config, stage_memory(sizes, teaching_plan(sizes))
    size, unit = unit_for(max(part.total for part in memory), BYTE_UNITS)
    costs = layer_costs(config.model, sizes.vocab_size, config.data.seq_length)
    lines = [
        f"stages ({unit} a rank on CUDA; the allocator's gaps and the libraries' own not counted):",
        "  either masks, activations, buckets and loss at once, or the update's copies",
    ]
    for stage, part in enumerate(memory):
        start, stop = sizes.bounds[stage], sizes.bounds[stage + 1]
        cost = sum(costs[1 + start : 1 + stop]) + (costs[-1] if stage == len(memory) - 1 else 0)
        bytes_of = {
            "weights": part.weights, "gradients": part.gradients, "optimizer": part.optimizer,
            "teacher": part.teacher, "its head": part.teacher_head,
            "its hidden states": part.hidden_states, "inputs": part.inputs,
            "pipeline buffers": part.pipeline, "prefix masks": part.masks,
            "activations": part.activations, "gradient buckets": part.buckets,
            "loss or teacher at work": part.loss, "update": part.update,
        }  # fmt: skip
        shown = ", ".join(f"{name} {n / size:.2f}" for name, n in bytes_of.items() if n)
        lines.append(
            f"  stage {stage}: layers [{start}, {stop}), {part.parameters:,} parameters a rank, "
            f"{cost / sum(costs):.1%} of the work; {shown}; in all {part.total / size:.2f}"
        )
    return lines


def teaching_plan(sizes: Sizes) -> TeacherPlan | None:
    """Who will teach which rows; as `Teaching.bring` decides it."""
    if sizes.teacher is None:
        return None
    ahead = teaches_ahead(sizes.config.teacher.placement, sizes.layout)
    return plan_teacher(sizes.shape, multiply_adds(sizes.shape), in_bubbles=ahead)
