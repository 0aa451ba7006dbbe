"""What is wrong is said in one message that names the file or setting, before training starts."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited import edit_manifest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from ranks import RankError, run_ranks, run_ranks_to_the_end
from safetensors.torch import load_file, save_file
from tiny import make_config, make_deepspeed, metrics_of, run_to_end

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest, verify_hashes
from megatron_salt.config.fields import DataConfig
from megatron_salt.corpus.train_tokenizer import train_tokenizer
from megatron_salt.data.dataset import DataSource, find_tokenizer
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.evaluation.checkpoint_score import ScoreRequest, score_checkpoint
from megatron_salt.parallel.groups import initialize
from megatron_salt.training.resume import lock_output_dir
from megatron_salt.training.run import prepare, train

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def _prepare(config: Any, deepspeed_config: str) -> None:
    prepare(config, deepspeed_config)


def _train(config: Any, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


@pytest.fixture
def fails(tmp_path: Path) -> Callable[..., str]:
    """Prepare a run that must fail on every rank; returns the message of the first."""

    def attempt(world_size: int, dataset: Path, **settings: Any) -> str:
        deepspeed = settings.pop("deepspeed", {})
        config = make_config(dataset, tmp_path / "run", **settings)
        with pytest.raises(RankError) as caught:
            run_ranks(world_size, _prepare, config, make_deepspeed(tmp_path, **deepspeed))
        assert caught.value.kind in ("ValueError", "FileNotFoundError", "FailedElsewhere")
        return caught.value.message

    return attempt


def copy_dataset(dataset: Path, folder: Path) -> Path:
    for path in dataset.parent.glob(dataset.name + ".*"):
        target = folder / path.name
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    return folder / dataset.name


def copy_checkpoint(teacher: Path, folder: Path) -> Path:
    return Path(shutil.copytree(list_checkpoints(teacher)[-1], folder / "teacher"))


def rewrite_weights(
    checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Change the weights of a one-rank checkpoint and make its manifest agree again."""
    file = next((checkpoint / "weights").iterdir())
    save_file(change(load_file(file)), file)
    edit_manifest(checkpoint)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_truncated_data(
    dataset: Path, tmp_path: Path, fails: Callable[..., str], suffix: str
) -> None:
    broken = copy_dataset(dataset, tmp_path)
    file = Path(f"{broken}{suffix}")
    file.write_bytes(file.read_bytes()[:-10])
    message = fails(1, broken)
    assert f"{broken.name}{suffix}" in message
    file.unlink()
    message = fails(1, broken)
    assert f"{broken.name}{suffix}" in message and "missing" in message


