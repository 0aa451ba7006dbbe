"""A teacher that is spread over tensor-parallel ranks teaches what replicas on them teach."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranks import run_ranks, run_ranks_to_the_end
from tiny import (
    GPT,
    LLAMA,
    allow_fp16_on_cpu,
    cut_back,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
    without_times,
)

from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.model.frozen import FrozenModel
from megatron_salt.model.weights import initial_weight, weight_table
from megatron_salt.parallel.groups import initialize
from megatron_salt.planner.dry_run import describe_run
from megatron_salt.planner.sizes import TeacherSize
from megatron_salt.teacher.simulator import StepTimes
from megatron_salt.training.run import prepare, train

FOUR = {**LLAMA, "num_layers": 4}
TP2: dict[str, Any] = {"parallel__tensor_model_parallel_size": 2}
TP2_PP2: dict[str, Any] = {**TP2, "model": FOUR, "parallel__pipeline_model_parallel_size": 2}
# Plain steps: Adam makes an element whose gradient is rounding alone as large as any other.
PLAIN = {"type": "SGD", "params": {"lr": 0.5}}


class Trained(NamedTuple):
    weights: dict[str, np.ndarray]
    tp_size: int
    """Over how many ranks the teacher was spread."""
    body_bytes: int
    """Of its weights on this rank without the head, by its own count."""
    expected_bytes: int


def _train(config: RunConfig, deepspeed_config: str) -> Trained:
    allow_fp16_on_cpu()
    run = prepare(config, deepspeed_config)
    teacher = run.teacher
    assert teacher is not None
    size, width = TeacherSize(
        model=teacher.record.config, vocab_size=teacher.record.vocab_size,
        num_positions=teacher.record.num_positions,
    ), torch.finfo(teacher.dtype).bits // 8  # fmt: skip
    head = 0 if teacher.head_WE is None else teacher.head_WE.numel()
    expected = size.numel(config.teacher_tp_size) * width
    tp_size, found = teacher.model.tp_size, teacher.model.num_bytes() - head * width
    train(run)
    return Trained(local_weights(run), tp_size, found, expected)


def _both_ways(config: RunConfig, deepspeed_config: str) -> tuple[Trained, Trained]:
    """Spread and as replicas, in folders of these names."""
    found = []
    for name, spread in (("spread", True), ("replica", False)):
        folder = str(Path(config.train.output_dir) / name)
        changed = dataclasses.replace(
            config, train=dataclasses.replace(config.train, output_dir=folder),
            teacher=dataclasses.replace(config.teacher, tensor_parallel=spread),
        )  # fmt: skip
        found.append(_train(changed, deepspeed_config))
    return found[0], found[1]


def numbers_of(folder: Path) -> np.ndarray:
    """Losses of all steps and evaluations, [records, ...]; nan where there is none."""
    names = ("loss", "ce_nats", "kl_nats", "valid_ce_nats", "teacher_valid_ce_nats",
             "teacher_valid_ce_hard_nats", "teacher_better_share")  # fmt: skip
    records = metrics_of(folder)
    return np.array([[record.get(name, np.nan) for name in names] for record in records], float)


def assert_close(found: np.ndarray, expected: np.ndarray, bound: float, what: str = "") -> None:
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected), err_msg=what)
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound, err_msg=what)


CASES: dict[str, dict[str, Any]] = {
    "tp2": TP2,
    "tp2-pp2-sp": {**TP2_PP2, "parallel__sequence_parallel": True},
    "tp2-pp2-before-prefix": {
        **TP2_PP2, "teacher__placement": "before_step", "data__objective": ["prefix"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_fp32_computes_what_replicas_compute(
    name: str, dataset: Path, even_teacher: Path, tmp_path: Path
) -> None:
    """Through the switch, by a plan of multiply-adds and by one of measured times."""
    config = make_config(
        dataset, tmp_path, train__steps=6, salt__kd_steps=5, train__eval_interval=3,
        train__eval_samples=4, teacher__checkpoint=str(even_teacher), **CASES[name],
    )  # fmt: skip
    world_size = 2 * config.parallel.pipeline_model_parallel_size
    path = make_deepspeed(tmp_path, optimizer=PLAIN)
    for rank, (spread, replica) in enumerate(run_ranks(world_size, _both_ways, config, path)):
        assert (spread.tp_size, replica.tp_size) == (2, 1)
        for trained in (spread, replica):
            assert trained.body_bytes == trained.expected_bytes
        # Every rank has all of the norms.
        assert 0.5 < spread.body_bytes / replica.body_bytes < 0.52
        for weight, expected in replica.weights.items():
            np.testing.assert_allclose(
                spread.weights[weight], expected, rtol=0, err_msg=f"rank {rank}, {weight}",
                atol=1e-6 * max(1.0, float(np.abs(expected).max())),
            )  # fmt: skip
    found, expected = numbers_of(tmp_path / "spread"), numbers_of(tmp_path / "replica")
    assert len(found) == 7 and np.isfinite(found[1:6, 2]).all()
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_as_right_as_replicas(
    precision: str, dataset: Path, even_teacher: Path, tmp_path: Path
) -> None:
    """Held against one process in fp32, as far away as replicas are, which round elsewhere; and no
    further from the replicas than these are from one process of this precision."""
    settings: dict[str, Any] = {
        "train__steps": 5, "salt__kd_steps": 4, "train__eval_interval": 2,
        "train__eval_samples": 8, "teacher__checkpoint": str(even_teacher), "model": FOUR,
    }  # fmt: skip
    dtype: dict[str, Any] = {
        "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    }[precision]
    in_16_bits = make_deepspeed(tmp_path, optimizer=PLAIN, zero_optimization={"stage": 1}, **dtype)
    config = make_config(dataset, tmp_path, **{**settings, **TP2_PP2})
    for spread, replica in run_ranks(4, _both_ways, config, in_16_bits):
        assert spread.body_bytes == spread.expected_bytes < 0.52 * replica.body_bytes
    for name, path in (
        ("single", in_16_bits), ("fp32", make_deepspeed(tmp_path, optimizer=PLAIN)),
    ):  # fmt: skip
        run_ranks(1, _train, make_config(dataset, tmp_path / name, **settings), path)
    names = ("spread", "replica", "single", "fp32")
    spread, replica, single, exact = (numbers_of(tmp_path / name) for name in names)

    def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Of each kind of number, the largest of all steps."""
        return np.nanmax(np.abs(one - other), axis=0)

    # The last one is a share of few tokens, which one rounding can move.
    limit = np.maximum(distance(replica, exact), distance(single, exact))[:-1]
    assert (distance(spread, exact)[:-1] <= 2 * limit).all()
    assert (distance(spread, replica)[:-1] <= distance(replica, exact)[:-1]).all()
    assert (limit > 1e-6).all(), "in 16 bits something is rounded"


