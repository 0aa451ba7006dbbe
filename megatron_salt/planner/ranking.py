"""All layouts that a number of GPUs allows: which are refused and why, which are fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_salt.parallel.layout import Layout
from megatron_salt.planner.estimate import SIMULATED_UP_TO, Estimate, full_estimate, quick_estimate
from megatron_salt.planner.hardware import Machine
from megatron_salt.planner.inputs import PlannerInputs
from megatron_salt.planner.sizes import Sizes

BATCH = "the global batch is no multiple of the data-parallel size"
MEMORY = "more memory than a GPU has"


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Layouts that fit, the fastest first, and how many were refused for what."""

    listed: list[Estimate]
    num_fitting: int
    """Of all layouts and micro-batch sizes; of each layout only the best size is listed."""
    refused: dict[str, int]
    """Reason -> number: of (tp, pp) for what concerns them, else of (tp, pp, micro-batch size)."""


def divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def layouts(inputs: PlannerInputs, machine: Machine) -> Iterator[Layout]:
    """Every way to cut the world: tp within a node, pp at most the number of layers, dp the rest.

    Sizes of tp are powers of two, as nodes are made.
    """
    for tp in (2**power for power in range(machine.gpus_per_node.bit_length())):
        if inputs.world_size % tp == 0:
            for pp in divisors(inputs.world_size // tp):
                if pp <= inputs.config.model.num_layers:
                    yield Layout(tp_size=tp, pp_size=pp, dp_size=inputs.world_size // tp // pp)


def candidates(inputs: PlannerInputs, machine: Machine, refused: Counter[str]) -> Iterator[Sizes]:
    """Every layout and micro-batch size that config and DeepSpeed allow. Mutates: refused."""
    total = inputs.settings.global_batch_size
    for layout in layouts(inputs, machine):
        if total % layout.dp_size:
            refused[BATCH] += 1
            continue
        for micro_batch_size in divisors(total // layout.dp_size):
            try:
                yield inputs.at(layout, micro_batch_size)
            except ValueError as error:
                refused[_reason(str(error))] += 1


def _reason(message: str) -> str:
    """A message without what differs from layout to layout."""
    for known, reason in (
        ("is not divisible by parallel.tensor", "heads, groups or MLP width not divisible by tp"),
        ("is not divisible by tp", "sequence length not divisible by tp"),
        ("does not work with parallel.pipeline", "ZeRO 2 and 3 need one stage"),
        ("bf16", "bf16 gradients would not be added up in fp32"),
    ):  # fmt: skip
        if known in message:
            return reason
    return message


def rank(inputs: PlannerInputs, machine: Machine, *, top: int = 5) -> Ranking:
    """Closed forms for all that fit, the simulator for the best few, which alone are listed.

    Raises: ValueError if none fits, naming the one that lacks least and its largest parts.
    """
    refused: Counter[str] = Counter()
    fitting: list[Estimate] = []
    closest: Estimate | None = None
    for sizes in candidates(inputs, machine, refused):
        estimate = quick_estimate(sizes, machine)
        if estimate.largest_bytes <= machine.usable_bytes:
            fitting.append(estimate)
            continue
        refused[MEMORY] += 1
        if closest is None or estimate.largest_bytes < closest.largest_bytes:
            closest = estimate
    if not fitting:
        raise ValueError(_nothing_fits(inputs, machine, refused, closest))
    listed = []
    for estimate in sorted(_best_micro_batches(fitting), key=_order)[:top]:
        sizes = estimate.sizes
        if sizes.layout.pp_size * sizes.settings.num_micro_batches <= SIMULATED_UP_TO:
            estimate = full_estimate(sizes, machine)
        # The exact shares of the teacher's rows may need a little more than equal ones.
        if estimate.largest_bytes <= machine.usable_bytes:
            listed.append(estimate)
    listed.sort(key=_order)
    reasons = dict(sorted(refused.items()))
    return Ranking(listed=listed, num_fitting=len(fitting), refused=reasons)


def _best_micro_batches(fitting: list[Estimate]) -> list[Estimate]:
    """One of each layout: the fastest; of equally fast ones, to a thousandth, the largest, whose
    matrix products are."""
    by_layout: dict[Layout, list[Estimate]] = {}
    for estimate in fitting:
        by_layout.setdefault(estimate.sizes.layout, []).append(estimate)
    return [
        max(
            (one for one in group if one.total_s <= 1.001 * min(each.total_s for each in group)),
            key=lambda one: one.sizes.settings.micro_batch_size,
        )
        for group in by_layout.values()
    ]


def _order(estimate: Estimate) -> tuple[float, int, int, int]:
    layout = estimate.sizes.layout
    return (
        estimate.total_s, layout.pp_size, layout.tp_size, estimate.sizes.settings.micro_batch_size
    )  # fmt: skip


def _nothing_fits(
    inputs: PlannerInputs, machine: Machine, refused: Counter[str], closest: Estimate | None
) -> str:
    counts = "; ".join(f"{number} times: {reason}" for reason, number in sorted(refused.items()))
    if closest is None:
        return f"no layout of {inputs.world_size} GPUs is possible: {counts}"
    gib, layout = 2.0**30, closest.sizes.layout
    found = [(phase, *one) for phase, parts in closest.memory.items() for one in enumerate(parts)]
    phase, stage, part = max(found, key=lambda one: one[2].total)
    parts_of = {
        "weights, gradients and optimizer": part.model_states,
        "teacher": part.teacher + part.teacher_head + part.hidden_states,
        "activations": part.activations + part.masks, "gradient buckets": part.buckets,
        "loss": part.loss,
    }  # fmt: skip
    largest = sorted(parts_of.items(), key=lambda pair: -pair[1])[:3]
    named = ", ".join(f"{name} {size / gib:.1f}" for name, size in largest)
    return (
        f"no layout of {inputs.world_size} GPUs ({machine.gpu.name}) fits into "
        f"{machine.usable_bytes / gib:.1f} GiB ({counts}). Closest is tp {layout.tp_size}, pp "
        f"{layout.pp_size}, dp {layout.dp_size} with micro-batch size "
        f"{closest.sizes.settings.micro_batch_size}: stage {stage} needs {part.total / gib:.1f} "
        f"GiB in the {phase} phase, {(part.total - machine.usable_bytes) / gib:.1f} too many "
        f"(largest: {named}). Try parallel.recompute_granularity full, a higher ZeRO stage, a "
        "smaller zero_optimization.reduce_bucket_size, or more GPUs"
    )
