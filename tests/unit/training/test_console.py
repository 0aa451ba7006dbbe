"""What a run says of itself: how long it will take."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_salt.config.fields import TrainConfig
from megatron_salt.training import console


@pytest.mark.parametrize("interval", [0, 1, 3, 4, 5, 12, 20])
def test_times_due_counts_what_the_loop_does(interval: int) -> None:
    """As `Run._after_step` decides at every step: at each multiple, and after the last."""
    total = 12
    for step in range(total + 2):
        due = [s for s in range(step + 1, total + 1)
               if s == total or (interval and s % interval == 0)]  # fmt: skip
        assert console.times_due(step, total, interval) == len(due), step


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_time_left_counts_steps_evaluations_and_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of 2 s, evaluations of 7 s every 10 steps, checkpoints of 30 s every 25, to step 100;
    resumed at step 20, with an evaluation of 7 s before the first step."""
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    train = TrainConfig(
        steps=100, output_dir="run", eval_interval=10, checkpoint_interval=25
    )  # fmt: skip
    groups: Any = None
    one = console.Console(train, groups)
    with one.timed("evaluation"):  # of the start: not the steps' time
        clock.now += 7.0
    clock.now += 50.0  # the rest of a slow start
    one.start_clock(20)
    last = 20

    def steps_to(step: int) -> None:
        nonlocal last
        for done in range(last + 1, step + 1):
            clock.now += 2.0
            last = done
            if done % 10 == 0:
                with one.timed("evaluation"):
                    clock.now += 7.0
            if done % 25 == 0 and done != step:
                with one.timed("checkpoint"):
                    clock.now += 30.0

    # No checkpoint has been timed yet: none is counted, but the evaluations are.
    steps_to(21)
    assert one.left_s(21) == pytest.approx(79 * 2 + 8 * 7)
    # One was made at step 25; those of steps 50, 75 and 100 are to come.
    steps_to(40)
    assert one.left_s(40) == pytest.approx(60 * 2 + 6 * 7 + 3 * 30)
    # A step's line comes before its own checkpoint, which is not counted.
    steps_to(50)
    assert one.left_s(50) == pytest.approx(50 * 2 + 5 * 7 + 2 * 30)
    steps_to(99)
    assert one.left_s(99) == pytest.approx(2 + 7 + 30)


def test_durations_read_as_people_say_them() -> None:
    found = [console.duration(seconds) for seconds in (0.4, 59.4, 59.6, 187, 3599.6, 3720, 90000)]
    assert found == ["0s", "59s", "1m00s", "3m07s", "1h00m", "1h02m", "25h00m"]
