"""The KD phase, the switch, and runs killed around it: resumed runs equal uninterrupted ones."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_keys import TEACHER_KEYS
from ranks import RankError, run_ranks
from tiny import (
    LLAMA,
    SGD,
    cut_back,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    run_and_kill,
    run_to_end,
    without_times,
)

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.config.fields import RunConfig
from megatron_salt.training.run import Run, prepare

KD_STEPS = 6
TP2_PP2: dict[str, Any] = {
    "parallel__tensor_model_parallel_size": 2,
    "parallel__pipeline_model_parallel_size": 2,
    "parallel__sequence_parallel": True,
    "salt__kd_steps": KD_STEPS,
    "salt__transition": "linear_decay",
    "salt__transition_steps": 3,
    "train__steps": 10,
    "train__checkpoint_interval": 2,
    "train__eval_interval": 3,
    "train__keep_checkpoints": 0,
    "train__lr_schedule": "cosine",
}
# Two micro-batches.
ZERO1 = {"zero_optimization": {"stage": 1}, "train_batch_size": 4}


def _train(config: RunConfig, deepspeed_config: str) -> dict[str, np.ndarray]:
    return local_weights(run_to_end(config, deepspeed_config))


@pytest.fixture(scope="module")
def uninterrupted(
    dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """output_dir and final weights per rank of a SALT run at tp 2, pp 2 that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = make_config(dataset, folder / "run", teacher__checkpoint=str(teacher), **TP2_PP2)
    return folder / "run", run_ranks(4, _train, config, make_deepspeed(folder, **ZERO1))


