"""The whole method on real text, on a CPU, in minutes: corpus to report.

A small language model is trained for a short time. Then it teaches a larger one, which overtakes
it: in a first phase only (SALT), to the end, and on sequences that it has chosen. A baseline
without a teacher starts from the same weights and reads the same data. The report states what was
measured on this machine, whatever that is.

Each task is a command, printed when it starts, so that it can be repeated by hand.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import runpy
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

EXAMPLES = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
CONFIGS, DEEPSPEED = EXAMPLES / "configs", EXAMPLES / "deepspeed" / "tiny.json"
MARK = ".quickstart"  # a folder with it was made here, and may be made anew
VOCAB_SIZE = 2048
CORPUS_BYTES = 2_000_000
FIRST_SEED = 1234
KD_STEPS, STEPS = 80, 200  # of tiny.yaml's 200 steps SALT's teacher sees the first 80
# Steps of the small model. The student overtakes the weak teacher, and never gets near the strong.
TEACHER_STEPS = {"weak": 200, "strong": 600}
# Importing these takes longer than many of the tasks. It is done once, piece by piece beside the
# data's tasks; those of the models are forks of it.
SHARED_IMPORTS = (
    "torch",
    "deepspeed",
    "megatron.core.datasets.helpers",
    "megatron.core.transformer.moe.experts",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megatron_salt.training.run",
    "megatron_salt.scoring.tagging",
)
CAN_FORK = sys.platform == "linux"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A command, and the tasks that must have ended before it starts."""

    name: str
    title: str
    command: list[str]
    needs: tuple[str, ...]
    light: bool = False
    """It needs none of SHARED_IMPORTS."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """A task that runs."""

    task: Task
    process: multiprocessing.process.BaseProcess
    log: Path
    start_s: float


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if CAN_FORK else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--text", type=Path, help="Your own JSONL (a `text` field per line).")
    parser.add_argument("--teacher", choices=sorted(TEACHER_STEPS), default="weak")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each setting (default: 3).")
    parser.add_argument(
        "--jobs", type=int, default=cores, help=f"Tasks at a time (default: {cores}, the cores)."
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    if arguments.text and not arguments.text.is_file():
        parser.error(f"TEXT={arguments.text} is not a file")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    output: Path = arguments.output
    text: Path | None = arguments.text
    make_folder(output)
    # One thread for each task, and as many tasks as cores. Two threads that spin while they wait
    # for each other take 2.5 to 2.9 s for a step where others use the cores (load 9 to 20 on 2
    # cores), two that sleep 0.17 s: a factor of 15. One thread waits for nobody: a busy loop on one
    # core costs it a factor of 1.6 there. See benchmarks/quickstart_threads.py.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for who sets more threads
    tasks = [
        *data_tasks(output, text),
        *model_tasks(output, arguments.teacher, arguments.seeds),
    ]
    report = report_task(output, arguments.teacher, arguments.seeds, tasks)
    started = time.monotonic()
    run_all([*tasks, report], output / "logs", arguments.jobs)
    print("\n" + (output / "logs" / f"{report.name}.log").read_text(encoding="utf-8"))
    print(f"Done in {time.monotonic() - started:.0f} s. Read {output / 'report.md'}", flush=True)


def make_folder(output: Path) -> None:
    """Make the folder of the quick start, in place of an earlier one.

    Raises: SystemExit if there is something else.
    """
    if output.is_dir() and (output / MARK).exists():
        shutil.rmtree(output)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(
            f"quickstart: error: --output {output} is there and was not made by the quick start: "
            "name another folder"
        )
    for folder in ("data", "logs"):
        (output / folder).mkdir(parents=True)
    (output / MARK).touch()


def data_tasks(output: Path, text: Path | None) -> list[Task]:
    """From text to an indexed dataset."""
    data = output / "data"
    corpus, tokenizer = text or data / "corpus.jsonl", data / "tokenizer.model"
    make_corpus = Task(
        name="corpus",
        title="corpus: this Python's standard library",
        command=[
            "-m",
            "megatron_salt",
            "corpus",
            "--output",
            str(corpus),
            "--max-bytes",
            str(CORPUS_BYTES),
        ],
        needs=(),
        light=True,
    )
    return [
        *([make_corpus] if text is None else []),
        Task(
            name="tokenizer",
            title="tokenizer",
            command=["-m", "megatron_salt", "tokenizer", "--input", str(corpus),
                     "--output", str(tokenizer), "--vocab-size", str(VOCAB_SIZE)],
            needs=("corpus",) if text is None else (),
            light=True,
        ),
        Task(
            name="dataset",
            title="indexed dataset",
            command=["-m", "megatron_salt", "preprocess", "--input", str(corpus),
                     "--tokenizer", str(tokenizer), "--output-prefix", str(data / "corpus")],
            needs=("tokenizer",),
            light=True,
        ),
    ]  # fmt: skip


def pretrain(name: str, title: str, config: str, output: Path, *extra: str, needs: str) -> Task:
    prefix = output / "data" / "corpus_text_document"
    command = [
        "-m", "megatron_salt", "pretrain", "--config", str(CONFIGS / config),
        "--deepspeed_config", str(DEEPSPEED), "--data.train_data_path", f"[{prefix}]",
        "--train.output_dir", str(output / name), *extra,
    ]  # fmt: skip
    return Task(name=name, title=title, command=command, needs=(needs,))


def model_tasks(output: Path, teacher: str, seeds: int) -> list[Task]:
    """The small model, what it chooses, and the student: four settings for each seed.

    The small model's scores are those that it gives after the weak teacher's steps.
    """
    slm, tags, chosen = output / "slm", output / "data" / "corpus_slm", output / "chosen"
    data = str(output / "data" / "corpus_text_document")
    early = TEACHER_STEPS["weak"]
    small, *scores = [
        pretrain(
            "slm", f"small language model (the {teacher} teacher)", "tiny_slm.yaml", output,
            "--train.steps", str(TEACHER_STEPS[teacher]), "--train.checkpoint_interval", str(early),
            "--train.keep_checkpoints", "0", needs="dataset",
        ),
        Task(
            name="tags",
            title=f"tags: losses of all sequences under the small model after {early} steps",
            command=["-m", "megatron_salt", "tag", "--data", data, "--output-prefix", str(tags),
                     "--teacher", str(slm / "checkpoints" / f"step_{early:08d}"),
                     "--window", "128"],
            needs=("slm",),
        ),
        Task(
            name="chosen",
            title="selection: the half of the sequences with the highest median loss",
            command=["-m", "megatron_salt", "select", "--tags", str(tags), "--data", data,
                     "--output-prefix", str(chosen), "--top-fraction", "0.5"],
            needs=("tags",),
        ),
    ]  # fmt: skip
    taught = ["--teacher.checkpoint", str(slm), "--salt.kd_weight", "0.5"]
    salt = [*taught, "--salt.kd_steps", str(KD_STEPS),
            "--salt.transition", "linear_decay", "--salt.transition_steps", "30"]  # fmt: skip
    throughout = [*taught, "--salt.kd_steps", str(STEPS), "--salt.transition", "constant"]
    selected = [*salt, "--salt.selection", f"[{chosen}.parquet]"]
    runs = []
    for number in range(seeds):
        for arm, title, extra, needs in (
            ("baseline", "student without a teacher (the baseline)", [], "dataset"),
            ("salt", "student with the teacher at first (SALT)", salt, "slm"),
            ("throughout", "student with the teacher to the end", throughout, "slm"),
            ("salt_ds", "SALT on selected sequences (SALT_DS)", selected, "chosen"),
        ):
            seed = ["--train.seed", str(FIRST_SEED + number)]
            title = f"{title}, seed {number + 1} of {seeds}"
            name = name_of(arm, number)
            runs.append(pretrain(name, title, "tiny.yaml", output, *seed, *extra, needs=needs))
    # The scores are short and first needed by the fourth run: from here on two cores end together.
    return [small, *runs[:2], *scores, *runs[2:]]


def name_of(arm: str, number: int) -> str:
    """The folder of an arm's run with the seed of this number, from 0."""
    return arm if number == 0 else f"{arm}_{number + 1}"


