"""KD ends when the teacher stops helping: early with one that knows nothing, late with a good one;
resumed at any point of it as if nothing had happened."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from evaluation_keys import STUDENT_KEYS, TEACHER_KEYS
from ranks import run_ranks
from tiny import (
    LLAMA,
    cut_back,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
    without_times,
)
from tiny_tags import write_tags

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.config.fields import RunConfig, SaltConfig
from megatron_salt.config.problems import ADAPTIVE_ONLY
from megatron_salt.data.tag_inputs import TagInputs
from megatron_salt.method.switch import SwitchState
from megatron_salt.planner.dry_run import describe_run
from megatron_salt.training.resume import check_same_tag_inputs
from megatron_salt.training.run import Run

SMALL = {**LLAMA, "hidden_size": 20, "num_attention_heads": 2,
         "num_query_groups": 1, "ffn_hidden_size": 40}  # fmt: skip
SWITCH_KEYS = ("switch_streak", "kd_end_step")
# A teacher that knows nothing is never ahead by 0.2 nats, a good one by more for longer than these
# runs last. Decided at the second evaluation, that is after step 2: KD would end after step 4.
ADAPTIVE: dict[str, Any] = {
    "salt__switch": "adaptive",
    "salt__switch_margin_nats": 0.2,
    "salt__kd_steps": 7,
    "salt__min_kd_steps": 5,
    "salt__transition": "linear_decay",
    "salt__transition_steps": 2,
    "train__steps": 8,
    "train__eval_interval": 1,
    "train__checkpoint_interval": 1,
    "train__keep_checkpoints": 0,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2-pp2": (
        4,
        {
            "parallel__tensor_model_parallel_size": 2,
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__sequence_parallel": True,
        },
        {"zero_optimization": {"stage": 1}, "train_batch_size": 4},
    ),
    "dp2": (2, {}, {}),
}


def _train(config: RunConfig, deepspeed_config: str) -> dict[str, np.ndarray]:
    return local_weights(run_to_end(config, deepspeed_config))


def make_teacher(dataset: Path, folder: Path, *, steps: int, lr: float) -> Path:
    optimizer = {"type": "AdamW", "params": {"lr": lr, "torch_adam": True}}
    config = make_config(dataset, folder / "run", model=SMALL, train__steps=steps)
    run_ranks(1, _train, config, make_deepspeed(folder, optimizer=optimizer))
    return folder / "run"


@pytest.fixture(scope="module")
def untrained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(dataset, tmp_path_factory.mktemp("untrained"), steps=1, lr=0.0)


@pytest.fixture(scope="module")
def good(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(dataset, tmp_path_factory.mktemp("good"), steps=40, lr=1e-2)


def _train_and_resume(
    config: RunConfig, deepspeed_config: str, points: list[tuple[int, dict[str, Any]]]
) -> list[dict[str, np.ndarray]]:
    """Final weights of the run, and of copies that go on from its checkpoint after `points` steps,
    with these settings of `salt` changed."""
    found = [local_weights(run_to_end(config, deepspeed_config))]
    whole = Path(config.train.output_dir)
    for number, (point, changes) in enumerate(points):
        folder = resumed_dir(whole, number)
        if dist.get_rank() == 0:
            cut_back(whole, folder, point)
        dist.barrier()
        again = dataclasses.replace(
            config, train=dataclasses.replace(config.train, output_dir=str(folder)),
            salt=dataclasses.replace(config.salt, **changes),
        )  # fmt: skip
        found.append(local_weights(run_to_end(again, deepspeed_config)))
    return found


def resumed_dir(whole: Path, number: int) -> Path:
    return whole.with_name(f"{whole.name}_resumed_{number}")


def switch_lines(output_dir: Path) -> list[tuple[int, str, float, int, int]]:
    """(step, phase, w, streak, end of KD as it was known) of every step."""
    return [
        (r["step"], r["phase"], r["kd_weight"], r["switch_streak"], r["kd_end_step"])
        for r in metrics_of(output_dir)[1:]
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_untrained_teacher_is_let_go_at_the_lower_bound(
    dataset: Path, untrained: Path, tmp_path: Path, layout: str
) -> None:
    """Resumed with a streak of one, between decision and end, at the end and after it: bit-equal,
    and a changed rule does not undo the decision. (The state is one for all layouts: four ranks
    try the two points at which the most changes.)"""
    world_size, parallel, deepspeed = LAYOUTS[layout]
    config = make_config(
        dataset, tmp_path / "run", teacher__checkpoint=str(untrained), **ADAPTIVE, **parallel
    )
    changed = {"switch_margin_nats": -9.0, "min_kd_steps": 0}
    points: list[tuple[int, dict[str, Any]]] = [(3, changed), (5, {})]
    points += [(1, {}), (7, {})] if layout == "dp2" else []
    deepspeed_config = make_deepspeed(tmp_path, **deepspeed)
    results = run_ranks(world_size, _train_and_resume, config, deepspeed_config, points)
    assert switch_lines(tmp_path / "run") == [
        (1, "kd", 0.5, 1, 7),
        (2, "kd", 0.5, 2, 5),  # the decision
        (3, "kd", 0.5, 2, 5),
        (4, "kd", 0.5, 2, 5),  # the window of two steps lies before the end
        (5, "kd", 0.25, 2, 5),
        (6, "lm", 0.0, 2, 5),
        (7, "lm", 0.0, 2, 5),
        (8, "lm", 0.0, 2, 5),
    ]
    expected = without_times(metrics_of(tmp_path / "run"))
    assert all(key in record for record in expected for key in (*STUDENT_KEYS, *TEACHER_KEYS))
    assert not set(SWITCH_KEYS) & set(expected[0]), "an untrained student decides nothing"
    for number in range(len(points)):
        folder = resumed_dir(tmp_path / "run", number)
        assert without_times(metrics_of(folder)) == expected, points[number]
        for rank, (weights, *resumed) in enumerate(results):
            for name, weight in weights.items():
                np.testing.assert_array_equal(
                    resumed[number][name], weight, err_msg=f"{points[number]}, {rank}, {name}"
                )
    manifests = [read_checkpoint_manifest(path) for path in list_checkpoints(tmp_path / "run")]
    assert manifests[0].run.switch == SwitchState(streak=1)
    decided = SwitchState(streak=2, decided_at=2, kd_end=5)
    assert all(manifest.run.switch == decided for manifest in manifests[1:])
    assert [manifest.run.phase for manifest in manifests] == ["kd"] * 4 + ["lm"] * 4


def test_good_teacher_stays_to_the_upper_bound(dataset: Path, good: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path / "run", teacher__checkpoint=str(good), **ADAPTIVE)
    points: list[tuple[int, dict[str, Any]]] = [(4, {}), (7, {})]
    results = run_ranks(2, _train_and_resume, config, make_deepspeed(tmp_path), points)
    lines = switch_lines(tmp_path / "run")
    assert [(phase, streak, end) for _, phase, _, streak, end in lines] == (
        [("kd", 0, 7)] * 7 + [("lm", 0, 7)]
    )
    expected = metrics_of(tmp_path / "run")
    assert all(record["teacher_lead_nats"] > 0 for record in expected)
    assert all(0.5 < record["teacher_better_share"] < 1 for record in expected)
    for number in range(len(points)):
        records = metrics_of(resumed_dir(tmp_path / "run", number))
        assert without_times(records) == without_times(expected)
    for weights, *resumed in results:
        for one in resumed:
            assert all(np.array_equal(one[name], weight) for name, weight in weights.items())


RULE = {name: getattr(SaltConfig(), name) for name in ADAPTIVE_ONLY}


def _adaptive_then_fixed(
    config: RunConfig, deepspeed_config: str, kd_steps: int, fixed_dir: str
) -> list[dict[str, np.ndarray]]:
    adaptive: Run = run_to_end(config, deepspeed_config)
    assert adaptive.teacher is None and adaptive.teaching._begun is None
    salt = dataclasses.replace(config.salt, switch="fixed", kd_steps=kd_steps, **RULE)
    train = dataclasses.replace(config.train, output_dir=fixed_dir)
    fixed = dataclasses.replace(config, salt=salt, train=train)
    return [local_weights(adaptive), local_weights(run_to_end(fixed, deepspeed_config))]


@pytest.mark.parametrize("stages", [1, 2])
def test_decided_run_is_the_run_with_that_end_from_the_start(
    dataset: Path, untrained: Path, tmp_path: Path, stages: int
) -> None:
    """The step after the decision reads by the new phase, though it was read ahead by the old one:
    with a selection the two phases read other sequences. On two stages it has been taught, too."""
    write_tags(tmp_path / "tags", dataset)
    config = make_config(
        dataset, tmp_path / "adaptive", teacher__checkpoint=str(untrained),
        data__tags=[str(tmp_path / "tags")], salt__ce_tokens="tagged",
        salt__selection=[str(tmp_path / "tags_sequences.parquet")],
        salt__switch="adaptive", salt__kd_steps=6, salt__switch_patience=1,
        salt__switch_margin_nats=0.2,
        train__steps=6, train__eval_interval=2, parallel__pipeline_model_parallel_size=stages,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path)
    fixed_dir = str(tmp_path / "fixed")
    results = run_ranks(2, _adaptive_then_fixed, config, deepspeed_config, 2, fixed_dir)
    records, expected = (without_times(metrics_of(tmp_path / n)) for n in ("adaptive", "fixed"))
    ends = [record.pop("kd_end_step", None) for record in records]
    assert ends == [None, None, 2, None, 2, None, 2]
    for record in records:
        record.pop("switch_streak", None)
    assert records == expected
    # Once it is over, by the decided end, a resumed run need not have the selection any more.
    manifest = read_checkpoint_manifest(list_checkpoints(tmp_path / "adaptive")[-1])
    at_step = [
        dataclasses.replace(manifest, training=dataclasses.replace(manifest.run, step=step))
        for step in range(3)
    ]
    check_same_tag_inputs(config, at_step[2], TagInputs())
    with pytest.raises(ValueError, match="data.tags: the KD phase of this run began with"):
        check_same_tag_inputs(config, at_step[1], TagInputs())
    for adaptive, fixed in results:
        assert all(np.array_equal(adaptive[name], weight) for name, weight in fixed.items())


def _resumed_lines(config: RunConfig, deepspeed_config: str) -> str:
    run_to_end(config, deepspeed_config)
    return describe_run(config, deepspeed_config)


def test_lm_phase_without_the_scores_of_its_teacher(
    dataset: Path, untrained: Path, tmp_path: Path
) -> None:
    """With other held-out samples nothing of them is true any more, and nothing is made up."""
    settings: dict[str, Any] = {
        "teacher__checkpoint": str(untrained), "salt__kd_steps": 1, "train__eval_interval": 1,
        "train__checkpoint_interval": 1,
    }  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path)
    config = make_config(dataset, tmp_path / "run", train__steps=2, **settings)
    run_ranks(1, _train, config, deepspeed_config)
    longer = make_config(
        dataset, tmp_path / "run", train__steps=3, train__eval_samples=4, **settings
    )
    run_ranks(1, _train, longer, deepspeed_config)
    record = metrics_of(tmp_path / "run")[-1]
    assert all(key in record for key in STUDENT_KEYS)
    assert not any(key in record for key in TEACHER_KEYS)


def test_dry_run_says_how_far_the_end_is_known(
    dataset: Path, untrained: Path, tmp_path: Path
) -> None:
    config = make_config(dataset, tmp_path / "run", teacher__checkpoint=str(untrained), **ADAPTIVE)
    deepspeed_config = make_deepspeed(tmp_path)
    assert "on each of 1 ranks for at most 7 steps" in describe_run(config, deepspeed_config)
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    text = run_ranks(1, _resumed_lines, shorter, deepspeed_config)[0]
    assert "on each of 1 ranks for at most 5 steps" in text
