"""The teacher in the pipeline's waits on real processes: same numbers, no deadlock, a clean end."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from ranks import RankError, run_ranks, run_ranks_to_the_end
from tiny import (
    LLAMA,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
    without_times,
)

from megatron_salt.config.fields import RunConfig
from megatron_salt.parallel.watchdog import StepWatchdog
from megatron_salt.planner.times import read_measured
from megatron_salt.teacher.passes import TeacherPass
from megatron_salt.teacher.schedule import (
    KINDS,
    RecvHidden,
    SendHidden,
    TeacherForward,
    measured_times,
    teaching_programs,
)
from megatron_salt.teacher.simulator import StepTimes, simulate
from megatron_salt.training.instructions import Instructions
from megatron_salt.training.run import MEASURED_STEP, Run, prepare, train

FOUR = {**LLAMA, "num_layers": 4}
# Six layers on four stages: they have unequal work, so shares of the teacher's rows differ too.
PP4: dict[str, Any] = {
    "model": {**LLAMA, "num_layers": 6},
    "parallel__pipeline_model_parallel_size": 4,
}
TP2_PP2_DP2: dict[str, Any] = {
    "parallel__tensor_model_parallel_size": 2,
    "parallel__pipeline_model_parallel_size": 2,
    "parallel__sequence_parallel": True,
}

SPREAD: dict[str, Any] = {
    "model": FOUR,
    "parallel__tensor_model_parallel_size": 2,
    "parallel__pipeline_model_parallel_size": 2,
    "teacher__tensor_parallel": True,
}


def instructions_of(run: Run) -> Instructions:
    assert run.student.instructions is not None
    return run.student.instructions


def _steps_and_schedules(config: RunConfig, deepspeed_config: str) -> tuple[Any, list[str]]:
    """Final weights, and which schedule each step ran."""
    run = prepare(config, deepspeed_config)
    choose, schedules = run.student.engine._train_schedule, []

    def noted() -> TrainSchedule:
        schedule = choose()
        schedules.append(type(schedule).__name__)
        return schedule

    run.student.engine._train_schedule = noted
    for step in range(run.first_step, config.train.steps):
        run.step(step)
    run.finish()
    return local_weights(run), schedules


@pytest.mark.parametrize(("layout", "world_size"), [(PP4, 4), (TP2_PP2_DP2, 8)],
                         ids=["pp4", "tp2-pp2-dp2"])  # fmt: skip
def test_both_placements_give_the_same_bits(
    dataset: Path, teacher: Path, tmp_path: Path, layout: dict[str, Any], world_size: int
) -> None:
    """8 steps through the switch: every metric, and every weight at the end. By the measured
    times it is taught from step 3 on, and the window of the decay is later still."""
    found = {}
    for placement in ("bubble", "before_step"):
        config = make_config(
            dataset, tmp_path / placement, train__steps=8, salt__kd_steps=6,
            salt__transition="linear_decay", salt__transition_steps=2, train__eval_interval=3,
            teacher__checkpoint=str(teacher), teacher__placement=placement, **layout,
        )  # fmt: skip
        deepspeed_config = make_deepspeed(
            tmp_path, train_micro_batch_size_per_gpu=1, train_batch_size=8 if world_size == 4 else 4
        )
        found[placement] = run_ranks(world_size, _steps_and_schedules, config, deepspeed_config)
    for ahead, before in zip(found["bubble"], found["before_step"], strict=True):
        for name, weight in before[0].items():
            np.testing.assert_array_equal(ahead[0][name], weight, err_msg=name)
        # From a process's first step on; the last KD step has nobody to teach, and the LM phase
        # runs DeepSpeed's own schedule.
        assert ahead[1] == [*["TeachingSchedule"] * 5, *["TrainSchedule"] * 3]
        assert before[1] == ["TrainSchedule"] * 8
    records = [without_times(metrics_of(tmp_path / name)) for name in found]
    assert records[0] == records[1]
    assert len(records[0]) == 9 and records[0][6]["kl_nats"] > 0


def _both_placements(config: RunConfig, deepspeed_config: str) -> tuple[Any, Any]:
    """Final weights with each placement, in folders of their names."""
    found = []
    for placement in ("bubble", "before_step"):
        folder = str(Path(config.train.output_dir) / placement)
        changed = dataclasses.replace(
            config, train=dataclasses.replace(config.train, output_dir=folder),
            teacher=dataclasses.replace(config.teacher, placement=placement),
        )  # fmt: skip
        found.append(local_weights(run_to_end(changed, deepspeed_config)))
    return found[0], found[1]


@pytest.mark.parametrize(("tp", "pp", "rows"), [(2, 2, 1), (1, 3, 3)], ids=["1-row", "1-micro"])
def test_few_rows_with_prefixes_give_the_same_bits(
    dataset: Path, teacher: Path, tmp_path: Path, tp: int, pp: int, rows: int
) -> None:
    """One micro-batch, of one row for four ranks or of three for three, and a prefix for each;
    evaluations between a teacher_pass and the step that uses it."""
    config = make_config(
        dataset, tmp_path, model=FOUR, train__steps=6, salt__kd_steps=5, train__eval_interval=2,
        data__objective=["0.2", "causal", "0.8", "prefix"], teacher__checkpoint=str(teacher),
        parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(
        tmp_path, train_batch_size=rows, train_micro_batch_size_per_gpu=rows
    )
    for ahead, before in run_ranks(tp * pp, _both_placements, config, deepspeed_config):
        for name, weight in before.items():
            np.testing.assert_array_equal(ahead[name], weight, err_msg=name)
    records = [without_times(metrics_of(tmp_path / name)) for name in ("bubble", "before_step")]
    assert records[0] == records[1]
    assert [record.get("phase") for record in records[0]] == [None, *["kd"] * 5, "lm"]


def _first_stage_said_to_be_slow(
    config: RunConfig, deepspeed_config: str
) -> tuple[Any, list[list[range]], list[list[range]]]:
    """Final weights, and who teaches which pieces before and after the times are known."""
    pp_size = config.parallel.pipeline_model_parallel_size
    forward = [9.0] + [1.0] * (pp_size - 1)
    times = StepTimes(
        forward=forward, backward=[2.0 * one for one in forward], teacher=lambda *_: 0.5
    )
    run = prepare(config, deepspeed_config, measure=lambda *_: times)
    assert run.teacher is not None and run.teacher.plan is not None
    plans = [run.teacher.plan]
    for step in range(config.train.steps):
        run.step(step)
        if run.teacher is not None and run.teacher.plan is not plans[-1]:
            plans.append(run.teacher.plan)
    before, after = plans
    return local_weights(run), before.pieces_of, after.pieces_of


@pytest.mark.parametrize(("tp", "pp"), [(1, 3), (2, 2)], ids=["pp3", "tp2-pp2"])
def test_rows_may_move_to_other_ranks_between_two_steps(
    dataset: Path, teacher: Path, tmp_path: Path, tp: int, pp: int
) -> None:
    """By the measured times the first stage should teach nothing, and others more: planned while
    its last teacher_pass is still to be finished, by the plan of before."""
    settings: dict[str, Any] = {
        "model": FOUR, "train__steps": 6, "salt__kd_steps": 5, "teacher__checkpoint": str(teacher),
        "parallel__tensor_model_parallel_size": tp, "parallel__pipeline_model_parallel_size": pp,
    }  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path, train_micro_batch_size_per_gpu=1)
    moved = make_config(dataset, tmp_path / "moved", **settings)
    results = run_ranks(tp * pp, _first_stage_said_to_be_slow, moved, deepspeed_config)
    for _, before, after in results:
        assert (before, after) == results[0][1:]
        assert all(before[0]) and not any(after[0])
        assert any(len(after[stage][0]) > len(before[stage][0]) for stage in range(1, pp))
    settings["teacher__placement"] = "before_step"
    config = make_config(dataset, tmp_path / "before_step", **settings)
    expected = run_ranks(tp * pp, _steps_and_schedules, config, deepspeed_config)
    for (found, _, _), (weights, _) in zip(results, expected, strict=True):
        for name, weight in weights.items():
            np.testing.assert_array_equal(found[name], weight, err_msg=name)
    records = [without_times(metrics_of(tmp_path / name)) for name in ("moved", "before_step")]
    assert records[0] == records[1] and len(records[0]) == 7


def _train_with_delays(config: RunConfig, deepspeed_config: str, seconds: float) -> None:
    rng = random.Random(int(os.environ["RANK"]))

    class LateWatchdog(StepWatchdog):
        """Every instruction begins at another time on every rank."""

        def enter(self, what: str) -> None:
            super().enter(what)
            time.sleep(rng.choice([0.0, 0.0, 0.0, rng.uniform(0.0, seconds)]))

    run = prepare(config, deepspeed_config, watchdog=LateWatchdog)
    for step in range(config.train.steps):
        run.step(step)


@pytest.mark.parametrize("spread", [False, True], ids=["pp4", "tp2-pp2-spread"])
def test_random_delays_change_nothing_and_block_nobody(
    dataset: Path, teacher: Path, even_teacher: Path, tmp_path: Path, spread: bool
) -> None:
    """200 steps in which every instruction on every rank may be late by up to 3 ms; fewer where
    the teacher has collectives too, beside the hidden states on their way."""
    steps = 30 if spread else 200
    settings = {
        **(SPREAD if spread else PP4),
        "train__steps": steps,
        "salt__kd_steps": steps * 3 // 4,
        "teacher__checkpoint": str(even_teacher if spread else teacher),
    }
    deepspeed_config = make_deepspeed(tmp_path, train_micro_batch_size_per_gpu=2)
    late = make_config(dataset, tmp_path / "late", **settings)
    run_ranks(4, _train_with_delays, late, deepspeed_config, 0.003)
    settings.update(train__steps=20, salt__kd_steps=20)
    punctual = make_config(dataset, tmp_path / "punctual", **settings)
    run_ranks(4, _train_with_delays, punctual, deepspeed_config, 0.0)
    expected = [record["loss"] for record in metrics_of(tmp_path / "punctual")[1:]]
    records = metrics_of(tmp_path / "late")
    assert [record["loss"] for record in records[1:21]] == expected
    assert len(records) == steps + 1 and records[-1]["phase"] == "lm"


def _train_until_one_dies(config: RunConfig, deepspeed_config: str, victim: int) -> None:
    class DyingWatchdog(StepWatchdog):
        """One rank kills itself in the first backward pass of step 2."""

        def enter(self, what: str) -> None:
            super().enter(what)
            here = int(os.environ["RANK"]) == victim and what.startswith("BackwardPass")
            if here and "in step 2," in str(self):
                os.kill(os.getpid(), signal.SIGKILL)

    run = prepare(config, deepspeed_config, watchdog=DyingWatchdog)
    for step in range(config.train.steps):
        run.step(step)


@pytest.mark.parametrize("victim", [1, 3])
def test_a_killed_rank_ends_all_and_each_says_where_it_was(
    dataset: Path, teacher: Path, tmp_path: Path, victim: int
) -> None:
    timeout_minutes = 0.25
    config = make_config(
        dataset, tmp_path / "run", salt__kd_steps=5, teacher__checkpoint=str(teacher),
        parallel__timeout_minutes=timeout_minutes, **PP4,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path, train_micro_batch_size_per_gpu=1)
    results = run_ranks_to_the_end(
        4, 60 * timeout_minutes + 15, _train_until_one_dies, config, deepspeed_config, victim
    )
    for rank, result in enumerate(results):
        assert isinstance(result, RankError)
        if rank == victim:
            assert result.message == "exit code -9"
            continue
        assert f"rank {rank} (tp 0, dp 0, stage {rank}) was in step 2, at " in result.trace


def _bytes_around_the_switch(
    config: RunConfig, deepspeed_config: str
) -> tuple[int, int, dict[str, int]]:
    """Live tensor bytes before and after the switch on this rank, and what the teacher's parts
    are."""
    run = prepare(config, deepspeed_config)

    def live() -> int:
        gc.collect()
        return sum(
            {
                item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
                for item in gc.get_objects()
                if isinstance(item, torch.Tensor)
            }.values()
        )

    for step in range(config.salt.kd_steps):
        run.step(step)
    teacher = run.teacher
    assert teacher is not None
    parts = {
        "body": sum(4 * weight.numel() for weight in teacher.model.layers.parameters()),
        "head": 0 if teacher.head_WE is None else 4 * teacher.head_WE.numel(),
        "buffers": sum(4 * buffer.numel() for buffer in teacher._buffers),
    }
    assert teacher.num_bytes() == sum(parts.values())
    before = live()
    run.teaching.release(config.salt.kd_steps)
    del teacher
    return before, live(), parts


@pytest.mark.parametrize(("tp", "pp", "placement"),
                         [(1, 4, "bubble"), (2, 2, "bubble"), (2, 2, "before_step"),
                          (1, 1, "before_step")])  # fmt: skip
def test_what_the_teacher_took_is_returned_on_every_rank(
    dataset: Path, teacher: Path, tmp_path: Path, tp: int, pp: int, placement: str
) -> None:
    config = make_config(
        dataset, tmp_path / "run", model=FOUR, salt__kd_steps=3, teacher__checkpoint=str(teacher),
        teacher__placement=placement, parallel__tensor_model_parallel_size=tp,
        parallel__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    results = run_ranks(tp * pp, _bytes_around_the_switch, config, make_deepspeed(tmp_path))
    row = 16 * 20 * 4  # S tokens, E wide, fp32
    for rank, (before, after, parts) in enumerate(results):
        last = rank // tp == pp - 1
        assert parts["head"] == (512 // tp * 20 * 4 if last else 0)
        if last:  # the rows of a step, and those of the next one
            assert parts["buffers"] == 8 * row * (2 if placement == "bubble" else 1)
        elif pp * tp == 4:  # 8 rows over four ranks, in pieces of the micro-batch's 2 rows
            assert parts["buffers"] == 2 * row
        # The rotary table goes as well.
        assert sum(parts.values()) <= before - after <= sum(parts.values()) + 4096


# So long that what else a rank does, and waiting for a core, are little beside them.
FORWARD_S, CHUNK_S = 0.03, 0.015


def _traced_steps(config: RunConfig, deepspeed_config: str) -> tuple[Any, Any, Any]:
    """What this stage did in the steps after the measured one, whose work is mostly sleep; the plan
    made of multiply-adds, and the one made of measured times."""
    run = prepare(config, deepspeed_config)
    instructions, engine = instructions_of(run), run.student.engine
    stage_s = FORWARD_S * (1.0 + 0.25 * (run.groups.pp_rank % 2))
    sleeps = {ForwardPass: stage_s, BackwardPass: 2 * stage_s, TeacherForward: CHUNK_S}

    def slow(meaning: Any, seconds: float) -> Any:
        def run_slowly(engine: Any, **arguments: Any) -> None:
            time.sleep(seconds)
            meaning(engine, **arguments)

        return run_slowly

    teach = instructions._of_own_piece(TeacherPass.run)
    meanings = {**PipelineEngine._INSTRUCTION_MAP, TeacherForward: teach}
    for kind, seconds in sleeps.items():
        engine._INSTRUCTION_MAP[kind] = instructions._noted(kind, slow(meanings[kind], seconds))
    assert run.teacher is not None
    counted = run.teacher.plan
    traces = []
    for step in range(config.train.steps):
        if step > MEASURED_STEP:
            instructions.start_trace()
        run.step(step)
        if step > MEASURED_STEP:
            trace = instructions.take_trace()
            assert trace is not None
            traces.append([(type(i).__name__, i.kwargs, *span) for i, *span in trace])
    return traces, counted, run.teacher.plan


def _simulated_and_traced(folder: Path, dataset: Path, teacher: Path) -> tuple[float, float]:
    """Relative errors of a traced run: of the simulated step of those that fits best, and of the
    times that the run has written."""
    config = make_config(
        dataset, folder / "run", train__steps=8, salt__kd_steps=8,
        teacher__checkpoint=str(teacher), train__eval_samples=2, **PP4,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(folder, train_micro_batch_size_per_gpu=1)
    results = run_ranks(4, _traced_steps, config, deepspeed_config)
    known = {kind.__name__: kind for kind in (*PipelineEngine._INSTRUCTION_MAP, TeacherForward,
                                              SendHidden, RecvHidden)}  # fmt: skip
    _, counted, measured = results[0]
    # One plan on all ranks, before the times are known and after.
    assert all(result[1:] == (counted, measured) for result in results)
    # The plan made of measured times knows what multiply-adds do not: that a chunk takes half of a
    # forward here. The pieces are the same.
    assert measured != counted and measured.pieces == counted.pieces
    programs = teaching_programs(8, 4, measured.placement)
    chunks = [(0, 1), (1, 2)]  # of the teacher's two layers
    errors = []
    for number in range(4):
        traces = [
            [(known[name](**arguments), *span) for name, arguments, *span in steps[number]]
            for steps, _, _ in results
        ]
        for trace, ops in zip(traces, programs, strict=True):
            assert [KINDS[type(one[0]).__name__] for one in trace] == [op.kind for op in ops]
        times = measured_times(traces, counted.pieces, chunks)
        simulated = simulate(programs, times).backward_end
        began = min(trace[0][1] for trace in traces)
        met = max(
            start
            for trace in traces
            for instruction, start, _ in trace
            if type(instruction).__name__ == "ReduceTiedGrads"
        )
        errors.append(abs(simulated / (met - began) - 1.0))
    # The planner takes what the run has written.
    given = read_measured(str(folder / "run" / "measured_times.json"))
    assert given.teacher_row_s is not None and given.teacher_row_s >= 2 * CHUNK_S
    assert given.forward_s is None, "no step was without a teacher"
    assert len(metrics_of(folder / "run")) == 9
    written = np.asarray(given.forward_kd_s) / np.asarray(times.forward) - 1.0
    return min(errors), float(np.abs(written).max())


def _train(config: RunConfig, deepspeed_config: str) -> None:
    train(prepare(config, deepspeed_config))


def test_a_plain_step_after_the_switch_is_measured_too(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """So that the planner holds measured seconds against measured ones."""
    config = make_config(
        dataset, tmp_path / "run", teacher__checkpoint=str(teacher), salt__kd_steps=5,
        parallel__pipeline_model_parallel_size=2, train__steps=7,
    )  # fmt: skip
    path = str(tmp_path / "run" / "measured_times.json")
    run_ranks(2, _train, config, make_deepspeed(tmp_path))
    taught = read_measured(path)
    assert taught.forward_s is None and taught.forward_kd_s is not None
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    run_ranks(2, _train, longer, make_deepspeed(tmp_path))
    both = read_measured(path)
    assert both.forward_s is not None and len(both.forward_s) == 2 and min(both.forward_s) > 0
    assert dataclasses.replace(both, forward_s=None) == taught


def test_simulated_step_agrees_with_a_traced_one(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """Measured times of the parts, on the simulator's clock, give the measured time of the step.

    Of four steps of up to four runs the one that fits best counts: another process on the machine
    can only make them differ, a wrong simulator makes all of them.
    """
    found = []
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        found.append(_simulated_and_traced(folder, dataset, teacher))
        if found[-1][0] < 0.05 and found[-1][1] < 0.3:
            return
    pytest.fail(f"errors of the step, and of the times that were written: {found}")