def _states(model: ModelConfig, tp_size: int, num_chunks: int) -> dict[str, np.ndarray]:
    """Hidden states of some rows, by precision and way, of weights by chance."""
    groups, found = initialize(tp_size, 1, 5.0), {}
    vocab_size, length = 509, 16
    tokens_BS = torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(1))
    prefix_B = torch.tensor([0, 5, 16])
    table = weight_table(model, vocab_size, length)
    for dtype, spread in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        weights = {
            name: (initial_weight(spec, model, 1) * 5).to(torch.bfloat16).to(dtype)
            for name, spec in table.items()
        }
        frozen = FrozenModel(
            model, weights.items(), groups, source="test", vocab_size=vocab_size,
            num_positions=length, seq_length=length, dtype=dtype, head=None, head_columns=0,
            tensor_parallel=spread,
        )  # fmt: skip
        frozen.prefix_masks.use(prefix_B, groups.device)
        hidden = tokens_BS
        with torch.no_grad():
            for number in range(num_chunks):
                for layer in frozen.chunk(number, num_chunks):
                    hidden = layer(hidden)
        found[f"{dtype} {spread}"] = hidden.float().numpy()
        frozen.prefix_masks.mask_B1SS = None
        shorter = frozen.forward(tokens_BS[:, :7]).float().numpy()
        found[f"short {dtype} {spread}"] = shorter
    return found


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_the_layers_of_both_kinds(kind: str, tp_size: int) -> None:
    """Groups or none, biases, position table, a vocabulary that nothing divides; whole and in
    chunks, rows with a prefix and shorter ones. Of the same bits on all ranks."""
    model = {"llama": {**LLAMA, "num_attention_heads": 8, "num_query_groups": 4}, "gpt": GPT}[kind]
    found = run_ranks(tp_size, _states, ModelConfig(**model), tp_size, 2)
    for states in found:
        for name, values in states.items():
            np.testing.assert_array_equal(values, found[0][name], err_msg=name)
        for part in ("", "short "):
            exact = states[f"{part}torch.float32 False"]
            assert float(np.abs(exact).mean()) > 0.1
            np.testing.assert_allclose(states[f"{part}torch.float32 True"], exact, atol=2e-5)
            error = {
                spread: float(np.abs(states[f"{part}torch.bfloat16 {spread}"] - exact).mean())
                for spread in (True, False)
            }
            assert error[True] <= 1.5 * error[False]


def _weights(config: RunConfig, deepspeed_config: str) -> dict[str, np.ndarray]:
    return local_weights(run_to_end(config, deepspeed_config))


