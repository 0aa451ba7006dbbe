"""What an evaluation reports, against the same numbers made token by token in one process."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited import edit_manifest
from evaluation_keys import STUDENT_KEYS, TEACHER_KEYS
from ranks import run_ranks
from tiny import make_config, make_deepspeed, metrics_of, run_to_end

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import DataSource, find_tokenizer
from megatron_salt.kernels import VocabShard
from megatron_salt.parallel.groups import initialize
from megatron_salt.training.run import prepare

# 63 samples are no multiple of what ranks times micro-batch take: some rows only fill up.
SETTINGS: dict[str, Any] = {
    "salt__kd_steps": 1, "train__steps": 2, "train__eval_interval": 1, "train__eval_samples": 63,
    "data__eod_mask_loss": True,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, int, int, int]] = {  # tp, pp, dp, micro-batch size
    "one": (1, 1, 1, 2),
    "one, micro-batches of 1": (1, 1, 1, 1),
    "tp2 pp2 dp2": (2, 2, 2, 2),
}


def _train(config: RunConfig, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


def _plain_scores(config: RunConfig, checkpoints: list[Path], cache: Path) -> list[np.ndarray]:
    """CE, confidence, correct and mask [4, N, S] of each model, in fp64 from whole logits."""
    groups = initialize(1, 1, 5.0)
    tokenizer = find_tokenizer(config.data)
    source = DataSource(
        config.data, tokenizer, num_samples=1, seed=0, cache_path=cache, held_out_only=True
    )
    batch = source.read_held_out(range(config.train.eval_samples))
    size = tokenizer.vocab_size
    found = []
    for path in checkpoints:
        model = load_frozen(
            path, read_checkpoint_manifest(path), groups, seq_length=config.data.seq_length,
            dtype=torch.float32, head=VocabShard(size=size, start=0, stop=size), head_columns=size,
        )  # fmt: skip
        hidden = model.forward(batch.tokens_RS)
        assert model.head_WE is not None
        log_p = (hidden.double() @ model.head_WE.double().T).log_softmax(dim=-1)
        ce = -log_p.gather(-1, batch.labels_RS[..., None])[..., 0]
        best = log_p.max(dim=-1)
        correct = best.indices == batch.labels_RS
        parts = (ce, best.values.exp(), correct.double(), batch.mask_RS.double())
        found.append(torch.stack(parts).numpy())
    return found


def calibration_error(tokens: list[Any]) -> float:
    """Of (CE, confidence, correct), from the definition."""
    error = 0.0
    for k in range(15):
        inside = [token for token in tokens if k == min(14, math.floor(token[1] * 15))]
        if inside:
            gap = np.mean([token[2] for token in inside]) - np.mean([token[1] for token in inside])
            error += len(inside) / len(tokens) * abs(gap)
    return error


def expected_values(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """The metrics, by loops over tokens."""
    places = [place for place in np.ndindex(*student.shape[1:]) if student[3][place]]
    mine = [tuple(student[i][place] for i in range(3)) for place in places]
    theirs = [tuple(teacher[i][place] for i in range(3)) for place in places]
    count = len(places)
    ce, teacher_ce = sum(t[0] for t in mine) / count, sum(t[0] for t in theirs) / count
    values = {
        "valid_ce_nats": ce,
        "valid_accuracy": sum(t[2] for t in mine) / count,
        "valid_tokens": count,
        "valid_ece": calibration_error(mine),
        "teacher_valid_ce_nats": teacher_ce,
        "teacher_lead_nats": ce - teacher_ce,
        "teacher_better_share": sum(b[0] < a[0] for a, b in zip(mine, theirs, strict=True)) / count,
        "teacher_valid_ece": calibration_error(theirs),
        "teacher_tv_bound": min(math.sqrt(teacher_ce / 2), math.sqrt(1 - math.exp(-teacher_ce))),
    }
    order = sorted(range(count), key=lambda i: theirs[i][0])  # no two losses are equal here
    cuts = [0, round(count / 3), round(2 * count / 3), count]
    for third, start, stop in zip(("easy", "medium", "hard"), cuts, cuts[1:], strict=False):
        values[f"valid_ce_{third}_nats"] = np.mean([mine[i][0] for i in order[start:stop]])
        values[f"teacher_valid_ce_{third}_nats"] = np.mean(
            [theirs[i][0] for i in order[start:stop]]
        )
    return values


@pytest.fixture(scope="module")
def runs(
    dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], dict[str, np.ndarray]]:
    """output_dirs of the same run at every layout, and the plain scores of each final student and
    of the teacher."""
    folder = tmp_path_factory.mktemp("held_out")
    outputs = {}
    for number, (name, (tp, pp, dp, size)) in enumerate(LAYOUTS.items()):
        config = make_config(
            dataset, folder / str(number), teacher__checkpoint=str(teacher),
            parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp,
            parallel__sequence_parallel=tp > 1, **SETTINGS,
        )  # fmt: skip
        deepspeed_config = make_deepspeed(folder, train_micro_batch_size_per_gpu=size)
        run_ranks(tp * pp * dp, _train, config, deepspeed_config)
        outputs[name] = folder / str(number)
    paths = [resolve(str(path), what="test") for path in [*outputs.values(), teacher]]
    scores = run_ranks(1, _plain_scores, config, paths, folder / "cache")[0]
    return outputs, dict(zip([*LAYOUTS, "teacher"], scores, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_equals_single_tokens(runs: Any, layout: str) -> None:
    outputs, scores = runs
    last = metrics_of(outputs[layout])[-1]  # of the LM phase: the teacher has gone
    assert last["phase"] == "lm"
    expected = expected_values(scores[layout], scores["teacher"])
    assert set(expected) == {*STUDENT_KEYS, *TEACHER_KEYS}
    assert 0 < expected["valid_tokens"] < 63 * 16, "some tokens are masked"
    for name, value in expected.items():
        assert last[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_evaluation_does_not_depend_on_the_cut(runs: Any, layout: str) -> None:
    """The untrained student has the same weights everywhere."""
    outputs, _ = runs
    first, expected = (metrics_of(outputs[name])[0] for name in (layout, "one"))
    assert set(first) == set(expected) and len(first) == 17
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def _bring(config: RunConfig, deepspeed_config: str) -> tuple[str, list[str]]:
    run = prepare(config, deepspeed_config)
    assert run.teacher is not None
    return run.held_out.score_teacher(run.teacher)


@pytest.mark.parametrize("bos", [None, 5])
def test_teacher_without_a_stored_score(
    dataset: Path, teacher: Path, tmp_path: Path, bos: int | None
) -> None:
    """A model without its run: read once more behind the token that began its texts, or else behind
    the one that ends documents."""
    checkpoint = tmp_path / "model"
    shutil.copytree(resolve(str(teacher), what="test"), checkpoint)

    def without_a_run(values: dict[str, Any]) -> None:
        values["training"] = values["model"]["evaluation"] = None
        values["model"]["bos"] = bos

    edit_manifest(checkpoint, without_a_run)
    config = make_config(dataset, tmp_path / "run", teacher__checkpoint=str(checkpoint), **SETTINGS)
    line, warnings = run_ranks(1, _bring, config, make_deepspeed(tmp_path))[0]
    token = find_tokenizer(config.data).eod if bos is None else bos
    assert "none was stored" in line and f"with token {token} in front" in line
    assert warnings == []
