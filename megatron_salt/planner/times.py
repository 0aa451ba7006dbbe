"""Seconds: products at a share of the peak, transfers at a share of the links.

Letters: B micro-batch, S sequence, D student width, E teacher width, P parameters on a rank, t
tensor-parallel and d data-parallel ranks, w bytes of an element in the model's precision.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from megatron_salt.config.values import is_number, nearest
from megatron_salt.planner.hardware import Machine
from megatron_salt.planner.memory import communication_bytes, stage_parameters
from megatron_salt.planner.sizes import Sizes
from megatron_salt.teacher.plan import multiply_adds
from megatron_salt.teacher.simulator import StepTimes


def all_reduce_s(num_bytes: float, ranks: int, bytes_s: float) -> float:
    """Of a ring: each rank sends 2 (n - 1) / n of the data.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009, section 3.
    """
    return 2.0 * gather_s(num_bytes, ranks, bytes_s)


def gather_s(num_bytes: float, ranks: int, bytes_s: float) -> float:
    """All-gather to, or reduce-scatter from, `num_bytes` on every rank: half of an all-reduce."""
    return (ranks - 1) / ranks * num_bytes / bytes_s


def tensor_parallel(sizes: Sizes, machine: Machine) -> tuple[float, float, float, float]:
    """Collectives of a micro-batch over tp, which nothing hides: in a layer's forward and backward,
    of the embedding, of the loss.

    Of w B S D bytes: 2 all-reduces in a layer's forward and 2 in its backward, one for the
    embedding and one for the hidden states' gradient of the loss. Under sequence parallelism an
    all-gather and a reduce-scatter stand for each, and the backward gathers both inputs again.

    Source: Megatron-LM, arXiv 1909.08053, section 3; Korthikanti et al., arXiv 2205.05198, section
    4.2.2; `linear_kd_loss`.
    """
    tp = sizes.layout.tp_size
    whole = sizes.tokens * sizes.config.model.hidden_size * sizes.width
    once = all_reduce_s(whole, tp, machine.link_bytes_s(tp)) if tp > 1 else 0.0
    parallel = sizes.config.parallel
    backward = (3.0 if parallel.sequence_parallel else 2.0) * once
    if parallel.recompute_granularity == "full":
        backward += 2.0 * once
    return 2.0 * once, backward, once / 2 if parallel.sequence_parallel else once, once


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """What the data-parallel ranks of a stage exchange, and the optimizer."""

    reduction: float
    """Of the gradients, once a step."""
    update: float
    """Of the optimizer, and weights brought back."""
    forward: float = 0.0
    """Weights gathered for each micro-batch's forward (ZeRO 3)."""
    backward: float = 0.0
    """Gradients reduced in each micro-batch's backward (ZeRO 2 and 3), weights gathered for it."""


