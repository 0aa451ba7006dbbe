"""The look at every weight's gradient in a process's first step, and at the weights to be saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import RankError, run_ranks, run_ranks_to_the_end
from tiny import (
    ADAM,
    LLAMA,
    allow_fp16_on_cpu,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
)

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import Batch, DataSource
from megatron_salt.model.layers import canonical_parameters
from megatron_salt.training.gradients import not_finite
from megatron_salt.training.run import prepare


def sections(precision: str, stage: int) -> dict[str, Any]:
    values: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if precision != "fp32":
        values |= {precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return values


def _train_without(name: str, config: RunConfig, deepspeed_config: str) -> None:
    """The gradient of one weight is lost on its way, as DeepSpeed once lost the head's."""
    allow_fp16_on_cpu()
    run = prepare(config, deepspeed_config)
    parameter = canonical_parameters(run.student.module).get(name)
    if parameter is not None:
        parameter.register_hook(torch.zeros_like)
    for step in range(config.train.steps):
        run.step(step)


def _train_without_one_shard(config: RunConfig, deepspeed_config: str) -> None:
    run = prepare(config, deepspeed_config)
    if run.groups.tp_rank == 1:
        weights = canonical_parameters(run.student.module)
        weights["layers.0.self_attention.linear_qkv.weight"].register_hook(torch.zeros_like)
    run.step(0)


def test_every_shard_of_a_weight_must_get_a_gradient(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path / "run", parallel__tensor_model_parallel_size=2)
    deepspeed_config = make_deepspeed(tmp_path, **sections("bf16", 1))
    outcomes = run_ranks_to_the_end(2, 120, _train_without_one_shard, config, deepspeed_config)
    for outcome in outcomes:
        assert isinstance(outcome, RankError)
        assert "linear_qkv.weight got no gradient" in outcome.message


def test_search_for_a_loss_scale_is_passed_over(dataset: Path, tmp_path: Path) -> None:
    """From 2^32 gradients overflow for some steps; then the weight that is cut off is found."""
    config = make_config(dataset, tmp_path / "run", train__steps=40)
    values = sections("fp16", 1)
    values["fp16"] |= {"initial_scale_power": 32, "hysteresis": 1}
    deepspeed_config = make_deepspeed(tmp_path, **values)
    (outcome,) = run_ranks_to_the_end(1, 120, _train_without, HEAD, config, deepspeed_config)
    assert isinstance(outcome, RankError) and f"{HEAD} got no gradient" in outcome.message
    skipped = metrics_of(tmp_path / "run")[1:]
    assert len(skipped) > 3 and all(record["grad_norm"] is None for record in skipped)


def test_padding_of_zero_3_is_no_weight() -> None:
    """Ten numbers over two ranks in parts of six: the last two of the second part are anything."""
    for dp_rank, place, found in ((0, 5, True), (1, 3, True), (1, 4, False), (1, 5, False)):
        layer = torch.nn.Linear(2, 5, bias=False)
        layer.canonical_name = "layer"  # type: ignore[assignment]
        weight: Any = layer.weight
        weight.ds_numel, weight.ds_tensor = 10, torch.zeros(6)
        weight.ds_tensor[place] = torch.inf
        groups: Any = SimpleNamespace(dp_rank=dp_rank, device=torch.device("cpu"))
        problem = not_finite(layer, groups)
        assert (problem == "weight layer.weight has inf or nan") is found, (dp_rank, place)
        assert found or problem is None


def _mask_first_step() -> None:
    read = DataSource.read

    def masked(self: DataSource, rows: range, phase: Any = "lm") -> Batch:
        batch = read(self, rows, phase)
        counts = 0.0 if rows.start < 8 else 1.0
        return dataclasses.replace(batch, mask_RS=batch.mask_RS * counts)

    DataSource.read = masked  # type: ignore[method-assign]


HEAD, NORM = "output_layer.weight", "layers.1.pre_mlp_layernorm.weight"


@pytest.mark.parametrize(
    ("precision", "stage", "tp", "pp", "dp", "name"),
    [
        ("fp32", 0, 1, 1, 1, NORM),
        ("fp32", 0, 2, 2, 1, HEAD),
        ("bf16", 1, 2, 2, 1, HEAD),
        ("bf16", 1, 1, 1, 2, HEAD),
        ("bf16", 2, 1, 1, 2, NORM),
        ("bf16", 3, 1, 1, 2, HEAD),
        ("fp16", 1, 1, 2, 1, HEAD),
    ],
)
def test_weight_without_gradient_ends_the_run_by_name(
    dataset: Path, tmp_path: Path, precision: str, stage: int, tp: int, pp: int, dp: int, name: str
) -> None:
    config = make_config(
        dataset, tmp_path / "run", train__steps=12, parallel__tensor_model_parallel_size=tp,
        parallel__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path, **sections(precision, stage))
    outcomes = run_ranks_to_the_end(
        tp * pp * dp, 120, _train_without, name, config, deepspeed_config
    )
    for outcome in outcomes:
        assert isinstance(outcome, RankError)
        assert f"{name} got no gradient" in outcome.message
    assert "train.check_gradients" in outcomes[0].message or pp > 1
    # fp16 first looks for its loss scale; the others know after a step, before it is written down.
    steps_done = [record["step"] for record in metrics_of(tmp_path / "run") if record["step"]]
    assert steps_done == [] or precision == "fp16"


