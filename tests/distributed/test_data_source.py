"""The rows of a run: every sample once an epoch, the same whoever asks and however long the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from ranks import run_ranks

from megatron_salt.config.fields import DataConfig
from megatron_salt.config.values import parse_blend
from megatron_salt.data.dataset import DataSource, find_tokenizer
from megatron_salt.data.manifest import tokenizer_directory
from megatron_salt.data.order import rows_of_rank
from megatron_salt.parallel.groups import initialize


def make_source(data: DataConfig, cache: Path, *, num_samples: int, seed: int = 7) -> DataSource:
    tokenizer = find_tokenizer(data)
    return DataSource(data, tokenizer, num_samples=num_samples, seed=seed, cache_path=cache)


def _read(data: DataConfig, cache: Path, num_samples: int, rows: Any, seed: int = 7) -> Any:
    initialize(1, 1, 5.0)
    source = make_source(data, cache, num_samples=num_samples, seed=seed)
    batch = source.read(list(rows))
    return {
        "tokens": batch.tokens_RS.numpy(),
        "labels": batch.labels_RS.numpy(),
        "mask": batch.mask_RS.numpy(),
        "per_epoch": [part.samples_per_epoch for part in source.parts],
        "held_out": source.num_held_out(),
    }


@pytest.fixture
def data(dataset: Path) -> DataConfig:
    return DataConfig(train_data_path=[str(dataset)], split="90,10", seq_length=32)


def test_each_epoch_reads_every_sample_once(dataset: Path, tmp_path: Path) -> None:
    # Ids drawn at random: in real text two samples may well be equal.
    prefix, draw = tmp_path / "drawn", np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in draw.integers(20, 200, size=60).tolist():
        builder.add_document(torch.from_numpy(draw.integers(3, 509, size=length)), [length])
    builder.finalize(f"{prefix}.idx")
    data = DataConfig(
        train_data_path=[str(prefix)], split="90,10", seq_length=32,
        tokenizer=str(tokenizer_directory(dataset)),
    )  # fmt: skip
    first = run_ranks(1, _read, data, tmp_path, 1, range(1))[0]
    n = first["per_epoch"][0]
    assert n > 50
    got = run_ranks(1, _read, data, tmp_path, 2 * n, range(2 * n))[0]
    epochs = [[row.tobytes() for row in got["tokens"][e * n : (e + 1) * n]] for e in (0, 1)]
    assert len(set(epochs[0])) == n and len(set(epochs[1])) == n
    assert epochs[0] != epochs[1]  # shuffled anew
    tokens = [np.sort(got["tokens"][e * n : (e + 1) * n].ravel()) for e in (0, 1)]
    # An epoch leaves out fewer tokens than one sequence holds, so the counts nearly agree.
    assert np.abs(np.bincount(tokens[0]) - np.bincount(tokens[1], minlength=tokens[0].max() + 1)
                  ).sum() < 2 * 2 * 33  # fmt: skip


def test_labels_are_the_next_tokens(data: DataConfig, tmp_path: Path) -> None:
    got = run_ranks(1, _read, data, tmp_path, 20, range(20))[0]
    np.testing.assert_array_equal(got["tokens"][:, 1:], got["labels"][:, :-1])
    assert (got["mask"] == 1).all()


def test_order_does_not_depend_on_the_length_of_the_run(data: DataConfig, tmp_path: Path) -> None:
    short = run_ranks(1, _read, data, tmp_path / "a", 10, range(10))[0]
    long = run_ranks(1, _read, data, tmp_path / "b", 900, range(10))[0]
    np.testing.assert_array_equal(short["tokens"], long["tokens"])
    other = run_ranks(1, _read, data, tmp_path / "c", 10, range(10), 8)[0]
    assert (other["tokens"] != short["tokens"]).any()


def _rows_of_two_ranks(data: DataConfig, cache: Path) -> Any:
    groups = initialize(1, 1, 5.0)
    source = make_source(data, cache, num_samples=64)
    rows = rows_of_rank(3, 8, groups.dp_rank, groups.layout.dp_size)
    return source.read(rows).tokens_RS.numpy()


def test_ranks_share_the_rows_of_a_step(data: DataConfig, tmp_path: Path) -> None:
    parts = run_ranks(2, _rows_of_two_ranks, data, tmp_path / "two")
    whole = run_ranks(1, _read, data, tmp_path / "one", 64, range(24, 32))[0]
    np.testing.assert_array_equal(np.concatenate(parts), whole["tokens"])


def test_blend_keeps_its_shares_at_every_point(data: DataConfig, tmp_path: Path) -> None:
    prefix = data.train_data_path[0]
    for suffix in (".bin", ".idx"):
        (tmp_path / f"copy{suffix}").write_bytes(Path(prefix + suffix).read_bytes())
    blended = dataclasses.replace(
        data, train_data_path=["3", prefix, "1", str(tmp_path / "copy")], tokenizer=None
    )
    got = run_ranks(1, _blend_shares, blended, tmp_path / "cache", 400)[0]
    counts = np.cumsum(np.asarray(got["which"]) == 0)
    assert np.abs(counts - 0.75 * np.arange(1, 401)).max() <= 1.0
    longer = run_ranks(1, _blend_shares, blended, tmp_path / "other", 800)[0]
    assert longer["which"][:400] == got["which"]
    np.testing.assert_array_equal(longer["tokens"][:50], got["tokens"][:50])


def test_ranks_wait_for_the_index_of_a_blend(data: DataConfig, tmp_path: Path) -> None:
    """On a cold cache rank 0 writes; nobody may read what is not there yet."""
    prefix = data.train_data_path[0]
    blended = dataclasses.replace(data, train_data_path=["3", prefix, "1", prefix])
    first, second = run_ranks(2, _blend_shares, blended, tmp_path / "cold", 3000)
    assert first["which"] == second["which"]


def _blend_shares(data: DataConfig, cache: Path, num_samples: int) -> Any:
    initialize(1, 1, 5.0)
    source = make_source(data, cache, num_samples=num_samples)
    which = [int(source.train[row]["dataset_id"]) for row in range(num_samples)]
    return {"which": which, "tokens": source.read(range(50)).tokens_RS.numpy()}


def _new_data_under_an_old_name(data: DataConfig, cache: Path) -> tuple[int, int]:
    initialize(1, 1, 5.0)
    before = make_source(data, cache, num_samples=8).parts[0].samples_per_epoch
    prefix = data.train_data_path[0]
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(60):
        builder.add_document(torch.full((50,), 5), [50])
    builder.finalize(f"{prefix}.idx")
    source = make_source(data, cache, num_samples=8)
    assert (source.read(range(8)).tokens_RS == 5).all()
    return before, source.parts[0].samples_per_epoch


def test_new_data_does_not_meet_an_old_index(data: DataConfig, tmp_path: Path) -> None:
    prefix = data.train_data_path[0]
    for suffix in (".bin", ".idx"):
        (tmp_path / f"mine{suffix}").write_bytes(Path(prefix + suffix).read_bytes())
    mine = dataclasses.replace(
        data, train_data_path=[str(tmp_path / "mine")], tokenizer=f"{prefix}.tokenizer"
    )
    before, after = run_ranks(1, _new_data_under_an_old_name, mine, tmp_path / "cache")[0]
    assert before != after


def test_eod_mask(data: DataConfig, tmp_path: Path) -> None:
    masked = dataclasses.replace(data, eod_mask_loss=True)
    got = run_ranks(1, _read, masked, tmp_path, 30, range(30))[0]
    eod = find_tokenizer(data).eod
    np.testing.assert_array_equal(got["mask"], (got["tokens"] != eod).astype(np.float32))
    assert (got["mask"] == 0).any()


def test_blend_forms() -> None:
    assert parse_blend(["a"], "data.train_data_path") == (["a"], [1.0])
    assert parse_blend(["2", "a", "1", "b"], "x") == (["a", "b"], [2.0, 1.0])
    for wrong in (["a", "b"], ["1", "a", "2"], ["0", "a", "1", "b"]):
        with pytest.raises(ValueError, match=r"data\.train_data_path"):
            parse_blend(wrong, "data.train_data_path")
