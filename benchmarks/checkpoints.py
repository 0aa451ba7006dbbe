"""What does a checkpoint cost the steps around it, and a resume at another layout?

    python benchmarks/checkpoints.py

On two CPU processes: a student of 8 layers, width 512, a vocabulary of 4096 learnt from the
standard library of the running Python; 28 M parameters, a hundredth of 2.8 B,
in fp32 with ZeRO 1 (a CPU emulates bf16).

Steps: a run at dp 2 saves in turn behind the next steps and while training waits. Seconds are of
the whole step with what follows it. The figures are of the step that saves and of the five after
it: medians over the saves, over the median of steps without a save nearby.

Restoring: its last checkpoint (dp 2) goes on at four layouts. Per rank: bytes of files verified,
bytes of tensors read, the peak of memory that is not of mapped files above what was there before,
what of it stays, and seconds, of `restore`.
Writes results/checkpoints.json with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from logits_step import described, run
from real_text import make_data
from step_memory import REPO, write_files

SIZE = {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8}
VOCAB_SIZE, SEQ_LENGTH, BETWEEN, AFTER = 4096, 32, 8, 5
LAYOUTS = {"dp 2, ZeRO 1": (1, 1, 1), "tp 2, ZeRO 1": (2, 1, 1), "pp 2, ZeRO 1": (1, 2, 1),
           "dp 2, ZeRO 3": (1, 1, 3)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps-of", nargs=2, metavar=("YAML", "JSON"), help=argparse.SUPPRESS)
    parser.add_argument("--restore-of", nargs=2, metavar=("YAML", "JSON"), help=argparse.SUPPRESS)
    output = REPO / "benchmarks/results/checkpoints.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    for measured, files in ((steps, arguments.steps_of), (restoring, arguments.restore_of)):
        if files:
            measured(*files)
            return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = make_data(folder, VOCAB_SIZE)
        total = (2 * arguments.rounds + 1) * BETWEEN
        write_run(folder / "run", prefix, total, (1, 1, 1))
        report: dict[str, Any] = {
            **described(), "model": SIZE, "vocab_size": VOCAB_SIZE, "seq_length": SEQ_LENGTH,
            "precision": "fp32", "steps": ranks(folder / "run", "--steps-of"),
        }  # fmt: skip
        print(json.dumps(report["steps"]), flush=True)
        report["restoring"] = {}
        for layout, sizes in LAYOUTS.items():
            shutil.copytree(folder / "run/checkpoints", folder / layout / "checkpoints")
            write_run(folder / layout, prefix, total + 1, sizes)
            report["restoring"][layout] = ranks(folder / layout, "--restore-of")
            print(layout, json.dumps(report["restoring"][layout]), flush=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def write_run(output: Path, prefix: Path, steps: int, layout: tuple[int, int, int]) -> None:
    tp, pp, stage = layout
    values = {
        "model": SIZE,
        "data": {"train_data_path": [str(prefix)], "seq_length": SEQ_LENGTH, "split": "90,10"},
        "parallel": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        "train": {"steps": steps, "output_dir": str(output), "tensorboard": False,
                  "eval_samples": 4, "lr_schedule": "constant"},
    }  # fmt: skip
    _, json_file = write_files(output, values, "fp32")
    content = json.loads(Path(json_file).read_text(encoding="utf-8"))
    content |= {
        "zero_optimization": {"stage": stage},
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4,
    }  # fmt: skip
    Path(json_file).write_text(json.dumps(content), encoding="utf-8")


def ranks(output: Path, what: str) -> Any:
    """What the two ranks print."""
    files = str(output.with_suffix(".yaml")), str(output.with_suffix(".json"))
    printed = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, what,
        *files,
    )  # fmt: skip
    found = [json.loads(line.split("measured ")[1]) for line in printed.splitlines()
             if "measured " in line]  # fmt: skip
    return found[0] if what == "--steps-of" else found


def prepared(yaml_file: str, json_file: str) -> Any:
    from megatron_salt.config.command_line import parse_command_line
    from megatron_salt.training.run import prepare

    command = parse_command_line(["--config", yaml_file, "--deepspeed_config", json_file])
    return prepare(command.config, command.deepspeed_config)


def steps(yaml_file: str, json_file: str) -> None:
    """On rank 0: print seconds of steps by how many steps after a save they come."""
    ready = prepared(yaml_file, json_file)
    config, saver = ready.config, ready.saver
    seconds: dict[str, list[list[float]]] = {"behind": [], "waiting": []}
    plain: list[float] = []
    for round_ in range(config.train.steps // BETWEEN):
        kind = ("waiting", "behind")[round_ % 2]
        saver.config = replace(config, train=replace(config.train, async_save=kind == "behind"))
        times = []
        for step in range(round_ * BETWEEN, (round_ + 1) * BETWEEN):
            started = time.perf_counter()
            ready.step(step)
            if step == round_ * BETWEEN:
                ready.save(step + 1)
            times.append(time.perf_counter() - started)
        if round_:  # the first save makes the buffers
            seconds[kind].append(times[: AFTER + 1])
            plain.extend(times[AFTER + 1 :])
        saver.drain()
    ready.finish()
    if ready.groups.rank == 0:
        usual = statistics.median(plain)
        report = {
            "plain_step_s": usual,
            "saves": len(seconds["behind"]),
            "checkpoint_bytes": sum(
                path.stat().st_size
                for path in sorted(saver.output_dir.glob("checkpoints/step_*"))[-1].rglob(
                    "*.safetensors"
                )
            ),
        }
        for kind, saves in seconds.items():
            report[f"{kind}_over_plain"] = [
                round(statistics.median(save[after] for save in saves) / usual, 3)
                for after in range(AFTER + 1)
            ]
            report[f"{kind}_extra_s_in_all"] = statistics.median(
                sum(save) - (AFTER + 1) * usual for save in saves
            )
        print("measured", json.dumps(report), flush=True)


def restoring(yaml_file: str, json_file: str) -> None:
    """On each rank: print what `restore` took."""
    from megatron_salt.checkpoint import manifest, optimizer, weights
    from megatron_salt.training import start, state

    read = {"verified": 0, "tensors": 0}

    class Slices:
        """A tensor of a file, which counts what is taken of it."""

        def __init__(self, of: Any) -> None:
            self.of = of

        def get_shape(self) -> Any:
            return self.of.get_shape()

        def __getitem__(self, item: Any) -> Any:
            found = self.of[item]
            read["tensors"] += found.nbytes
            return found

    class Counting:
        def __init__(self, of: Any) -> None:
            self.of = of

        def keys(self) -> Any:
            return self.of.keys()

        def get_slice(self, name: str) -> Slices:
            return Slices(self.of.get_slice(name))

    open_tensors = weights.open_tensors
    optimizer.open_tensors = weights.open_tensors = lambda path: Counting(open_tensors(path))
    digest = manifest.sha256_of

    def counted(path: Path) -> str:
        read["verified"] += Path(path).stat().st_size
        return digest(path)

    manifest.sha256_of = counted
    result: dict[str, float] = {}

    def measured(*arguments: Any) -> None:
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak.append(anonymous_bytes())

        before, started = anonymous_bytes(), time.perf_counter()
        watcher = threading.Thread(target=watch)
        watcher.start()
        state.restore(*arguments)
        done.set()
        watcher.join()
        result["restore_s"] = time.perf_counter() - started
        kept = max(0, anonymous_bytes() - before)
        result["host_peak_mib"] = max(0, max(peak) - before) / 2**20
        result["kept_mib"] = kept / 2**20

    start.restore = measured
    ready = prepared(yaml_file, json_file)
    result["verified_mib"] = read["verified"] / 2**20
    result["read_mib"] = read["tensors"] / 2**20
    print("measured", json.dumps({"rank": ready.groups.rank, **result}), flush=True)
    ready.finish()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
