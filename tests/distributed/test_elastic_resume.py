"""A checkpoint of any layout goes on at any other: every number is restored, and the losses that
follow are the uninterrupted run's. `tests/elastic.py` tries all pairs of eight layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VOCAB_SIZE
from elastic import LAYOUTS, SAVED, TOLERANCE, At, Pairs, config_at
from ranks import run_ranks
from tiny import allow_fp16_on_cpu, cut_back, make_config, make_deepspeed, metrics_of, run_to_end

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.checkpoint.optimizer import OPTIMIZER_INDEX, StoredOptimizer
from megatron_salt.config.fields import RunConfig


def assert_good(pairs: list[Any], precision: str) -> None:
    for pair in pairs:
        assert pair.same_state
        assert pair.worst_loss <= TOLERANCE[precision]


# Each of the eight layouts is saved at and resumed at; tp, pp, dp, ZeRO stage, micro-batch and the
# number of ranks change, in the KD phase (step 3, the switch follows) and in the LM phase (step 6).
# The optimizers that DeepSpeed has for precisions and ZeRO stages also go on at their own layout.
@pytest.mark.parametrize(
    ("precision", "model", "step", "saved_at", "resumed_at"),
    [
        ("bf16", "llama", SAVED, LAYOUTS[0], [LAYOUTS[4], LAYOUTS[0]]),
        ("bf16", "gpt", SAVED, LAYOUTS[1], [LAYOUTS[0], LAYOUTS[1]]),
        ("fp16", "gpt", 2 * SAVED, LAYOUTS[2], [LAYOUTS[1]]),
        ("fp16", "llama", SAVED, LAYOUTS[3], [LAYOUTS[5], LAYOUTS[3]]),
        ("fp32", "llama", 2 * SAVED, LAYOUTS[4], [LAYOUTS[2]]),
        ("fp32", "gpt", SAVED, LAYOUTS[5], [LAYOUTS[6], LAYOUTS[5]]),
        ("fp32", "llama", 2 * SAVED, LAYOUTS[6], [LAYOUTS[3]]),
        ("fp32", "llama", SAVED, LAYOUTS[7], [LAYOUTS[2], LAYOUTS[7]]),
    ],
)
def test_resumed_at_another_layout(
    dataset: Path, teacher: Path, tmp_path: Path, precision: str, model: str, step: int,
    saved_at: At, resumed_at: list[At],
) -> None:  # fmt: skip
    few = {} if step > SAVED else {"train__steps": 6}  # two after the switch
    pairs = Pairs(tmp_path, dataset, teacher, precision, model, VOCAB_SIZE, step, **few)
    saved = pairs.save(saved_at)
    for at in resumed_at:
        (pair,) = pairs.resume(at, [saved])
        assert_good([pair], precision)
        if at == saved_at:
            assert pair.worst_loss == 0.0 and pair.same_end


def test_the_adaptive_switch_goes_on_at_another_layout(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """The streak that decides is in the manifest: the phase ends where it would have."""
    settings = {"salt__switch": "adaptive", "salt__kd_steps": 7, "salt__switch_margin_nats": 10.0,
                "salt__switch_patience": 2, "train__eval_interval": 2}  # fmt: skip
    pairs = Pairs(tmp_path, dataset, teacher, "fp32", "llama", VOCAB_SIZE, **settings)
    saved = pairs.save(LAYOUTS[1])
    ended = [r["kd_end_step"] for r in metrics_of(saved.folder) if "kd_end_step" in r]
    assert ended[-1] < 7
    (pair,) = pairs.resume(LAYOUTS[0], [saved])
    assert_good([pair], "fp32")


def _only_overflows(config: RunConfig, deepspeed_config: str) -> tuple[float, int, Any]:
    """Loss scale, steps without an update and optimizer state after all steps."""
    allow_fp16_on_cpu()
    run = run_to_end(config, deepspeed_config)
    engine = run.student.engine
    return engine.optimizer.loss_scaler.cur_scale, engine.skipped_steps, metrics_of(
        config.train.output_dir
    )  # fmt: skip


def test_before_the_first_update_there_is_no_state(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """fp16 looks for its loss scale for some steps: no optimizer has a state yet, and the scale
    that the search has come to is restored."""
    scales = {"fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1},
              "zero_optimization": {"stage": 1}}  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path, **scales)
    settings = {"train__checkpoint_interval": 2, "train__check_gradients": False}
    config = config_at(At(1, 2, 1, 1), dataset, teacher, tmp_path / "run", "gpt", **settings)
    whole = run_ranks(2, _only_overflows, config, deepspeed_config)[0]
    assert whole[1] > 3
    cut_back(tmp_path / "run", tmp_path / "again", 2)
    folder = list_checkpoints(tmp_path / "again")[-1]
    assert StoredOptimizer(folder, read_checkpoint_manifest(folder)).index.states == ["fp32"]
    again = config_at(At(2, 1, 1, 1), dataset, teacher, tmp_path / "again", "gpt", **settings)
    resumed = run_ranks(2, _only_overflows, again, deepspeed_config)[0]
    assert resumed[:2] == whole[:2]
    for mine, theirs in zip(resumed[2][1:], whole[2][1:], strict=True):
        assert (mine["grad_norm"] is None) == (theirs["grad_norm"] is None)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "state", "more", "stage"),
    [("SGD", "momentum_buffer", {"momentum": 0.9}, 1), ("Adagrad", "sum", {}, 0)],
)
def test_optimizers_without_adams_state(
    dataset: Path, tmp_path: Path, kind: str, state: str, more: dict[str, Any], stage: int
) -> None:
    """What an optimizer keeps is written under its own words."""
    deepspeed_config = make_deepspeed(
        tmp_path, optimizer={"type": kind, "params": {"lr": 0.1, **more}},
        zero_optimization={"stage": stage}, zero_allow_untested_optimizer=True,
    )  # fmt: skip
    losses = []
    for name, tp in (("whole", 1), ("moved", 2)):
        config = make_config(
            dataset, tmp_path / name, parallel__tensor_model_parallel_size=tp, train__steps=6,
            train__checkpoint_interval=3, train__keep_checkpoints=0,
        )  # fmt: skip
        if name == "moved":
            cut_back(tmp_path / "whole", tmp_path / name, 3)
        run_ranks(2, lambda *args: bool(run_to_end(*args)), config, deepspeed_config)
        losses.append([record["loss"] for record in metrics_of(tmp_path / name)[1:]])
    index = json.loads((list_checkpoints(tmp_path / "moved")[-1] / OPTIMIZER_INDEX).read_text())
    assert index["states"] == ["fp32", state]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
