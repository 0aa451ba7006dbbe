"""`--dry_run`: everything is read and checked, layout and memory are printed, nothing trains.

Works in one process for any number of ranks, because layout, stage split and sizes are arithmetic
(`parallel/layout.py`, `model/weights.py`); inside a launcher each rank would print the same.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_salt import checkpoint as ckpt
from megatron_salt.config import RunConfig, parse_blend, parse_objective
from megatron_salt.data.dataset import Choice, find_tokenizer, load_choice, verify_all
from megatron_salt.data.manifest import read_manifest
from megatron_salt.data.objective import check_sentinels, fit_spans
from megatron_salt.deepspeed_config import (
    DeepSpeedSettings,
    check_against_run,
    load_deepspeed_config,
    positive_int,
    read_json,
)
from megatron_salt.model.weights import (
    WeightSpec,
    num_parameters,
    output_weight_name,
    padded_vocab,
    shard_shape,
    weight_table,
)
from megatron_salt.parallel.groups import planned_world_size
from megatron_salt.parallel.layout import (
    Layout,
    balanced_stages,
    layer_costs,
    layout_for_world,
    split_rows,
)
from megatron_salt.resume import (
    check_same_choice,
    check_start,
    find_teacher,
    unseen_objectives,
)
from megatron_salt.switch import carried_over, effective

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes per rank of one pipeline stage."""

    parameters: int
    """Number of parameters of this stage on one tensor-parallel rank (not bytes)."""
    model_states: float
    teacher: float
    hidden_states: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.model_states + self.teacher + self.hidden_states + self.activations + self.loss


def world_size_for(config: RunConfig, deepspeed_config: str) -> int:
    """World size of the launcher, else what the batch sizes imply, else one replica."""
    planned = planned_world_size()
    if planned is not None and planned > 1:
        return planned
    parallel = config.parallel
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    values = read_json(deepspeed_config)
    total, micro, steps = (
        positive_int(values, key, deepspeed_config)
        for key in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        )
    )
    dp_size = total // (micro * steps) if total and micro and steps else 1
    return model_ranks * max(1, dp_size)


def model_state_bytes(parameters: int, settings: DeepSpeedSettings, dp_size: int) -> float:
    """Weights, gradients and Adam states of one rank under the ZeRO stage.

    Source: ZeRO, arXiv 1910.02054, section 3: 2 + 2 + 12 bytes a parameter with 16-bit weights
    (fp32 master, momentum, variance), 4 + 4 + 8 in fp32; stages 1, 2 and 3 cut optimiser states,
    gradients and weights by the data-parallel size. Gradient accumulation in fp32 adds 4 - 2.
    """
    small = settings.precision != "fp32"
    weights, states = (2.0, 12.0) if small else (4.0, 8.0)
    accumulate_fp32 = settings.values.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    gradients = 4.0 if not small or accumulate_fp32 else 2.0
    stage = settings.zero_stage
    weights /= dp_size if stage >= 3 else 1
    gradients /= dp_size if stage >= 2 else 1
    states /= dp_size if stage >= 1 else 1
    return parameters * (weights + gradients + states)


def activation_bytes(config: RunConfig, settings: DeepSpeedSettings, layers: int) -> float:
    """Bytes that one micro-batch in flight keeps for its backward through `layers` layers.

    Source: Korthikanti et al., arXiv 2205.05198, eq. 2 and 4 with the attention matrix recomputed
    (flash attention): S B D (10 + 24 / tp) bytes a layer with 16-bit activations, 34 / tp under
    sequence parallelism, 2 with full recomputation. Meant as an estimate.
    """
    tp = config.parallel.tensor_model_parallel_size
    unit = config.data.seq_length * settings.micro_batch_size * config.model.hidden_size
    shared = tp if config.parallel.sequence_parallel else 1
    per_layer = 10.0 / shared + 24.0 / tp
    if config.parallel.recompute_granularity == "full":
        per_layer = 2.0 / shared
    return unit * per_layer * layers * BYTES[settings.precision] / 2


