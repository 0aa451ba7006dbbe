"""Says what a run will need and how long it will take, before any data or teacher exists.

    megatron-salt plan --config examples/configs/paper_2.8b_student.yaml \\
        --deepspeed_config examples/deepspeed/paper_zero1_bf16.json --gpus 64 --gpu h100 \\
        --teacher-config examples/configs/paper_1.5b_teacher.yaml --vocab-size 32000

prints memory and times of the config's own layout and ranks all that fit, with the same global
batch. --config and every setting of a run (--salt.kd_steps 1000) are understood as training does.
See docs/planner.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_salt.planner.hardware import find_gpu

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    add("--gpu", required=True, metavar="NAME", help="a100-40gb, a100, h100, h200 or b200")
    add("--interconnect", metavar="NET",
        help="edr, hdr, ndr, xdr or GB/s for each GPU in one direction (default: as in the maker's "
        "own machine)")  # fmt: skip
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    add("--teacher-config", metavar="YAML",
        help="the teacher's model, where there is no checkpoint of it yet")  # fmt: skip
    add("--vocab-size", type=int, metavar="V", help="where there is no tokenizer yet")
    add("--efficiency", type=float, default=0.5, metavar="SHARE",
        help="of the peak of matrix products (default: 0.5, an assumption)")  # fmt: skip
    add("--link-efficiency", type=float, default=0.8, metavar="SHARE",
        help="of the bandwidth of links and memory (default: 0.8, an assumption)")  # fmt: skip
    add("--usable", type=float, default=0.95, metavar="SHARE",
        help="of the GPU's memory that tensors may take (default: 0.95)")  # fmt: skip
    add("--measured", metavar="JSON", help="measured seconds of the config's own layout")
    add("--steps-saved", type=float, metavar="SHARE",
        help="share of the baseline's steps that SALT is taken to save")  # fmt: skip
    add("--top", type=int, default=5, metavar="N", help="layouts to list (default: 5)")
    add("--json", metavar="FILE", help="write everything there as well")
    add("--timeline", metavar="PNG", help="draw the steps of the config's own layout")


def check(args: argparse.Namespace) -> None:
    find_gpu(args.gpu)


def run(args: argparse.Namespace, settings: list[str]) -> int:
    # DeepSpeed, whose schedule is simulated, takes seconds to import: --help does not wait for it.
    from megatron_salt.planner.command import make_plan
    from megatron_salt.planner.output import as_dict, describe_plan, timelines

    plan = make_plan(args, settings)
    print(describe_plan(plan))
    if args.json:
        text = json.dumps(as_dict(plan), indent=2) + "\n"
        Path(args.json).write_text(text, encoding="utf-8")
    if args.timeline:
        from megatron_salt.report.timeline import draw_timelines

        chosen = plan.own or (plan.ranking.listed[0] if plan.ranking else None)
        drawn = timelines(chosen) if chosen else {}
        if not drawn:
            raise ValueError("--timeline: no step of this plan has been simulated")
        draw_timelines(drawn, args.timeline)
    return 0