def test_other_tokenizer_shows_the_first_differing_tokens(
    dataset: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    texts = [f"entirely different words, number {n}, said {n * n} times" for n in range(300)]
    train_tokenizer(texts, tmp_path / "other.model", vocab_size=330)
    message = fails(1, dataset, data__tokenizer=str(tmp_path / "other.model"))
    assert "330" in message and "509" in message
    assert "id " in message or "token" in message


def test_no_tokenizer_anywhere(dataset: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    bare = copy_dataset(dataset, tmp_path)
    shutil.rmtree(f"{bare}.tokenizer")
    assert "data.tokenizer is not set" in fails(1, bare)


def test_sequences_longer_than_the_held_out_text(dataset: Path, fails: Callable[..., str]) -> None:
    message = fails(1, dataset, data__split="999999,1")
    assert "held-out" in message and "data.split" in message


def test_teacher_path(dataset: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    message = fails(1, dataset, teacher__checkpoint=str(tmp_path / "nowhere"), salt__kd_steps=2)
    assert "teacher.checkpoint" in message and "does not exist" in message


def test_teacher_of_zeros(
    dataset: Path, teacher: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    checkpoint = copy_checkpoint(teacher, tmp_path)
    name = "layers.1.mlp.linear_fc2.weight"
    rewrite_weights(checkpoint, lambda w: {**w, name: torch.zeros_like(w[name])})
    message = fails(1, dataset, teacher__checkpoint=str(checkpoint), salt__kd_steps=2)
    assert name in message and "all zeros" in message


def _score(path: str, data: list[str] | None) -> dict[str, Any]:
    request = ScoreRequest(
        data=data, split=None, samples=4, seq_length=None, micro_batch_size=2, precision=None
    )
    return score_checkpoint(path, request, initialize(1, 1, 5.0))


def test_model_without_its_run_teaches_and_is_scored_but_not_resumed(
    dataset: Path, teacher: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """What a converted model is: weights, tokenizer and what the model says about itself."""
    checkpoint = copy_checkpoint(teacher, tmp_path)
    whole = run_ranks(1, _score, str(checkpoint), [str(dataset)])[0]
    edit_manifest(checkpoint, lambda values: values.update(training=None))
    assert run_ranks(1, _score, str(checkpoint), [str(dataset)])[0] == whole
    with pytest.raises(RankError, match="holds a model without its run: .* on data that is named"):
        run_ranks(1, _score, str(checkpoint), None)
    message = fails(1, dataset, train__resume=str(checkpoint))
    assert "without its run" in message and "not be resumed" in message
    config = make_config(
        dataset, tmp_path / "taught", teacher__checkpoint=str(checkpoint), salt__kd_steps=1,
        train__steps=2, parallel__tensor_model_parallel_size=2,
    )  # fmt: skip
    run_ranks(2, _train, config, make_deepspeed(tmp_path))
    assert metrics_of(tmp_path / "taught")[1]["kl_nats"] > 0


def test_teacher_with_a_missing_weight_fails_on_every_rank(
    dataset: Path, teacher: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    checkpoint = copy_checkpoint(teacher, tmp_path)
    name = "layers.0.mlp.linear_fc1.weight"
    rewrite_weights(checkpoint, lambda w: {k: v for k, v in w.items() if k != name})
    settings = {"teacher__checkpoint": str(checkpoint), "salt__kd_steps": 2}
    message = fails(2, dataset, parallel__tensor_model_parallel_size=2, **settings)
    assert name in message


def test_teacher_whose_weights_are_not_those_it_was_saved_with(
    dataset: Path, teacher: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """All there, no zeros, right shapes, another model: only its held-out CE gives it away."""
    checkpoint = copy_checkpoint(teacher, tmp_path)
    rewrite_weights(checkpoint, lambda w: {**w, "output_layer.weight": -w["output_layer.weight"]})
    message = fails(1, dataset, teacher__checkpoint=str(checkpoint), salt__kd_steps=2)
    assert "max_valid_ce_gap_nats" in message


def test_teacher_of_another_vocabulary(
    dataset: Path, teacher: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    checkpoint = copy_checkpoint(teacher, tmp_path)
    texts = [f"entirely different words, number {n}, said {n * n} times" for n in range(300)]
    train_tokenizer(texts, checkpoint / "tokenizer" / "tokenizer.model", vocab_size=330)
    edit_manifest(checkpoint)
    message = fails(1, dataset, teacher__checkpoint=str(checkpoint), salt__kd_steps=2)
    assert "teacher" in message and "330" in message and "509" in message


def test_sequences_longer_than_the_teachers(
    dataset: Path, teacher: Path, fails: Callable[..., str]
) -> None:
    settings = {"teacher__checkpoint": str(teacher), "salt__kd_steps": 2, "data__seq_length": 32}
    message = fails(1, dataset, **settings)
    assert "sequences of 16 tokens" in message and "data.seq_length is 32" in message


def _train_until_a_gradient_explodes(config: Any, deepspeed_config: str, explodes_at: int) -> None:
    run = prepare(config, deepspeed_config)
    for step in range(explodes_at):
        run.step(step)
    run.first_step = explodes_at
    parameter = next(iter(run.student.module.parameters()))
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    train(run)


@pytest.mark.parametrize(
    ("pp", "deepspeed"),
    [
        (1, {}),
        (2, {}),
        (1, {"zero_optimization": {"stage": 1}, **BF16}),
        (2, {"zero_optimization": {"stage": 1}, **BF16}),
        (1, {"zero_optimization": {"stage": 2}}),
        (1, {"zero_optimization": {"stage": 3}}),
    ],
    ids=["fp32", "fp32-pp2", "bf16-zero1", "bf16-zero1-pp2", "zero2", "zero3"],
)
def test_exploding_gradient_stops_the_run_before_it_is_saved(
    dataset: Path, tmp_path: Path, pp: int, deepspeed: dict[str, Any]
) -> None:
    """The loss is still finite: only the gradient tells, and DeepSpeed would skip or apply it."""
    settings = {"train__checkpoint_interval": 1, "train__steps": 4}
    config = make_config(
        dataset, tmp_path / "run", parallel__pipeline_model_parallel_size=pp, **settings
    )
    deepspeed_config = make_deepspeed(tmp_path, **deepspeed)
    with pytest.raises(RankError, match="stopping instead of training on"):
        run_ranks(pp, _train_until_a_gradient_explodes, config, deepspeed_config, 2)
    assert list_checkpoints(tmp_path / "run")[-1].name == "step_00000002"


def test_world_size_that_does_not_fit(dataset: Path, fails: Callable[..., str]) -> None:
    message = fails(3, dataset, parallel__tensor_model_parallel_size=2)
    assert "world size 3" in message and "tensor_model_parallel_size = 2" in message


def test_batch_that_does_not_divide(dataset: Path, fails: Callable[..., str]) -> None:
    message = fails(1, dataset, deepspeed={"train_micro_batch_size_per_gpu": 3})
    assert "train_batch_size = 8" in message and "train_micro_batch_size_per_gpu = 3" in message


def test_what_deepspeed_refuses_is_named_with_the_file(
    dataset: Path, fails: Callable[..., str]
) -> None:
    message = fails(1, dataset, deepspeed={"zero_optimization": {"stage": 1, "stagee": 2}})
    assert "/ds_" in message and "DeepSpeed refuses it" in message and "stagee" in message


def test_output_dir_with_checkpoints_is_not_overwritten(
    dataset: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    config = make_config(dataset, tmp_path / "run", train__steps=1)
    run_ranks(1, _train, config, make_deepspeed(tmp_path))
    before = metrics_of(tmp_path / "run")
    assert "train.resume" in fails(1, dataset, train__resume="none")
    assert metrics_of(tmp_path / "run") == before


def test_output_dir_of_a_living_run_is_refused(
    dataset: Path,
    tmp_path: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_salt.training.resume.LOCK_WAIT_S", 0.0)
    with lock_output_dir(str(tmp_path / "run"), print):
        assert "in use by another run" in fails(1, dataset)
    config = make_config(dataset, tmp_path / "run", train__steps=1)
    run_ranks(1, _train, config, make_deepspeed(tmp_path))  # free again


def test_resume_in_another_precision(
    dataset: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    zero_1 = {"zero_optimization": {"stage": 1}}
    config = make_config(dataset, tmp_path / "run", train__steps=1)
    run_ranks(1, _train, config, make_deepspeed(tmp_path, **zero_1))
    assert "precision" in fails(1, dataset, deepspeed={**zero_1, "fp16": {"enabled": True}})


def test_resume_with_another_batch_optimizer_or_data(
    dataset: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    config = make_config(dataset, tmp_path / "run", train__steps=2)
    run_ranks(1, _train, config, make_deepspeed(tmp_path))
    assert "train_batch_size = 16" in fails(1, dataset, deepspeed={"train_batch_size": 16})
    assert "train.seed" in fails(1, dataset, train__seed=7)
    assert "data.split" in fails(1, dataset, data__split="80,20")
    assert "training documents" in fails(1, dataset, data__valid_data_path=[str(dataset)])
    other = {"type": "SGD", "params": {"lr": 0.1}}
    assert "optimizer (type, amsgrad) = ('sgd'" in fails(1, dataset, deepspeed={"optimizer": other})
    assert "blend weights" in fails(
        1, dataset, data__train_data_path=["0.5", str(dataset), "0.5", str(dataset)]
    )
    moved = copy_dataset(dataset, tmp_path)
    manifest = Path(f"{moved}.manifest.json")
    manifest.write_text(manifest.read_text().replace('"bin_sha256": "', '"bin_sha256": "0'))
    assert "other data" in fails(1, moved)


def _truncated(checkpoint: Path) -> None:
    file = next((checkpoint / "weights").iterdir())
    file.write_bytes(file.read_bytes()[:-1])


def _flipped(name: str) -> Callable[[Path], None]:
    def flip(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return flip


def _without_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


# What headers and sizes show, what only hashes show, and the manifest itself.
@pytest.mark.parametrize(
    "damage",
    [_truncated, _without_manifest, _flipped("optimizer/rank_00000.safetensors"),
     _flipped("deepspeed.json"), _flipped("manifest.json")],
    ids=["truncated", "no manifest", "state", "settings", "manifest"],
)  # fmt: skip
def test_damaged_checkpoint_is_passed_over_or_refused(
    dataset: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    deepspeed_config = make_deepspeed(tmp_path)
    settings = {"train__checkpoint_interval": 1, "train__steps": 2}
    config = make_config(dataset, tmp_path / "run", **settings)
    run_ranks(1, _train, config, deepspeed_config)
    newest = list_checkpoints(tmp_path / "run")[-1]
    damage(newest)
    named = make_config(dataset, tmp_path / "run", train__resume=str(newest), train__steps=3)
    with pytest.raises(RankError, match="damaged|holds no complete checkpoint"):
        run_ranks(1, _prepare, named, deepspeed_config)
    auto = make_config(dataset, tmp_path / "run", train__steps=3, train__keep_checkpoints=1)
    run_ranks(1, _train, auto, deepspeed_config)
    # The damaged one is kept, out of the way: it is neither resumed from nor counted as a newest.
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000003"]
    assert (newest.parent / f"damaged_{newest.name}").is_dir()
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_changed_byte_is_found_by_its_hash(teacher: Path, tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(teacher, tmp_path)
    file = next((checkpoint / "weights").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    manifest = read_checkpoint_manifest(checkpoint)  # sizes are as they were
    with pytest.raises(ValueError, match=file.name):
        verify_hashes(checkpoint, manifest, [f"weights/{file.name}"])


def _train_with_small_files(config: Any, deepspeed_config: str, limit_bytes: int) -> None:
    """No file can grow beyond the limit: writing fails as it does on a full disk."""
    run = prepare(config, deepspeed_config)
    run.step(run.first_step)
    run.saver.drain()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    run.step(run.first_step + 1)
    run.saver.drain()


@pytest.mark.parametrize("limit_bytes", [60_000, 200_000])  # in weights, in the optimizer's state
def test_failed_save_leaves_the_last_checkpoint(
    dataset: Path, tmp_path: Path, limit_bytes: int
) -> None:
    settings = {"train__checkpoint_interval": 1, "train__steps": 2, "train__keep_checkpoints": 1}
    config = make_config(dataset, tmp_path / "run", **settings)
    deepspeed_config = make_deepspeed(tmp_path)
    with pytest.raises(RankError, match=r"step_00000002.partial cannot be written: .*bytes free"):
        run_ranks(1, _train_with_small_files, config, deepspeed_config, limit_bytes)
    left = list_checkpoints(tmp_path / "run")
    assert [path.name for path in left] == ["step_00000001"]
    manifest = read_checkpoint_manifest(left[0])
    verify_hashes(left[0], manifest, list(manifest.files))
    run_ranks(1, _train, config, deepspeed_config)  # and it resumes
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == [0, 1, 2]


def test_trains_on_a_dataset_of_megatron_core(dataset: Path, tmp_path: Path) -> None:
    """No manifest and no tokenizer beside it: what Megatron-LM's own preprocessing leaves."""
    prefix = tmp_path / "foreign_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(509))
    generator = np.random.default_rng(0)
    for _ in range(40):
        tokens = torch.from_numpy(generator.integers(3, 509, size=100))
        builder.add_document(tokens, [100])
    builder.finalize(f"{prefix}.idx")
    config = make_config(
        prefix, tmp_path / "run", train__steps=1, data__tokenizer=f"{dataset}.tokenizer"
    )
    run_ranks(1, _train, config, make_deepspeed(tmp_path))
    assert metrics_of(tmp_path / "run")[1]["tokens"] == 8 * 16


def damage(prefix: Path, places: slice, number: int, dtype: Any = np.uint16) -> None:
    ids = np.fromfile(f"{prefix}.bin", dtype=dtype)
    ids[places] = number
    ids.tofile(f"{prefix}.bin")


def make_dataset(prefix: Path, dtype: Any) -> Path:
    """40 documents of 100 ids, all known, and no manifest."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    generator = np.random.default_rng(0)
    for _ in range(40):
        builder.add_document(torch.from_numpy(generator.integers(3, 509, size=100)), [100])
    builder.finalize(f"{prefix}.idx")
    return prefix


def source_of(tokenizer: str, cache: Path, **settings: Any) -> DataSource:
    data = DataConfig(tokenizer=tokenizer, seq_length=16, **{"split": "90,10", **settings})
    return DataSource(data, load_tokenizer(tokenizer), num_samples=64, seed=1, cache_path=cache)


def _meet_unknown_ids(tokenizer: str, tmp_path: Path, number: int) -> None:
    initialize(1, 1, 5.0)
    names = [make_dataset(tmp_path / name, np.int32) for name in ("one", "two")]
    blend = {"train_data_path": ["0.5", str(names[0]), "0.5", str(names[1])]}
    source = source_of(tokenizer, tmp_path / "cache", **blend)
    rows = list(range(64))
    before = source.read(rows)
    assert source.read_held_out([*range(20), -1]).tokens_RS.max() < 509
    of_two = [row for row in rows if source.train.dataset_index[row] == 1]
    assert 0 < len(of_two) < 64
    damage(names[1], slice(None), number, np.int32)
    source = source_of(tokenizer, tmp_path / "cache_2", **blend)
    some = [row for row in rows if row not in of_two]
    assert torch.equal(source.read(some).tokens_RS, before.tokens_RS[some])
    with pytest.raises(ValueError) as error:
        source.read([*some[:3], of_two[5], of_two[6]])
    found = f"{names[1]}.bin: training row {of_two[5]} holds id {number} at position 0, "
    assert str(error.value).startswith(found) and "has 509 tokens" in str(error.value)
    held_out = source_of(tokenizer, tmp_path / "cache_2", train_data_path=[str(names[0])],
                         valid_data_path=[str(name) for name in names])  # fmt: skip
    held_out.read_held_out([0, -1, 2, 4])
    with pytest.raises(ValueError, match=rf"two\.bin: held-out row 7 holds id {number} at posi"):
        held_out.read_held_out([2, 7])


@pytest.mark.parametrize("number", [509, 2**31 - 1, -1, -(2**31)])
def test_id_beyond_the_vocabulary_is_named_with_its_dataset_and_row(
    dataset: Path, tmp_path: Path, number: int
) -> None:
    """-1 too, which megatron-core would make token 0 without loss if padding were -1."""
    run_ranks(1, _meet_unknown_ids, f"{dataset}.tokenizer", tmp_path, number)


def test_last_label_of_a_row_is_looked_at(dataset: Path, tmp_path: Path) -> None:
    """It is the one id of a row that is no input; and an objective does not hide it."""
    prefix = make_dataset(tmp_path / "text", np.uint16)
    for objective in ("causal", "prefix"):
        source = source_of(
            f"{dataset}.tokenizer", tmp_path / "cache", train_data_path=[str(prefix)],
            objective=[objective],
        )  # fmt: skip
        batch = source.read([0])
        batch.labels_RS[0, -1] = 509
        source.train = [{"tokens": batch.tokens_RS[0], "labels": batch.labels_RS[0],
                         "loss_mask": batch.mask_RS[0]}]  # fmt: skip
        with pytest.raises(ValueError, match="training row 0 holds id 509 at position 16,"):
            source.read([0])


def _train_in_time(config: Any, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_id_beyond_the_vocabulary_ends_all_ranks(
    dataset: Path, tmp_path: Path, tp: int, pp: int, dp: int
) -> None:
    """Met by the last replica in step 3; a collective would wait 30 minutes for it."""
    prefix = copy_dataset(dataset, tmp_path)
    Path(f"{prefix}.manifest.json").unlink()  # or its hash of samples would find it at the start
    config = make_config(
        prefix, tmp_path / "run", parallel__tensor_model_parallel_size=tp,
        parallel__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    row = 3 * 8 + 7
    source = DataSource(config.data, find_tokenizer(config.data), num_samples=40,
                        seed=config.train.seed, cache_path=tmp_path / "cache")  # fmt: skip
    wanted = source.read([row]).tokens_RS[0].numpy()
    ids = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    start = next(at for at in range(len(ids)) if (ids[at : at + 16] == wanted).all())
    damage(prefix, slice(start + 5, start + 6), 509)
    results = run_ranks_to_the_end(
        tp * pp * dp, 60.0, _train_in_time, config, make_deepspeed(tmp_path)
    )
    found = f"{prefix}.bin: training row {row} holds id 509 at position 5, "
    for rank, result in enumerate(results):
        assert isinstance(result, RankError)
        reads_it = rank // tp % dp == dp - 1
        assert (result.kind == "ValueError" and result.message.startswith(found)) == reads_it
    assert len(metrics_of(tmp_path / "run")) == 1 + 3, "step 0 and three whole steps"
