"""megatron-core's index files are what was written, and never a pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_salt.config.fields import DataConfig
from megatron_salt.data import index_cache
from megatron_salt.data.dataset import DataSource
from megatron_salt.data.tokenizer import load_tokenizer


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def tokens(dataset: Path, cache: Path) -> list[list[int]]:
    data = DataConfig(train_data_path=[str(dataset)], split="90,10", seq_length=16)  # type: ignore[list-item]
    tokenizer = load_tokenizer(f"{dataset}.tokenizer")
    source = DataSource(data, tokenizer, num_samples=8, seed=1, cache_path=cache)
    return source.read(range(8)).tokens_RS.tolist()


@pytest.mark.parametrize("which", ["document", "sample", "shuffle"])
def test_damage_of_the_right_size_is_found(dataset: Path, tmp_path: Path, which: str) -> None:
    first = tokens(dataset, tmp_path)
    assert tokens(dataset, tmp_path) == first
    for path in tmp_path.glob(f"*/*-train-{which}_index.npy"):
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match=rf"{which}_index\.npy: its content.*delete the folder"):
        tokens(dataset, tmp_path)


def test_a_file_that_is_gone_is_missed(dataset: Path, tmp_path: Path) -> None:
    tokens(dataset, tmp_path)
    next(tmp_path.glob("*/*-train-shuffle_index.npy")).unlink()
    with pytest.raises(ValueError, match=r"shuffle_index\.npy: its content"):
        tokens(dataset, tmp_path)


@pytest.mark.parametrize("planted", ["pickle", "zeros", "link"])
def test_files_without_hashes_are_made_again(dataset: Path, tmp_path: Path, planted: str) -> None:
    """Those of a start that was killed, or of somebody else."""
    cache, marker = tmp_path / "cache", tmp_path / "ran"
    first = tokens(dataset, cache)
    (tmp_path / "kept").write_text("mine")
    for path in cache.glob("*/*.sha256.json"):
        path.unlink()
    for path in cache.glob("*/*.npy"):
        size = path.stat().st_size
        path.unlink()
        if planted == "link":
            path.symlink_to(tmp_path / "kept")
        else:
            path.write_bytes(pickle.dumps(Payload(marker)) if planted == "pickle" else bytes(size))
    assert tokens(dataset, cache) == first and not marker.exists()
    assert (tmp_path / "kept").read_text() == "mine"
    assert tokens(dataset, cache) == first


def test_pickles_are_refused_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the hashes say; ranks other than the first do not read them."""
    marker, opened = tmp_path / "ran", []
    forms = [pickle.dumps(Payload(marker))]
    objects = np.array([Payload(marker)], dtype=object)
    for name, save in (("o.npy", np.save), ("o.npz", np.savez)):
        save(tmp_path / name, objects)
        forms.append((tmp_path / name).read_bytes())
    monkeypatch.setattr(index_cache.dist, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(index_cache.dist, "get_rank", lambda rank=rank: rank)
        for form in forms:
            path = tmp_path / "key-a_index.npy"
            path.write_bytes(form)
            (tmp_path / "key.sha256.json").write_text(
                f'{{"{path.name}": "{index_cache.sha256_of(path)}"}}'
            )
            with pytest.raises(ValueError, match=r"key-a_index\.npy: not an array of numbers"):
                index_cache._checked(tmp_path, "key", lambda: opened.append(1))
    assert not opened and not marker.exists()
