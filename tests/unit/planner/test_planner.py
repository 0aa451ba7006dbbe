"""The planner's arithmetic by hand and by brute force, its ranking, its messages, its files."""

from __future__ import annotations

import json
import math
import random
import re
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, call, run_forked
from tiny import GPT, LLAMA, make_config, make_deepspeed
from tiny_logits import make_settings

from megatron_salt.model.costs import layer_costs
from megatron_salt.model.weights import padded_vocab
from megatron_salt.parallel.layout import Layout
from megatron_salt.planner import command, hardware, ranking, times
from megatron_salt.planner.estimate import (
    closed_form,
    full_estimate,
    overheads,
    quick_estimate,
    simulated,
    water_level,
)
from megatron_salt.planner.inputs import PlannerInputs, read_inputs
from megatron_salt.planner.memory import (
    hidden_state_bytes,
    model_states,
    stage_memory,
    teacher_forward_bytes,
)
from megatron_salt.planner.offline import TOP_K, offline_costs, stored_bytes_per_token
from megatron_salt.planner.output import PlanReport, as_dict, describe_plan, timelines
from megatron_salt.planner.sizes import Sizes, TeacherSize
from megatron_salt.report.timeline import draw_timelines
from megatron_salt.teacher.plan import TeacherPlan

H100 = hardware.Machine(gpu=hardware.GPUS["h100"], network_gb_s=50.0)
# Equal stages: no head to speak of.
FLAT = {**LLAMA, "num_layers": 8, "make_vocab_size_divisible_by": 1}
FOUR = {"llama": {**LLAMA, "num_layers": 4}, "gpt": {**GPT, "num_layers": 4}}
VOCAB_SIZE = 64


def inputs_of(
    folder: Path, world_size: int, *, teacher: bool = True, json_values: Any = (), **settings: Any
) -> PlannerInputs:
    config = make_config("data", folder / "run", **{"model": FOUR["llama"], **settings})
    if teacher:
        config = replace(config, salt=replace(config.salt, kd_steps=2))
    path = make_deepspeed(
        folder, **{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 1, **dict(json_values)}
    )
    inputs = read_inputs(config, path, world_size, vocab_size=VOCAB_SIZE, teacher_config=None)
    size = TeacherSize(model=config.model, vocab_size=VOCAB_SIZE, num_positions=16)
    return replace(inputs, teacher=size) if teacher else inputs


def at(inputs: PlannerInputs, tp: int, pp: int, dp: int, micro_batch_size: int = 1) -> Sizes:
    return inputs.at(Layout(tp_size=tp, pp_size=pp, dp_size=dp), micro_batch_size)


# Hardware


def test_unknown_names_come_with_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--gpu h10: .*h100, h200.*Did you mean 'h100'"):
        hardware.find_gpu("h10")
    with pytest.raises(ValueError, match=r"--interconnect nrd: .*edr, hdr, ndr.*Did you mean"):
        hardware.find_network("nrd")
    with pytest.raises(ValueError, match="above 0"):
        hardware.find_network("-3")
    assert hardware.find_gpu("H200").memory_gb == 141
    assert hardware.find_network("ndr") == 50.0 and hardware.find_network("12.5") == 12.5


def test_links_within_and_between_nodes() -> None:
    nvlink, network = 450e9 * 0.8, 50e9 * 0.8
    assert H100.link_bytes_s(8) == nvlink
    assert H100.link_bytes_s(9) == H100.link_bytes_s(16, 1) == network
    assert H100.link_bytes_s(64, 4) == 4 * network
    assert H100.link_bytes_s(64, 100) == nvlink  # never more than it can take in


# Times


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_an_all_reduce_is_a_ring_of_reduce_scatter_and_all_gather(ranks: int) -> None:
    """By sending the n parts of a vector round a ring: 2 (n - 1) turns, one part each."""
    vectors = [[random.random() for _ in range(ranks)] for _ in range(ranks)]
    total = [sum(column) for column in zip(*vectors, strict=True)]
    sent = 0.0
    for turn in range(2 * (ranks - 1)):
        parts = [(rank - turn) % ranks for rank in range(ranks)]
        moving = [vectors[rank][part] for rank, part in enumerate(parts)]
        for rank, part in enumerate(parts):
            there = (rank + 1) % ranks
            adds = turn < ranks - 1
            vectors[there][part] = moving[rank] + (vectors[there][part] if adds else 0.0)
        sent += 1.0 / ranks
    for vector in vectors:
        assert vector == pytest.approx(total)
    assert times.all_reduce_s(1.0, ranks, 1.0) == pytest.approx(sent)
    assert times.gather_s(1.0, ranks, 1.0) == pytest.approx(sent / 2)


