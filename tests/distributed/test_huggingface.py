"""Converted models in runs, and what runs export: transformers' losses are the measure."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_folders import make_model, save_model
from ranks import RankError, run_ranks
from tiny import (
    LLAMA,
    cut_back,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    whole_weights,
    without_times,
)

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest, weights_fingerprint
from megatron_salt.checkpoint.weights import read_weights
from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.data.dataset import DataSource, find_tokenizer
from megatron_salt.evaluation.checkpoint_score import ScoreRequest, score_checkpoint
from megatron_salt.huggingface.convert import import_folder
from megatron_salt.parallel.groups import initialize
from megatron_salt.planner.dry_run import describe_run
from megatron_salt.training.run import prepare

transformers = pytest.importorskip("transformers")
VOCAB_SIZE = 509  # of the data's tokenizer; the models have 517 rows
STEPS = 4
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1}}  # fmt: skip
LAYOUTS = [(1, 1), (2, 2)]


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The model of a converted checkpoint, as its model.yaml has it."""
    model = read_checkpoint_manifest(checkpoint).model.config
    return dataclasses.asdict(model) | {"make_vocab_size_divisible_by": 4}


@pytest.fixture(scope="module")
def folders(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders of models that have read a little of the data."""
    folder = tmp_path_factory.mktemp("hf")
    ids = torch.from_numpy(np.fromfile(f"{dataset}.bin", dtype=np.uint16).astype(np.int64))
    for name in ("qwen3", "pythia"):
        model = make_model(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(20):
            rows = ids[step * 512 : (step + 1) * 512].view(16, 32)
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        save_model(model, dataset.parent / "tokenizer.model", folder / name)
    return {name: folder / name for name in ("qwen3", "pythia")}


@pytest.fixture(scope="module")
def converted(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("checkpoints") / name for name in folders}
    for name, target in made.items():
        import_folder(folders[name], target)
    return made


def held_out_loss(model: Any, config: RunConfig) -> float:
    """transformers' mean loss of a run's held-out rows, in nats, over the tokenizer's tokens."""
    data = DataSource(
        config.data, find_tokenizer(config.data), num_samples=1, seed=0,
        cache_path=Path(config.train.output_dir).parent / "cache", held_out_only=True,
    )  # fmt: skip
    samples = min(config.train.eval_samples, data.num_held_out())
    batch = data.read_held_out(list(range(samples)))
    with torch.no_grad():
        logits = model(input_ids=batch.tokens_RS).logits[..., :VOCAB_SIZE].float()
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels_RS.flatten(), reduction="none")
    mask = batch.mask_RS.flatten()
    return float((losses.double() * mask).sum() / mask.sum())


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _score(checkpoint: str, data: str, seq_length: int) -> float:
    request = ScoreRequest(data=[data], split="90,10", samples=8, seq_length=seq_length,
                           micro_batch_size=2, precision=None)  # fmt: skip
    return score_checkpoint(checkpoint, request, initialize(1, 1, 5.0))["valid_ce_nats"]


def _train(config: RunConfig, deepspeed_config: str) -> dict[str, np.ndarray]:
    """A whole run; the weights that it started from."""
    run = prepare(config, deepspeed_config)
    weights = local_weights(run)
    for step in range(run.first_step, config.train.steps):
        run.step(step)
    run.finish()
    return weights


