"""A rank that waits says where it is."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_salt.parallel.watchdog import StepWatchdog

GROUPS: Any = SimpleNamespace(rank=5, tp_rank=1, dp_rank=0, pp_rank=2)


def test_an_error_carries_step_and_instruction() -> None:
    place = StepWatchdog(GROUPS, timeout_minutes=1.0)
    with pytest.raises(ConnectionError, match="^peer is gone") as caught, place.in_step(7):
        place.enter("RecvGrad(buffer_id=1)")
        raise ConnectionError("peer is gone")
    (note,) = caught.value.__notes__
    assert note.startswith("rank 5 (tp 1, dp 0, stage 2) was in step 7, at RecvGrad(buffer_id=1), ")


def test_a_rank_that_does_not_move_says_so_once(capfd: pytest.CaptureFixture[str]) -> None:
    place = StepWatchdog(GROUPS, timeout_minutes=0.2 / 60)  # 0.2 s
    with place.watched(), place.in_step(3):
        place.enter("BackwardPass(buffer_id=0)")
        deadline = time.monotonic() + 20
        said = ""
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
            said = capfd.readouterr().err
        time.sleep(0.3)
        assert capfd.readouterr().err == ""
        place.enter("SendGrad(buffer_id=0)")
        time.sleep(0.05)
    assert (
        "WARNING rank 5 (tp 1, dp 0, stage 2) was in step 3, at BackwardPass(buffer_id=0)" in said
    )
    assert said.count("WARNING") == 1