def test_products_and_collectives_of_a_step(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, 8, teacher=False)
    sizes = at(inputs, 1, 1, 8)
    costs = layer_costs(sizes.config.model, VOCAB_SIZE, 16)
    found = times.step_times(sizes, H100)
    seconds = 2 * 16 / (67e12 * 0.5)  # fp32: two operations, 16 tokens
    assert found.forward == pytest.approx([(sum(costs[:-1]) + 3 * costs[-1]) * seconds])
    assert found.backward == pytest.approx([2 * sum(costs[:-1]) * seconds])
    assert found.transfer == found.hidden_transfer == 0.0
    parameters = stage_memory(sizes)[0].parameters
    reduced = times.all_reduce_s(4 * parameters, 8, 450e9 * 0.8)
    adam = 32 * parameters / (3350e9 * 0.8)
    assert found.update == pytest.approx(reduced + adam)

    over_tp = times.step_times(at(inputs, 2, 1, 4), H100)
    once = times.all_reduce_s(16 * 32 * 4, 2, 450e9 * 0.8)  # S D in fp32
    layers = sizes.config.model.num_layers
    padded = padded_vocab(sizes.config.model, VOCAB_SIZE, 2)
    assert padded == VOCAB_SIZE
    # In each layer two, one for the embedding and one for the loss; none of it is hidden.
    assert over_tp.forward[0] == pytest.approx(found.forward[0] / 2 + (2 * layers + 2) * once)
    assert over_tp.backward[0] == pytest.approx(found.backward[0] / 2 + 2 * layers * once)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_moves_gradients_and_weights(tmp_path: Path, stage: int) -> None:
    """ZeRO's section 7 in units of the gradient's all-reduce: an all-gather is a half."""
    inputs = inputs_of(
        tmp_path, 8, teacher=False, json_values={"zero_optimization": {"stage": stage}}
    )
    sizes = at(inputs, 1, 1, 8)
    found = times.data_parallel(1_000_000, sizes, H100)
    unit = times.all_reduce_s(4e6, 8, 450e9 * 0.8)
    adam = 32e6 / (8 if stage else 1) / (3350e9 * 0.8)
    expected = {
        0: (unit, adam, 0.0, 0.0),
        1: (unit, adam + unit / 2, 0.0, 0.0),
        2: (0.0, adam + unit / 2, 0.0, unit),
        3: (0.0, adam, unit / 2, unit),
    }[stage]
    seen = (found.reduction, found.update, found.forward, found.backward)
    assert seen == pytest.approx(expected)


def test_a_pipeline_sends_hidden_states_over_the_network(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, 16)
    found = times.step_times(at(inputs, 1, 4, 4, 2), H100)
    assert found.transfer == pytest.approx(2 * 16 * 32 * 4 / (50e9 * 0.8))
    assert found.hidden_transfer == found.transfer  # the teacher is as wide, a piece as large
    partitioned = times.step_times(at(inputs, 2, 4, 2, 2), H100)
    gathered = times.gather_s(2 * 16 * 32 * 4, 2, 450e9 * 0.8)
    assert partitioned.transfer == pytest.approx(found.transfer / 2 + gathered)


