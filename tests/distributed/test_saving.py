"""Checkpoints that are written behind the next steps: what they hold, when they count, how they
fail. `tests/kills.py` kills runs at random while they save."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elastic import At
from kills import Kill, Killing, slow_writer
from ranks import RankError, run_ranks, run_ranks_to_the_end
from tiny import (
    GPT,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
    without_times,
)

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest, verify_hashes
from megatron_salt.config.fields import RunConfig
from megatron_salt.training import saving
from megatron_salt.training.run import prepare, train
from megatron_salt.training.state import HostCopies

BF16_ZERO1 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
              "zero_optimization": {"stage": 1}}  # fmt: skip
SETTINGS = {"train__checkpoint_interval": 2, "train__keep_checkpoints": 0, "train__steps": 8}


def _there_after_each_step(
    config: RunConfig, deepspeed_config: str, delay_s: float
) -> list[list[str]]:
    """Which checkpoints have their final name after each step."""
    slow_writer(delay_s)
    run = prepare(config, deepspeed_config)
    found = []
    for step in range(run.first_step, config.train.steps):
        run.step(step)
        found.append([path.name for path in list_checkpoints(config.train.output_dir)])
    run.finish()
    return found


# ZeRO 1 over two ranks, two stages, and ZeRO 3, whose weights are gathered only to be copied.
@pytest.mark.parametrize(
    ("pp", "deepspeed"),
    [(1, BF16_ZERO1), (2, BF16_ZERO1), (1, {"zero_optimization": {"stage": 3}})],
    ids=["dp2", "pp2", "dp2-zero3"],
)
def test_written_behind_the_next_steps(
    dataset: Path, teacher: Path, tmp_path: Path, pp: int, deepspeed: dict[str, Any]
) -> None:
    """By a writer that takes several steps: every file is what it is where training waits, the
    evaluation and the switch in the manifest are those of the step that was copied."""
    folders = {}
    for name, background, delay_s in (("waiting", False, 0.0), ("behind", True, 0.5)):
        folders[name] = tmp_path / name
        config = make_config(
            dataset, tmp_path / name, parallel__pipeline_model_parallel_size=pp,
            teacher__checkpoint=str(teacher), salt__kd_steps=5, train__async_save=background,
            train__eval_interval=3, train__lr_schedule="cosine", **SETTINGS,
        )  # fmt: skip
        there = run_ranks(
            2, _there_after_each_step, config, make_deepspeed(tmp_path, **deepspeed), delay_s
        )[0]
        if name == "waiting":
            assert [len(each) for each in there] == [0, 1, 1, 2, 2, 3, 3, 4]
        else:  # the next save waits for the one before; steps do not
            assert there[1] == [] and there[3][:1] == ["step_00000002"]
            assert len(there[-1]) == 3
    evaluated = [None, 3, 6, 8]  # before the step that was copied
    behind, waiting = (list_checkpoints(folder) for folder in folders.values())
    assert [path.name for path in behind] == [path.name for path in waiting]
    for one, other, last in zip(behind, waiting, evaluated, strict=True):
        mine, theirs = read_checkpoint_manifest(one), read_checkpoint_manifest(other)
        verify_hashes(one, mine, list(mine.files))
        assert mine.files == theirs.files
        assert mine.model.evaluation == theirs.model.evaluation
        assert (mine.model.evaluation.step if mine.model.evaluation else None) == last
        for field in ("step", "phase", "tokens", "data_rows", "switch", "skipped_steps"):
            assert getattr(mine.run, field) == getattr(theirs.run, field)
    assert without_times(metrics_of(folders["behind"])) == without_times(
        metrics_of(folders["waiting"])
    )  # fmt: skip


def _fail_in_the_background(config: RunConfig, deepspeed_config: str, rank: int) -> int:
    """On one rank the second checkpoint meets a full disk; how many steps were done."""
    run = prepare(config, deepspeed_config)
    for step in range(run.first_step, 3):
        run.step(step)
    if int(os.environ["RANK"]) == rank:

        def full(path: Path, *_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        saving.save_tensors = full
    try:
        for step in range(3, config.train.steps):
            run.step(step)
    except (OSError, RuntimeError) as error:
        raise type(error)(f"after {run.done} steps: {error}") from error
    return run.done


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_fails_ends_all_ranks_at_the_same_step(
    dataset: Path, tmp_path: Path, rank: int
) -> None:
    config = make_config(dataset, tmp_path / "run", **SETTINGS)
    deepspeed_config = make_deepspeed(tmp_path, **BF16_ZERO1)
    outcomes = run_ranks_to_the_end(2, 120, _fail_in_the_background, config, deepspeed_config, rank)
    assert all(isinstance(outcome, RankError) for outcome in outcomes)
    steps = [re.findall(r"after (\d) steps", outcome.message)[0] for outcome in outcomes]
    assert steps[0] == steps[1]
    assert "No space left on device" in outcomes[rank].message
    assert ".step_00000004.partial cannot be written" in outcomes[rank].message
    assert "bytes free" in outcomes[rank].message
    assert f"failed on rank {rank}" in outcomes[1 - rank].message
    (left,) = list_checkpoints(tmp_path / "run")
    assert left.name == "step_00000002"
    run_ranks(2, lambda *args: bool(run_to_end(*args)), config, deepspeed_config)
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == list(range(9))


def _without_room(config: RunConfig, deepspeed_config: str) -> None:
    real = shutil.disk_usage
    saving.shutil.disk_usage = lambda path: real(path)._replace(free=1000)
    run_to_end(config, deepspeed_config)


def test_a_disk_without_room_is_said_before_it_is_filled(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path / "run", train__steps=1)
    with pytest.raises(
        RankError, match=r"takes [\d,]{7,} bytes, and its disk has 1,000 bytes free"
    ):
        run_ranks(1, _without_room, config, make_deepspeed(tmp_path))


def _diverge_while_saving(config: RunConfig, deepspeed_config: str) -> None:
    slow_writer(0.5)
    run = prepare(config, deepspeed_config)
    take = run.student.loss_function.take_sums
    calls = iter(range(100))
    spoilt = torch.tensor([np.nan, 1.0, 1.0, 1.0, 1.0, 1.0])  # the loss
    run.student.loss_function.take_sums = lambda: take() * (spoilt if next(calls) == 2 else 1.0)
    train(run)


def test_a_divergence_waits_for_what_is_being_written(dataset: Path, tmp_path: Path) -> None:
    """The step after the save diverges: the good checkpoint before it is kept."""
    config = make_config(dataset, tmp_path / "run", **SETTINGS)
    with pytest.raises(RankError, match="step 3: the loss is nan"):
        run_ranks(2, _diverge_while_saving, config, make_deepspeed(tmp_path, **BF16_ZERO1))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000002"]


def _lose_the_folder(
    config: RunConfig, deepspeed_config: str, lose: Callable[[Path], None]
) -> None:
    run = prepare(config, deepspeed_config)
    for step in range(3):
        run.step(step)
    if run.groups.rank == 0:
        lose(Path(config.train.output_dir))
    run.step(3)


def _replace(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    (folder / ".lock").touch()  # another run's


@pytest.mark.parametrize("lose", [shutil.rmtree, _replace], ids=["deleted", "replaced"])
def test_a_folder_that_is_taken_away_ends_the_run(
    dataset: Path, tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    config = make_config(dataset, tmp_path / "run", **SETTINGS)
    with pytest.raises(RankError, match=r"run has been deleted, moved or replaced"):
        run_ranks(2, _lose_the_folder, config, make_deepspeed(tmp_path, **BF16_ZERO1), lose)
    assert not list_checkpoints(tmp_path / "run")


# One of each kind of place; the background write in bf16.
@pytest.mark.parametrize(
    ("at", "precision", "kills"),
    [
        (At(1, 1, 2, 1), "bf16", [Kill("write", 3, 1, 0.2), Kill("durable", 1, 0, 0.05)]),
        (At(1, 2, 1, 1), "fp32", [Kill("copy", 70, -1, 0.0), Kill("renamed", 1, 0, 0.2),
                                  Kill("removal", 0, 0, 0.0)]),
    ],
)  # fmt: skip
def test_killed_while_saving(
    dataset: Path, teacher: Path, tmp_path: Path, at: At, precision: str, kills: list[Kill]
) -> None:
    killing = Killing(tmp_path, dataset, teacher, at, precision)
    for kill in kills:
        assert killing.check(kill).startswith("died")


def test_colleagues_may_read_what_the_umask_lets_them(dataset: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        config = make_config(dataset, tmp_path / "run", train__steps=1, model=GPT)
        run_ranks(1, lambda *args: bool(run_to_end(*args)), config, make_deepspeed(tmp_path))
    finally:
        os.umask(before)
    for path in list_checkpoints(tmp_path / "run")[0].rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_copies_are_of_the_moment() -> None:
    """Also on the CPU, where a view would be updated with the weights; buffers are kept."""
    copies, weight = HostCopies(torch.device("cpu")), torch.ones(4)
    first = copies.copy("w", weight)
    weight.zero_()
    assert first.tolist() == [1.0] * 4
    assert copies.copy("w", weight).data_ptr() == first.data_ptr()
    assert copies.copy("w", torch.ones(5)).shape == (5,)  # of another shape: another buffer
