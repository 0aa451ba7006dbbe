"""How a process ends early: one line, one status, and what the launcher is told."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_salt.parallel import endings

END = "megatron-salt pretrain: "


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[str, int]]:
    """What torchrun would read of this rank: the reason, and by how long after the moment of the
    failure it claims to be. torchrun takes the earliest for the cause."""
    file = tmp_path / "rank" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(endings.time, "time", lambda: 1000.7)

    def read() -> tuple[str, int]:
        message = json.loads(file.read_text())["message"]
        return message["message"], int(message["extraInfo"]["timestamp"]) - 1000

    return read


@pytest.mark.parametrize("rank", ["RANK", "SLURM_PROCID"])
def test_a_refusal_is_said_by_the_first_rank_and_told_by_all(
    told: Callable[[], tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for number, here, says in (("0", None, True), ("1", None, False), ("1", True, True),
                               ("0", False, False)):  # fmt: skip
        monkeypatch.setenv(rank, number)
        with pytest.raises(SystemExit) as stop:
            endings.refuse("megatron-salt pretrain", ValueError("a = 1: must be 2"), here=here)
        assert stop.value.code == endings.REFUSED == 2
        assert capsys.readouterr().err == (f"{END}error: a = 1: must be 2\n" if says else "")
        # Also by a rank that is faster than the one that says it, and by which that one is ended.
        assert told() == ("a = 1: must be 2", 0 if says else 1)


def test_without_a_launcher_there_is_one_rank_and_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "SLURM_PROCID", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        endings.refuse("megatron-salt", "no")
    assert capsys.readouterr().err == "megatron-salt: error: no\n"


def test_a_reason_that_cannot_be_left_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "file" / "error.json"))
    with pytest.raises(SystemExit):
        endings.refuse("megatron-salt", "no", here=True)
    assert capsys.readouterr().err == "megatron-salt: error: no\n"


def test_the_cause_is_the_rank_that_failed_not_those_that_lost_it(
    told: Callable[[], tuple[str, int]],
) -> None:
    endings.tell_failure(RuntimeError("step 3: the loss is nan"))
    assert told() == ("RuntimeError: step 3: the loss is nan", 0)

    class DistBackendError(RuntimeError):
        """As torch.distributed's, of NCCL."""

    of_gloo = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    for error in (RuntimeError(of_gloo), DistBackendError("NCCL error: remote process exited")):
        endings.tell_failure(error)
        assert told() == (f"{type(error).__name__}: {error}", 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_interrupt_is_one_line_whatever_signal_follows(
    told: Callable[[], tuple[str, int]], tmp_path: Path, number: signal.Signals, rank: str
) -> None:
    """In a fork: it ends at once, without the interpreter's own end."""
    printed = tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 2)
        endings.sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ["RANK"] = rank
        endings.interrupt_on_sigterm()
        try:
            os.kill(os.getpid(), number)
            for _ in range(10_000):  # the signal is handled between two instructions
                pass
        except KeyboardInterrupt:

            def where() -> str:  # launchers send another while it looks for checkpoints
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                return "after step 7"

            endings.end_interrupted("megatron-salt pretrain", where)
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == endings.INTERRUPTED == 130
    line = f"\n{END}interrupted: after step 7\n"
    assert printed.read_text() == (line if rank == "0" else "")
    # Where a rank failed, the launcher ends the others: they are not the cause.
    assert told() == ("interrupted: after step 7", 60)
