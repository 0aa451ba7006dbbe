"""Parts of shards from files that were cut otherwise; the optimizer's fragments and their index."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import MODEL, TABLE, V, cuts, manifest_of, numbered, record, stored_optimizer
from torch import Tensor

from megatron_salt.checkpoint.optimizer import (
    OPTIMIZER_INDEX,
    StoredOptimizer,
    optimizer_file,
    write_optimizer_index,
)
from megatron_salt.checkpoint.shards import WHOLE, read_range
from megatron_salt.checkpoint.weights import WeightFiles, write_weights
from megatron_salt.files.disk import save_tensors
from megatron_salt.model.weights import as_matrix, padded_vocab, shard


@pytest.mark.parametrize("saved_tp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_any_part_of_any_shard(saved_tp: int, tp: int) -> None:
    draws = random.Random(f"{saved_tp} {tp}")
    saved_padded = padded_vocab(MODEL, V, saved_tp)
    for name, spec in TABLE.items():
        shards = [shard(numbered(name), spec, *cut) for cut in cuts(saved_tp)]
        read = []

        def read_rows(tp_rank: int, first: int, last: int, of: Any = (shards, read)) -> Tensor:
            of[1].append((last - first) * as_matrix(of[0][tp_rank]).shape[1])
            return as_matrix(of[0][tp_rank])[first:last]

        for cut in cuts(tp):
            expected = shard(numbered(name), spec, *cut).flatten()
            for _ in range(8):
                start, stop = sorted(draws.sample(range(len(expected) + 1), 2))
                read.clear()
                got = read_range(spec, cut, range(start, stop), saved_tp, saved_padded, read_rows)
                assert torch.equal(got.double(), expected[start:stop]), (name, cut, start, stop)
                # Nothing but the rows that overlap; of columns the whole rows of the saved shards.
                width = as_matrix(numbered(name)).shape[1]
                assert sum(read) <= stop - start + 2 * width + (stop - start) * (
                    max(1, tp // saved_tp) if spec.sharding == "columns" else 0
                )


@pytest.mark.parametrize("saved_tp", [1, 2])
def test_optimizer_state_at_any_layout(tmp_path: Path, saved_tp: int) -> None:
    manifest, _ = stored_optimizer(tmp_path, saved_tp)
    stored, draws = StoredOptimizer(tmp_path, manifest), random.Random(1)
    assert stored.index.scalars == {"step": 5.0} and stored.index.states == ["fp32", "exp_avg"]
    for tp in (1, 2, 4):
        for cut in cuts(tp):
            for name, spec in TABLE.items():
                expected = shard(numbered(name), spec, *cut).flatten()
                start, stop = sorted(draws.sample(range(len(expected) + 1), 2))
                for state, sign in (("fp32", 1), ("exp_avg", -1)):
                    got = stored.read(name, state, cut, range(start, stop))
                    assert torch.equal(got, sign * expected[start:stop]), (name, cut)


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ("hole", r"in no file"),
        ("overlap", r"overlap others"),
        ("unknown", r"layers.9.x is not a weight of this model"),
        ("rank", r"is not a weight of this model"),
        ("elsewhere", r"rank_00077.safetensors is not in the manifest"),
        ("stripped", r"no optimizer state .stripped.*train.init_from"),
        ("types", r"index.json: parts.fragments = 3: expected"),
        ("shape", r"rank_0000.*has shape .* the index says"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, slip: str, message: str) -> None:
    manifest, parts = stored_optimizer(tmp_path, 2)
    index = json.loads((tmp_path / OPTIMIZER_INDEX).read_text())
    part = next(each for each in index["parts"] if len(each["fragments"]) > 1)
    name = next(name for name, (_, numel) in part["fragments"].items() if numel > 1)
    start, numel = part["fragments"][name]
    match slip:
        case "hole":
            part["fragments"][name] = [start, numel - 1]
        case "overlap":
            part["fragments"][name] = [start, numel + 1]
        case "unknown":
            part["fragments"]["layers.9.x"] = [0, 1]
        case "rank":
            part["tp_rank"] = 2
        case "elsewhere":
            part["file"] = optimizer_file(77)
        case "stripped":
            del manifest.files[OPTIMIZER_INDEX]
        case "types":
            part["fragments"] = 3
        case "shape":
            other = next(each for each in parts if each.file == part["file"])
            save_tensors(tmp_path / other.file, {
                f"{key}/{state}": torch.zeros(1 + size)
                for key, (_, size) in other.fragments.items() for state in ("fp32", "exp_avg")
            })  # fmt: skip
    (tmp_path / OPTIMIZER_INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        stored = StoredOptimizer(tmp_path, manifest)
        for each, spec in TABLE.items():
            stored.read(each, "fp32", WHOLE, range(spec.numel))


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    manifest, parts = stored_optimizer(tmp_path, 2)
    num, states, scalars = len(parts), ["fp32", "exp_avg"], {"step": 5.0}

    def write(these: Any = parts, of: Any = None, numbers: Any = None) -> None:
        write_optimizer_index(
            tmp_path, manifest.model, these, of or [states] * num, numbers or [scalars] * num
        )  # fmt: skip

    write()
    for wrong, message in (
        ({"of": [states] * (num - 1) + [["fp32"]]}, "states differ.*on rank 5"),
        ({"numbers": [scalars] * (num - 1) + [{"step": 6.0}]}, "numbers differ"),
        ({"these": parts[1:]}, "in no file"),
    ):
        with pytest.raises(RuntimeError, match=f"{message}.*no checkpoint is made of it"):
            write(**wrong)
    assert json.loads((tmp_path / OPTIMIZER_INDEX).read_text())["parts"] == json.loads(
        json.dumps([asdict(part) for part in parts])
    )


@pytest.mark.parametrize("saved_tp", [1, 2])
def test_weights_at_any_layout(tmp_path: Path, saved_tp: int) -> None:
    """Over two stages; a vocabulary without padding, as conversions write it, is read as well."""
    names = list(TABLE)
    for pp_rank, own in enumerate((names[:3], names[3:])):
        for cut in cuts(saved_tp):
            tensors = {name: shard(numbered(name), TABLE[name], *cut) for name in own}
            if saved_tp == 1:
                tensors = {name: numbered(name) for name in own}
            write_weights(tmp_path, pp_rank, cut.tp_rank, tensors)
    manifest = manifest_of(tmp_path, record(saved_tp, 2))
    stored = WeightFiles(tmp_path, manifest)
    for name, spec in TABLE.items():
        assert torch.equal(stored.whole(name), numbered(name))
        for cut in cuts(4):
            expected = shard(numbered(name), spec, *cut).flatten()
            got = stored.read(name, cut, range(1, len(expected)))
            assert torch.equal(got.double(), expected[1:])
    write_weights(tmp_path, 1, 0, {names[0]: numbered(names[0])})
    with pytest.raises(ValueError, match=f"{names[0]} is also in|{names[0]}: shape"):
        WeightFiles(tmp_path, manifest)
