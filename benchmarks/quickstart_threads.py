"""What another process on one core costs the quick start, by the settings of its threads.

python benchmarks/quickstart_threads.py [SETTING ...]

For each setting a training process of the quick start's student is started (or one on each core).
It makes steps by turns alone and beside a busy loop on the last core. The ratio is that of the
medians. On a machine that others use, alone means beside whatever they run: the load is noted.
Needs the data of `make quickstart`; writes benchmarks/results/quickstart_threads.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RESULT = REPO / "benchmarks" / "results" / "quickstart_threads.json"
DATA = REPO / "runs" / "quickstart" / "data" / "corpus_text_document"
ROUNDS, STEPS = 4, 8
CORES = os.cpu_count() or 1
ALL = {"OMP_NUM_THREADS": str(CORES)}
SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "a thread for each core": (1, ALL),
    "OMP_WAIT_POLICY=PASSIVE": (1, {**ALL, "OMP_WAIT_POLICY": "PASSIVE"}),
    "GOMP_SPINCOUNT=0": (1, {**ALL, "GOMP_SPINCOUNT": "0"}),
    "KMP_BLOCKTIME=0": (1, {**ALL, "KMP_BLOCKTIME": "0"}),
    "one thread": (1, {"OMP_NUM_THREADS": "1"}),
    "one thread, a process for each core": (CORES, {"OMP_NUM_THREADS": "1"}),
}


def train(folder: str) -> None:
    """A training process: makes STEPS steps for each line that it reads, answers with seconds."""
    from megatron_salt.noise import silence_known_warnings

    silence_known_warnings()
    from megatron_salt.config.command_line import parse_command_line
    from megatron_salt.training.run import prepare

    command = parse_command_line(
        ["--config", "examples/configs/tiny.yaml", "--train.output_dir", folder,
         "--deepspeed_config", "examples/deepspeed/tiny.json", "--train.eval_interval", "0",
         "--data.train_data_path", f"[{DATA}]", "--train.steps", "1000"]
    )  # fmt: skip
    run = prepare(command.config, command.deepspeed_config)
    for step in range(3):
        run.step(step)
    print("ready", flush=True)
    step = 3
    for _ in sys.stdin:
        seconds = []
        for _ in range(STEPS):
            started = time.perf_counter()
            run.step(step)
            seconds.append(time.perf_counter() - started)
            step += 1
        print(json.dumps(seconds), flush=True)
    os._exit(0)  # nothing to save


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        os.environ.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, __file__, "--train", str(folder)], cwd=REPO, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit("quickstart_threads: training did not start; run `make quickstart` first")
    return process


def measure(processes: list[subprocess.Popen[str]]) -> list[float]:
    """Step times of all processes, which make their steps at the same time."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [s for p in processes if p.stdout for s in json.loads(p.stdout.readline())]


def race(count: int, environment: dict[str, str]) -> dict[str, float]:
    alone: list[float] = []
    beside: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        processes = [start(Path(scratch, str(number)), environment) for number in range(count)]
        for _ in range(ROUNDS):
            alone += measure(processes)
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(busy.pid, {CORES - 1})
            beside += measure(processes)
            busy.kill()
            busy.wait()
        for process in processes:
            process.kill()
            process.wait()
    alone_s, beside_s = statistics.median(alone), statistics.median(beside)
    return {
        "processes": count,
        "step_alone_ms": round(1000 * alone_s, 1),
        "step_beside_ms": round(1000 * beside_s, 1),
        "ratio": round(beside_s / alone_s, 2),
        "slowest_step_beside_ms": round(1000 * max(beside), 1),
        "steps_per_s_alone": round(count / alone_s, 2),
        "steps_per_s_beside": round(count / beside_s, 2),
    }


def main() -> None:
    from megatron_salt.report.markdown import describe_machine

    # Settings that were named on the command line are measured anew, the others stay as they are.
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    found = result.get("settings", {})
    for name in sys.argv[1:] or SETTINGS:
        count, environment = SETTINGS[name]
        load = os.getloadavg()[0]
        found[name] = {**race(count, environment), "load_before": round(load, 1)}
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        result = {"machine": describe_machine(), "settings": found}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--train" in sys.argv:
        train(sys.argv[-1])
    else:
        main()
