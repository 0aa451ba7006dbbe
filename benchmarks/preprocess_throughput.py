"""How close does megatron-salt preprocess come to the tokenizer library alone?

    python benchmarks/preprocess_throughput.py

Two numbers on the same text and the same cores, alternated, in tokens per second:

- `run`: the whole command, from starting the interpreter until it has exited: imports, reading,
  sha256, JSON, tokenising, writing, fsync, renaming.
- `library`: only the encode calls of the library, on strings already in memory, in whichever of
  its ways of using all cores is fastest here. No reading, no start-up, nothing is kept or written.

Tokens are those of the text, without the end-of-document tokens. The text is the standard library
of the running Python, repeated in a new order each time; some 4 s of a run are importing
megatron-core, whatever the size of the text, so `run_of_one_document_s` is given as well. Other
load on the machine disturbs seconds more than processor seconds, so `cpu_ratio`, the same ratio in
processor seconds of all threads and processes, stands beside `ratio`.
Writes benchmarks/results/preprocess_throughput.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from megatron_salt.corpus.python_sources import make_corpus
from megatron_salt.corpus.train_tokenizer import sample_documents, train_tokenizer

REPO = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "preprocess_throughput.json"
VOCAB_SIZE = 4096
TOKENIZERS = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}
# Half a minute of the library on two cores, so that imports are a small part of a run.
MEGABYTES = {"sentencepiece": 256, "tokenizers": 64}
CALIBRATION_BYTES = 8_000_000
PACKAGES = ("megatron_salt", "megatron-core", "torch", "sentencepiece", "tokenizers", "numpy")


class Times(NamedTuple):
    """How long something took, by the clock and on the processors."""

    wall_s: float
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--megabytes", type=int, help=f"of text for each (default: {MEGABYTES})")
    parser.add_argument("--only", choices=tuple(TOKENIZERS), help="measure one library")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine(), "counted": __doc__}
    with tempfile.TemporaryDirectory() as directory:
        for library in [args.only] if args.only else list(TOKENIZERS):
            megabytes = args.megabytes or MEGABYTES[library]
            results[library] = measure(library, Path(directory), megabytes, args.repetitions)
            print(json.dumps(results[library], indent=2), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(library: str, directory: Path, megabytes: int, repetitions: int) -> dict[str, Any]:
    """Alternates runs and library calls on one text; medians and their ratio."""
    base, text = directory / "base.jsonl", directory / "text.jsonl"
    tokenizer = directory / TOKENIZERS[library]
    make_corpus(base)
    sample, _ = sample_documents([base], json_key="text", sample_bytes=8_000_000)
    train_tokenizer(sample, tokenizer, vocab_size=VOCAB_SIZE)
    write_text(base, text, CALIBRATION_BYTES)
    ways = {way: timed_library(way, tokenizer, text)[0].wall_s for way in WAYS[library]}
    best = min(ways, key=lambda way: ways[way])
    (directory / "one.jsonl").write_bytes(base.read_bytes().split(b"\n")[0] + b"\n")
    one_document = timed_run(directory / "one.jsonl", tokenizer, directory)
    documents = write_text(base, text, megabytes * 1_000_000)
    runs, encodes = [], []
    tokens = 0
    for _ in range(repetitions):
        runs.append(timed_run(text, tokenizer, directory))
        encode, tokens = timed_library(best, tokenizer, text)
        encodes.append(encode)
    run_rate = tokens / statistics.median(run.wall_s for run in runs)
    library_rate = tokens / statistics.median(encode.wall_s for encode in encodes)
    library_cpu_s = statistics.median(encode.cpu_s for encode in encodes)
    return {
        "ratio": round(run_rate / library_rate, 3),
        "cpu_ratio": round(library_cpu_s / statistics.median(run.cpu_s for run in runs), 3),
        "run_tokens_per_s": round(run_rate),
        "library_tokens_per_s": round(library_rate),
        "library_way": best,
        "library_ways_s_on_calibration_text": {name: round(s, 2) for name, s in ways.items()},
        "run_s": [round(run.wall_s, 2) for run in runs],
        "library_s": [round(encode.wall_s, 2) for encode in encodes],
        "run_cpu_s": [round(run.cpu_s, 2) for run in runs],
        "library_cpu_s": [round(encode.cpu_s, 2) for encode in encodes],
        "run_of_one_document_s": round(one_document.wall_s, 2),
        "text_bytes": text.stat().st_size,
        "documents": documents,
        "tokens": tokens,
        "vocab_size": VOCAB_SIZE,
    }


def write_text(base: Path, destination: Path, num_bytes: int) -> int:
    """Repeats the lines of `base` in new orders up to `num_bytes`; the number of lines."""
    lines = [line + b"\n" for line in base.read_bytes().split(b"\n") if line]
    generator = random.Random(0)
    written = documents = 0
    with open(destination, "wb") as file:
        while written < num_bytes:
            for line in generator.sample(lines, len(lines)):
                if written >= num_bytes:
                    break
                written += file.write(line)
                documents += 1
    return documents


def timed_run(text: Path, tokenizer: Path, directory: Path) -> Times:
    """Seconds of the command as a user starts it, with its default settings."""
    tool = REPO / "tools" / "preprocess_data.py"
    command = [sys.executable, str(tool), "--input", str(text), "--tokenizer", str(tokenizer)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with tempfile.TemporaryDirectory(dir=directory) as output:
        command += ["--output-prefix", str(Path(output, "out"))]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started_s = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - started_s
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Times(wall_s, cpu_s)


def timed_library(way: str, tokenizer: Path, text: Path) -> tuple[Times, int]:
    """Seconds and tokens of the library alone, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(encode_with_library, way, tokenizer, text).result()


