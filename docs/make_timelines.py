"""Draws docs/timeline: where a pipeline waits, and the teacher's work before the step and within.

    python docs/make_timelines.py

Four equal stages, 16 micro-batches, a backward of two forwards; the teacher's forward on a row
takes 0.54 of the student's. Everything is simulated, by the instruction lists that training runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_salt.files.markdown import markdown_table
from megatron_salt.planner.output import idle_shares
from megatron_salt.report.timeline import draw_timelines
from megatron_salt.teacher.placement import place, with_teacher, work_bound
from megatron_salt.teacher.schedule import plain_programs
from megatron_salt.teacher.simulator import Op, StepTimes, Timeline, simulate

STAGES, MICRO_BATCHES, RATIO, CHUNKS = 4, 16, 0.54, 4


def timelines() -> tuple[dict[str, Timeline], float]:
    """The three steps, in forwards of one stage on one micro-batch; and the bound of the second."""
    programs = plain_programs(MICRO_BATCHES, STAGES)
    # The whole teacher on one rank costs RATIO of the student, whose forward is STAGES stages long.
    chunk_time = RATIO * STAGES / CHUNKS
    times = StepTimes(
        forward=[1.0] * STAGES, backward=[2.0] * STAGES, teacher=lambda piece, chunk: chunk_time
    )
    share = MICRO_BATCHES // STAGES
    pieces = [range(stage * share, (stage + 1) * share) for stage in range(STAGES)]
    lessons = [
        {0: tuple(Op("teacher", piece, chunk) for piece in mine for chunk in range(CHUNKS))}
        for mine in pieces
    ]
    found = {
        "KD, teacher before the step": simulate(with_teacher(programs, lessons), times),
        "KD, teacher in the bubbles": simulate(
            with_teacher(programs, place(programs, times, pieces, CHUNKS).before), times
        ),
        "LM, no teacher": simulate(programs, times),
    }
    return found, work_bound(times, programs, [chunk_time * CHUNKS * share] * STAGES)


def text(found: dict[str, Timeline], bound: float) -> str:
    """The page: what is drawn, and the figures."""
    header = ["", "step", "against LM", *(f"idle, stage {stage}" for stage in range(STAGES))]
    plain = list(found.values())[-1].step_time
    rows = [
        [
            name,
            f"{timeline.step_time:.4g}",
            f"{timeline.step_time / plain - 1:+.1%}",
            *(f"{share:.1%}" for share in idle_shares(timeline)),
        ]
        for name, timeline in found.items()
    ]
    return f"""# Where the pipeline waits

Made by [docs/make_timelines.py](../make_timelines.py). The case has {STAGES} equal stages,
{MICRO_BATCHES} micro-batches and a backward of two forwards. The teacher's forward takes {RATIO} of
the student's, in {CHUNKS} chunks. One unit is a forward of one stage on one micro-batch. Transfers
and the update take no time. The figures are simulated, not measured. [planner.md](../planner.md) is
about sizes and seconds of real models.

![The teacher before the step, the teacher in the bubbles, and no teacher](p4_m16_all.png)

{markdown_table(header, rows)}

Idle is the share of the step in which a stage neither computes nor exchanges anything. No placement
with these shares of the rows can take less than {bound / plain - 1:+.1%}.

- [p4_m16_before_step.png](p4_m16_before_step.png): before the step all of the share is added
- [p4_m16_bubble.png](p4_m16_bubble.png): in the bubbles it works on the next batch
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "timeline")
    folder = parser.parse_args(argv).output
    folder.mkdir(parents=True, exist_ok=True)
    found, bound = timelines()
    names = list(found)
    draw_timelines(found, folder / "p4_m16_all.png", unit="forwards")
    for name, file in zip(names[:2], ("before_step", "bubble"), strict=True):
        draw_timelines({name: found[name]}, folder / f"p4_m16_{file}.png", unit="forwards")
    (folder / "README.md").write_text(text(found, bound), encoding="utf-8")


if __name__ == "__main__":
    main()
