"""Data for benchmarks: the standard library of the running Python, as an indexed dataset."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"


def make_data(folder: Path, vocab_size: int) -> Path:
    """Make text, a tokenizer learnt from it and a dataset in `folder`; returns its prefix."""

    def tool(name: str, *words: object) -> None:
        command = [sys.executable, str(TOOLS / name), *map(str, words)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    tool("make_corpus.py", "--output", text)
    tool("train_tokenizer.py", "--input", text, "--output", tokenizer, "--vocab-size", vocab_size)
    tool("preprocess_data.py", "--input", text, "--tokenizer", tokenizer, "--output-prefix",
         folder / "data")  # fmt: skip
    return folder / "data_text_document"
