"""The end of a teacher's pass: who still has to be told the rows of others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_salt.parallel.layout import Layout
from megatron_salt.teacher.passes import TeacherPass
from megatron_salt.teacher.pieces import assign_pieces, teacher_pieces
from megatron_salt.teacher.plan import TeacherPlan


@pytest.mark.parametrize("teacher_tp_size", [1, 2])
def test_ranks_that_share_a_teacher_broadcast_nothing(
    monkeypatch: pytest.MonkeyPatch, teacher_tp_size: int
) -> None:
    layout = Layout(tp_size=2, pp_size=1, dp_size=1)
    pieces = teacher_pieces(6, 1, layout, teacher_tp_size)
    shares = assign_pieces(pieces, layout, [0.0], 1.0, teacher_tp_size)
    groups: Any = SimpleNamespace(
        layout=layout, pp_rank=0, tp_rank=0, dp_rank=0, is_last_stage=True, tp=None
    )
    model: Any = SimpleNamespace(tp_size=teacher_tp_size)
    out_RSE, nothing = torch.zeros(6, 1, 1), None
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda rows, source, group: sent.append((len(rows), source))
    )
    forward = TeacherPass(
        model=model, groups=groups, timer=nothing,  # type: ignore[arg-type]
        plan=TeacherPlan(pieces, shares, num_chunks=1, placement=None),
        tokens_RS=out_RSE, prefix_R=None, out_RSE=out_RSE,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"has run pieces \[\], not \[0"):
        forward.finish()
    forward.done = list(forward.mine)
    assert len(forward.done) == 3 * teacher_tp_size
    assert forward.finish() is out_RSE
    assert sent == ([(3, 0), (3, 1)] if teacher_tp_size == 1 else [])