def loss_bytes(
    config: RunConfig, settings: DeepSpeedSettings, vocab_size: int, *, teacher: bool
) -> float:
    """Bytes of the loss on a rank of the last stage: logits of one chunk of tokens, and what waits
    for the backward, the gradients of the hidden states and, in fp32, of the head.

    Source: `kernels.chunks.Heads.bytes_per_token`, without its scratch of some hidden states.
    """
    model, salt, width = config.model, config.salt, BYTES[settings.precision]
    tp = config.parallel.tensor_model_parallel_size
    columns = padded_vocab(model, vocab_size, tp) // tp
    logits = 4 if salt.logits_dtype == "fp32" else width
    per_token = columns * logits * (2 if teacher else 1)
    if logits != width:  # the products want the logits' gradient in the model's precision
        per_token += columns * width
    tokens = config.data.seq_length * settings.micro_batch_size
    chunk = min(salt.loss_chunk_mib << 20, tokens * per_token)
    local_tokens = tokens // tp if config.parallel.sequence_parallel else tokens
    return chunk + model.hidden_size * (4.0 * columns + width * local_tokens)


def _stage_of(name: str, bounds: list[int]) -> int:
    if name.startswith("layers."):
        index = int(name.split(".")[1])
        return max(stage for stage, start in enumerate(bounds[:-1]) if start <= index)
    return 0 if name.startswith(("embedding", "position_embedding")) else len(bounds) - 2