def test_measured_times_are_read(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    for text, message in (
        ('{"backwards_s": [1]}', "Did you mean 'backward_s'"),
        ('{"update_s": -1}', "expected seconds"),
        ('{"forward_s": 1}', "a list of seconds"),
        ("[", "--measured"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            times.read_measured(str(path))


# As a run with a teacher writes them: slow enough that nothing computed could be their equal.
OF_A_RUN = {"forward_kd_s": [2.0, 5.0], "backward_s": [4.0, 7.0], "teacher_row_s": 8.0,
            "transfer_s": 0.5}  # fmt: skip


def measured_plan(folder: Path, values: dict[str, Any]) -> PlanReport:
    sizes = {f"parallel__{axis}_model_parallel_size": 2 for axis in ("tensor", "pipeline")}
    inputs = inputs_of(folder, 4, **sizes)
    (folder / "measured.json").write_text(json.dumps(values))
    measured = times.read_measured(str(folder / "measured.json"))
    return command.plan_run(inputs, H100, measured=measured)


def test_measured_times_stand_for_all_computed_ones(tmp_path: Path) -> None:
    plan = measured_plan(tmp_path, {**OF_A_RUN, "forward_s": [2.0, 3.0]})
    assert plan.own is not None and plan.own.steps is not None
    num, steps = plan.own.sizes.settings.num_micro_batches, plan.own.steps
    # 1F1B by hand: the last stage is the slowest, the first begins and ends the step.
    assert steps.lm_s == pytest.approx(
        2 + 0.5 + num * (3 + 7) + (num - 1) * 0.5 * 2 + 0.5 + 4, rel=0.1
    )
    found = times.MeasuredTimes(**OF_A_RUN).step_times(plan.own.sizes)
    whole = sum(found.teacher(0, chunk) for chunk in range(len(plan.own.sizes.shape.chunk_bounds)))
    assert (whole, found.update, found.hidden_transfer) == (pytest.approx(8.0), 0.0, 0.0)
    assert (found.forward, found.backward, found.transfer) == ([2.0, 5.0], [4.0, 7.0], 0.5)
    slow = replace(H100, efficiency=1e-12, link_efficiency=1e-12)
    measured = times.MeasuredTimes(**OF_A_RUN, forward_s=[2.0, 3.0])
    assert simulated(plan.own.sizes, slow, measured) == steps  # no figure of the machine is in it
    text = describe_plan(plan)
    assert (
        "A step, measured" in text and "by computed times" in text and "No plain step" not in text
    )


def test_a_runs_own_file_is_compared_with_no_plain_step(tmp_path: Path) -> None:
    """The head of the teacher is in forward_kd_s: what a plain step takes does not follow."""
    plan = measured_plan(tmp_path, OF_A_RUN)
    text, values = describe_plan(plan), as_dict(plan)
    assert "No plain step to compare with: --measured has no forward_s" in text
    assert f"give forward of an LM step / {64 * 1000} as forward_s" in text
    table = text[text.index("A step, measured") :].split("\n\n")[1]
    rows = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in table.splitlines()}
    assert rows.pop("") == "against LM" and rows.pop(next(n for n in rows if n.startswith("--")))
    assert rows == dict.fromkeys(
        ["KD, teacher before the step", "KD, teacher in the bubbles", "no placement can beat"], "-"
    )
    assert values["own"]["lm_step_s"] is None and values["own"]["run"] is None
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert plan.own is not None and list(timelines(plan.own)) == list(rows)[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward_kd_s": None, "forward_s": [1.0, 2.0]}, "forward_kd_s is None"),
        ({"teacher_row_s": None}, "teacher_row_s is None"),
        ({"transfer_s": None}, "transfer_s is None"),
        ({"backward_s": [3.0]}, r"backward_s is \[3.0\]: give seconds, by stage 2 of them"),
    ],
)
def test_what_was_not_measured_is_not_computed(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values = {name: value for name, value in {**OF_A_RUN, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=f"--measured: {message}"):
        measured_plan(tmp_path, values)


def test_one_piece_is_one_piece() -> None:
    plan = TeacherPlan(pieces=[(0, 16)], pieces_of=[[range(1)]], num_chunks=1, placement=None)
    assert plan.describe("") == "1 piece of 16 rows for each replica, all at once"
    plan = replace(plan, pieces=[(0, 1), (1, 2)], pieces_of=[[range(2)]])
    assert plan.work == "2 pieces of 1 row"


# Steps


def test_water_level_against_bisection() -> None:
    for seed in range(50):
        draw = random.Random(seed)
        busy = [draw.uniform(0, 5) for _ in range(draw.randint(1, 6))]
        work = draw.uniform(0, 20)
        low, high = 0.0, 30.0
        for _ in range(80):
            middle = (low + high) / 2
            filled = sum(max(0.0, middle - each) for each in busy)
            low, high = (low, middle) if filled >= work else (middle, high)
        assert water_level(busy, work) == pytest.approx(max(high, *busy))


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_closed_form_is_the_simulators_step(tmp_path: Path, pp: int) -> None:
    """Exactly for equal stages; for unequal ones, with transfers, within a few per cent."""
    fast = replace(H100, network_gb_s=1e9, gpu=replace(H100.gpu, nvlink_gb_s=1e9))
    settings = {"model": FLAT, "data__seq_length": 64}
    sizes = at(inputs_of(tmp_path, pp, teacher=False, **settings), 1, pp, 1)
    lm_s, kd_s = closed_form(sizes, fast)
    assert lm_s == kd_s
    assert lm_s == pytest.approx(simulated(sizes, fast).lm_s, rel=0.05)
    sizes = at(inputs_of(tmp_path, pp, **settings), 1, pp, 1)
    steps = simulated(sizes, fast)
    if pp == 1:
        assert steps.kd_bubble_s is None and overheads(sizes, fast) == []
        assert closed_form(sizes, fast)[1] == pytest.approx(steps.kd_before_s, rel=0.05)
        return
    assert steps.kd_bound_s is not None and steps.kd_bubble_s is not None
    assert steps.kd_bubble_s >= steps.kd_bound_s * (1 - 1e-9)
    assert closed_form(sizes, fast)[1] <= steps.kd_bubble_s * 1.05


@pytest.mark.parametrize("num_micro", [2, 4, 16, 64])
def test_bound_is_the_formula_of_equal_stages(tmp_path: Path, num_micro: int) -> None:
    """max(0, r M - 3 (p - 1)) / (3 (M + p - 1)) of a step, but for the heads."""
    values = {"train_batch_size": num_micro}
    wide = {**FLAT, "hidden_size": 256, "ffn_hidden_size": 1024}
    sizes = at(inputs_of(tmp_path, 4, json_values=values, model=wide), 1, 4, 1)
    machine = replace(H100, network_gb_s=1e9, gpu=replace(H100.gpu, memory_gb_s=1e9))
    found = next(one for one in overheads(sizes, machine) if one.num_micro_batches == num_micro)
    bound = max(0.0, num_micro - 9) / (3 * (num_micro + 3))  # r = 1: the teacher is the student
    assert found.bound == pytest.approx(bound, abs=0.03)
    assert found.bound - 1e-9 <= found.bubble <= found.before_step + 1e-9


# A teacher that is spread


def spread_inputs(folder: Path, world_size: int, **settings: Any) -> PlannerInputs:
    inputs = inputs_of(folder, world_size, **settings)
    teacher = replace(inputs.config.teacher, checkpoint="slm", tensor_parallel=True)
    return replace(inputs, config=replace(inputs.config, teacher=teacher))


def test_times_of_a_teacher_that_is_spread(tmp_path: Path) -> None:
    """Half of the products each, two all-reduces in a layer and one of the embedding, and no
    exchange at the end."""
    whole, spread = (at(f(tmp_path, 4), 2, 2, 1, 4) for f in (inputs_of, spread_inputs))
    assert spread.shape.teachers_per_stage == 1 and whole.shape.teachers_per_stage == 2
    assert whole.shape.pieces == spread.shape.pieces == [(r, r + 4) for r in range(0, 64, 4)]
    assert len(spread.shape.chunk_bounds) == len(whole.shape.chunk_bounds) == 4
    one, other = times.step_times(whole, H100), times.step_times(spread, H100)
    once = times.all_reduce_s(4 * 16 * 32 * 4, 2, 450e9 * 0.8)  # B S E in fp32
    for chunk in range(4):
        products = one.teacher(3, chunk) / 2
        collectives = (2 + (chunk == 0)) * once
        assert other.teacher(3, chunk) == pytest.approx(products + collectives)
    assert times.hidden_exchange_s(whole, H100) > 0 == times.hidden_exchange_s(spread, H100)
    # The rank of the last stage receives the rows of all other stages, not a half of them.
    slow = replace(H100, network_gb_s=0.001, gpus_per_node=2)
    late = [simulated(each, slow).kd_before_s for each in (whole, spread)]
    lm_s = [simulated(each, slow).lm_s for each in (whole, spread)]
    received = 32 * 16 * 32 * 4 / slow.link_bytes_s(4)
    assert late[0] and late[1]
    assert late[0] - lm_s[0] == pytest.approx(received / 2, rel=0.01)
    assert late[1] - lm_s[1] == pytest.approx(received, rel=0.01)
    before = replace(spread.config.teacher, placement="before_step")
    before_step = replace(spread, config=replace(spread.config, teacher=before))
    assert closed_form(before_step, H100)[1] == pytest.approx(
        simulated(before_step, H100).kd_before_s, rel=0.05
    )


def test_memory_of_a_teacher_that_is_spread(tmp_path: Path) -> None:
    whole, spread = (at(f(tmp_path, 4), 2, 2, 1, 4) for f in (inputs_of, spread_inputs))
    assert whole.teacher is not None
    norms = 9 * 32  # two in each of four layers, one at the end
    assert whole.teacher.numel(2) == (whole.teacher.numel(1) - norms) // 2 + norms
    for one, other in zip(stage_memory(whole), stage_memory(spread), strict=True):
        assert (one.teacher, other.teacher) == tuple(4 * whole.teacher.numel(n) for n in (1, 2))
        assert one.teacher_head == other.teacher_head
    for stage in range(2):  # all rows of its stage on each rank; on the last stage those of all
        rows = (16, 32) if stage == 0 else (128, 128)
        found = tuple(hidden_state_bytes(each, stage, None) for each in (whole, spread))
        assert found == tuple(16 * 32 * 4 * n for n in rows)
    wide = 4 * 16 * 4  # B S w
    inner = 5 * 48  # SwiGLU on a CPU
    parts = [replace(each, on_cuda=False) for each in (whole, spread)]
    assert [teacher_forward_bytes(each) for each in parts] == [
        wide * (2 * 32 + inner), wide * (2 * 32 + inner / 2)
    ]  # fmt: skip


def test_plans_with_a_teacher_that_is_spread(tmp_path: Path) -> None:
    """Said in the text; a layout without tensor parallelism has a replica; one whose ranks cannot
    share the teacher is refused."""
    inputs = spread_inputs(
        tmp_path, 4, parallel__pipeline_model_parallel_size=2,
        parallel__tensor_model_parallel_size=2,
    )  # fmt: skip
    text = describe_plan(command.plan_run(inputs, H100))
    assert "the ranks of each stage together " in text and "a rank of each stage" not in text
    assert inputs.teacher is not None
    alone = at(inputs, 1, 2, 2)
    assert stage_memory(alone)[0].teacher == 4 * inputs.teacher.numel(1)
    odd = replace(inputs.teacher, model=replace(inputs.teacher.model, ffn_hidden_size=49))
    inputs = replace(inputs, teacher=odd)
    assert at(inputs, 1, 2, 2)
    with pytest.raises(ValueError, match="the teacher's ffn_hidden_size = 49 is not divisible by"):
        at(inputs, 2, 2, 1)
    refused: Counter[str] = Counter()
    assert {each.layout.tp_size for each in ranking.candidates(inputs, H100, refused)} == {1}
    assert "heads, groups or MLP width not divisible by tp" in refused


# Memory


def test_buffers_for_hidden_states_are_those_of_the_teacher(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, 4)
    sizes = at(inputs, 1, 4, 1, 2)
    row = 16 * 32 * 4
    plan = simulated(sizes, H100).plan
    assert plan is not None
    for stage in range(3):
        start, stop = plan.rows(stage, 0)
        assert hidden_state_bytes(sizes, stage, plan) == (stop - start) * row
        assert hidden_state_bytes(sizes, stage, None) == 64 // 4 * row
    assert hidden_state_bytes(sizes, 3, plan) == 2 * 64 * row
    before = replace(sizes.config.teacher, placement="before_step")
    sizes = replace(sizes, config=replace(sizes.config, teacher=before))
    assert hidden_state_bytes(sizes, 3, None) == 64 * row


@pytest.mark.parametrize(
    ("precision", "stage", "accumulate", "expected"),
    [
        ("fp32", 0, None, (4, 4, 8)),
        ("fp32", 1, None, (4, 4, 12 / 4)),
        ("fp16", 1, None, (2, 2, 12 / 4)),
        ("bf16", 1, "fp32", (2, 4, 12 / 4)),
        ("bf16", 2, "fp32", (2, 4 / 4, 12 / 4)),
        ("bf16", 2, None, (2, 2 / 4, 12 / 4)),
        ("bf16", 3, "fp32", (2 / 4 + 2, 4 / 4, 12 / 4)),
    ],
)
def test_bytes_of_a_parameter(
    tmp_path: Path, precision: str, stage: int, accumulate: str | None, expected: tuple[float, ...]
) -> None:
    values: dict[str, Any] = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10}}
    if accumulate:
        values["data_types"] = {"grad_accum_dtype": accumulate}
    values[precision] = {"enabled": True}
    settings = replace(
        inputs_of(tmp_path, 4).settings, values=values, precision=precision, zero_stage=stage
    )
    found = model_states(1000, settings, Layout(tp_size=1, pp_size=1, dp_size=4))
    seen = (found["weights"], found["gradients"], found["optimizer"])
    assert seen == pytest.approx(tuple(1000 * each for each in expected))


# Ranking


@pytest.mark.parametrize("name", FOUR)
def test_ranking_against_brute_force(tmp_path: Path, name: str) -> None:
    inputs = inputs_of(tmp_path, 32, model=FOUR[name])
    found = ranking.rank(inputs, H100, top=40)
    possible = set()
    for tp in (1, 2, 4, 8):
        for pp in range(1, 5):  # as many as there are layers
            if 32 % (tp * pp) or 2 * tp > 8 or (name == "llama" and tp > 2):
                continue  # 4 heads; llama has 2 groups
            dp = 32 // (tp * pp)
            possible |= {(tp, pp, dp, b) for b in range(1, 65) if 64 % (dp * b) == 0}
    assert found.num_fitting == len(possible)
    listed = [one.sizes for one in found.listed]
    assert {s.layout for s in listed} == {
        Layout(tp_size=tp, pp_size=pp, dp_size=dp) for tp, pp, dp, _ in possible
    }
    for sizes in listed:
        layout, settings = sizes.layout, sizes.settings
        where = (layout.tp_size, layout.pp_size, layout.dp_size, settings.micro_batch_size)
        assert where in possible and layout.world_size == 32
        rows = settings.micro_batch_size * settings.num_micro_batches * layout.dp_size
        assert rows == settings.global_batch_size == 64
    hours = [one.total_s for one in found.listed]
    assert hours == sorted(hours)
    again = ranking.rank(inputs, H100, top=40)
    assert [one.sizes.layout for one in again.listed] == [s.layout for s in listed]


def test_what_does_not_fit_is_not_listed(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, 8)
    refused: Counter[str] = Counter()
    needs = [
        quick_estimate(sizes, H100).largest_bytes
        for sizes in ranking.candidates(inputs, H100, refused)
    ]
    limit = sorted(needs)[len(needs) // 2]
    small = replace(H100, usable=1.0, gpu=replace(H100.gpu, memory_gb=limit / 1e9))
    found = ranking.rank(inputs, small, top=100)
    assert 0 < found.num_fitting < len(needs)
    assert found.num_fitting + found.refused[ranking.MEMORY] == len(needs)
    assert all(one.largest_bytes <= limit for one in found.listed)


def test_where_nothing_fits_the_closest_is_named(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, 8)
    tiny = replace(H100, gpu=replace(H100.gpu, memory_gb=1e-6))
    with pytest.raises(ValueError, match=r"Closest is tp \d, pp \d.*needs.*too many.*recompute"):
        ranking.rank(inputs, tiny)
    with pytest.raises(ValueError, match="ZeRO 2 and 3 need one stage"):
        zero3 = inputs_of(tmp_path, 8, json_values={"zero_optimization": {"stage": 3}})
        ranking.rank(zero3, tiny)


def test_refusals_are_counted_by_reason(tmp_path: Path) -> None:
    values = {"zero_optimization": {"stage": 2}}
    found = ranking.rank(inputs_of(tmp_path, 8, json_values=values), H100)
    assert all(one.sizes.layout.pp_size == 1 for one in found.listed)
    assert found.refused["ZeRO 2 and 3 need one stage"] > 0
    assert found.refused["heads, groups or MLP width not divisible by tp"] > 0
    assert all(len(reason) < 60 for reason in found.refused)


# Output


def test_the_plan_as_text_and_json(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, 8, parallel__pipeline_model_parallel_size=2)
    plans = [command.plan_run(inputs, H100, steps_saved=0.4) for _ in range(2)]
    texts, values = [describe_plan(plan) for plan in plans], [as_dict(plan) for plan in plans]
    assert texts[0] == texts[1] and values[0] == values[1]
    assert json.loads(json.dumps(values[0])) == values[0]
    run = values[0]["own"]["run"]
    step, plain = values[0]["own"]["kd_step_s"], values[0]["own"]["lm_step_s"]
    assert run["salt_h"] == pytest.approx((2 * step + 3 * plain) / 3600)
    assert run["baseline_gpu_h"] == pytest.approx(8 * 5 * plain / 3600)
    assert run["fewer_steps_h"] == pytest.approx((2 * step + 1 * plain) / 3600)
    for phrase in ("KD, teacher in the bubbles", "no placement can beat", "40% fewer steps",
                   "| stage |", "Refused", "micro-batches"):  # fmt: skip
        assert phrase in texts[0], phrase
    assert values[0]["ranking"]["listed"][0]["fits"]


def test_small_runs_have_small_units(tmp_path: Path) -> None:
    plan = command.plan_run(inputs_of(tmp_path, 2, parallel__pipeline_model_parallel_size=2), H100)
    assert plan.own is not None and plan.own.largest_bytes < 2**20 and plan.own.total_s < 1
    text = describe_plan(plan)
    assert f"{plan.own.largest_bytes / 2**10:.1f} of {H100.usable_bytes / 2**10:,.1f} KiB" in text
    assert "Memory of a rank in the KD phase, KiB" in text and " MiB |" in text
    span_ms = 1000 * plan.own.total_s
    assert (
        f"take {span_ms:.1f} ms, {2 * span_ms:.1f} GPU ms;" in text and "run, ms | GPU ms" in text
    )
    long = replace(plan.own, lm_s=100.0, kd_s=130.0)  # 2 KD steps of 5
    text = describe_plan(replace(plan, own=long))
    assert "take 9.3 min, 18.7 GPU min; 5 plain steps 8.3 min, 16.7 GPU min: +12.0%" in text


def test_a_picture_of_the_steps(tmp_path: Path) -> None:
    sizes = at(inputs_of(tmp_path, 4), 1, 4, 1)
    drawn = timelines(full_estimate(sizes, H100))
    assert list(drawn) == ["KD, teacher before the step", "KD, teacher in the bubbles", "LM"]
    draw_timelines(drawn, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
def test_committed_timelines_are_the_scripts(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    done = run_forked("docs/make_timelines.py", "--output", str(made), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    committed = ROOT / "docs" / "timeline"
    assert (made / "README.md").read_text() == (committed / "README.md").read_text(), (
        "run: python docs/make_timelines.py"
    )
    assert sorted(p.name for p in made.iterdir()) == sorted(p.name for p in committed.iterdir())
    assert all(path.stat().st_size < 150_000 for path in committed.glob("*.png"))


# The command

PAPER = (
    "--config", "examples/configs/paper_2.8b_student.yaml",
    "--deepspeed_config", "examples/deepspeed/paper_zero1_bf16.json",
)  # fmt: skip


@pytest.mark.processes
def test_thousands_of_gpus_in_seconds(tmp_path: Path) -> None:
    """From nothing but YAML: no data, tokenizer or teacher exists. Seconds of the processor, so
    that a busy machine does not count."""
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_forked(
        "-m", "megatron_salt", "plan", *PAPER, "--gpus", "4096", "--gpu", "h100",
        "--vocab-size", "32000", "--teacher-config", "examples/configs/paper_1.5b_teacher.yaml",
        "--json", str(tmp_path / "plan.json"), "--timeline", str(tmp_path / "plan.png"),
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime < 20
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["own"]["dp_size"] == 512 and values["global_batch_size"] == 2048
    for one in values["ranking"]["listed"]:
        sizes = math.prod(one[name] for name in ("tp_size", "pp_size", "dp_size"))
        assert sizes == 4096 and one["fits"]
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h10"], "Did you mean 'h100'"),
        (["--gpu", "h100"], "give --vocab-size"),
        (["--gpu", "h100", "--vocab-size", "32000"], "give its YAML by --teacher-config"),
        (["--gpu", "h100", "--steps-saved", "1.5"], "--steps-saved 1.5"),
        (["--gpu", "h100", "--efficiency", "50"], "a share"),
        (["--gpu", "h100", "--salt.kd_stepz", "5"], "salt.kd_steps"),
        (["--gpu", "h100", "--vocab-size", "9", "--teacher-config", "no.yaml"], "no.yaml"),
    ],
)
def test_bad_input_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    assert call("plan", *PAPER, "--gpus", "64", *words) == 2
    error_text = capsys.readouterr().err
    assert message in error_text and "Traceback" not in error_text


def test_a_teacher_on_paper_needs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config", "examples/configs/tiny.yaml", "--deepspeed_config",
             "examples/deepspeed/tiny.json", "--gpus", "1", "--gpu", "h100", "--vocab-size", "256",
             "--salt.kd_steps", "60"]  # fmt: skip
    assert call("plan", *words) == 2
    assert "teacher.checkpoint is not set" in capsys.readouterr().err
    words += ["--teacher.hf", "absent"]
    assert call("plan", *words) == 2
    assert "absent: no config.json there" in capsys.readouterr().err
    assert call("plan", *words, "--teacher-config", "examples/configs/tiny_slm.yaml") == 0
    assert "60 KD and 140 LM steps" in capsys.readouterr().out


def test_an_impossible_own_layout_leaves_the_ranking(tmp_path: Path) -> None:
    inputs = inputs_of(
        tmp_path, 8, parallel__pipeline_model_parallel_size=3, model={**LLAMA, "num_layers": 3}
    )
    assert inputs.own is None and "not a multiple" in inputs.own_problem
    plan = command.plan_run(inputs, H100)
    assert plan.own is None and plan.ranking is not None
    assert "not a multiple" in describe_plan(plan)
    with pytest.raises(ValueError, match="--measured is of the config's own layout"):
        command.plan_run(inputs, H100, measured=times.MeasuredTimes())


# Stored logits in place of the teacher


@pytest.mark.parametrize("vocab_size", [509, 1 << 16, (1 << 16) + 1])
def test_bytes_are_those_of_the_format(vocab_size: int) -> None:
    settings = make_settings(top_k=TOP_K, vocab_size=vocab_size)
    entries = sum(x.itemsize for x in settings.entry_dtypes.values())
    tokens = sum(x.itemsize for x in settings.token_dtypes.values())
    assert stored_bytes_per_token(vocab_size) == TOP_K * entries + tokens + 8 / 1024


def test_one_pass_of_the_teacher_against_what_it_adds_to_a_run(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, 4)
    plan = command.plan_run(inputs, H100)
    assert plan.own is not None and plan.own.sizes.teacher is not None
    costs = offline_costs(plan.own, H100)
    assert costs is not None
    tokens = 2 * 64 * 16  # steps of the KD phase, rows, tokens of a row
    of_token = sum(layer_costs(plan.own.sizes.teacher.model, VOCAB_SIZE, 16))
    seconds = 2 * tokens * of_token / H100.flops_s(inputs.settings.precision)
    assert costs.capture_gpu_s == pytest.approx(seconds, rel=1e-12)
    assert costs.online_gpu_s == pytest.approx(2 * 4 * (plan.own.kd_s - plan.own.lm_s), rel=1e-12)
    assert costs.num_bytes == tokens * stored_bytes_per_token(VOCAB_SIZE)
    assert as_dict(plan)["offline"]["num_bytes"] == costs.num_bytes
    runs = max(1, math.ceil(costs.capture_gpu_s / costs.online_gpu_s))
    assert re.search(
        rf"KiB, read at .*/s\. .* storing pays from {runs} such runs", describe_plan(plan)
    )


def test_without_a_teacher_nothing_is_said(tmp_path: Path) -> None:
    plan = command.plan_run(inputs_of(tmp_path, 4, teacher=False), H100)
    assert plan.own is not None and offline_costs(plan.own, H100) is None
    assert as_dict(plan)["offline"] is None and "stored once" not in describe_plan(plan)
    unknown = replace(plan.own, lm_s=math.nan)
    assert offline_costs(unknown, H100) is None
