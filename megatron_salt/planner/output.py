"""The plan for people, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_salt.files.markdown import BYTE_UNITS, TIME_UNITS, markdown_table, unit_for
from megatron_salt.planner.estimate import Estimate, Overheads
from megatron_salt.planner.hardware import Machine
from megatron_salt.planner.inputs import PlannerInputs
from megatron_salt.planner.memory import StageMemory
from megatron_salt.planner.offline import TOP_K, offline_costs
from megatron_salt.planner.ranking import Ranking
from megatron_salt.teacher.simulator import Timeline

# Columns whose heading is not the name of the field.
HEADINGS = {"teacher_head": "its head", "hidden_states": "hidden states", "total": "in all"}


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """All that `megatron-salt plan` has found."""

    inputs: PlannerInputs
    machine: Machine
    own: Estimate | None
    """The config's own layout; None: the GPUs do not allow it."""
    overheads: list[Overheads]
    """Of the own layout, computed."""
    measured: bool = False
    ranking: Ranking | None
    problem: str = ""
    """Why there is no ranking."""
    steps_saved: float | None = None
    """Share of the baseline's steps that SALT is taken to save; the caller's, not a claim."""


def as_dict(plan: PlanReport) -> dict[str, Any]:
    """Plain values for a JSON file; bytes and seconds."""
    inputs, ranking = plan.inputs, plan.ranking
    return {
        "gpus": inputs.world_size, "machine": dataclasses.asdict(plan.machine),
        "vocab_size": inputs.vocab_size, "global_batch_size": inputs.settings.global_batch_size,
        "precision": inputs.settings.precision, "zero_stage": inputs.settings.zero_stage,
        "own": None if plan.own is None else _estimate_dict(plan, plan.own),
        "own_problem": inputs.own_problem,
        "overheads": [dataclasses.asdict(one) for one in plan.overheads],
        "ranking": ranking
        and {**vars(ranking), "listed": [_estimate_dict(plan, one) for one in ranking.listed]},
        "problem": plan.problem,
        "offline": None if plan.own is None else _offline_dict(plan, plan.own),
    }  # fmt: skip


def _offline_dict(plan: PlanReport, own: Estimate) -> dict[str, Any] | None:
    costs = offline_costs(own, plan.machine)
    return None if costs is None else dataclasses.asdict(costs)


def _estimate_dict(plan: PlanReport, one: Estimate) -> dict[str, Any]:
    sizes, steps = one.sizes, one.steps
    found = {
        **dataclasses.asdict(sizes.layout), "micro_batch_size": sizes.settings.micro_batch_size,
        "num_micro_batches": sizes.settings.num_micro_batches, "stage_bounds": list(sizes.bounds),
        "memory_bytes": {
            phase: [{**dataclasses.asdict(part), "total": part.total} for part in parts]
            for phase, parts in one.memory.items()
        },
        "fits": one.largest_bytes <= plan.machine.usable_bytes, "simulated": steps is not None,
        "lm_step_s": one.lm_s, "kd_step_s": one.kd_s, "run": totals(plan, one),
    }  # fmt: skip
    if math.isnan(one.lm_s):
        found |= {"lm_step_s": None, "run": None}
    if steps is not None:
        found["kd_before_step_s"] = steps.kd_before_s
        found["kd_bubble_s"] = steps.kd_bubble_s
        found["kd_bound_s"] = steps.kd_bound_s
        found["idle_share"] = {name: idle_shares(t) for name, t in timelines(one).items()}
    return found


def timelines(one: Estimate) -> dict[str, Timeline]:
    """Those that were simulated: before the step above in the bubbles above the plain step."""
    steps = one.steps
    if steps is None:
        return {}
    before = "KD, teacher before the step"
    found = {before: steps.kd_before, "KD, teacher in the bubbles": steps.kd_bubble, "LM": steps.lm}
    return {name: timeline for name, timeline in found.items() if timeline is not None}


def idle_shares(timeline: Timeline) -> list[float]:
    """Of the step, by stage."""
    return [timeline.idle(stage) / timeline.step_time for stage in range(len(timeline.spans))]


def totals(plan: PlanReport, one: Estimate) -> dict[str, float]:
    """Of the whole run in hours: with a teacher, the same steps without, and with fewer steps."""
    config, gpus = one.sizes.config, one.sizes.layout.world_size
    steps, kd_steps = config.train.steps, config.salt.kd_steps
    seconds = {"salt": one.total_s, "baseline": steps * one.lm_s}
    if plan.steps_saved is not None:
        fewer = max(kd_steps, round(steps * (1 - plan.steps_saved)))
        seconds["fewer_steps"] = kd_steps * one.kd_s + (fewer - kd_steps) * one.lm_s
    hours = {f"{name}_h": value / 3600 for name, value in seconds.items()}
    return hours | {f"{name}_gpu_h": value / 3600 * gpus for name, value in seconds.items()}