def stage_parameters(config: RunConfig, vocab_size: int, bounds: list[int]) -> list[int]:
    """Parameters on one tensor-parallel rank of every stage; vocabulary padding included."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    padded = padded_vocab(model, vocab_size, tp)
    counts = [0] * (len(bounds) - 1)

    def size(spec: WeightSpec) -> int:
        return math.prod(shard_shape(spec, tp, padded))

    table = weight_table(model, vocab_size, config.position_rows)
    for name, spec in table.items():
        counts[_stage_of(name, bounds)] += size(spec)
    if not model.untie_embeddings_and_output_weights and len(counts) > 1:
        counts[-1] += size(table[output_weight_name(model)])  # the last stage's copy
    return counts


def describe(config: RunConfig, deepspeed_config: str) -> str:
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
    verify_all(config.data, tokenizer)
    check_sentinels(config.data, tokenizer)
    choice = load_choice(config, tokenizer)
    fingerprint = tokenizer.fingerprint
    resume, warnings = ckpt.find_resume(config.train.output_dir, config.train.resume)
    resumed = ckpt.read_manifest(resume) if resume else None
    check_start(config, layout, settings, fingerprint, resume, resumed)
    if resumed is not None:
        check_same_choice(config, resumed, choice)
        switch = carried_over(resumed.switch, resumed.config.salt, config.salt)
        config = dataclasses.replace(config, salt=effective(config.salt, switch))
    teacher = None
    if config.teacher.checkpoint is not None:
        path, seq_length = config.teacher.checkpoint, config.data.seq_length
        folder, teacher = find_teacher(path, tokenizer, seq_length, resumed)
        warnings = [*warnings, *unseen_objectives(folder, teacher, config)]
    costs = layer_costs(config.model, tokenizer.vocab_size, config.data.seq_length)
    bounds = balanced_stages(costs, layout.pp_size)
    memory = stage_memory(config, settings, layout, tokenizer.vocab_size, bounds, teacher)
    lines = [
        *(f"WARNING {warning}" for warning in warnings),
        *_layout_lines(layout, settings, config),
        *_token_lines(config, settings, choice),
        f"start: {'new run' if resume is None else f'resume {resume}'}",
        *_teacher_lines(teacher, config, settings, layout),
        *_stage_lines(bounds, memory, costs),
    ]
    return "\n".join(lines)


def stage_memory(
    config: RunConfig,
    settings: DeepSpeedSettings,
    layout: Layout,
    vocab_size: int,
    bounds: list[int],
    teacher: ckpt.CheckpointManifest | None,
) -> list[StageMemory]:
    """Bytes per rank of every stage, in the KD phase if there is a teacher."""
    width = BYTES[settings.precision]
    result = []
    rows = settings.micro_batch_size * settings.num_micro_batches
    for stage, count in enumerate(stage_parameters(config, vocab_size, bounds)):
        last = stage == layout.pp_size - 1
        teacher_bytes = hidden_bytes = 0.0
        if teacher is not None:
            model = teacher.config.model
            table = weight_table(model, teacher.vocab_size, teacher.config.position_rows)
            body = sum(spec.numel for name, spec in table.items() if name != "output_layer.weight")
            shard_columns = padded_vocab(config.model, vocab_size, layout.tp_size) // layout.tp_size
            head = shard_columns * model.hidden_size if last else 0
            teacher_bytes = float((body + head) * width)
            per_row = config.data.seq_length * model.hidden_size * width
            share = split_rows(rows, layout.tp_size * layout.pp_size)[0][1]
            hidden_bytes = float(per_row * (rows if last else share))
        in_flight = min(layout.pp_size - stage, settings.num_micro_batches)
        layers = bounds[stage + 1] - bounds[stage]
        result.append(
            StageMemory(
                parameters=count,
                model_states=model_state_bytes(count, settings, layout.dp_size),
                teacher=teacher_bytes,
                hidden_states=hidden_bytes,
                activations=activation_bytes(config, settings, layers) * in_flight,
                loss=loss_bytes(config, settings, vocab_size, teacher=teacher is not None)
                if last
                else 0.0,
            )
        )
    return result


def _layout_lines(layout: Layout, settings: DeepSpeedSettings, config: RunConfig) -> list[str]:
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


def _token_lines(config: RunConfig, settings: DeepSpeedSettings, choice: Choice) -> list[str]:
    per_step = settings.global_batch_size * config.data.seq_length
    total = per_step * config.train.steps
    most = "at most " if config.salt.switch == "adaptive" else ""
    lines = [
        f"tokens: {per_step:,} a step x {config.train.steps:,} steps = {total:,} "
        f"({most}{per_step * config.salt.kd_steps:,} of them in the KD phase)"
    ]
    lines += [f"  {line}" for line in choice.describe()]
    if choice.selections:
        total -= per_step * config.salt.kd_steps
    prefixes, weights = parse_blend(config.data.train_data_path, "data.train_data_path")
    for which, (prefix, weight) in enumerate(zip(prefixes, weights, strict=True)):
        manifest = read_manifest(prefix)
        share = weight / sum(weights)
        if choice.selections:
            chosen = choice.selections[which]
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
        length, rate = config.data.seq_length, config.data.span_corruption_rate
        counts = fit_spans(length + 1, rate, config.data.span_mean_length)
        lines.append(
            f"  a row of span_corruption reads {counts.num_tokens} of its {length + 1} tokens and "
            f"predicts {counts.num_noise} of them in {counts.num_spans} spans"
        )
    return lines


def _teacher_lines(
    teacher: ckpt.CheckpointManifest | None,
    config: RunConfig,
    settings: DeepSpeedSettings,
    layout: Layout,
) -> list[str]:
    if teacher is None:
        return ["teacher: none"]
    count = num_parameters(teacher.config.model, teacher.vocab_size, teacher.config.position_rows)
    rows = settings.micro_batch_size * settings.num_micro_batches
    parts = split_rows(rows, layout.tp_size * layout.pp_size)
    sizes = sorted({stop - start for start, stop in parts})
    most = "at most " if config.salt.switch == "adaptive" else ""
    share = " or ".join(str(size) for size in sizes)
    return [
        f"teacher: {count:,} parameters, a replica on each of "
        f"{layout.world_size} ranks for {most}{config.salt.kd_steps:,} steps",
        f"  its work: the {rows} sequences of a replica's step over {len(parts)} ranks, {share} "
        f"each, {max(sizes) * config.data.seq_length:,} tokens at most",
    ]


def _stage_lines(bounds: list[int], memory: list[StageMemory], costs: list[float]) -> list[str]:
    gib = 2.0**30
    lines = [
        "stages (GiB per rank; activations are an estimate, allocator and buffers not counted):"
    ]
    total_cost = sum(costs)
    for stage, part in enumerate(memory):
        start, stop = bounds[stage], bounds[stage + 1]
        cost = sum(costs[1 + start : 1 + stop]) + (costs[-1] if stage == len(memory) - 1 else 0)
        lines.append(
            f"  stage {stage}: layers [{start}, {stop}), {part.parameters:,} parameters a rank, "
            f"{cost / total_cost:.1%} of the work; model states {part.model_states / gib:.2f} + "
            f"teacher {part.teacher / gib:.2f} + its hidden states {part.hidden_states / gib:.2f} "
            f"+ activations {part.activations / gib:.2f} + loss {part.loss / gib:.2f} = "
            f"{part.total / gib:.2f}"
        )
    return lines
