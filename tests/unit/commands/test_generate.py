"""`megatron-salt generate`: its options, what it prints and writes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_salt.commands.generate import add_arguments, run


def started(words: list[str]) -> tuple[int, str, str]:
    """The command as a user starts it: status, output, errors."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(parser.parse_args(words))
    return status, out.getvalue(), err.getvalue()


def test_two_checkpoints_side_by_side(teacher: Path, tmp_path: Path) -> None:
    """Prompts of the options, then of the file; the file written has what is printed."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    prompts.write_text("import ", encoding="utf-8")
    (step,) = (teacher / "checkpoints").glob("step_*8")
    ((status, printed, said),) = run_ranks(
        1, started, ["--checkpoint", str(teacher), str(step), "--prompt", "def ", "--greedy",
                     "--prompt", "", "--prompt-file", str(prompts), "--max-new-tokens", "20",
                     "--output", str(output)],
    )  # fmt: skip
    assert status == 0 and said.count("note:") == 2 and "beyond the 16" in said
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == ["def ", "", "import "] * 2
    for mine, same in zip(records[:3], records[3:], strict=True):
        assert (mine["checkpoint"], same["checkpoint"]) == (str(teacher), str(step))
        assert mine["tokens"] == same["tokens"] and mine["text"] == same["text"]
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith("prompt ")] == [
        "prompt 1",
        "prompt 2",
        "prompt 3",
    ]
    assert [line.split(",")[0] for line in lines if ", step 8: " in line] == [
        str(teacher),
        str(step),
    ] * 3


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match="2 ranks: generate runs on one"):
        run(parser.parse_args(["--checkpoint", "a", "--prompt", "b"]))
