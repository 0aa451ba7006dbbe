"""Progress: lines in a log, a bar on a terminal."""

import io
import sys

import pytest

from megatron_salt.files import progress
from megatron_salt.files.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(total: int, steps: int, **settings: bool) -> None:
    with Progress(total, "token", "rank 0", **settings) as shown:
        for _ in range(steps):
            shown.set_postfix_str("fast", refresh=False)
            shown.update(1)


def test_a_log_gets_one_whole_line_for_each_tenth(capsys: pytest.CaptureFixture) -> None:
    run(1000, 1000)
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert len(lines) == 10 and "\r" not in text and text.endswith("\n")
    assert lines[0].startswith("rank 0:  10%|") and lines[-1].startswith("rank 0: 100%|")
    assert "100/1.00k" in lines[0] and "fast]" in lines[0]


def test_a_slow_task_says_something_every_minute(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 10.0
        return now_s

    monkeypatch.setattr(progress.time, "monotonic", clock)
    run(10_000, 30)
    few = capsys.readouterr().err.splitlines()
    assert 3 <= len(few) <= 5
    run(10_000, 30, visible=False)
    assert capsys.readouterr().err == ""
    run(0, 30)  # a pipe: its size is not known
    assert 3 <= len(capsys.readouterr().err.splitlines()) <= 5


def test_a_terminal_gets_a_bar_and_other_ranks_nothing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(100, 100, visible=False)
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(100, 100, visible=False)
    assert terminal.getvalue() == ""
    run(100, 100)
    assert terminal.getvalue().count("\n") == 1 and "\rrank 0: 100%|" in terminal.getvalue()