def report_task(output: Path, teacher: str, seeds: int, tasks: list[Task]) -> Task:
    arms = {"baseline": "baseline", "SALT": "salt", "teacher throughout": "throughout",
            "SALT_DS": "salt_ds"}  # fmt: skip
    runs = [str(output / name_of(arm, n)) for arm in arms.values() for n in range(seeds)]
    labels = [label for label in arms for _ in range(seeds)]
    return Task(
        name="report",
        title="report",
        command=["-m", "megatron_salt", "compare", "--baseline", *runs[:seeds],
                 "--run", *runs[seeds:], "--teacher", str(output / "slm"), "--label", *labels,
                 "--title", f"Quick start: SALT with a {teacher} teacher",
                 "--output", str(output / "report.md")],
        needs=tuple(task.name for task in tasks),
    )  # fmt: skip


def run_all(tasks: list[Task], logs: Path, jobs: int) -> None:
    """Run tasks in their order, as soon as what they need is there and a core is free.

    Raises: SystemExit at the first that fails, after showing the end of its log.
    """
    waiting, running, done = list(tasks), list[Started](), set[str]()
    imports = list(SHARED_IMPORTS) if CAN_FORK else []
    begin_s = time.monotonic()
    while waiting or running:
        ready = [
            task for task in waiting if done.issuperset(task.needs) and (task.light or not imports)
        ]
        for task in ready[: jobs - len(running)]:
            waiting.remove(task)
            print(f"\n[{time.monotonic() - begin_s:.0f} s] {task.title}", flush=True)
            print("  " + shlex.join(["python", *task.command]), flush=True)
            running.append(start(task, logs))
        if imports:
            import_shared(imports.pop(0), last=not imports)
        else:
            connection.wait([each.process.sentinel for each in running])
        for each in [each for each in running if not each.process.is_alive()]:
            running.remove(each)
            done.add(each.task.name)
            report_end(each, begin_s, running)


