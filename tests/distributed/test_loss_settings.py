"""The settings of the loss do what they say in a run: tp 2, a few steps of the KD phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from tiny import make_config, make_deepspeed, metrics_of, run_to_end

from megatron_salt.config.fields import RunConfig, SaltConfig
from megatron_salt.kernels import VocabShard, compiled
from megatron_salt.model.loss import LossFunction

pytestmark = pytest.mark.distributed

WEIGHT = 0.6
BF16: dict[str, Any] = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
}


def run(
    folder: Path, dataset: Path, teacher: Path, deepspeed: dict[str, Any] | None = None, **salt: Any
) -> list[dict[str, Any]]:
    """Metrics of two KD steps and an evaluation."""
    config = make_config(
        dataset, folder / "run", train__steps=2, salt__kd_steps=2, salt__kd_weight=WEIGHT,
        teacher__checkpoint=str(teacher), parallel__tensor_model_parallel_size=2,
        **{f"salt__{name}": value for name, value in salt.items()},
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    run_ranks(2, run_without_result, config, make_deepspeed(folder, **(deepspeed or {})))
    return metrics_of(folder / "run")


def run_without_result(config: RunConfig, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


@pytest.fixture(scope="module")
def usual(
    dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("usual"), dataset, teacher)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_implementations_train_alike(
    impl: str, usual: list[dict[str, Any]], dataset: Path, teacher: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    records = run(tmp_path, dataset, teacher, loss_impl=impl)
    assert f"loss: {impl} code, logits in fp32" in capfd.readouterr().err
    for record, expected in zip(records, usual, strict=True):
        for key in ("loss", "ce_nats", "kl_nats", "grad_norm", "valid_ce_nats"):
            if expected.get(key) is not None:
                assert record[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "mse"])
def test_divergence_takes_the_place_of_the_kl(
    divergence: str, usual: list[dict[str, Any]], dataset: Path, teacher: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first = run(tmp_path, dataset, teacher, divergence=divergence)[1]
    assert "loss: reference code" in capfd.readouterr().err
    assert first["ce_nats"] == pytest.approx(usual[1]["ce_nats"], rel=1e-6)
    assert abs(first["kl_nats"] / usual[1]["kl_nats"] - 1) > 1e-3
    mixed = (1 - WEIGHT) * first["ce_nats"] + WEIGHT * first["kl_nats"]
    assert first["loss"] == pytest.approx(mixed, rel=1e-5)


def test_logits_in_the_models_precision_lose_digits(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    kl = {
        dtype: run(tmp_path / dtype, dataset, teacher, BF16, logits_dtype=dtype)[1]["kl_nats"]
        for dtype in ("fp32", "model")
    }
    assert kl["fp32"] != kl["model"]
    assert kl["fp32"] == pytest.approx(kl["model"], rel=0.1)


def test_chunk_size_is_the_settings() -> None:
    loss_function = LossFunction(
        vocab=VocabShard(size=4, start=0, stop=4), salt=SaltConfig(loss_chunk_mib=3), tp_group=None,
        sequence_parallel=False, device=torch.device("cpu"),
    )  # fmt: skip
    assert loss_function.chunking.chunk_bytes == 3 * 2**20


def test_an_implementation_that_is_not_here_ends_the_run_at_its_start(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankError, match="impl = 'cuda' cannot serve tensors on cpu"):
        run(tmp_path, dataset, teacher, loss_impl="cuda")


def run_without_compiler_on_rank_1(config: RunConfig, deepspeed_config: str) -> str:
    original = compiled.load

    def load(*about: Any) -> Any:
        return "no C++ compiler found" if dist.get_rank() == 1 else original(*about)

    with mock.patch.object(compiled, "load", load):
        try:
            run_to_end(config, deepspeed_config)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_ranks_that_would_compute_differently_end_the_run_at_its_start(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    config = make_config(
        dataset, tmp_path / "run", train__steps=1, salt__kd_steps=1,
        teacher__checkpoint=str(teacher), parallel__tensor_model_parallel_size=2,
    )  # fmt: skip
    errors = run_ranks(2, run_without_compiler_on_rank_1, config, make_deepspeed(tmp_path))
    for error in errors:
        assert "rank 1 on" in error and "by its reference code, rank 0 by native" in error