@pytest.mark.parametrize("name", ["qwen3", "pythia"])
def test_a_converted_model_scores_as_student_teacher_and_in_evaluate(
    name: str, folders: dict[str, Path], converted: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    """The student that starts from it and the teacher, at every layout, and weights bit for bit."""
    checkpoint = converted[name]
    own = read_weights(checkpoint, read_checkpoint_manifest(checkpoint))
    for tp, pp in LAYOUTS:
        config = make_config(
            dataset, tmp_path / f"run{tp}{pp}", model=settings_of(checkpoint),
            train__init_from=str(checkpoint), teacher__checkpoint=str(checkpoint),
            train__eval_samples=8, train__steps=1, salt__kd_steps=1, data__seq_length=32,
            parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp,
        )  # fmt: skip
        per_rank = run_ranks(tp * pp, _train, config, make_deepspeed(tmp_path))
        found = whole_weights(per_rank, config, VOCAB_SIZE)
        for key, weight in own.items():
            rows = weight[:VOCAB_SIZE] if weight.shape[0] == 517 else weight
            assert np.array_equal(found[key.removesuffix(", tied")], rows.numpy()), key
        wanted = held_out_loss(load(folders[name]), config)
        first, step = metrics_of(config.train.output_dir)[:2]
        assert first["valid_ce_nats"] == pytest.approx(wanted, rel=1e-6)
        assert first["teacher_valid_ce_nats"] == pytest.approx(wanted, rel=1e-6)
        assert step["kl_nats"] == pytest.approx(0.0, abs=1e-6)  # it is its own teacher
        manifest = read_checkpoint_manifest(list_checkpoints(config.train.output_dir)[-1])
        assert manifest.run.init_fingerprint == weights_fingerprint(
            read_checkpoint_manifest(checkpoint)
        )
    (score,) = run_ranks(1, _score, str(checkpoint), str(dataset), 32)
    assert score == pytest.approx(wanted, rel=1e-6)
    assert wanted < 6.0  # it has learnt something: chance is ln 509 = 6.23


@pytest.mark.parametrize("name", ["qwen3", "pythia"])
def test_a_converted_teacher_teaches_as_the_model_itself_does(
    name: str, folders: dict[str, Path], converted: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    """teacher.checkpoint and teacher.hf: equal metrics, through the switch and across a resume."""
    found = []
    for kind, path in {"checkpoint": converted[name], "hf": folders[name]}.items():
        settings: dict[str, Any] = {
            f"teacher__{kind}": str(path), "salt__kd_steps": STEPS - 1, "salt__kd_weight": 0.7,
            "train__steps": STEPS, "train__checkpoint_interval": 1, "train__keep_checkpoints": 0,
            "train__eval_interval": 2, "train__lr_decay_steps": STEPS,
        }  # fmt: skip
        whole = make_config(dataset, tmp_path / f"{kind}_whole", **settings)
        run_ranks(1, _train, whole, make_deepspeed(tmp_path))
        cut_back(tmp_path / f"{kind}_whole", tmp_path / kind, step=2)
        cut = make_config(dataset, tmp_path / kind, **settings)
        run_ranks(1, _train, cut, make_deepspeed(tmp_path))
        records = without_times(metrics_of(tmp_path / kind))
        assert records == without_times(metrics_of(tmp_path / f"{kind}_whole"))
        found.append(records)
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            same = pytest.approx(theirs[key], rel=1e-6) if isinstance(value, float) else theirs[key]
            assert value == same, (key, ours.get("step", 0))
    assert [record["phase"] for record in found[0][1:]] == ["kd"] * (STEPS - 1) + ["lm"]
    assert found[0][1]["kl_nats"] > 0.1


@pytest.mark.parametrize(
    ("tp", "pp", "zero", "bf16"), [(2, 2, 0, False), (2, 2, 1, True), (1, 1, 3, True)], ids=str
)
def test_what_a_run_exports_scores_as_its_checkpoint(
    tp: int, pp: int, zero: int, bf16: bool, dataset: Path, tmp_path: Path
) -> None:
    """Through the switch, to a folder that transformers reads and continues text with."""
    values = {**BF16, "zero_optimization": {"stage": zero}} if bf16 else {}
    config = make_config(
        dataset, tmp_path / "run", model={**LLAMA, "num_layers": 3, "qk_layernorm": True},
        train__export_hf=str(tmp_path / "out"), train__steps=STEPS, train__eval_samples=8,
        parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path, **values)
    run_ranks(tp * pp, _train, config, deepspeed_config)
    model = load(tmp_path / "out")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert model.config.vocab_size == VOCAB_SIZE
    # Rounded logits of transformers' bf16 head are no part of the model: scored in fp32, both.
    (score,) = run_ranks(1, _score, str(tmp_path / "run"), str(dataset), 16)
    exported = held_out_loss(model, config)
    assert exported == pytest.approx(score, rel=1e-3 if bf16 else 1e-6)
    assert metrics_of(tmp_path / "run")[-1]["valid_ce_nats"] == pytest.approx(
        score, rel=1e-3 if bf16 else 1e-6
    )
    eod = find_tokenizer(config.data).eod
    for ends in (model.config, model.generation_config):
        assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (eod, eod, eod)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    (made,) = pipeline("def main(", max_new_tokens=5, do_sample=False)
    assert made["generated_text"].startswith("def main(")
    assert len(made["generated_text"]) > len("def main(")
    # The same command again: done, and nothing is exported twice.
    with pytest.raises(RankError, match="nothing to do"):
        run_ranks(tp * pp, _train, config, deepspeed_config)


def test_started_run_resumes_exactly_and_names_what_it_started_from(
    converted: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    """Also without the folder that it started from."""
    import shutil

    source = tmp_path / "source"
    shutil.copytree(converted["qwen3"], source)
    settings: dict[str, Any] = {
        "model": settings_of(source), "train__init_from": str(source), "train__steps": STEPS,
        "train__checkpoint_interval": 2, "train__keep_checkpoints": 0,
    }  # fmt: skip
    whole = make_config(dataset, tmp_path / "whole", **settings)
    run_ranks(1, _train, whole, make_deepspeed(tmp_path))
    last = list_checkpoints(tmp_path / "whole")[-1]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints" / last.name)
    shutil.rmtree(source)
    cut = make_config(dataset, tmp_path / "cut", **settings)
    run_ranks(1, _train, cut, make_deepspeed(tmp_path))
    resumed = list_checkpoints(tmp_path / "cut")[-1]
    for here, there in [(read_checkpoint_manifest(resumed), read_checkpoint_manifest(last))]:
        assert weights_fingerprint(here) == weights_fingerprint(there)
        assert here.run.init_fingerprint == there.run.init_fingerprint is not None
    other = make_config(dataset, tmp_path / "cut", **{**settings, "train__init_from": "another",
                                                      "train__steps": 9})  # fmt: skip
    with pytest.raises(RankError, match=r"train.init_from: \S+ -> another"):
        run_ranks(1, _train, other, make_deepspeed(tmp_path))


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_layers": 2}, {}, "is another model: it has num_layers 3, not 2: .*model.yaml"),
    ({"qk_layernorm": False}, {}, "qk_layernorm True, not False"),
    ({"ffn_hidden_size": None}, {}, "ffn_hidden_size 96, not 256"),
    ({}, {"train__init_from": "/nowhere"}, "train.init_from = /nowhere: does not exist"),
    ({"add_qkv_bias": True}, {"train__init_from": None, "train__export_hf": "out"},
     "no class of transformers computes this model"),
    ({}, {"train__init_from": None, "train__export_hf": "taken"}, "taken is there already"),
]  # fmt: skip


def _refusals(configs: list[RunConfig], deepspeed_config: str) -> list[str]:
    """What a run says of each, which starts nothing."""
    found = []
    for config in configs:
        with pytest.raises(ValueError) as refused:
            prepare(config, deepspeed_config)
        found.append(str(refused.value))
    return found


def test_refused_at_the_start(
    converted: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run and by its dry run, before anything is built."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    deepspeed_config = make_deepspeed(tmp_path)
    configs = [
        make_config(
            dataset, tmp_path / f"run{number}", model=settings_of(converted["qwen3"]) | model,
            **{"train__init_from": str(converted["qwen3"]), **settings},
        )
        for number, (model, settings, _) in enumerate(REFUSED)
    ]  # fmt: skip
    (by_run,) = run_ranks(1, _refusals, configs, deepspeed_config)
    for config, said, (_, _, message) in zip(configs, by_run, REFUSED, strict=True):
        assert re.search(message, said)
        with pytest.raises(ValueError, match=message):
            describe_run(config, deepspeed_config)


def test_other_settings_that_fit_the_weights_are_said(
    converted: dict[str, Path], dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Longer sequences with a slower rotation; sizes that are said in other words are the same."""
    model = settings_of(converted["qwen3"])
    same = dataclasses.replace(ModelConfig(**model), init_method_std=0.1)
    config = make_config(
        dataset, tmp_path / "run", train__steps=1, train__init_from=str(converted["qwen3"]),
        model=dataclasses.asdict(same) | {"rope_scaling": {"factor": 2.0}}, data__seq_length=160,
    )  # fmt: skip
    run_ranks(1, _train, config, make_deepspeed(tmp_path))
    said = capfd.readouterr().err
    assert "model.rope_scaling: None -> {'factor': 2.0}" in said
    assert "data.seq_length: 128 -> 160" in said
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])["loss"] > 0
