"""Runs on a mixture of objectives: which tokens see which, every layout the same, exact resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_text import original_text
from ranks import RankError, run_ranks
from tiny import (
    GPT,
    LLAMA,
    SGD,
    TEACHER_MODEL,
    cut_back,
    gradient_of_step,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
    without_times,
)

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.config.fields import DataConfig, RunConfig, TextOrNumber
from megatron_salt.config.values import OBJECTIVES
from megatron_salt.corpus.preprocess import preprocess
from megatron_salt.corpus.train_tokenizer import train_tokenizer
from megatron_salt.data.dataset import Batch, DataSource, find_tokenizer
from megatron_salt.data.objective import make_mixture
from megatron_salt.model.student import OutputLayer
from megatron_salt.parallel.groups import initialize
from megatron_salt.planner.dry_run import describe_run
from megatron_salt.teacher.find import unseen_objectives
from megatron_salt.training.run import prepare

VOCAB_SIZE = 509
# 16 tokens a row: span corruption reads 10 of 17 and takes 3 spans out of them.
MIXTURE: dict[str, Any] = {
    "data__objective": ["0.3", "causal", "0.4", "prefix", "0.3", "span_corruption"],
    "data__span_corruption_rate": 0.4,
    "data__span_mean_length": 1.5,
    # Of the first step's four micro-batches no two have the same prefixes.
    "train__seed": 1235,
}
ZERO1 = {"zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def sentinel_dataset(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of `dataset` in the tokens of a tokenizer with 4 sentinels."""
    folder = tmp_path_factory.mktemp("sentinels")
    lines = (dataset.parent / "short.jsonl").read_text(encoding="utf-8").splitlines()
    train_tokenizer(
        [json.loads(line)["text"] for line in lines], folder / "tokenizer.model",
        vocab_size=VOCAB_SIZE, num_sentinels=4,
    )  # fmt: skip
    text = dataset.parent / "short.jsonl"
    preprocess([text], folder / "tiny", folder / "tokenizer.model", workers=1)
    return folder / "tiny_text_document"


def _train(config: RunConfig, deepspeed_config: str) -> dict[str, np.ndarray]:
    return local_weights(run_to_end(config, deepspeed_config))


