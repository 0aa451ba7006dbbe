"""Held-out loss by dataset and by source, where each token tells by itself what it is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run_forked
from ranks import run_ranks
from small_datasets import write_dataset
from tiny import make_config, make_deepspeed, metrics_of, run_to_end

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import DataSource, find_tokenizer
from megatron_salt.data.parts import short_names
from megatron_salt.kernels import VocabShard
from megatron_salt.parallel.groups import initialize

# The ids of each part; sources lie among one another in one file.
IDS = {"some/a": (10, 60), "some/b": (60, 110), "some/c": (110, 160), "other": (160, 210)}
LAYOUTS = {"one": (1, 1, 1), "tp2 pp2 dp2": (2, 2, 2), "tp2 pp2, bf16": (2, 2, 1)}
BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"}}  # fmt: skip
SAMPLES = 31  # rows of several ranks are filled up


@pytest.fixture(scope="module")
def held_out(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Prefixes of two datasets, one with three sources."""
    folder, draw = tmp_path_factory.mktemp("parts"), np.random.RandomState(3)

    def document(name: str) -> list[int]:
        return draw.randint(*IDS[name], size=draw.randint(3, 30)).tolist()

    names = [f"some/{draw.choice(list('abbccc'))}" for _ in range(60)]
    tokenizer = Path(f"{dataset}.tokenizer")
    some, other = folder / "some_text_document", folder / "other_text_document"
    write_dataset(some, tokenizer, [document(name) for name in names], [n[-1] for n in names])
    write_dataset(other, tokenizer, [document("other") for _ in range(40)])
    return [str(other), str(some)]


def _config(dataset: Path, output_dir: Path, valid: list[str], **settings: Any) -> RunConfig:
    return make_config(
        dataset, output_dir, data__valid_data_path=valid, train__eval_samples=SAMPLES,
        train__steps=1, **settings,
    )  # fmt: skip


def _train(config: RunConfig, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


def _plain_losses(config: RunConfig, paths: list[Path], cache: Path) -> tuple[Any, list[Any]]:
    """Labels [N, S], and each model's losses of them, in fp64 from whole logits."""
    groups, tokenizer = initialize(1, 1, 5.0), find_tokenizer(config.data)
    source = DataSource(
        config.data, tokenizer, num_samples=1, seed=0, cache_path=cache, held_out_only=True
    )
    batch, size, found = source.read_held_out(range(SAMPLES)), tokenizer.vocab_size, []
    for path in paths:
        model = load_frozen(
            path, read_checkpoint_manifest(path), groups, seq_length=config.data.seq_length,
            dtype=torch.float32, head=VocabShard(size=size, start=0, stop=size), head_columns=size,
        )  # fmt: skip
        hidden, head_WE = model.forward(batch.tokens_RS), model.head_WE
        assert head_WE is not None
        log_p = (hidden.double() @ head_WE.double().T).log_softmax(dim=-1)
        found.append(-log_p.gather(-1, batch.labels_RS[..., None])[..., 0].numpy())
    return batch.labels_RS.numpy(), found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_part_has_the_loss_of_its_tokens(
    layout: str, dataset: Path, teacher: Path, held_out: list[str], tmp_path: Path
) -> None:
    tp, pp, dp = LAYOUTS[layout]
    config = _config(
        dataset, tmp_path / "run", held_out, teacher__checkpoint=str(teacher), salt__kd_steps=1,
        parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp,
        parallel__sequence_parallel=tp > 1,
    )  # fmt: skip
    precision, close = (BF16, 3e-3) if "bf16" in layout else ({}, 2e-5)
    run_ranks(tp * pp * dp, _train, config, make_deepspeed(tmp_path, **precision))
    last = metrics_of(tmp_path / "run")[-1]
    paths = [resolve(str(path), what="test") for path in (tmp_path / "run", teacher)]
    labels, losses = run_ranks(1, _plain_losses, config, paths, tmp_path / "cache")[0]
    assert {key.split("/", 1)[1] for key in last if "/" in key} == set(IDS)
    for name, (low, high) in IDS.items():
        here = (labels >= low) & (labels < high)
        assert here.sum() > 20, name
        for key, loss in zip(("valid_ce_nats", "teacher_valid_ce_nats"), losses, strict=True):
            assert last[f"{key}/{name}"] == pytest.approx(loss[here].mean(), rel=close), (key, name)
    assert last["valid_ce_nats"] == pytest.approx(losses[0].mean(), rel=close)
    # In any precision the parts make up the whole.
    sizes = {name: ((labels >= low) & (labels < high)).sum() for name, (low, high) in IDS.items()}
    whole = sum(last[f"valid_ce_nats/{name}"] * size for name, size in sizes.items())
    assert last["valid_ce_nats"] == pytest.approx(whole / labels.size, rel=1e-6)


def test_one_dataset_without_sources_has_no_parts_and_evaluate_has_them_too(
    dataset: Path, held_out: list[str], tmp_path: Path
) -> None:
    (tmp_path / "was").mkdir()
    for path in Path(held_out[0]).parent.glob("other*[!r]"):
        shutil.copy(path, tmp_path / "was")
    config = _config(dataset, tmp_path / "run", [f"{tmp_path}/was/other_text_document"])
    run_ranks(1, _train, config, make_deepspeed(tmp_path))
    last = metrics_of(tmp_path / "run")[-1]
    assert not [key for key in last if "/" in key]
    words = ["-m", "megatron_salt", "evaluate", "--checkpoint", str(tmp_path / "run")]
    scores = ["--samples", str(SAMPLES), "--output", str(tmp_path / "scores.json")]
    done = run_forked(*words, *scores, "--data", held_out[1], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(not the text of the run's own score)" in done.stdout
    (result,) = json.loads((tmp_path / "scores.json").read_text())
    assert {key for key in result if "/" in key} == {f"valid_ce_nats/{name}" for name in "abc"}
    # The run's own data, moved: found by its name under a folder.
    (tmp_path / "was").rename(tmp_path / "moved")
    # Not in the folder of the command, unless that is one of those that are named.
    lost = run_forked(*words, *scores, folder=tmp_path / "moved", there=True)
    assert lost.returncode == 2 and "set MEGATRON_SALT_DATA to the folder" in lost.stderr
    moved = str(tmp_path / "moved")
    done = run_forked(*words, *scores, folder=tmp_path, MEGATRON_SALT_DATA=f"/absent:{moved}")
    assert done.returncode == 0 and "(not the text" not in done.stdout, done.stderr
    (result,) = json.loads((tmp_path / "scores.json").read_text())
    assert result["valid_ce_nats"] == pytest.approx(last["valid_ce_nats"], rel=1e-6)


def test_names_are_short_where_they_can_be() -> None:
    assert short_names(["x/py_text_document", "y/git_content_document", "raw"]) == [
        "py", "git", "raw",
    ]  # fmt: skip
    alike = ["x/py_text_document", "y/py_text_document"]
    assert short_names(alike) == alike
