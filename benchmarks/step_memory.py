"""How much memory does one training step of the KD phase take at its peak?

    python benchmarks/step_memory.py [--checkout OTHER] [--loss_chunk_mib 64]

A small run on one CPU process: student and teacher of 2 layers, width 256, a vocabulary of 16384
learnt from the standard library of the running Python, 4 sequences of 512 tokens a step. After two
steps the peak of the resident size (VmHWM) is reset, and a third step is taken. Printed: the peak
above what was resident before that step, which holds activations, logits, and their gradients.
`--checkout` imports megatron_salt from another checkout, to compare two versions. Each figure comes
from a process of its own, for fp32 and for bf16 (ZeRO 1).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_text import make_data

REPO = Path(__file__).parents[1]
VOCAB_SIZE = 16384
MODEL = {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 4}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, default=REPO)
    parser.add_argument("--loss_chunk_mib", type=int, help="of salt; default: the version's own")
    parser.add_argument("--step-of", nargs=2, metavar=("YAML", "JSON"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step_of:
        print(f"peak {peak_of_a_step(*arguments.step_of)}")
        return
    version = subprocess.run(
        ["git", "-C", str(arguments.checkout), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    chunks = arguments.loss_chunk_mib or "default"
    torch_version = importlib.metadata.version("torch")
    print(f"commit {version}, torch {torch_version}, loss_chunk_mib {chunks}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = make_data(folder, VOCAB_SIZE)
        for precision in PRECISIONS:
            teacher = folder / precision / "teacher"
            step_of(arguments.checkout, write_run(folder, precision, prefix, teacher, {}))
            salt: dict[str, Any] = {"kd_steps": 3}
            if arguments.loss_chunk_mib:
                salt["loss_chunk_mib"] = arguments.loss_chunk_mib
            student = folder / precision / "student"
            files = write_run(folder, precision, prefix, student, salt, teacher)
            peak = step_of(arguments.checkout, files)
            print(f"{precision}: {peak / 2**20:.0f} MiB above what was resident before the step")


def write_run(
    folder: Path,
    precision: str,
    prefix: Path,
    output: Path,
    salt: dict[str, Any],
    teacher: Path | None = None,
) -> tuple[Path, Path]:
    """The YAML and the DeepSpeed JSON of a run of three steps."""
    values = {
        "model": MODEL,
        "data": {"train_data_path": [str(prefix)], "seq_length": 512},
        "teacher": {"checkpoint": str(teacher) if teacher else None},
        "salt": salt,
        "train": {"steps": 3, "output_dir": str(output), "tensorboard": False, "eval_samples": 4},
    }
    return write_files(output, values, precision)


def write_files(output: Path, values: dict[str, Any], precision: str) -> tuple[Path, Path]:
    """The YAML of these values, and a DeepSpeed JSON of 4 rows a step, beside output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    deepspeed = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        **PRECISIONS[precision],
    }
    yaml_file, json_file = output.with_suffix(".yaml"), output.with_suffix(".json")
    yaml_file.write_text(json.dumps(values), encoding="utf-8")
    json_file.write_text(json.dumps(deepspeed), encoding="utf-8")
    return yaml_file, json_file


def step_of(checkout: Path, files: tuple[Path, Path]) -> int:
    command = [sys.executable, __file__, "--step-of", *map(str, files)]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return int(done.stdout.split("peak ")[1])


def peak_of_a_step(yaml_file: str, json_file: str) -> int:
    """Bytes. Runs all three steps, with what follows the last one."""
    from megatron_salt.config.command_line import parse_command_line
    from megatron_salt.training.run import prepare

    command = parse_command_line(["--config", yaml_file, "--deepspeed_config", json_file])
    run = prepare(command.config, command.deepspeed_config)
    run.step(0)
    run.step(1)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    run.step(2)
    peak = status_bytes("VmHWM")
    run.finish()
    return peak - before


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
