"""metrics.jsonl holds each step once; TensorBoard groups its curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_salt.training.metrics import MetricsLog, board_tag


def log(folder: Path, resumed_step: int) -> MetricsLog:
    return MetricsLog(folder, resumed_step=resumed_step, tensorboard=False, settings={})


@pytest.mark.parametrize(("resumed_step", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2])])
def test_lines_of_what_is_done_again_are_dropped(
    tmp_path: Path, resumed_step: int, kept: list[int]
) -> None:
    """A run that ended before its first checkpoint begins anew, from its step 0 on."""
    first = log(tmp_path, 0)
    for step in range(4):
        first.write({"step": step})
    first.close()
    log(tmp_path, resumed_step).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == kept


def test_curves_are_grouped() -> None:
    assert {key: board_tag(key) for key in ("lr", "valid_ce_nats/web", "teacher_valid_ece",
                                            "teacher_time_s", "valid_ece")} == {
        "lr": "train/lr", "valid_ce_nats/web": "valid/ce_nats/web", "teacher_valid_ece":
        "teacher/ece", "teacher_time_s": "teacher/time_s", "valid_ece": "valid/ece",
    }  # fmt: skip


def test_a_byte_that_is_no_text_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 0}\n{"step": 1, "a": "\xff"}\n{"step": 2}\n'
    )
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a step's metrics"):
        log(tmp_path, 2)


def test_what_a_link_leads_to_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    for name in ("metrics.partial", "metrics.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "kept")
    made = log(tmp_path, 0)
    made.write({"step": 0})
    made.close()
    assert (tmp_path / "kept").read_text() == "mine"
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