def report_end(ended: Started, begin_s: float, others: list[Started]) -> None:
    """Print the last line that a task has written; when it failed, stop the others and raise."""
    ended.process.join()
    now_s, status = time.monotonic(), ended.process.exitcode
    lines = ended.log.read_text(encoding="utf-8", errors="replace").splitlines()
    if status:
        for other in others:
            other.process.terminate()
        print("\n".join(["", *lines[-30:]]), file=sys.stderr)
        raise SystemExit(f"quickstart: {ended.task.title}: ended with status {status}")
    last = f": {lines[-1]}" if lines else ""
    took_s = now_s - ended.start_s
    print(f"[{now_s - begin_s:.0f} s]   {ended.task.name} took {took_s:.1f} s{last}", flush=True)


def import_shared(name: str, *, last: bool) -> None:
    """Import what the tasks of the models then inherit."""
    from megatron_salt.noise import silence_known_warnings

    silence_known_warnings()
    importlib.import_module(name)
    if last:
        # DeepSpeed's look at its operators, which starts compilers.
        assert importlib.import_module("deepspeed.ops").__compatible_ops__
        gc.collect()
        gc.freeze()  # else the collectors of the tasks would copy what they have inherited


def start(task: Task, logs: Path) -> Started:
    log = logs / f"{task.name}.log"
    process = multiprocessing.get_context("fork").Process(target=execute, args=(task, log))
    process.start()
    return Started(task=task, process=process, log=log, start_s=time.monotonic())


def execute(task: Task, log: Path) -> None:
    """In a process of its own: what `python COMMAND` does, its output into `log`."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (
        os.fdopen(stream, "w", buffering=1, encoding="utf-8") for stream in (1, 2)
    )
    if not CAN_FORK:
        os.execv(sys.executable, [sys.executable, *task.command])
    script, *words = task.command
    if script == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
