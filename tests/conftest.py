"""One small dataset and one small teacher for all tests that train, made when first asked for.

Fixtures import what they need: with several workers, pytest's own process reads this file too, and
should not spend seconds on importing torch and DeepSpeed before the workers start.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

VOCAB_SIZE = 509  # a prime: no padding rule or shard size divides it


def pytest_configure() -> None:
    """Each worker and the ranks that it forks keep to their share of the cores. On one core of two
    four ranks take a fifth less time of the processor: none is woken on another core."""
    # A shell starts what it leaves in the background with Ctrl-C ignored, and so would be the
    # commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    cores = sorted(os.sched_getaffinity(0))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and workers <= len(cores):
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Test modules import torch, megatron-core and DeepSpeed. Of their objects nearly all stay, and
    looking through them again and again for garbage would be a third of the imports' time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker("distributed")
        # The fixtures' dataset is written by a worker process, the teacher trained by a rank; the
        # CUDA code on the CPU takes a compiler ten seconds.
        uses = set(getattr(item, "fixturenames", ()))
        if uses & {"dataset", "teacher", "even_teacher"} or "cuda on cpu" in item.name:
            item.add_marker("processes")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset of 150 short documents of real text."""
    from megatron_salt.corpus.preprocess import preprocess
    from megatron_salt.corpus.python_sources import make_corpus
    from megatron_salt.corpus.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    make_corpus(folder / "all.jsonl", max_bytes=1_500_000)
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"][:1500] for line in lines]
    texts = [text for text in texts if text.isascii()]  # 509 ids leave no room for many alphabets
    train_tokenizer(texts[:100], folder / "tokenizer.model", vocab_size=VOCAB_SIZE)
    pieces = [text[start : start + 500] for text in texts for start in range(0, 1500, 500)]
    short = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces[:150])
    (folder / "short.jsonl").write_text(short, encoding="utf-8")
    preprocess([folder / "short.jsonl"], folder / "tiny", folder / "tokenizer.model", workers=1)
    return folder / "tiny_text_document"


@pytest.fixture(scope="session")
def teacher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """output_dir of a small model trained for a few steps on one rank."""
    return train_teacher(dataset, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def even_teacher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `teacher`; two ranks can share its heads and their groups."""
    return train_teacher(dataset, tmp_path_factory.mktemp("even"), num_query_groups=2)


def train_teacher(dataset: Path, folder: Path, **changes: int) -> Path:
    import torch
    from commands import run_command
    from ranks import run_ranks
    from tiny import TEACHER_MODEL, make_config, make_deepspeed

    from megatron_salt.config.command_line import write_config
    from megatron_salt.training.run import prepare, train

    model = {**TEACHER_MODEL, **changes}
    config = make_config(dataset, folder / "run", model=model, train__steps=8)
    if torch.cuda.is_available():  # which a forked process cannot use
        write_config(config, folder / "run.json")
        done = run_command(
            "-m", "megatron_salt.pretrain", "--config", str(folder / "run.json"),
            "--deepspeed_config", make_deepspeed(folder),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run_ranks(1, lambda *args: train(prepare(*args)), config, make_deepspeed(folder))
    return folder / "run"
