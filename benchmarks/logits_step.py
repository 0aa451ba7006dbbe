"""What does a KD step cost from stored logits, with the teacher in the run, and without either?

    python benchmarks/logits_step.py

On one CPU process: a student of 4 layers, width 512, a teacher of 4 layers, width 384 (0.6 of its
parameters in layers), a vocabulary of 16384 learnt from the standard library of the running Python.
A step reads 4 sequences of 512 tokens of 40 documents, in fp32 and in bf16 (ZeRO 1). The teacher's
50 likeliest tokens are stored by `cache-logits`. Each figure comes from a process of its own;
rounds of the three kinds follow each other, and the ratios are of the medians over rounds. Seconds
are the median of a process's steps after the first three, memory the peak above what was resident
before a step.
Writes results/logits_step.json with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_text import make_data
from step_memory import PRECISIONS, REPO, status_bytes, write_files

VOCAB_SIZE, SEQ_LENGTH, STEPS, WARM_UP = 16384, 512, 8, 3
STUDENT = {"num_layers": 4, "hidden_size": 512, "num_attention_heads": 8}
TEACHER = {"num_layers": 4, "hidden_size": 384, "num_attention_heads": 6}
KINDS = ("plain", "stored", "online")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", choices=[*PRECISIONS], default=[*PRECISIONS])
    parser.add_argument("--steps-of", nargs=2, metavar=("YAML", "JSON"), help=argparse.SUPPRESS)
    output = REPO / "benchmarks/results/logits_step.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    if arguments.steps_of:
        print("measured", json.dumps(measure(*arguments.steps_of)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("-m", "megatron_salt", "subset", str(make_data(folder, VOCAB_SIZE)),
            "--output-prefix", str(folder / "some"), "--documents", "40")  # fmt: skip
        prefix = folder / "some"
        for precision in arguments.precisions:
            teacher, logits = folder / precision / "teacher", folder / precision / "logits"
            steps_of(write_run(precision, prefix, teacher, TEACHER, {}))
            run(
                "-m", "megatron_salt", "cache-logits", "--data", str(prefix), "--teacher",
                str(teacher), "--output-prefix", str(logits), "--window", str(SEQ_LENGTH),
            )  # fmt: skip
            who = {"plain": {}, "stored": {"logits": [str(logits)]},
                   "online": {"checkpoint": str(teacher)}}  # fmt: skip
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for number in range(arguments.rounds):
                for kind in KINDS:
                    place = folder / precision / f"{kind}_{number}"
                    files = write_run(precision, prefix, place, STUDENT, who[kind])
                    found[kind].append(steps_of(files))
            results[precision] = compared(found)
            print(precision, json.dumps(results[precision]), flush=True)
    report = {
        **described(), "student": STUDENT, "teacher": TEACHER, "vocab_size": VOCAB_SIZE,
        "seq_length": SEQ_LENGTH, "rounds": arguments.rounds, "steps": STEPS - WARM_UP,
        "results": results,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def described() -> dict[str, Any]:
    from megatron_salt.report.markdown import describe_machine

    return {"machine": describe_machine(), "threads": os.cpu_count()}


def compared(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and those of stored and online over the plain step's."""
    middle = {
        kind: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for kind, rounds in found.items()
    }
    return {
        kind: {
            "step_s_against_plain": middle[kind]["step_s"] / middle["plain"]["step_s"],
            "by_round": [
                mine["step_s"] / plain["step_s"]
                for mine, plain in zip(found[kind], found["plain"], strict=True)
            ],
            "peak_mib": middle[kind]["peak_bytes"] / 2**20,
            "resident_mib": middle[kind]["resident_bytes"] / 2**20,
        }
        for kind in KINDS
    }


def write_run(
    precision: str, prefix: Path, output: Path, model: dict[str, Any], teacher: dict[str, Any]
) -> tuple[str, str]:
    """The YAML and the DeepSpeed JSON of a run."""
    values = {
        "model": model,
        "data": {"train_data_path": [str(prefix)], "seq_length": SEQ_LENGTH, "windows": True,
                 "split": "90,10"},
        "teacher": teacher,
        "salt": {"kd_steps": STEPS if teacher else 0, "transition": "constant"},
        "train": {"steps": STEPS, "output_dir": str(output), "tensorboard": False,
                  "eval_samples": 4},
    }  # fmt: skip
    yaml_file, json_file = write_files(output, values, precision)
    return str(yaml_file), str(json_file)


def run(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def steps_of(files: tuple[str, str]) -> dict[str, float]:
    measured: dict[str, float] = json.loads(
        run(__file__, "--steps-of", *files).split("measured ")[1]
    )
    return measured


def measure(yaml_file: str, json_file: str) -> dict[str, float]:
    """Runs all steps, with what follows the last one."""
    from megatron_salt.config.command_line import parse_command_line
    from megatron_salt.training.run import prepare

    command = parse_command_line(["--config", yaml_file, "--deepspeed_config", json_file])
    ready = prepare(command.config, command.deepspeed_config)
    for step in range(WARM_UP):
        ready.step(step)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    for step in range(WARM_UP, STEPS):
        if step == STEPS - 1:  # the last one is followed by an evaluation and a checkpoint
            peak = status_bytes("VmHWM")
        ready.step(step)
    ready.finish()
    lines = (Path(command.config.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["step_time_s"] for line in lines[1 + WARM_UP :]]
    return {"step_s": statistics.median(seconds), "peak_bytes": peak - before,
            "resident_bytes": before}  # fmt: skip


if __name__ == "__main__":
    main()
