"""Shows a checkpoint, checks every byte of it, compares two, or makes one at another layout.

    megatron-salt inspect-checkpoint runs/salt
    megatron-salt inspect-checkpoint runs/salt --verify
    megatron-salt inspect-checkpoint --diff runs/salt runs/baseline --optimizer
    megatron-salt inspect-checkpoint runs/salt --to archive/salt --tp 1 --pp 1
    megatron-salt inspect-checkpoint runs/salt --to teachers/salt --strip-optimizer

An output_dir stands for its newest checkpoint; its others are listed, and verified by --verify.
Ends with status 1 if a checkpoint is damaged, or two differ. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", nargs="?", metavar="PATH", help="a checkpoint, or an output_dir of a run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="check every byte and every number")
    what.add_argument("--diff", nargs=2, metavar="PATH",
                      help="which weights and settings of two of one shape differ")  # fmt: skip
    what.add_argument("--to", type=Path, metavar="FOLDER",
                      help="a new folder, for what the options below make of it")  # fmt: skip
    add("--optimizer", action="store_true", help="with --diff: the optimizer's states as well")
    add("--tp", type=int, metavar="N", help="tensor-parallel ranks (default: as it is)")
    add("--pp", type=int, metavar="N", help="pipeline stages (default: as it is)")
    add("--strip-optimizer", action="store_true",
        help="leave out what only a resume needs: what can teach remains")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    if (args.path is None) == (args.diff is None):
        raise ValueError("give a PATH, or two with --diff")
    if args.optimizer and not args.diff:
        raise ValueError("--optimizer belongs to --diff")
    for name in ("tp", "pp"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if bool(args.to) != bool(args.tp or args.pp or args.strip_optimizer):
        raise ValueError("--to needs --tp, --pp or --strip-optimizer, and these need --to FOLDER")


def run(args: argparse.Namespace) -> int:
    # torch takes seconds to import: `--help` does not wait for it.
    from megatron_salt.checkpoint import inspection
    from megatron_salt.checkpoint.folder import checkpoints_dir, resolve

    if args.diff:
        return _diff(resolve(args.diff[0], what="--diff"), resolve(args.diff[1], what="--diff"),
                     args.optimizer)  # fmt: skip
    of_run = sorted(checkpoints_dir(args.path).glob("*step_*"))
    taken = [each for each in of_run if each.name.startswith("step_")]
    wrong = False
    if args.verify:
        for folder in taken or [resolve(args.path, what="PATH")]:
            problem = ""
            for problem in inspection.checkpoint_problems(folder):
                print(problem, flush=True)
            print(f"{folder}: {'damaged' if problem else 'all of it verified'}", flush=True)
            wrong = wrong or bool(problem)
        return int(wrong)
    if args.to:
        inspection.rewrite_checkpoint(
            resolve(args.path, what="PATH"), args.to, tp_size=args.tp, pp_size=args.pp,
            strip=args.strip_optimizer,
        )  # fmt: skip
        print("\n".join(inspection.describe_checkpoint(args.to)))
        return 0
    for folder in of_run:
        line, damaged = inspection.describe_briefly(folder)
        print(line, flush=True)
        wrong = wrong or damaged
    if not wrong:
        print("\n".join(inspection.describe_checkpoint(resolve(args.path, what="PATH"))))
    return int(wrong)


def _diff(first: Path, second: Path, with_optimizer: bool) -> int:
    from megatron_salt.checkpoint.inspection import changed_between, tensor_differences

    print("".join(f"{line}\n" for line in changed_between(first, second)), end="")
    total = same = 0
    for each in tensor_differences(first, second, with_optimizer=with_optimizer):
        total, same = total + 1, same + each.same
        if not each.same:
            print(f"{each.name}: differs by up to {each.max_abs:.3g}, {each.relative:.3g} of its "
                  "norm", flush=True)  # fmt: skip
    print(f"{same} of {total} are the same to the bit")
    return int(same < total)