def data_parallel(parameters: int, sizes: Sizes, machine: Machine) -> DataParallel:
    """Gradients are all-reduced in stages 0 and 1 once a step, in stage 2 each micro-batch, and
    reduce-scattered in stage 3; weights come back by an all-gather from stage 1 on. The optimizer
    reads gradient, master weight and two moments and writes all but the first: 28 + w bytes.

    Source: ZeRO, arXiv 1910.02054, section 7; DeepSpeed 0.19 all-reduces where a reduce-scatter
    would do (`buffered_allreduce_fallback`, use_multi_rank_bucket_allreduce).
    """
    layout, settings, w = sizes.layout, sizes.settings, sizes.width
    d, stage = layout.dp_size, settings.zero_stage
    in_node = max(1, machine.gpus_per_node // layout.tp_size)
    rate = machine.link_bytes_s(layout.tp_size * d, min(d, in_node))
    gradients = parameters * communication_bytes(settings)
    reduction = all_reduce_s(gradients, d, rate)
    weights = gather_s(parameters * w, d, rate) if stage else 0.0
    share = parameters / (d if stage else 1)
    optimizer = share * (28 + w) / machine.memory_bytes_s
    if stage <= 1:
        return DataParallel(reduction=reduction, update=optimizer + weights)
    if stage == 2:
        return DataParallel(reduction=0.0, update=optimizer + weights, backward=reduction)
    return DataParallel(
        reduction=0.0, update=optimizer, forward=weights, backward=reduction / 2 + weights
    )


def step_times(sizes: Sizes, machine: Machine) -> StepTimes:
    """What the parts of a step take, for the simulator.

    Two floating-point operations for each multiply-add of `multiply_adds`; a stage's collectives
    are added to its forward and backward, because megatron-core and DeepSpeed wait for them.
    """
    base, layout = multiply_adds(sizes.shape), sizes.layout
    per_multiply_add = 2.0 / machine.flops_s(sizes.settings.precision)
    layer_forward, layer_backward, embedding, loss = tensor_parallel(sizes, machine)
    counts = stage_parameters(sizes.config, sizes.vocab_size, sizes.bounds)
    over_dp = [data_parallel(count, sizes, machine) for count in counts]
    forward, backward = [], []
    for stage in range(layout.pp_size):
        layers = sizes.bounds[stage + 1] - sizes.bounds[stage]
        ends = embedding if stage == 0 else 0.0
        ends += loss if stage == layout.pp_size - 1 else 0.0
        products = base.forward[stage] * per_multiply_add
        forward.append(products + layers * layer_forward + ends + over_dp[stage].forward)
        products = base.backward[stage] * per_multiply_add
        backward.append(products + layers * layer_backward + over_dp[stage].backward)
    transfer = hidden_transfer = 0.0
    if layout.pp_size > 1:
        rate = machine.link_bytes_s(layout.world_size)
        transfer = sizes.hidden_bytes / rate
        if sizes.partitioned:
            tp = layout.tp_size
            transfer = transfer / tp + gather_s(sizes.hidden_bytes, tp, machine.link_bytes_s(tp))
        if sizes.teacher is not None:
            start, stop = sizes.shape.pieces[0]
            hidden_transfer = (stop - start) * sizes.hidden_row_bytes / rate

    def teacher(piece: int, chunk: int) -> float:
        seconds = base.teacher(piece, chunk) * per_multiply_add
        return seconds + teacher_collectives_s(sizes, machine, piece, chunk)

    return StepTimes(
        forward=forward, backward=backward, transfer=transfer, hidden_transfer=hidden_transfer,
        teacher=cache(teacher),
        update=max(each.reduction + each.update for each in over_dp),
    )  # fmt: skip


def teacher_collectives_s(sizes: Sizes, machine: Machine, piece: int, chunk: int) -> float:
    """Of a teacher that is spread: 2 all-reduces over tp of w S B E bytes in a layer, one for the
    embedding.

    Source: `FrozenModel`.
    """
    tp = sizes.config.teacher_tp_size
    if tp == 1:
        return 0.0
    (start, stop), (first, end) = sizes.shape.pieces[piece], sizes.shape.chunk_bounds[chunk]
    once = all_reduce_s((stop - start) * sizes.hidden_row_bytes, tp, machine.link_bytes_s(tp))
    return once * (2 * (end - first) + (chunk == 0))


def hidden_exchange_s(sizes: Sizes, machine: Machine) -> float:
    """The broadcasts over tp that end a pass on the last stage: R S E w bytes in all. Ranks that
    share a teacher have all rows.

    Source: `TeacherPass.finish`.
    """
    tp = sizes.layout.tp_size
    if tp == sizes.config.teacher_tp_size or sizes.teacher is None:
        return 0.0
    return sizes.shape.num_rows * sizes.hidden_row_bytes / machine.link_bytes_s(tp)


@dataclass(frozen=True, kw_only=True)
class MeasuredTimes:
    """Seconds that were measured, of the config's own layout. They stand in the place of all that
    is computed: a measured second is never held against a computed one."""

    forward_s: Sequence[float] | None = None
    """Of one micro-batch, by stage, in the LM phase."""
    forward_kd_s: Sequence[float] | None = None
    """The same in the KD phase, whose loss has two heads."""
    backward_s: Sequence[float] | None = None
    teacher_row_s: float | None = None
    """Of the teacher's whole forward on one row."""
    transfer_s: float | None = None
    hidden_transfer_s: float | None = None
    """Of a piece's hidden states to the last stage."""
    update_s: float | None = None

    def step_times(self, sizes: Sizes) -> StepTimes:
        """Of a KD step, or of a plain one where `sizes` has no teacher. What a run does not trace,
        `hidden_transfer_s` and `update_s`, counts nothing unless it is given.

        Raises: ValueError naming what is missing.
        """
        pp_size, teacher = sizes.layout.pp_size, sizes.teacher
        lists = ("forward_s" if teacher is None else "forward_kd_s", "backward_s")
        single = ["teacher_row_s"] * (teacher is not None) + ["transfer_s"] * (pp_size > 1)
        wrong = [name for name in lists if len(getattr(self, name) or ()) != pp_size]
        if wrong := wrong + [name for name in single if getattr(self, name) is None]:
            raise ValueError(
                f"--measured: {', '.join(f'{name} is {getattr(self, name)}' for name in wrong)}: "
                f"give seconds, by stage {pp_size} of them; nothing computed stands in for them"
            )
        forward, backward = (list(getattr(self, name)) for name in lists)

        def taught(piece: int, chunk: int) -> float:
            assert teacher is not None and self.teacher_row_s is not None
            (start, stop), (first, end) = sizes.shape.pieces[piece], sizes.shape.chunk_bounds[chunk]
            return self.teacher_row_s * (stop - start) * (end - first) / teacher.model.num_layers

        return StepTimes(
            forward=forward, backward=backward, teacher=cache(taught),
            transfer=self.transfer_s or 0.0, hidden_transfer=self.hidden_transfer_s or 0.0,
            update=self.update_s or 0.0,
        )  # fmt: skip


def read_measured(path: str) -> MeasuredTimes:
    """Raises: ValueError naming file and key for anything that is not `Measured`'s."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--measured {path}: {error}") from error
    known = [field.name for field in fields(MeasuredTimes)]
    if not isinstance(values, dict):
        raise ValueError(f"--measured {path}: expected an object with {', '.join(known)}")
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"--measured {path}: unknown key {key!r}.{nearest(key, known)}")
        by_stage = key.startswith(("forward", "backward"))
        numbers = value if by_stage else [value]
        if not isinstance(numbers, list) or not all(is_number(n) and n >= 0 for n in numbers):
            what = "a list of seconds, one for each stage" if by_stage else "seconds"
            raise ValueError(f"--measured {path}: {key} = {value!r}: expected {what}")
    return MeasuredTimes(**values)
