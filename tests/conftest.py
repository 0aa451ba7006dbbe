"""One small dataset and one small teacher for all tests that train, made when first asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run_command
from ranks import run_ranks
from tiny import LLAMA, make_config, make_deepspeed, run_to_end

from megatron_salt.config.command_line import write_config
from megatron_salt.corpus.preprocess import preprocess
from megatron_salt.corpus.python_sources import make_corpus
from megatron_salt.corpus.train_tokenizer import train_tokenizer

# 20 wide, as no tensor of the student is: hidden states that outlive the switch are recognised.
TEACHER_MODEL = {**LLAMA, "num_layers": 2, "hidden_size": 20, "num_attention_heads": 2,
                 "num_query_groups": 1, "ffn_hidden_size": 40}  # fmt: skip
VOCAB_SIZE = 509  # a prime: no padding rule or shard size divides it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker("distributed")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset of 150 short documents of real text."""
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
    folder = tmp_path_factory.mktemp("teacher")
    config = make_config(dataset, folder / "run", model=TEACHER_MODEL, train__steps=8)
    if torch.cuda.is_available():  # which a forked process cannot use
        write_config(config, folder / "run.json")
        done = run_command(
            "-m", "megatron_salt.pretrain", "--config", str(folder / "run.json"),
            "--deepspeed_config", make_deepspeed(folder),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run_ranks(1, _train, config, make_deepspeed(folder))
    return folder / "run"


def _train(config: object, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)  # type: ignore[arg-type]
