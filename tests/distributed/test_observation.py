"""Settings that let a run be looked at, and looked at twice: times, collectives, determinism."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import make_config, make_deepspeed, metrics_of, run_to_end

from megatron_salt.config.fields import RunConfig


def _train(config: RunConfig, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


def test_times_of_stages_and_sums_of_collectives_are_printed(
    dataset: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(
        dataset, tmp_path / "run", train__log_interval=2, salt__kd_steps=5,
        teacher__checkpoint=str(teacher), parallel__pipeline_model_parallel_size=2,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(
        tmp_path, wall_clock_breakdown=True, comms_logger={"enabled": True}, steps_per_print=5
    )
    run_ranks(2, _train, config, deepspeed_config)
    output = "".join(capfd.readouterr())
    lines = re.findall(r"step (\d+), ms by stage: (.*)", output)
    # Of the logged steps, and of the third, by whose times the teacher is placed anew.
    assert [int(step) for step, _ in lines] == [2, 3, 4]
    for _, line in lines:
        for kind in ("forward", "backward", "teacher", "send_activation", "update"):
            found = re.search(rf"\b{kind} ([\d.]+) ([\d.]+)", line)
            assert found, (kind, line)
        assert float(re.search(r"backward ([\d.]+)", line)[1]) > 0  # type: ignore[index]
    assert "steps: 5 loss:" in output  # DeepSpeed's own line
    assert "all_reduce" in output  # of its log of collectives


def _flags(config: RunConfig, deepspeed_config: str) -> dict[str, object]:
    run = run_to_end(config, deepspeed_config)
    layer = next(m for m in run.student.module.modules() if hasattr(m, "deterministic_mode"))
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "layers": layer.deterministic_mode,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "nccl": os.environ.get("NCCL_ALGO"),
    }


def test_deterministic_reaches_every_library(dataset: Path, tmp_path: Path) -> None:
    """That it gives the same bits on CUDA is for tests/gpu to show."""
    losses = []
    for wanted in (False, True):
        folder = tmp_path / str(wanted)
        config = make_config(
            dataset, folder, train__deterministic=wanted, train__steps=2,
            parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True,
        )  # fmt: skip
        (flags, _) = run_ranks(2, _flags, config, make_deepspeed(tmp_path))
        assert flags["algorithms"] is wanted and flags["layers"] is wanted
        losses.append([record["loss"] for record in metrics_of(folder)[1:]])
    assert flags["cublas"] == ":4096:8" and flags["nccl"] == "Ring"
    # The embedding's gradient is added up in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
