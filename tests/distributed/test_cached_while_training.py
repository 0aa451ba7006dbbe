"""train.cache_logits: what is stored is what the student said before each step, at any layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks
from tiny import LLAMA, make_config, make_deepspeed, metrics_of, run_and_kill, run_to_end

from megatron_salt.config.fields import RunConfig
from megatron_salt.data.logits import StoredLogits, verify_logits
from megatron_salt.scoring.logits_view import verify_stored_logits

pytestmark = pytest.mark.distributed

TOP_K, STEPS, ROWS, WINDOW = 40, 4, 4, 16
SETTINGS: dict[str, Any] = {
    "model": LLAMA, "data__windows": True, "train__steps": STEPS, "train__checkpoint_interval": 2,
    "train__cache_logits_top_k": TOP_K, "train__keep_checkpoints": 0,
}  # fmt: skip
DEEPSPEED = {"train_batch_size": ROWS, "train_micro_batch_size_per_gpu": 1,
             "zero_optimization": {"stage": 1}}  # fmt: skip


def _train(config: RunConfig, deepspeed: str) -> None:
    run_to_end(config, deepspeed)


@pytest.fixture(scope="module")
def one_rank(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """output_dir and logits of a run on one rank."""
    folder = tmp_path_factory.mktemp("one")
    config = make_config(
        dataset, folder / "run", train__cache_logits=[str(folder / "own")], **SETTINGS
    )
    run_ranks(1, _train, config, make_deepspeed(folder, **DEEPSPEED))
    return folder / "run", str(folder / "own")


def read(prefix: str, dataset: Path) -> tuple[np.ndarray, np.ndarray, dict[str, torch.Tensor]]:
    """Windows, steps, and what is stored of them, window by window."""
    stored = StoredLogits(prefix, verify_logits(prefix, dataset, hashes=True), top_k=None)
    windows = np.fromfile(f"{prefix}_windows.bin", "<i8")
    steps = np.fromfile(f"{prefix}_steps.bin", "<i4")[np.argsort(windows)]
    windows = np.sort(windows)
    places = (windows[:, None] * WINDOW + np.arange(WINDOW)).ravel()
    return windows, steps, stored.of_places(places)


def test_losses_are_those_of_the_steps(one_rank: tuple[Path, str], dataset: Path) -> None:
    """Before the update: the mean of what is stored of a step is the loss in its metrics."""
    windows, steps, found = read(one_rank[1], dataset)
    assert len(windows) == STEPS * ROWS and sorted(set(steps)) == list(range(STEPS))
    losses = found["logits_loss"].view(len(windows), WINDOW).double().mean(dim=1).numpy()
    for record in metrics_of(one_rank[0])[1:]:
        mine = losses[steps == record["step"] - 1].mean()
        assert mine == pytest.approx(record["ce_nats"], rel=1e-4)  # of fp16
    total = found["logits_logp"].exp().sum(dim=1) + found["logits_rest"].exp()
    assert torch.allclose(total, torch.ones_like(total), atol=1e-2)
    assert found["logits_ids"].shape[1] == TOP_K
    lines = list(verify_stored_logits(str(dataset), one_rank[1]))
    assert lines[-1].startswith(
        f"    {len(total) * TOP_K} entries of {len(total)} tokens, distinct"
    )
    with open(f"{one_rank[1]}_loss.bin", "r+b") as file:  # of one token, in the second window
        file.seek(2 * (WINDOW + 3))
        before = file.read(2)
        file.seek(2 * (WINDOW + 3))
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match=r"own_loss\.bin is not the file"):
        list(verify_stored_logits(str(dataset), one_rank[1]))
    with open(f"{one_rank[1]}_loss.bin", "r+b") as file:
        file.seek(2 * (WINDOW + 3))
        file.write(before)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
             "sequence_parallel": True}),
        (2, {}),
    ],
    ids=["tp2-pp2-sp", "dp2"],
)  # fmt: skip
def test_other_layouts_and_a_resume_store_the_same(
    ranks: int, layout: dict[str, Any], one_rank: tuple[Path, str], dataset: Path, tmp_path: Path
) -> None:
    """The second one is killed in its fourth step, resumes from the second, and writes the third
    again. Complete logits are not overwritten."""
    settings = {**SETTINGS, **{f"parallel__{name}": value for name, value in layout.items()}}
    own = str(tmp_path / "own")
    config = make_config(dataset, tmp_path / "run", train__cache_logits=[own], **settings)
    deepspeed = make_deepspeed(tmp_path, **DEEPSPEED)
    if not layout:
        with pytest.raises(RankError):
            run_ranks(ranks, run_and_kill, config, deepspeed, 3)
        assert Path(f"{own}.logits.log/rank_00001/index.bin").stat().st_size == 3 * 2 * 24
    run_ranks(ranks, _train, config, deepspeed)
    if not layout:
        other = dataclasses.replace(config.train, output_dir=str(tmp_path / "other"))
        with pytest.raises(RankError, match=r"own\.logits\.json is there already"):
            run_ranks(1, _train, dataclasses.replace(config, train=other), deepspeed)
    windows, steps, found = read(own, dataset)
    expected = read(one_rank[1], dataset)
    np.testing.assert_array_equal(windows, expected[0])
    np.testing.assert_array_equal(steps, expected[1])
    for name in ("logits_logp", "logits_entropy", "logits_loss"):
        torch.testing.assert_close(found[name], expected[2][name], atol=2e-2, rtol=2e-3)


def test_a_student_learns_from_them(
    one_rank: tuple[Path, str], dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its KD phase reads the windows that are stored, and only those: they are few."""
    config = make_config(
        dataset, tmp_path / "run", teacher__logits=[one_rank[1]], salt__kd_steps=6,
        salt__kd_weight=0.9, train__steps=7,
    )  # fmt: skip
    run_ranks(1, _train, config, make_deepspeed(tmp_path, train_batch_size=6,
                                                train_micro_batch_size_per_gpu=2))  # fmt: skip
    records = metrics_of(tmp_path / "run")
    assert all(record["kl_nats"] > 0 for record in records[1:7])
    assert records[7]["kl_nats"] is None
    assert "step 0 of 4: those of an early teacher" in capfd.readouterr().err


def test_16_bits_store_what_fp32_logits_say(dataset: Path, tmp_path: Path) -> None:
    """At tp 2, also where the loss has its logits in bf16: a distribution is not made of those."""
    own = str(tmp_path / "own")
    config = make_config(
        dataset, tmp_path / "run", train__cache_logits=[own], salt__logits_dtype="model",
        parallel__tensor_model_parallel_size=2, **SETTINGS,
    )  # fmt: skip
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    run_ranks(2, _train, config, make_deepspeed(tmp_path, **DEEPSPEED, **bf16))
    windows, steps, found = read(own, dataset)
    total = found["logits_logp"].double().exp().sum(dim=1) + found["logits_rest"].double().exp()
    assert (total - 1).abs().max() < 2e-3  # of fp16; sums of bf16 are 1e-2 off
    losses = found["logits_loss"].view(len(windows), WINDOW).double().mean(dim=1).numpy()
    for record in metrics_of(tmp_path / "run")[1:]:
        mine = losses[steps == record["step"] - 1].mean()
        assert mine == pytest.approx(record["ce_nats"], rel=5e-3)