def describe_plan(plan: PlanReport) -> str:
    """The whole plan as text; tables in Markdown."""
    inputs, machine = plan.inputs, plan.machine
    gpu, settings = machine.gpu, inputs.settings
    parts = [
        f"{inputs.world_size} GPUs {gpu.name} ({gpu.source}), {machine.gpus_per_node} in a node, "
        f"network {machine.network_gb_s:g} GB/s each; {settings.precision}, ZeRO "
        f"{settings.zero_stage}, {settings.global_batch_size} sequences a step.\n"
        f"Assumed: products at {machine.efficiency:.0%} of their peak, links and memory at "
        f"{machine.link_efficiency:.0%}, {machine.usable:.0%} of {gpu.memory_gb:g} GB for tensors. "
        "Every time below stands and falls with them."
    ]
    if plan.own is None:
        parts.append(f"The config's own layout: {inputs.own_problem}")
    else:
        parts += _describe_own(plan, plan.own)
    if plan.ranking is None:
        parts.append(f"No ranking: {plan.problem}")
    else:
        parts += _describe_ranking(plan, plan.ranking)
    return "\n\n".join(parts)


def _describe_own(plan: PlanReport, own: Estimate) -> list[str]:
    sizes, usable = own.sizes, plan.machine.usable_bytes
    layout, settings = sizes.layout, sizes.settings
    fits = "fits" if own.largest_bytes <= usable else "does NOT fit"
    size, unit = unit_for(own.largest_bytes, BYTE_UNITS)
    lines = [
        f"The config's own layout: tp {layout.tp_size}, pp {layout.pp_size}, dp {layout.dp_size}, "
        f"{settings.num_micro_batches} micro-batch{'es' * (settings.num_micro_batches > 1)} of "
        f"{settings.micro_batch_size}. It {fits}: "
        f"{own.largest_bytes / size:.1f} of {usable / size:,.1f} {unit}."
    ]
    lines += [
        f"Memory of a rank in the {phase} phase, {unit}\n\n{memory_table(parts, size)}"
        for phase, parts in own.memory.items()
    ]
    assert own.steps is not None
    if (teaching := own.steps.plan) is not None:
        counts = ", ".join(f"{len(ranks[0])}" for ranks in teaching.pieces_of)
        spread = sizes.config.teacher_tp_size > 1
        who = "the ranks of each stage together" if spread else "a rank of each stage"
        lines.append(
            f"In the bubbles the teacher reads a replica's step in {teaching.work}, {who} "
            f"{counts} of them, in {teaching.num_chunks} chunks each."
        )
    kind = ", measured; what the file does not have counts nothing" * plan.measured
    lines.append(f"A step{kind}\n\n{steps_table(own)}")
    if plan.overheads:
        kind = ", computed" * plan.measured
        table = overheads_table(plan.overheads)
        lines.append(f"A KD step by number of micro-batches{kind}\n\n{table}")
    return [*lines, _describe_run(plan, own), *_describe_offline(plan, own)]


def _describe_offline(plan: PlanReport, own: Estimate) -> list[str]:
    """Whether the teacher's logits had better be stored, for this run and for several."""
    costs = offline_costs(own, plan.machine)
    if costs is None or not costs.num_bytes:
        return []
    size, unit = unit_for(costs.num_bytes, BYTE_UNITS)
    rate, rate_unit = unit_for(costs.num_bytes / own.sizes.config.salt.kd_steps / costs.kd_step_s,
                               BYTE_UNITS)  # fmt: skip
    online, capture = costs.online_gpu_s / 3600, costs.capture_gpu_s / 3600
    pays = "for no number of runs: the teacher costs them nothing"
    if online > 0:
        pays = f"from {max(1, math.ceil(capture / online))} such runs on"
    read = costs.num_bytes / own.sizes.config.salt.kd_steps / costs.kd_step_s / rate
    return [
        f"The teacher's logits, stored once (`cache-logits`, {TOP_K} tokens of each position): "
        f"{capture:,.1f} GPU hours and {costs.num_bytes / size:,.1f} {unit}, read at {read:,.1f} "
        f"{rate_unit}/s. The teacher in the run costs {online:,.1f} GPU hours of its KD steps. In "
        f"GPU hours storing pays {pays}."
    ]


