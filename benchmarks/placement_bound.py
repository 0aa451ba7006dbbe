"""How near does the teacher's work in the pipeline's waits come to the bound? No clock is read.

    python benchmarks/placement_bound.py

Every number of micro-batches from p to 8p for p = 2, 4, 8 stages, a teacher of 0.1 to 1 times the
student's work, equal and unequal stages, four rows a micro-batch. For each the overhead of a KD
step over a plain one as the simulator finds it for the plan that training would run, and the bound:
the longest stage without any wait, with the rows of the teacher in equal shares. Points are
percentages of the plain step. Writes results/placement_bound.json and .md.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron_salt.config.fields import ModelConfig
from megatron_salt.parallel.layout import Layout
from megatron_salt.teacher.placement import work_bound
from megatron_salt.teacher.plan import StepShape, plan_teacher
from megatron_salt.teacher.schedule import plain_programs
from megatron_salt.teacher.simulator import StepTimes

REPO = Path(__file__).parents[1]
RATIOS = (0.1, 0.3, 0.54, 1.0)
STAGES = {
    "equal": lambda p: [1.0] * p,
    "a last stage slower by 0.3": lambda p: [1.0] * (p - 1) + [1.3],
    "a quarter fewer layers in half of them": lambda p: [
        1.0 if 2 * s < p else 0.75 for s in range(p)
    ],
}
ROWS = 4
# Only its number of layers counts here: into how many chunks it can be cut.
MODEL = ModelConfig(num_layers=32, hidden_size=64, num_attention_heads=4)


def measure(case: tuple[int, int, float, str, int]) -> dict[str, Any]:
    """One case's overheads in points: found, bound, and before the step."""
    stages, micro_batches, ratio, kind, chunks = case
    forward = STAGES[kind](stages)
    shape = StepShape(
        student=MODEL, teacher=MODEL, vocab_size=512, seq_length=32, micro_batch_size=ROWS,
        num_micro_batches=micro_batches,
        layout=Layout(tp_size=1, pp_size=stages, dp_size=1), num_chunks=chunks,
    )  # fmt: skip
    whole, pieces = ratio * sum(forward), shape.pieces

    def teacher(piece: int, chunk: int) -> float:
        start, stop = pieces[piece]
        return whole * (stop - start) / ROWS / chunks

    times = StepTimes(forward=forward, backward=[2.0 * one for one in forward], teacher=teacher)
    placement = plan_teacher(shape, times, in_bubbles=True).placement
    assert placement is not None
    equal = plan_teacher(shape, times, in_bubbles=False)
    work = [
        sum(teacher(piece, chunk) for piece in ranks[0] for chunk in range(chunks))
        for ranks in equal.pieces_of
    ]
    plain = placement.plain_time
    bound = work_bound(times, plain_programs(micro_batches, stages), work)
    return {
        "stages": stages, "micro_batches": micro_batches, "ratio": ratio, "kind": kind,
        "chunks": chunks, "overhead": 100 * placement.overhead,
        "bound": 100 * (bound / plain - 1.0), "before_step": 100 * max(work) / plain,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The largest distance to the bound, and how often it is above 1.5 points."""
    lines = [
        "| chunks | stages | teacher / student | cases | above the bound by at most | by more than "
        "1.5 points | overhead, mean | before the step, mean |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for chunks in sorted({one["chunks"] for one in results}):
        for kind in STAGES:
            for ratio in RATIOS:
                found = [
                    one for one in results
                    if (one["chunks"], one["kind"], one["ratio"]) == (chunks, kind, ratio)
                ]  # fmt: skip
                gaps = [one["overhead"] - one["bound"] for one in found]
                mean = {
                    key: sum(one[key] for one in found) / len(found)
                    for key in ("overhead", "before_step")
                }
                lines.append(
                    f"| {chunks} | {kind} | {ratio} | {len(found)} | {max(gaps):.2f} | "
                    f"{sum(gap > 1.5 for gap in gaps)} | {mean['overhead']:.2f} % | "
                    f"{mean['before_step']:.2f} % |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    cases = [
        (stages, micro_batches, ratio, kind, chunks)
        for chunks in (4, 16)
        for stages in (2, 4, 8)
        for micro_batches in range(stages, 8 * stages + 1, 1 if stages < 8 else 3)
        for ratio in RATIOS
        for kind in STAGES
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = list(pool.map(measure, cases, chunksize=8))
    output = REPO / "benchmarks/results/placement_bound"
    compact = [list(one.values()) for one in results]
    report = {"columns": list(results[0]), "cases": compact}
    output.with_suffix(".json").write_text(json.dumps(report, indent=None) + "\n", encoding="utf-8")
    text = (
        "Made by `python benchmarks/placement_bound.py`: a simulation, the same on every machine.\n"
        "p = 2, 4: every M from p to 8p; p = 8: every third.\n\n"
    )
    output.with_suffix(".md").write_text(text + table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