@pytest.fixture(scope="module")
def causal_teacher(sentinel_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal_teacher")
    config = make_config(sentinel_dataset, folder / "run", model=TEACHER_MODEL, train__steps=4)
    run_ranks(1, _train, config, make_deepspeed(folder))
    return folder / "run"


def data_config(prefix: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "train_data_path": [TextOrNumber(str(prefix))], "split": "90,10", "seq_length": 16,
        "objective": [TextOrNumber(word) for word in MIXTURE["data__objective"]],
        "span_corruption_rate": 0.4, "span_mean_length": 1.5,
    }  # fmt: skip
    return DataConfig(**(values | changes))


def _batches(data: DataConfig, cache: Path) -> dict[str, Any]:
    """40 rows of the mixture, and the same rows and held-out samples of a causal run."""
    initialize(1, 1, 5.0)
    tokenizer = find_tokenizer(data)
    causal = DataConfig(
        train_data_path=data.train_data_path, split=data.split, seq_length=data.seq_length
    )
    found: dict[str, Any] = {}
    for name, settings in (("mixed", data), ("causal", causal)):
        source = DataSource(settings, tokenizer, num_samples=40, seed=7, cache_path=cache)
        for part, batch in (("rows", source.read(range(40))),
                            ("held_out", source.read_held_out(range(4))),
                            ("late", source.read([33, 2]))):  # fmt: skip
            prefix = None if batch.prefix_R is None else batch.prefix_R.numpy()
            tensors = (batch.tokens_RS, batch.labels_RS, batch.mask_RS)
            found[f"{name} {part}"] = (*(x.numpy() for x in tensors), prefix)
    return found


def test_rows_are_made_of_the_rows_of_a_causal_run(sentinel_dataset: Path, tmp_path: Path) -> None:
    data = data_config(sentinel_dataset)
    found = run_ranks(1, _batches, data, tmp_path)[0]
    mixture = make_mixture(data, find_tokenizer(data), seed=7)
    assert mixture is not None
    tokens, labels, _, nothing = found["causal rows"]
    assert nothing is None
    seen = []
    for row in range(40):
        text = np.append(tokens[row], labels[row, -1])
        sample = mixture.sample(text, row)
        seen.append(sample.objective)
        back = original_text(sample, mixture.sentinels)
        np.testing.assert_array_equal(back, text[: len(back)])
        expected = (sample.tokens_S, sample.labels_S, sample.mask_S, sample.prefix)
        for mine, theirs in zip(found["mixed rows"], expected, strict=True):
            np.testing.assert_array_equal(mine[row], theirs)
        if sample.objective == "causal":
            for mine, theirs in zip(found["mixed rows"][:3], found["causal rows"][:3], strict=True):
                np.testing.assert_array_equal(mine[row], theirs[row])
    assert set(seen) == set(OBJECTIVES)
    for mine, theirs in zip(found["mixed late"], found["mixed rows"], strict=True):
        np.testing.assert_array_equal(mine, theirs[[33, 2]])
    for mine, theirs in zip(found["mixed held_out"], found["causal held_out"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


# Micro-batches of two rows: the first of each round has no prefix at all.
PREFIXES = (0, 0, 6, 16)


def _perturbed(config: RunConfig, deepspeed_config: str) -> list[np.ndarray | None]:
    """Last hidden states of student and teacher, [17, 4, S, width]: of rows as they are (0), and
    with token j changed (1 + j), for each of the prefixes. None off the last stage.
    """
    run = prepare(config, deepspeed_config)
    length = config.data.seq_length
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, VOCAB_SIZE, (1, length), generator=generator)
    variants = text.repeat(length + 1, 1)
    variants[range(1, length + 1), range(length)] += 1
    tokens_RS = (variants % VOCAB_SIZE).repeat_interleave(len(PREFIXES), dim=0)
    nothing = torch.zeros(tokens_RS.shape)
    prefix_R = torch.tensor(PREFIXES).repeat(length + 1)
    batch = Batch(tokens_RS=tokens_RS, labels_RS=tokens_RS, mask_RS=nothing, prefix_R=prefix_R)
    assert run.teacher is not None
    taught = run.teacher.hidden_states(batch.tokens_RS, batch.prefix_R)
    seen: list[torch.Tensor] = []
    for module in run.student.module.modules():
        if isinstance(module, OutputLayer):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    micro_batches = [
        run.student.scoring_batch(
            Batch(tokens_RS=tokens_RS[rows], labels_RS=tokens_RS[rows], mask_RS=nothing[rows],
                  prefix_R=prefix_R[rows])
        )
        for rows in (slice(start, start + 2) for start in range(0, len(tokens_RS), 2))
    ]  # fmt: skip
    run.student.evaluate(micro_batches)
    shape = (length + 1, len(PREFIXES), -1)
    student = torch.cat(seen, dim=1).transpose(0, 1) if seen else None
    return [
        None if x is None else x.reshape(*shape[:2], x.shape[1], x.shape[2]).numpy()
        for x in (student, taught)
    ]


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor_model": 2}, {"tensor_model": 2, "sequence": True}, {"pipeline_model": 2}],
    ids=["one", "tp2", "tp2-sp", "pp2"],
)
def test_who_sees_a_changed_token(
    sentinel_dataset: Path, causal_teacher: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    """Within the prefix in both directions, after it only what comes later; student and teacher."""
    tp, pp = layout.get("tensor_model", 1), layout.get("pipeline_model", 1)
    config = make_config(
        sentinel_dataset, tmp_path / "run", teacher__checkpoint=str(causal_teacher),
        salt__kd_steps=1, parallel__tensor_model_parallel_size=tp,
        parallel__pipeline_model_parallel_size=pp,
        parallel__sequence_parallel=layout.get("sequence", False),
    )  # fmt: skip
    last_stage = run_ranks(tp * pp, _perturbed, config, make_deepspeed(tmp_path))[-tp:]
    student = np.concatenate([result[0] for result in last_stage], axis=2)[:, :, :16]
    if layout.get("sequence"):  # each rank has its part of the sequence
        assert last_stage[0][0].shape[2] == 8
    for hidden in (student, *(result[1] for result in last_stage)):
        moved = np.abs(hidden[1:] - hidden[:1]).max(axis=-1)  # [changed token, prefix, position]
        for changed in range(16):
            for which, prefix in enumerate(PREFIXES):
                for position in range(16):
                    sees = changed <= position or changed < prefix
                    distance = moved[changed, which, position]
                    assert (distance > 1e-5) if sees else (distance < 1e-6), (
                        changed, prefix, position, distance,
                    )  # fmt: skip


def measure(
    folder: Path, dataset: Path, teacher: Path, *, model: dict[str, Any], tp: int = 1, pp: int = 1,
    dp: int = 1, sp: bool = False, zero: int = 0, recompute: str = "none",
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:  # fmt: skip
    """Metrics of 3 steps of Adam and the gradient of one of SGD, on the mixture with a teacher."""
    settings: dict[str, Any] = {
        **MIXTURE,
        "parallel__tensor_model_parallel_size": tp,
        "parallel__pipeline_model_parallel_size": pp,
        "parallel__sequence_parallel": sp,
        "parallel__recompute_granularity": recompute,
        "teacher__checkpoint": str(teacher),
        "salt__kd_weight": 0.6,
    }
    adam = make_config(
        dataset, folder / "adam", model=model, train__steps=3, salt__kd_steps=2, **settings
    )
    sgd = make_config(
        dataset, folder / "sgd", model=model, train__steps=1, salt__kd_steps=1, **settings
    )
    zero_section = {"zero_optimization": {"stage": zero}}
    adam_json = make_deepspeed(folder, **zero_section)
    sgd_json = make_deepspeed(folder, optimizer=SGD, **zero_section)
    per_rank = run_ranks(tp * pp * dp, _both, adam, adam_json, sgd, sgd_json)
    gradient = gradient_of_step(per_rank, sgd, VOCAB_SIZE)
    return metrics_of(folder / "adam")[1:], gradient


def _both(adam: RunConfig, adam_json: str, sgd: RunConfig, sgd_json: str) -> dict[str, np.ndarray]:
    run_to_end(adam, adam_json)
    return _train(sgd, sgd_json)


MODELS = {"llama": LLAMA, "gpt": GPT}


@pytest.fixture(scope="module")
def references(
    sentinel_dataset: Path, causal_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One process."""
    return {
        name: measure(
            tmp_path_factory.mktemp(name), sentinel_dataset, causal_teacher, model=model
        )
        for name, model in MODELS.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama", {"recompute": "full"}),
        ("llama", {"tp": 2, "sp": True, "recompute": "full"}),
        ("llama", {"pp": 2}),
        ("llama", {"pp": 2, "zero": 1, "recompute": "full"}),
        ("llama", {"tp": 2, "pp": 2, "sp": True}),
        ("llama", {"dp": 2, "zero": 3, "recompute": "full"}),
        ("gpt", {"tp": 2, "pp": 2, "sp": True, "zero": 1, "recompute": "full"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.items())),
)
def test_layout_computes_what_one_process_computes(
    references: dict[str, Any],
    sentinel_dataset: Path,
    causal_teacher: Path,
    tmp_path: Path,
    model: str,
    layout: dict[str, Any],
) -> None:
    records, gradient = measure(
        tmp_path, sentinel_dataset, causal_teacher, model=MODELS[model], **layout
    )
    expected_records, expected_gradient = references[model]
    for record, expected in zip(records, expected_records, strict=True):
        assert record["tokens"] == expected["tokens"]
        for key in ("loss", "ce_nats"):
            assert record[key] == pytest.approx(expected[key], rel=1e-5), (record["step"], key)
    assert records[1]["kl_nats"] == pytest.approx(expected_records[1]["kl_nats"], rel=1e-5)
    assert records[-1]["valid_ce_nats"] == pytest.approx(
        expected_records[-1]["valid_ce_nats"], rel=1e-5
    )
    for name, expected in expected_gradient.items():
        error = np.linalg.norm(gradient[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-5, f"{name}: relative gradient error {error:.2e}"


def test_steps_compared_hold_every_objective(sentinel_dataset: Path) -> None:
    """Guards the guard: the 8 rows of the first step, and different masks one after the other."""
    data = data_config(sentinel_dataset)
    mixture = make_mixture(data, find_tokenizer(data), seed=MIXTURE["train__seed"])
    assert mixture is not None
    samples = [mixture.sample(np.arange(17), row) for row in range(8)]
    assert {sample.objective for sample in samples} == set(OBJECTIVES)
    masks = [(a.prefix, b.prefix) for a, b in zip(samples[::2], samples[1::2], strict=True)]
    assert len(set(masks)) == 4


def test_resumed_run_is_bit_equal(
    sentinel_dataset: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    """At tp 2, pp 2 with recomputation; cut off in the KD phase, the switch is after the resume."""
    settings: dict[str, Any] = {
        **MIXTURE,
        "parallel__tensor_model_parallel_size": 2,
        "parallel__pipeline_model_parallel_size": 2,
        "parallel__sequence_parallel": True,
        "parallel__recompute_granularity": "full",
        "teacher__checkpoint": str(causal_teacher),
        "salt__kd_steps": 4,
        "train__steps": 6,
        "train__checkpoint_interval": 2,
        "train__keep_checkpoints": 0,
        "train__eval_interval": 2,
    }
    deepspeed_config = make_deepspeed(tmp_path, train_batch_size=4, **ZERO1)
    whole = make_config(sentinel_dataset, tmp_path / "whole", **settings)
    expected = run_ranks(4, _train, whole, deepspeed_config)
    config = make_config(sentinel_dataset, tmp_path / "run", **settings)
    cut_back(tmp_path / "whole", tmp_path / "run", 2)
    got = run_ranks(4, _train, config, deepspeed_config)
    for mine, theirs in zip(got, expected, strict=True):
        for name, weight in theirs.items():
            np.testing.assert_array_equal(mine[name], weight, err_msg=name)
    records = without_times(metrics_of(tmp_path / "run"))
    assert records == without_times(metrics_of(tmp_path / "whole"))


def test_causal_alone_changes_nothing(sentinel_dataset: Path, tmp_path: Path) -> None:
    """Written as a mixture, and with rates that nothing uses, it is bit for bit the default."""
    deepspeed_config = make_deepspeed(tmp_path)
    spelt = {**MIXTURE, "data__objective": ["2.0", "causal"]}
    seed = {"train__seed": MIXTURE["train__seed"]}
    results = [
        run_ranks(1, _train, make_config(
            sentinel_dataset, tmp_path / name, train__steps=2, **settings), deepspeed_config)[0]
        for name, settings in (("default", seed), ("spelt", spelt), ("mixed", MIXTURE))
    ]  # fmt: skip
    for name, weight in results[0].items():
        np.testing.assert_array_equal(results[1][name], weight, err_msg=name)
    assert any((results[2][name] != weight).any() for name, weight in results[0].items())


def test_student_that_equals_its_teacher_learns_nothing(
    sentinel_dataset: Path, tmp_path: Path
) -> None:
    """Only if the teacher reads the same prefixes as the student is the KL exactly 0."""
    still = make_deepspeed(tmp_path, optimizer={"type": "SGD", "params": {"lr": 0.0}})
    teacher = make_config(sentinel_dataset, tmp_path / "teacher", train__steps=1, **MIXTURE)
    run_ranks(1, _train, teacher, still)
    config = make_config(
        sentinel_dataset, tmp_path / "student", train__steps=2, salt__kd_steps=2,
        salt__kd_weight=1.0, teacher__checkpoint=str(tmp_path / "teacher"), **MIXTURE,
    )  # fmt: skip
    run_ranks(1, _train, config, still)
    assert [record["kl_nats"] for record in metrics_of(tmp_path / "student")[1:]] == [0.0, 0.0]


def _prepare(config: RunConfig, deepspeed_config: str) -> None:
    prepare(config, deepspeed_config)


def test_resume_with_another_objective_is_refused(sentinel_dataset: Path, tmp_path: Path) -> None:
    deepspeed_config = make_deepspeed(tmp_path)

    def config(**changes: Any) -> RunConfig:
        settings = {"train__steps": 2, **MIXTURE, **changes}
        return make_config(sentinel_dataset, tmp_path / "run", **settings)

    run_ranks(1, _train, config(train__steps=1), deepspeed_config)
    for changes, words in (
        ({"data__objective": ["causal"]}, ["data.objective: 1 causal", "0.4 prefix"]),
        ({"data__objective": ["0.4", "causal", "0.3", "prefix", "0.3", "span_corruption"]},
         ["0.4 causal, 0.3 prefix"]),
        ({"data__span_corruption_rate": 0.3}, ["data.span_corruption_rate = 0.3", "= 0.4"]),
        ({"data__span_mean_length": 2.0}, ["data.span_mean_length = 2.0", "= 1.5"]),
    ):  # fmt: skip
        with pytest.raises(RankError) as caught:
            run_ranks(1, _prepare, config(**changes), deepspeed_config)
        assert all(word in caught.value.message for word in words), caught.value.message
    same = ["6", "span_corruption", "6", "causal", "8", "prefix"]
    run_ranks(1, _train, config(data__objective=same), deepspeed_config)


def test_tokenizer_without_sentinels_is_refused_before_the_start(
    dataset: Path, sentinel_dataset: Path, tmp_path: Path
) -> None:
    config = make_config(dataset, tmp_path / "run", **MIXTURE)
    deepspeed_config = make_deepspeed(tmp_path)
    with pytest.raises(RankError) as caught:
        run_ranks(1, _prepare, config, deepspeed_config)
    with pytest.raises(ValueError) as dry:
        describe_run(config, deepspeed_config)
    for message in (caught.value.message, str(dry.value)):
        assert "needs 4 sentinels" in message and "has 0" in message
        assert "tokenizer.model" in message and "--sentinels 4" in message
    assert not (tmp_path / "run" / "index_cache").exists()
    lines = describe_run(
        make_config(sentinel_dataset, tmp_path / "run", **MIXTURE), deepspeed_config
    )
    assert "objective: 30.0% causal, 40.0% prefix, 30.0% span_corruption" in lines
    assert "reads 10 of its 17 tokens and predicts 4 of them in 3 spans" in lines


def test_teacher_that_never_read_a_prefix_is_warned_of(
    sentinel_dataset: Path, causal_teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deepspeed_config = make_deepspeed(tmp_path)
    teaching = {"teacher__checkpoint": str(causal_teacher), "salt__kd_steps": 1}
    config = make_config(
        sentinel_dataset, tmp_path / "run", train__steps=1, **teaching, **MIXTURE
    )  # fmt: skip
    run_ranks(1, _train, config, deepspeed_config)
    warning = "never read a prefix in both directions"
    assert warning in capfd.readouterr().err
    assert f"WARNING teacher {causal_teacher}" in describe_run(config, deepspeed_config)
    causal = make_config(sentinel_dataset, tmp_path / "causal", **teaching)
    assert "WARNING" not in describe_run(causal, deepspeed_config)
    taught = {**teaching, "teacher__checkpoint": str(tmp_path / "run")}
    of_mixture = make_config(sentinel_dataset, tmp_path / "next", **taught, **MIXTURE)
    assert "WARNING" not in describe_run(of_mixture, deepspeed_config)
    manifest = read_checkpoint_manifest(list_checkpoints(tmp_path / "run")[-1])
    model = dataclasses.replace(manifest.model, objective=["prefix"])
    saw_none = dataclasses.replace(manifest, model=model)
    assert "never saw sentinels" in unseen_objectives(tmp_path, saw_none, config)[0]
    prefix_only = dataclasses.replace(config.data, objective=[TextOrNumber("prefix")])
    alike = dataclasses.replace(config, data=prefix_only)
    assert unseen_objectives(tmp_path, saw_none, alike) == []