def assert_same_weights(found: list[Any], expected: list[Any]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for name, weight in theirs.items():
            np.testing.assert_array_equal(mine[name], weight, err_msg=name)


def test_placements_and_a_resumed_run_give_the_same_bits(
    dataset: Path, even_teacher: Path, tmp_path: Path
) -> None:
    """In the waits, before the step, and killed in the KD phase; rows with prefixes. The adaptive
    end comes after the next batch has been taught."""
    settings: dict[str, Any] = {
        **TP2_PP2, "train__steps": 6, "salt__kd_steps": 6, "train__eval_interval": 2,
        "train__checkpoint_interval": 2, "train__keep_checkpoints": 0,
        "data__objective": ["0.5", "causal", "0.5", "prefix"], "salt__switch": "adaptive",
        "salt__switch_margin_nats": 9.0,  # it never helps
        "teacher__checkpoint": str(even_teacher), "teacher__tensor_parallel": True,
    }  # fmt: skip
    path = make_deepspeed(tmp_path)
    ahead = make_config(dataset, tmp_path / "bubble", **settings)
    expected = run_ranks(4, _weights, ahead, path)
    before = make_config(dataset, tmp_path / "before", **settings, teacher__placement="before_step")
    assert_same_weights(run_ranks(4, _weights, before, path), expected)
    cut_back(tmp_path / "bubble", tmp_path / "resumed", 2)
    resumed = make_config(dataset, tmp_path / "resumed", **settings)
    assert_same_weights(run_ranks(4, _weights, resumed, path), expected)
    records = [without_times(metrics_of(tmp_path / n)) for n in ("bubble", "before", "resumed")]
    assert records[0] == records[1] == records[2]
    assert [record.get("phase") for record in records[0][1:]] == ["kd"] * 4 + ["lm"] * 2


def _first_stage_is_slow(config: RunConfig, deepspeed_config: str) -> tuple[Any, Any]:
    """Final weights, and the pieces of each stage by the times said to be measured."""
    times = StepTimes(forward=[9.0, 1.0], backward=[18.0, 2.0], teacher=lambda *_: 0.5)
    run = prepare(config, deepspeed_config, measure=lambda *_: times)
    for step in range(config.salt.kd_steps):
        run.step(step)
    assert run.teacher is not None and run.teacher.plan is not None
    return local_weights(run), run.teacher.plan.pieces_of


def test_rows_may_move_to_another_stage(dataset: Path, even_teacher: Path, tmp_path: Path) -> None:
    """While the last pass by the plan of before is still to be finished."""
    found = []
    for name, placement in (("moved", "bubble"), ("before", "before_step")):
        config = make_config(
            dataset, tmp_path / name, teacher__checkpoint=str(even_teacher), salt__kd_steps=5,
            teacher__tensor_parallel=True, teacher__placement=placement, **TP2_PP2,
        )  # fmt: skip
        found.append(run_ranks(4, _first_stage_is_slow, config, make_deepspeed(tmp_path)))
    moved, before = found
    assert [plan for _, plan in moved] == [[[range(0)] * 2, [range(4)] * 2]] * 4
    assert [plan for _, plan in before] == [[[range(2)] * 2, [range(2, 4)] * 2]] * 4
    assert_same_weights([weights for weights, _ in moved], [weights for weights, _ in before])


def test_a_teacher_that_cannot_be_shared_evenly_is_refused(
    dataset: Path, teacher: Path, even_teacher: Path, tmp_path: Path
) -> None:
    """With the remedy, by the dry run and before weights are read."""
    config = make_config(
        dataset, tmp_path / "run", teacher__checkpoint=str(teacher), salt__kd_steps=2,
        teacher__tensor_parallel=True, **TP2,
    )  # fmt: skip
    path = make_deepspeed(tmp_path)
    wanted = (
        r"(?s)teacher .*step_00000008 cannot be spread.*the teacher's num_query_groups = 1 is not "
        r"divisible by parallel.tensor_model_parallel_size = 2: set teacher.tensor_parallel to "
        r"false, or choose another"
    )
    with pytest.raises(ValueError, match=wanted):
        describe_run(config, path)
    checkpoint = dataclasses.replace(config.teacher, checkpoint=str(even_teacher))
    text = describe_run(dataclasses.replace(config, teacher=checkpoint), path)
    assert "parameters, each stage's spread over its 2 tensor-parallel ranks for 2 steps" in text
    assert "the 8 sequences of a replica's step over 1 stages, 8 each" in text
    refused = run_ranks_to_the_end(2, 60, _weights, config, path)
    assert {each.kind for each in refused} == {"ValueError", "FailedElsewhere"}
    assert all(re.search(wanted, each.message) for each in refused)