def _describe_run(plan: PlanReport, own: Estimate) -> str:
    config, settings, found = own.sizes.config, own.sizes.settings, totals(plan, own)
    if math.isnan(own.lm_s):
        return (
            "No plain step to compare with: --measured has no forward_s, a run's file is of its KD "
            "phase. `wall_clock_breakdown` in the DeepSpeed JSON prints a step's milliseconds by "
            f"stage: give forward of an LM step / {1000 * settings.num_micro_batches} as forward_s."
        )
    size, unit = unit_for(own.total_s, TIME_UNITS)

    def take(name: str) -> str:
        hours, gpu_hours = found[f"{name}_h"], found[f"{name}_gpu_h"]
        return f"{hours * 3600 / size:,.1f} {unit}, {gpu_hours * 3600 / size:,.1f} GPU {unit}"

    text = (
        f"The run: {config.salt.kd_steps:,} KD and "
        f"{config.train.steps - config.salt.kd_steps:,} LM steps take {take('salt')}; "
        f"{config.train.steps:,} plain steps {take('baseline')}: "
        f"{found['salt_h'] / found['baseline_h'] - 1:+.1%}. The teacher's own training is not "
        "counted."
    )
    if plan.steps_saved is not None:
        text += (
            f"\nIf SALT needs {plan.steps_saved:.0%} fewer steps (--steps-saved, not a claim): "
            f"{take('fewer_steps')}, {found['fewer_steps_h'] / found['baseline_h'] - 1:+.1%}."
        )
    return text


def memory_table(parts: Sequence[StageMemory], size: float) -> str:
    """In units of so many bytes; columns that are zero everywhere are left out."""
    names = [field.name for field in dataclasses.fields(StageMemory)]
    names.remove("parameters")
    shown = [n for n in [*names, "total"] if any(getattr(part, n) for part in parts)]
    rows = [
        [str(stage), f"{part.parameters:,}", *(f"{getattr(part, n) / size:.2f}" for n in shown)]
        for stage, part in enumerate(parts)
    ]
    return markdown_table(["stage", "parameters", *(HEADINGS.get(n, n) for n in shown)], rows)


def steps_table(one: Estimate) -> str:
    """Seconds, overhead and idle share of every stage, of each placement."""
    steps = one.steps
    assert steps is not None
    seconds = [s for s in (steps.kd_before_s, steps.kd_bubble_s, steps.lm_s) if s and s > 0]
    rows = []
    for (name, timeline), step_s in zip(timelines(one).items(), seconds, strict=True):
        idle = " ".join(f"{share:.1%}" for share in idle_shares(timeline))
        rows.append([name, f"{step_s:.4g}", f"{step_s / steps.lm_s - 1:+.1%}", idle])
    if steps.kd_bound_s is not None:
        bound = steps.kd_bound_s
        rows.insert(2, ["  no placement can beat", f"{bound:.4g}",
                        f"{bound / steps.lm_s - 1:+.1%}", ""])  # fmt: skip
    if steps.lm is None:
        rows = [[*row[:2], "-", row[3]] for row in rows]
    return markdown_table(["", "s", "against LM", "idle by stage"], rows)


def overheads_table(found: Sequence[Overheads]) -> str:
    rows = [
        [f"{one.num_micro_batches}", f"{one.lm_s:.4g}", f"{one.before_step:+.1%}",
         f"{one.bubble:+.1%}", f"{one.bound:+.1%}"]
        for one in found
    ]  # fmt: skip
    return markdown_table(["micro-batches", "LM s", "before the step", "bubbles", "bound"], rows)


def _describe_ranking(plan: PlanReport, ranking: Ranking) -> list[str]:
    rows = []
    size, unit = unit_for(max((one.largest_bytes for one in ranking.listed), default=0), BYTE_UNITS)
    span, time = unit_for(max((one.total_s for one in ranking.listed), default=0), TIME_UNITS)
    for place, one in enumerate(ranking.listed, start=1):
        layout, settings = one.sizes.layout, one.sizes.settings
        rows.append(
            [
                f"{place}", f"{layout.tp_size}", f"{layout.pp_size}", f"{layout.dp_size}",
                f"{settings.micro_batch_size}", f"{settings.num_micro_batches}",
                f"{one.largest_bytes / size:.1f}", f"{one.lm_s:.4g}", f"{one.kd_s:.4g}",
                f"{one.kd_s / one.lm_s - 1:+.1%}", f"{one.total_s / span:,.1f}",
                f"{one.total_s / span * layout.world_size:,.1f}",
                "" if one.steps else "closed form",
            ]
        )  # fmt: skip
    header = ["", "tp", "pp", "dp", "micro-batch", "number", unit, "LM s", "KD s", "KD against LM",
              f"run, {time}", f"GPU {time}", "times from"]  # fmt: skip
    if all(one.steps for one in ranking.listed):
        header, rows = header[:-1], [row[:-1] for row in rows]
    counts = "".join(f"\n- {number}: {reason}" for reason, number in ranking.refused.items())
    return [
        f"The fastest of {ranking.num_fitting} layouts and micro-batch sizes that fit, one of "
        f"each layout{', by computed times' * plan.measured}\n\n{markdown_table(header, rows)}",
        f"Refused{counts}" if counts else "Refused: none",
    ]
