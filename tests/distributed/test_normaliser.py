"""One normaliser: a step's gradient does not depend on how its batch is cut.

The same 8 sequences with very uneven masks (one fully masked) are cut into 1, 2, 4 or 8
micro-batches over one or two data-parallel ranks; CE and KL are in the loss with different weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import (
    SGD,
    SGD_LR,
    gradient_of_step,
    local_weights,
    make_config,
    make_deepspeed,
)

from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import Batch
from megatron_salt.data.order import rows_of_rank
from megatron_salt.training.run import prepare

VOCAB_SIZE = 509


def uneven_mask(num_rows: int, seq_length: int) -> torch.Tensor:
    """Row r keeps about r/8 of its positions; row 0 none."""
    generator = torch.Generator().manual_seed(5)
    chance = torch.arange(num_rows)[:, None] / num_rows
    return (torch.rand(num_rows, seq_length, generator=generator) < chance).float()


def _one_masked_step(config: RunConfig, deepspeed_config: str) -> dict[str, Any]:
    run = prepare(config, deepspeed_config)
    mask_RS = uneven_mask(8, config.data.seq_length)
    layout = run.groups.layout
    rows = rows_of_rank(0, 8, run.groups.dp_rank, layout.dp_size)
    batch = dataclasses.replace(run.data.read(rows), mask_RS=mask_RS[rows.start : rows.stop])
    assert isinstance(batch, Batch) and run.teacher is not None
    hidden_RSE = run.teacher.hidden_states(batch.tokens_RS)
    micro_batches = run.student.micro_batches(batch, 0.3, hidden_RSE)
    run.student.train_step(micro_batches, SGD_LR)
    sums, _ = run.student.reduce_sums()
    assert sums.tokens == mask_RS.sum().item()
    return {"loss": sums.loss, "weights": local_weights(run)}


def gradient_of_cut(
    folder: Path, dataset: Path, teacher: Path, *, micro_batch_size: int, dp: int = 1, pp: int = 1
) -> tuple[float, dict[str, np.ndarray]]:
    config = make_config(
        dataset, folder / f"run_{micro_batch_size}_{dp}_{pp}", train__steps=1, salt__kd_steps=1,
        teacher__checkpoint=str(teacher), parallel__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(
        folder, optimizer=SGD, train_micro_batch_size_per_gpu=micro_batch_size
    )
    results = run_ranks(dp * pp, _one_masked_step, config, deepspeed_config)
    weights = [result["weights"] for result in results]
    gradient = gradient_of_step(weights, config, VOCAB_SIZE)
    return results[0]["loss"], gradient


@pytest.fixture(scope="module")
def whole_batch(
    dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[float, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("whole")
    return gradient_of_cut(folder, dataset, teacher, micro_batch_size=8)


@pytest.mark.parametrize(
    "cut",
    [
        {"micro_batch_size": 4},
        {"micro_batch_size": 1},
        {"micro_batch_size": 2, "pp": 2},
        {"micro_batch_size": 4, "dp": 2},
        {"micro_batch_size": 1, "dp": 2, "pp": 2},
    ],
    ids=str,
)
def test_gradient_does_not_depend_on_the_cut(
    whole_batch: tuple[float, dict[str, np.ndarray]],
    dataset: Path,
    teacher: Path,
    tmp_path: Path,
    cut: dict[str, int],
) -> None:
    loss, gradient = gradient_of_cut(tmp_path, dataset, teacher, **cut)
    expected_loss, expected = whole_batch
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, value in expected.items():
        error = np.linalg.norm(gradient[name] - value) / np.linalg.norm(value)
        assert error < 1e-5, f"{name}: relative gradient error {error:.2e}"
