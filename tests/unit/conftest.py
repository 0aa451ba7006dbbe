"""Real text and two tiny tokenizers trained on it, made once per test session."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_salt.corpus.python_sources import make_corpus
from megatron_salt.corpus.train_tokenizer import train_tokenizer

CORPUS_BYTES = 2_500_000  # more than two blocks of the reader
TRAINING_BYTES = 400_000


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of Python sources, of several blocks."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    make_corpus(path, max_bytes=CORPUS_BYTES)
    return path


@pytest.fixture(scope="session")
def corpus_texts(corpus_path: Path) -> list[str]:
    lines = corpus_path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


@pytest.fixture(scope="session")
def sentencepiece_path(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.model"
    train_tokenizer(_first(corpus_texts, TRAINING_BYTES), path, vocab_size=512)
    return path


@pytest.fixture(scope="session")
def hugging_face_path(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hugging_face") / "tiny.json"
    train_tokenizer(_first(corpus_texts, TRAINING_BYTES), path, vocab_size=512)
    return path


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[str]], Path]:
    """Writes texts as a JSONL file of the test's directory."""

    def write(name: str, texts: Sequence[str]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


def _first(texts: Sequence[str], num_bytes: int) -> list[str]:
    kept: list[str] = []
    for text in texts:
        kept.append(text)
        num_bytes -= len(text)
        if num_bytes <= 0:
            break
    return kept