def _train_masked_without(name: str, config: RunConfig, deepspeed_config: str) -> None:
    _mask_first_step()
    _train_without(name, config, deepspeed_config)


@pytest.mark.parametrize("name", [HEAD, "no weight"])
def test_step_that_has_nothing_to_learn_is_passed_over(
    dataset: Path, tmp_path: Path, name: str
) -> None:
    config = make_config(dataset, tmp_path / "run", train__steps=3)
    deepspeed_config = make_deepspeed(tmp_path, **sections("bf16", 1))
    (outcome,) = run_ranks_to_the_end(1, 120, _train_masked_without, name, config, deepspeed_config)
    done = metrics_of(tmp_path / "run")[1:]
    assert done[0]["tokens"] == 0 and done[0]["loss"] == 0
    if name == HEAD:
        assert isinstance(outcome, RankError) and "step 2: " + HEAD in outcome.message
        assert len(done) == 1
    else:
        assert outcome is None and len(done) == 3


@pytest.mark.parametrize(
    "settings",
    [
        # The second rank's half of the padded vocabulary has no token at all.
        {"model": {**LLAMA, "make_vocab_size_divisible_by": 512}, "tp": 2},
        {"salt__kd_weight": 0.0},
        {"salt__kd_weight": 1.0, "salt__kd_tokens": "teacher_better", "salt__untaught_ce": "mixed"},
        {"salt__kd_tokens": "low_entropy", "salt__kd_token_share": 0.1},
    ],
    ids=str,
)
def test_weights_that_may_lack_a_gradient_do_not_end_a_run(
    dataset: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = dict(settings)
    tp = settings.pop("tp", 1)
    teaches = settings.get("salt__kd_weight") != 0.0
    config = make_config(
        dataset, tmp_path / "run", train__steps=2, salt__kd_steps=2,
        teacher__checkpoint=str(teacher) if teaches else None,
        parallel__tensor_model_parallel_size=tp, **settings,
    )  # fmt: skip
    run_ranks(tp, _train, config, make_deepspeed(tmp_path, **sections("bf16", 1)))
    assert len(metrics_of(tmp_path / "run")) == 3


def _train(config: RunConfig, deepspeed_config: str) -> None:
    allow_fp16_on_cpu()
    run_to_end(config, deepspeed_config)


def _spoil_and_save(name: str, config: RunConfig, deepspeed_config: str) -> None:
    run = prepare(config, deepspeed_config)
    run.step(0)
    parameter = canonical_parameters(run.student.module).get(name)
    if parameter is not None:
        part = getattr(parameter, "ds_tensor", parameter)
        with torch.no_grad():
            part.view(-1)[-1 if run.groups.dp_rank == 0 else 0] = torch.nan
    run.save(1)


@pytest.mark.parametrize(
    ("stage", "tp", "pp", "dp"), [(1, 2, 2, 1), (3, 1, 1, 2)], ids=["tp2-pp2", "zero3-dp2"]
)
def test_weight_that_is_not_finite_is_not_saved(
    dataset: Path, tmp_path: Path, stage: int, tp: int, pp: int, dp: int
) -> None:
    """One number in the embedding of a token that no text has: no loss or gradient shows it."""
    config = make_config(
        dataset, tmp_path / "run", parallel__tensor_model_parallel_size=tp,
        parallel__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path, **sections("bf16", stage))
    name = "embedding.word_embeddings.weight"
    outcomes = run_ranks_to_the_end(
        tp * pp * dp, 120, _spoil_and_save, name, config, deepspeed_config
    )
    for outcome in outcomes:
        assert isinstance(outcome, RankError)
        assert f"weight {name} has inf or nan" in outcome.message
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_run_goes_on_from_its_last_good_checkpoint(dataset: Path, tmp_path: Path) -> None:
    """An update that leaves fp16's range: loss and gradient are of before it, and are finite."""

    def train(steps: int, lr: float) -> Any:
        config = make_config(
            dataset, tmp_path / "run", train__steps=steps, train__checkpoint_interval=1
        )
        optimizer = {**ADAM, "params": {**ADAM["params"], "lr": lr}}
        precision = sections("fp16", 1)
        precision["fp16"]["initial_scale_power"] = 8
        deepspeed_config = make_deepspeed(tmp_path, optimizer=optimizer, **precision)
        return run_ranks_to_the_end(1, 120, _train, config, deepspeed_config)[0]

    assert train(2, 3e-3) is None
    broken = train(4, 1e6)
    assert isinstance(broken, RankError) and "step 3: weight embedding" in broken.message
    assert "The last good one is the newest" in broken.message
    assert [path.name for path in list_checkpoints(tmp_path / "run")][-1] == "step_00000002"
    assert train(4, 3e-3) is None
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 4]
