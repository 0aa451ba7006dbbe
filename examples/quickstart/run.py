"""The whole method on real text, on a CPU, in minutes: corpus to report.

Each step is a command of its own, printed before it runs, so that it can be repeated by hand. The
report states what was measured on this machine, whatever that is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path("examples/configs")
DEEPSPEED = Path("examples/deepspeed/tiny.json")
VOCAB_SIZE = 2048
CORPUS_BYTES = 6_000_000


class Steps:
    """Runs commands one after the other, shows each, and stops at the first that fails."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = time.monotonic()

    def run(self, title: str, command: list[str]) -> None:
        self.done += 1
        elapsed = time.monotonic() - self.started
        print(f"\n[{self.done}/{self.total}] {title}   ({elapsed:.0f} s so far)", flush=True)
        print("  " + shlex.join(["python", *command]), flush=True)
        status = subprocess.call([sys.executable, *command], cwd=ROOT)
        if status:
            raise SystemExit(f"quickstart: step {self.done} ({title}) ended with status {status}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--text", type=Path, help="Your own JSONL (a `text` field per line).")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output: Path = arguments.output
    if arguments.text and not arguments.text.is_file():
        raise SystemExit(f"quickstart: TEXT={arguments.text} is not a file")
    target = ROOT / output
    if target.exists():
        shutil.rmtree(target)
    (target / "data").mkdir(parents=True)
    # One process; the matrix products use all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    steps = Steps(total=12 - bool(arguments.text))
    data = output / "data"
    corpus = arguments.text.resolve() if arguments.text else data / "corpus.jsonl"
    if not arguments.text:
        steps.run(
            "corpus: this Python's standard library",
            ["tools/make_corpus.py", "--output", str(corpus), "--max-bytes", str(CORPUS_BYTES)],
        )
    tokenizer = data / "tokenizer.model"
    steps.run(
        "tokenizer",
        ["tools/train_tokenizer.py", "--input", str(corpus), "--output", str(tokenizer),
         "--vocab-size", str(VOCAB_SIZE)],
    )  # fmt: skip
    steps.run(
        "indexed dataset",
        ["tools/preprocess_data.py", "--input", str(corpus), "--tokenizer", str(tokenizer),
         "--output-prefix", str(data / "corpus")],
    )  # fmt: skip
    train_all(steps, output, data / "corpus_text_document")
    runs = [output / name for name in ("slm", "baseline", "salt", "salt_ds", "selection")]
    steps.run(
        "evaluation of the models on the held-out text",
        ["-m", "megatron_salt.evaluate", "--checkpoint", *map(str, runs), "--samples", "512",
         "--output", str(output / "evaluation.json")],
    )  # fmt: skip
    steps.run(
        "report",
        ["tools/compare_runs.py", "--baseline", str(runs[1]), "--run", *map(str, runs[2:]),
         "--teacher", str(runs[0]),
         "--label", "baseline", "SALT", "SALT_DS", "selection, no KD",
         "--title", "Quickstart: SALT against plain pre-training",
         "--output", str(output / "report.md")],
    )  # fmt: skip
    elapsed = time.monotonic() - steps.started
    print(f"\nDone in {elapsed:.0f} s. Read {output / 'report.md'}", flush=True)


def train_all(steps: Steps, output: Path, prefix: Path) -> None:
    """SLM, tags, then the student four times from the same initial weights.

    The baseline and SALT read the same rows in the same order; the other two read, in the KD phase,
    the sequences that an early checkpoint of the SLM found hardest among those it can learn.
    """

    def pretrain(title: str, config: str, name: str, *extra: str) -> None:
        steps.run(
            title,
            ["-m", "megatron_salt.pretrain", "--config", str(CONFIGS / config),
             "--deepspeed_config", str(DEEPSPEED), "--data.train_data_path", f"[{prefix}]",
             "--train.output_dir", str(output / name), *extra],
        )  # fmt: skip

    pretrain("small language model (the teacher)", "tiny_slm.yaml", "slm")
    tags = output / "data" / "corpus_slm"
    steps.run(
        "tags: losses of all sequences under the SLM as it was after a third of its steps",
        ["tools/tag_data.py", "--data", str(prefix), "--output-prefix", str(tags),
         "--teacher", str(output / "slm" / "checkpoints" / "step_00000200"), "--window", "128"],
    )  # fmt: skip
    chosen = output / "chosen"
    steps.run(
        "selection: the half of the sequences with the highest median loss",
        ["tools/select_data.py", "--tags", str(tags), "--data", str(prefix),
         "--output-prefix", str(chosen), "--top-fraction", "0.5"],
    )  # fmt: skip
    teaching = [
        "--teacher.checkpoint", str(output / "slm"), "--salt.kd_weight", "0.5",
        "--salt.transition", "linear_decay", "--salt.transition_steps", "50",
    ]  # fmt: skip
    kd_steps = ["--salt.kd_steps", "150"]
    selection = ["--salt.selection", f"[{chosen}.parquet]"]
    pretrain("student without a teacher (the baseline)", "tiny.yaml", "baseline")
    pretrain("student with the teacher (SALT)", "tiny.yaml", "salt", *kd_steps, *teaching)
    pretrain(
        "student with the teacher, on selected sequences (SALT_DS)", "tiny.yaml", "salt_ds",
        *kd_steps, *teaching, *selection,
    )  # fmt: skip
    pretrain(
        "control: the same selection without a teacher", "tiny.yaml", "selection",
        *kd_steps, *selection, "--salt.kd_weight", "0",
    )  # fmt: skip


if __name__ == "__main__":
    main()