def assert_same_weights(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for rank, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for name, weight in theirs.items():
            np.testing.assert_array_equal(mine[name], weight, err_msg=f"rank {rank}: {name}")


# A checkpoint is written every 2 steps and the switch is after step 6: the resumed run starts two
# steps before the switch, exactly at it, and after it. One is killed indeed, the others are what
# the uninterrupted run had written by then.
@pytest.mark.parametrize(("kill_after", "resumes_at"), [(None, 4), (7, 6), (None, 8)])
def test_resumed_run_is_bit_equal(
    uninterrupted: tuple[Path, Any],
    dataset: Path,
    teacher: Path,
    tmp_path: Path,
    kill_after: int | None,
    resumes_at: int,
) -> None:
    expected_dir, expected_weights = uninterrupted
    config = make_config(dataset, tmp_path / "run", teacher__checkpoint=str(teacher), **TP2_PP2)
    deepspeed_config = make_deepspeed(tmp_path, **ZERO1)
    if kill_after is None:
        cut_back(expected_dir, tmp_path / "run", resumes_at)
    else:
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(4, run_and_kill, config, deepspeed_config, kill_after)
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step_{resumes_at:08d}"
    weights = run_ranks(4, _train, config, deepspeed_config)
    assert_same_weights(weights, expected_weights)
    records = metrics_of(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(11))
    assert without_times(records) == without_times(metrics_of(expected_dir))


def test_steps_after_the_switch_equal_a_run_without_a_teacher(
    uninterrupted: tuple[Path, Any], dataset: Path, tmp_path: Path
) -> None:
    """A plain run, resumed from the state at the switch, takes the very same LM steps."""
    expected_dir, expected_weights = uninterrupted
    start = tmp_path / "at_switch"
    shutil.copytree(expected_dir / "checkpoints" / f"step_{KD_STEPS:08d}", start)
    plain = {key: value for key, value in TP2_PP2.items() if not key.startswith("salt__")}
    config = make_config(dataset, tmp_path / "run", train__resume=str(start), **plain)
    weights = run_ranks(4, _train, config, make_deepspeed(tmp_path, **ZERO1))
    assert_same_weights(weights, expected_weights)
    expected = [r for r in metrics_of(expected_dir) if r["step"] > KD_STEPS]
    got = [r for r in metrics_of(tmp_path / "run") if r["step"] > KD_STEPS]
    for record in expected:  # the SALT run goes on comparing with its teacher
        for key in TEACHER_KEYS:
            record.pop(key, None)
    assert without_times(got) == without_times(expected)


def _tensors_of_teacher(run: Run) -> list[weakref.ref[Any]]:
    teacher = run.teacher
    assert teacher is not None
    tensors = [*teacher.model.layers.parameters(), *teacher.model.layers.buffers()]
    if teacher.head_WE is not None:
        tensors.append(teacher.head_WE)
    return [weakref.ref(teacher), *(weakref.ref(tensor) for tensor in tensors)]


def _alive_after_switch(config: RunConfig, deepspeed_config: str) -> tuple[int, int, list[Any]]:
    """(teacher tensors before, alive after the first LM step, live tensors as wide as E)."""
    run = prepare(config, deepspeed_config)
    references = _tensors_of_teacher(run)
    width = run.teacher.model.parts.model.hidden_size  # type: ignore[union-attr]
    for step in range(KD_STEPS + 1):
        run.step(step)
    gc.collect()
    alive = sum(reference() is not None for reference in references)
    wide = [
        tuple(item.shape)
        for item in gc.get_objects()
        if isinstance(item, torch.Tensor) and item.dim() > 0 and item.shape[-1] == width
    ]
    return len(references), alive, wide


@pytest.mark.parametrize("pp", [1, 2])
def test_no_teacher_tensor_survives_the_switch(
    dataset: Path, teacher: Path, tmp_path: Path, pp: int
) -> None:
    settings = {**TP2_PP2, "parallel__pipeline_model_parallel_size": pp}
    config = make_config(dataset, tmp_path / "run", teacher__checkpoint=str(teacher), **settings)
    results = run_ranks(2 * pp, _alive_after_switch, config, make_deepspeed(tmp_path, **ZERO1))
    for before, alive, wide in results:
        assert before > 10
        assert alive == 0
        # The teacher is 20 wide and nothing of the student is: hidden states would show here.
        assert wide == []


def test_weight_zero_equals_a_run_that_never_had_a_teacher(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    layout = {"parallel__tensor_model_parallel_size": 2}
    with_teacher = make_config(
        dataset, tmp_path / "with", teacher__checkpoint=str(teacher), salt__kd_steps=5,
        salt__kd_weight=0.0, **layout,
    )  # fmt: skip
    without = make_config(dataset, tmp_path / "without", **layout)
    deepspeed_config = make_deepspeed(tmp_path)
    taught = run_ranks(2, _train, with_teacher, deepspeed_config)
    assert_same_weights(taught, run_ranks(2, _train, without, deepspeed_config))
    pairs = zip(
        metrics_of(tmp_path / "with")[1:], metrics_of(tmp_path / "without")[1:], strict=True
    )
    for mine, theirs in pairs:
        for key in ("step", "ce_nats", "loss", "grad_norm", "lr", "tokens"):
            assert mine[key] == theirs[key]


def test_student_that_equals_its_teacher_learns_nothing(dataset: Path, tmp_path: Path) -> None:
    """Same weights on both sides: KL is exactly 0, and one huge step of SGD moves nothing."""
    still = make_deepspeed(tmp_path, optimizer={"type": "SGD", "params": {"lr": 0.0}})
    run_ranks(1, _train, make_config(dataset, tmp_path / "teacher", train__steps=1), still)
    config = make_config(
        dataset, tmp_path / "student", train__steps=1, salt__kd_steps=1, salt__kd_weight=1.0,
        teacher__checkpoint=str(tmp_path / "teacher"),
    )  # fmt: skip
    moved = run_ranks(1, _train, config, make_deepspeed(tmp_path, optimizer=SGD))
    record = metrics_of(tmp_path / "student")[1]
    assert record["kl_nats"] == 0.0
    assert record["loss"] == 0.0
    assert record["grad_norm"] in (0.0, None)
    initial = run_ranks(1, _train, make_config(dataset, tmp_path / "again", train__steps=1), still)
    assert_same_weights(moved, initial)


@pytest.mark.parametrize(
    ("saved_at", "used_at"),
    [({"tp": 2, "pp": 2}, {"tp": 1, "pp": 1}), ({"tp": 1, "pp": 1}, {"tp": 2, "pp": 2})],
)
def test_teacher_serves_any_layout(
    dataset: Path, teacher: Path, tmp_path: Path, saved_at: dict[str, int], used_at: dict[str, int]
) -> None:
    """A teacher saved at one layout teaches at another as one saved and used on one rank does."""

    def sizes(layout: dict[str, int]) -> dict[str, Any]:
        return {
            "parallel__tensor_model_parallel_size": layout["tp"],
            "parallel__pipeline_model_parallel_size": layout["pp"],
        }

    deepspeed_config = make_deepspeed(tmp_path)
    losses = []
    for name, teacher_layout, student_layout in (
        ("plain", {"tp": 1, "pp": 1}, {"tp": 1, "pp": 1}),
        ("mixed", saved_at, used_at),
    ):
        folder = tmp_path / name
        folder.mkdir()
        made = make_config(dataset, folder / "teacher", train__steps=2, **sizes(teacher_layout))
        run_ranks(teacher_layout["tp"] * teacher_layout["pp"], _train, made, deepspeed_config)
        config = make_config(
            dataset, folder / "student", train__steps=3, salt__kd_steps=3,
            teacher__checkpoint=str(folder / "teacher"),
            model={**LLAMA, "hidden_size": 16}, **sizes(student_layout),
        )  # fmt: skip
        run_ranks(student_layout["tp"] * student_layout["pp"], _train, config, deepspeed_config)
        records = metrics_of(folder / "student")
        losses.append([records[0]["teacher_valid_ce_nats"], *(r["loss"] for r in records[1:])])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def _tensor_bytes_per_step(config: RunConfig, deepspeed_config: str) -> list[int]:
    run = prepare(config, deepspeed_config)
    sizes = []
    for step in range(config.train.steps):
        run.step(step)
        gc.collect()
        storages = {
            item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
            for item in gc.get_objects()
            if isinstance(item, torch.Tensor)
        }
        sizes.append(sum(storages.values()))
    return sizes


@pytest.mark.parametrize("pp", [1, 2])
def test_memory_is_flat(dataset: Path, teacher: Path, tmp_path: Path, pp: int) -> None:
    """20 steps, half of them taught: live tensor bytes do not grow after step 3 of a phase."""
    config = make_config(
        dataset, tmp_path / "run", train__steps=20, salt__kd_steps=10,
        teacher__checkpoint=str(teacher), parallel__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    for sizes in run_ranks(pp, _tensor_bytes_per_step, config, make_deepspeed(tmp_path)):
        kd, lm = sizes[3:10], sizes[12:-1]
        assert max(kd) <= min(kd) + 4096, kd
        assert max(lm) <= min(lm) + 4096, lm
        assert max(lm) < min(kd)


def test_training_goes_on_after_a_finished_run(dataset: Path, tmp_path: Path) -> None:
    """Extending train.steps continues the same order of data: equal to one longer run."""
    deepspeed_config = make_deepspeed(tmp_path)
    run_ranks(1, _train, make_config(dataset, tmp_path / "run", train__steps=3), deepspeed_config)
    longer = make_config(dataset, tmp_path / "run", train__steps=6)
    extended = run_ranks(1, _train, longer, deepspeed_config)
    whole = make_config(dataset, tmp_path / "whole", train__steps=6)
    assert_same_weights(extended, run_ranks(1, _train, whole, deepspeed_config))


def test_finished_run_has_nothing_left_to_do(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path / "run", train__steps=2)
    deepspeed_config = make_deepspeed(tmp_path)
    run_ranks(1, _train, config, deepspeed_config)

    def state() -> dict[str, tuple[bytes, int]]:
        files = [path for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = state()
    for steps in (2, 1):  # the same command again, and a shorter run
        asked = replace(config, train=replace(config.train, steps=steps))
        with pytest.raises(RankError, match=f"NothingToDo: nothing to do: .* done 2 of {steps} st"):
            run_ranks(1, prepare, asked, deepspeed_config)
        assert state() == before
    other = replace(config, train=replace(config.train, lr_warmup_steps=1, log_interval=7))
    with pytest.raises(RankError, match=r"changed \(train.lr_warmup_steps: 0 -> 1\). Choose"):
        run_ranks(1, prepare, other, deepspeed_config)
    assert state() == before
    # Neither where the run lies nor what is logged of it was trained.
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = replace(config, train=replace(config.train, output_dir=str(tmp_path / "moved")))
    with pytest.raises(RankError, match="NothingToDo"):
        run_ranks(1, prepare, moved, make_deepspeed(tmp_path, wall_clock_breakdown=True))


def test_a_rate_that_would_jump_is_refused(dataset: Path, tmp_path: Path) -> None:
    """A longer run stretches a cosine under the steps that are done."""
    deepspeed_config = make_deepspeed(tmp_path)
    run = {"train__lr_schedule": "cosine", "train__lr_warmup_steps": 1}

    def resumed(**changes: Any) -> list[float]:
        config = make_config(dataset, tmp_path / "run", **{**run, "train__steps": 6, **changes})
        run_ranks(1, _train, config, deepspeed_config)
        return [record["lr"] for record in metrics_of(tmp_path / "run") if record["step"]]

    first = resumed(train__steps=4)
    message = (
        r"would jump from 0\.000975 \(step 4\) to 0\.00123 \(train.steps: 4 -> 6\): "
        r"train.lr_decay_steps 3 keeps the old curve"
    )
    with pytest.raises(RankError, match=message):
        resumed()
    kept = resumed(train__lr_decay_steps=3, train__steps=5)
    assert kept[:-1] == first and kept[-1] == pytest.approx(0.1 * max(first))
    assert resumed(train__allow_lr_jump=True)[-1] > 1.5 * kept[-1]


def test_a_kd_phase_does_not_end_in_the_past(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    deepspeed_config = make_deepspeed(tmp_path)
    taught = {"teacher__checkpoint": str(teacher), "salt__kd_steps": 3}
    config = make_config(dataset, tmp_path / "run", train__steps=4, **taught)
    run_ranks(1, _train, config, deepspeed_config)
    shorter = replace(config, salt=replace(config.salt, kd_steps=2),
                      train=replace(config.train, steps=5))  # fmt: skip
    with pytest.raises(RankError, match=r"salt.kd_steps = 2, but 3 steps of the KD phase are done"):
        run_ranks(1, prepare, shorter, deepspeed_config)
