"""What does the teacher cost in a real step: before it, and in the pipeline's waits?

    python benchmarks/bubble_overhead.py

Two pipeline stages on two CPU cores, one thread each, gloo: a waiting stage leaves its core idle,
so its wait can be used. One student, one teacher of about half its work, the same batch; in turn,
in the same processes: a step without a teacher, one that is given the teacher's states (what its
head and the KL cost), one with the teacher's forward before it, one with the next batch's in the
waits, by the plan made of multiply-adds and by the one made of a step's times. Ratios of the
medians of the rounds, beside what the plans say. Writes results/bubble_overhead.json with machine
and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from real_text import make_data

from megatron_salt.config.fields import RunConfig
from megatron_salt.parallel.groups import from_rank_0
from megatron_salt.report.markdown import describe_machine
from megatron_salt.teacher.passes import TeacherPass
from megatron_salt.teacher.plan import StepShape, TeacherPlan, multiply_adds, plan_teacher
from megatron_salt.teacher.schedule import measured_times
from megatron_salt.training.run import prepare

REPO = Path(__file__).parents[1]
VOCAB_SIZE, SEQ_LENGTH, MICRO_BATCHES = 2048, 256, 8
STUDENT = {"num_layers": 8, "hidden_size": 256, "num_attention_heads": 8, "ffn_hidden_size": 704}
TEACHER = {"num_layers": 8, "hidden_size": 192, "num_attention_heads": 6, "ffn_hidden_size": 512}
DEEPSPEED = {
    "train_batch_size": MICRO_BATCHES, "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--output", type=Path, default=REPO / "benchmarks/results/bubble_overhead.json"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.rounds, arguments.output)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = make_data(folder, VOCAB_SIZE)
        one = {**DEEPSPEED, "train_batch_size": 1}
        write(folder, "teacher", run_of(prefix, folder, "teacher", TEACHER, {}), one)
        launch(1, "-m", "megatron_salt.pretrain", "--config", folder / "teacher.json",
               "--deepspeed_config", folder / "teacher_deepspeed.json")  # fmt: skip
        student = run_of(prefix, folder, "student", STUDENT, {
            "parallel": {"pipeline_model_parallel_size": 2},
            "teacher": {"checkpoint": str(folder / "teacher"), "placement": "bubble"},
            "salt": {"kd_steps": 1},
        })  # fmt: skip
        write(folder, "student", student, DEEPSPEED)
        launch(2, __file__, "--worker", folder, "--rounds", arguments.rounds,
               "--output", arguments.output)  # fmt: skip
    print(arguments.output.read_text(encoding="utf-8"))


def launch(processes: int, *words: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(processes), *map(str, words)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    subprocess.run(command, check=True, cwd=REPO, env=environment)


def run_of(
    prefix: Path, folder: Path, name: str, model: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model": model,
        "data": {"train_data_path": [str(prefix)], "split": "95,5", "seq_length": SEQ_LENGTH},
        "train": {"steps": 1, "output_dir": str(folder / name), "eval_samples": 1,
                  "tensorboard": False},
        **more,
    }  # fmt: skip


def write(folder: Path, name: str, run: dict[str, Any], deepspeed: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / f"{name}_deepspeed.json").write_text(json.dumps(deepspeed), encoding="utf-8")


def work(folder: Path, rounds: int, output: Path) -> None:
    """One stage: the three kinds of step in turn; rank 0 writes what was found."""
    torch.set_num_threads(1)
    values = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    config = RunConfig.from_dict(values, source="student.json")
    run = prepare(config, str(folder / "student_deepspeed.json"))
    student, teacher = run.student, run.teacher
    assert teacher is not None
    batch = run.batches.take(0)
    shape = StepShape.of_run(config, run.settings, run.groups.layout, VOCAB_SIZE,
                             teacher.manifest.model.config)  # fmt: skip
    plan = plan_teacher(shape, multiply_adds(shape), in_bubbles=True)
    equal = plan_teacher(shape, multiply_adds(shape), in_bubbles=False)
    shares_RSE = teacher._empty(teacher._buffer_shape(equal, SEQ_LENGTH))
    hidden_RSE = teacher.hidden_states(batch.tokens_RS)

    def plain() -> None:
        student.train_step(student.micro_batches(batch, 0.0, None, "lm"), 1e-4)

    def before_step() -> None:
        teacher_pass = TeacherPass(
            model=teacher.model, groups=teacher.groups, timer=teacher.timer, plan=equal,
            tokens_RS=batch.tokens_RS, prefix_R=None, out_RSE=shares_RSE,
        )  # fmt: skip
        teacher_pass.run_all()
        student.train_step(student.micro_batches(batch, 0.5, teacher_pass.finish()), 1e-4)

    def in_waits() -> None:
        nonlocal hidden_RSE
        teacher_pass = teacher.begin_pass(batch.tokens_RS, None)
        student.train_step(student.micro_batches(batch, 0.5, hidden_RSE), 1e-4, teacher_pass)
        hidden_RSE = teacher_pass.finish()

    def with_head() -> None:
        """The teacher's states for nothing: what its head and the KL cost the last stage."""
        student.train_step(student.micro_batches(batch, 0.5, hidden_RSE), 1e-4)

    # As a run does after its third step: the plan made anew from the times of one step.
    for _ in range(2):
        in_waits()
    student.start_trace()
    in_waits()
    traces: list[Any] = [None, None]
    dist.all_gather_object(traces, student.take_trace())
    measured = measured_times(traces, shape.pieces, shape.chunk_bounds)
    placed_anew: TeacherPlan = from_rank_0(plan_teacher(shape, measured, in_bubbles=True))

    def by_counted() -> None:
        teacher.prepare(plan, ahead=True)
        in_waits()

    def by_measured() -> None:
        teacher.prepare(placed_anew, ahead=True)
        in_waits()

    kinds = {
        "plain": plain, "states_given": with_head, "before_step": before_step,
        "bubble_by_multiply_adds": by_counted, "bubble_by_measured_times": by_measured,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for index in range(rounds + 1):
        for name, step in kinds.items():
            dist.barrier()
            started = time.perf_counter()
            step()
            dist.barrier()
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    if run.groups.rank == 0:
        report(shape, plan, placed_anew, seconds, output)
    dist.barrier()
    dist.destroy_process_group()


def report(
    shape: StepShape,
    counted: TeacherPlan,
    measured: TeacherPlan,
    seconds: dict[str, list[float]],
    output: Path,
) -> None:
    """Write the ratios of medians, and the quartiles of the rounds' own ratios."""
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    by_round = {
        name: [mine / plain for mine, plain in zip(each, seconds["plain"], strict=True)]
        for name, each in seconds.items()
    }
    assert counted.placement is not None and measured.placement is not None
    costs = multiply_adds(shape)
    of_a_row = sum(costs.teacher(0, chunk) for chunk in range(counted.num_chunks))
    found = {
        "machine": describe_machine(), "student": STUDENT, "teacher": TEACHER,
        "vocab_size": VOCAB_SIZE, "seq_length": SEQ_LENGTH, "stages": 2,
        "micro_batches": MICRO_BATCHES, "rounds": len(seconds["plain"]),
        "teacher_over_student_forward": round(of_a_row / sum(costs.forward), 3),
        "step_over_plain_step": {
            name: round(each / medians["plain"], 4) for name, each in medians.items()
        },
        "quartiles_by_round": {
            name: [round(one, 4) for one in statistics.quantiles(each, n=4)]
            for name, each in by_round.items()
        },
        "rows_by_stage": {
            "by_multiply_adds": [len(ranks[0]) for ranks in counted.pieces_of],
            "by_measured_times": [len(ranks[0]) for ranks in measured.pieces_of],
        },
        "overhead_in_the_plan": {
            "by_multiply_adds": round(counted.placement.overhead, 4),
            "by_measured_times": round(measured.placement.overhead, 4),
        },
    }  # fmt: skip
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