def encode_with_library(way: str, tokenizer: Path, text: Path) -> tuple[Times, int]:
    with open(text, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encode = ALL_WAYS[way](tokenizer)
    encode(texts[:8])  # starts the library's threads
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    tokens = encode(texts)
    times = Times(time.perf_counter() - started_s, time.process_time() - started_cpu_s)
    return times, tokens


def sentencepiece_way(out_type: Any) -> Callable[[Path], Callable[[list[str]], int]]:
    def load(path: Path) -> Callable[[list[str]], int]:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        cores = len(os.sched_getaffinity(0))

        def encode(texts: list[str]) -> int:
            return sum(map(len, processor.encode(texts, out_type=out_type, num_threads=cores)))

        return encode

    return load


def tokenizers_way(method: str, batch: int | None) -> Callable[[Path], Callable[[list[str]], int]]:
    def load(path: Path) -> Callable[[list[str]], int]:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        encode_batch = getattr(tokenizer, method)

        def batches(texts: list[str]) -> Iterator[list[str]]:
            size = batch or len(texts)
            return (texts[start : start + size] for start in range(0, len(texts), size))

        def encode(texts: list[str]) -> int:
            return sum(
                len(encoding.ids)
                for part in batches(texts)
                for encoding in encode_batch(part, add_special_tokens=False)
            )

        return encode

    return load


WAYS: dict[str, dict[str, Callable[[Path], Callable[[list[str]], int]]]] = {
    "sentencepiece": {
        "encode(list, out_type=int, num_threads=cores)": sentencepiece_way(int),
        "encode(list, out_type='numpy', num_threads=cores)": sentencepiece_way("numpy"),
    },
    "tokenizers": {
        "encode_batch(all)": tokenizers_way("encode_batch", None),
        "encode_batch_fast(all)": tokenizers_way("encode_batch_fast", None),
        "encode_batch_fast(64 documents)": tokenizers_way("encode_batch_fast", 64),
        "encode_batch_fast(1024 documents)": tokenizers_way("encode_batch_fast", 1024),
    },
}
ALL_WAYS = {name: way for ways in WAYS.values() for name, way in ways.items()}


def describe_machine() -> dict[str, Any]:
    """The processor, its cores and the versions; nothing that names the machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    main()
