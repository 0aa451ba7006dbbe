"""Stored logits: what is written comes back, wherever it is read; wrong files are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_logits import make_settings, write_logits, write_logits_manifest
from tiny_tags import write_indexed

from megatron_salt.data.logits import StoredLogits, read_logits_manifest, verify_logits

TOKENS = 2500  # three blocks, the last one short
SCALARS = ("rest", "entropy", "loss")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of as many tokens; what they are does not matter here."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    tokens = np.random.default_rng(0).integers(0, 509, TOKENS).astype(np.uint16)
    write_indexed(prefix, np.split(tokens, [700, 1500]))
    return prefix


def distributions(vocab_size: int, kept: int, *, ragged: bool, seed: int = 1) -> dict[str, Any]:
    """Sorted log-probabilities [S, K] of random logits, their ids, and the rest; if ragged, of each
    place another number of them."""
    random = np.random.default_rng(seed)
    logits = random.normal(0.0, 3.0, (TOKENS, 600))[:, :vocab_size]
    columns = np.linspace(0, vocab_size - 1, logits.shape[1]).astype(np.int32)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logp, axis=1)
    logp = np.take_along_axis(logp, order, axis=1)
    count = random.integers(1, kept + 1, (TOKENS, 1)) if ragged else np.full((TOKENS, 1), kept)
    present = np.arange(logp.shape[1]) < count
    with np.errstate(divide="ignore"):
        rest = np.log(np.where(present, 0.0, np.exp(logp)).sum(axis=1))
    return {
        "ids": columns[order][:, :kept],
        "logp": np.where(present, logp, -np.inf)[:, :kept].astype(np.float32),
        "rest": rest.astype(np.float32),
        "entropy": random.exponential(1.0, TOKENS).astype(np.float32),
        "loss": random.exponential(3.0, TOKENS).astype(np.float32),
    }


def written(prefix: Path, data: Path, made: dict[str, Any], **changes: Any) -> StoredLogits:
    settings = make_settings(**changes)
    of_token = {name: made[name] for name in SCALARS}
    write_logits(prefix, data, settings, made["ids"], made["logp"], of_token)
    return StoredLogits(prefix, verify_logits(prefix, data, "tok", hashes=True), top_k=None)


def found_at(stored: StoredLogits, places: Any) -> dict[str, np.ndarray]:
    found = stored.of_places(np.asarray(places, dtype=np.int64))
    settings = stored.settings
    as_stored = settings.kind == "top" and settings.encoding == "fp16"
    assert {name: value.dtype for name, value in found.items()} == {
        "logits_ids": torch.int32 if settings.vocab_size > 1 << 16 else torch.uint16,
        "logits_logp": torch.float16 if as_stored else torch.float32,
        **dict.fromkeys([f"logits_{name}" for name in SCALARS], torch.float32),
    }
    return {name.removeprefix("logits_"): value.numpy() for name, value in found.items()}


def check_same(
    found: dict[str, np.ndarray], made: dict[str, Any], places: Any, rtol: float, atol: float = 0.0
) -> None:
    expected = made["logp"][places]
    present = expected > -np.inf
    np.testing.assert_array_equal(found["logp"] > -np.inf, present)
    np.testing.assert_array_equal(found["ids"][present], made["ids"][places][present])
    np.testing.assert_allclose(found["logp"][present], expected[present], rtol=rtol, atol=atol)
    for name in SCALARS:
        np.testing.assert_allclose(found[name], made[name][places], rtol=rtol or atol / 100)


# Runs over borders of blocks, single places, backwards, twice, the first and the last.
PLACES = np.r_[1000:1100, 2499, 0:3, 7, 6, 5, 2040:2060, 1023, 1024, 1023, 2047:2049]


@pytest.mark.parametrize("vocab_size", [509, 1 << 16, 200_000])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_what_is_written_comes_back(
    tmp_path: Path, data: Path, vocab_size: int, ragged: bool
) -> None:
    made = distributions(vocab_size, 8, ragged=ragged)
    places = np.arange(TOKENS)
    for encoding, rtol in (("fp32", 0.0), ("fp16", 2.0**-11)):
        stored = written(
            tmp_path / encoding, data, made, encoding=encoding, vocab_size=vocab_size
        )  # fmt: skip
        assert stored.num_kept == 8
        check_same(found_at(stored, places), made, places, rtol)
        check_same(found_at(stored, PLACES), made, PLACES, rtol)
    assert (tmp_path / "fp16_high.bin").exists() == (vocab_size > 1 << 16)
    assert found_at(stored, [])["ids"].shape == (0, 8)


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_codes_are_absolute_again_by_the_rest(tmp_path: Path, data: Path, ragged: bool) -> None:
    """Within a step's half, and as probable together as what the rest leaves."""
    made = distributions(509, 60, ragged=ragged)
    stored = written(tmp_path / "some", data, made, encoding="uint8", top_k=60)
    found = found_at(stored, PLACES)
    check_same(found, made, PLACES, rtol=0.0, atol=16 / 255)
    present = found["logp"] > -np.inf
    near = np.abs(found["logp"][present] - made["logp"][PLACES][present])
    assert near.max() > 0.01 and np.median(near) < 16 / 255 / 2
    total = np.exp(found["logp"].astype(np.float64)).sum(axis=1) + np.exp(found["rest"])
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    # Further than the range below the likeliest one is as far as the range.
    nothing = np.full(TOKENS, -np.inf, np.float32)
    two = np.tile(np.float32([-1e-9, -40.0]), (TOKENS, 1))
    far = {**made, "ids": made["ids"][:, :2], "logp": two, "rest": nothing}
    stored = written(tmp_path / "far", data, far, encoding="uint8")
    np.testing.assert_allclose(found_at(stored, [5])["logp"][0, :2], [-1.1e-7, -16.0], atol=1e-6)


def test_everything_is_stored_with_all_tokens(tmp_path: Path, data: Path) -> None:
    """K = V, wider counts than a byte, a rest of nothing: bit for bit."""
    made = distributions(509, 509, ragged=False)
    stored = written(tmp_path / "all", data, made, encoding="fp32", top_k=509)
    assert (tmp_path / "all_count.bin").stat().st_size == 2 * TOKENS
    found = found_at(stored, PLACES)
    check_same(found, made, PLACES, rtol=0.0)
    assert np.isneginf(found["rest"]).all()


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "uint8"])
def test_fewer_entries_leave_a_larger_rest(tmp_path: Path, data: Path, encoding: Any) -> None:
    """The rest of what is given, with equal and ragged places; of more than is stored all."""
    made = distributions(509, 12, ragged=True)
    whole = written(tmp_path / "some", data, made, encoding=encoding, top_k=12)
    manifest = read_logits_manifest(tmp_path / "some")
    all_of_them = found_at(whole, PLACES)
    few = StoredLogits(tmp_path / "some", manifest, top_k=5)
    assert few.num_kept == 5
    found = found_at(few, PLACES)
    for name in ("ids", "logp"):
        np.testing.assert_array_equal(found[name], all_of_them[name][:, :5])
    p = np.exp(all_of_them["logp"].astype(np.float64))
    outside = np.exp(all_of_them["rest"].astype(np.float64)) + p[:, 5:].sum(axis=1)
    np.testing.assert_allclose(found["rest"], np.log(outside), rtol=1e-6)
    np.testing.assert_array_equal(found_at(few, [PLACES[0]])["rest"], found["rest"][:1])
    more = StoredLogits(tmp_path / "some", manifest, top_k=100)
    assert more.num_kept == 12
    with pytest.raises(ValueError, match=r"top_k = 0 of .*some\.logits\.json: must be at least 1"):
        StoredLogits(tmp_path / "some", manifest, top_k=0)


def test_draws_are_shares(tmp_path: Path, data: Path) -> None:
    random = np.random.default_rng(3)
    counts = -np.sort(-random.multinomial(20, np.full(20, 0.05), TOKENS), axis=1)
    ids = np.argsort(random.random((TOKENS, 509)), axis=1)[:, :20].astype(np.int32)
    ones = np.ones(TOKENS, np.float32)
    made = {"ids": ids, "logp": counts, "rest": -np.inf * ones, "entropy": ones, "loss": ones}
    stored = written(tmp_path / "some", data, made, draws=20)
    found = found_at(stored, PLACES)
    shares = np.where(counts > 0, np.log(np.maximum(counts, 1) / 20), -np.inf).astype(np.float32)
    check_same(found, {**made, "logp": shares}, PLACES, rtol=1e-6)
    with pytest.raises(ValueError, match="top_k = 3 of .*it has draws, which cannot be cut"):
        StoredLogits(tmp_path / "some", read_logits_manifest(tmp_path / "some"), top_k=3)


def test_places_that_are_not_there_are_named(tmp_path: Path, data: Path) -> None:
    made = distributions(509, 8, ragged=False)
    made["logp"][1030] = -np.inf  # such as a place of a window that is not stored
    stored = written(tmp_path / "some", data, made)
    with pytest.raises(ValueError, match=r"some_count\.bin, place 1030: nothing is stored there"):
        stored.of_places(np.arange(1000, 1100))
    places = np.r_[1000:1030, 1031:1100]
    check_same(found_at(stored, places), made, places, rtol=2.0**-11)
    for wrong in ([-1], [2400, TOKENS]):
        with pytest.raises(
            ValueError, match=r"some\.logits\.json: place (-1|2500) .*its data has 2500 tok"
        ):
            stored.of_places(np.array(wrong))


def test_ids_and_offsets_that_cannot_be_are_named(tmp_path: Path, data: Path) -> None:
    """Files that agree with their manifest: only what they say is impossible."""
    made = distributions(509, 8, ragged=True)
    made["ids"][1100, 0] = 509
    stored = written(tmp_path / "some", data, made)
    with pytest.raises(ValueError, match=r"some_ids\.bin, place 1100: id 509 is beyond .* of 509"):
        stored.of_places(np.r_[3, 1090:1110])
    offsets = np.fromfile(tmp_path / "some_offsets.bin", np.int64)
    offsets[1] += offsets[-1]
    offsets.tofile(tmp_path / "some_offsets.bin")
    suffixes = [*read_logits_manifest(tmp_path / "some").files]
    manifest = write_logits_manifest(tmp_path / "some", data, make_settings(), "tok", suffixes)
    with pytest.raises(ValueError, match=r"some_offsets\.bin: .*place 1025 .*some_ids\.bin"):
        StoredLogits(tmp_path / "some", manifest, top_k=None).of_places(np.array([1025]))


def test_files_that_are_not_the_ones_written_are_named(tmp_path: Path, data: Path) -> None:
    prefix = tmp_path / "some"
    written(prefix, data, distributions(509, 8, ragged=True))
    for suffix in read_logits_manifest(prefix).files:
        path = Path(f"{prefix}{suffix}")
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=rf"truncated: .*some{suffix} has .*cache-logits` aga"):
            verify_logits(prefix, data)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"some{suffix} is not the file .*some\.logits\.json"):
            verify_logits(prefix, data)
        path.unlink()
        with pytest.raises(ValueError, match=rf"some{suffix}: missing"):
            verify_logits(prefix, data)
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"some_ids\.bin is a file of logits: give .*some, the --o"
    ):
        read_logits_manifest(f"{prefix}_ids.bin")
    with pytest.raises(ValueError, match=r"other\.logits\.json: no such file; give the --output-p"):
        verify_logits(tmp_path / "other", data)
    with pytest.raises(
        ValueError, match=r"made with a tokenizer of fingerprint tok, .*text has yo"
    ):
        verify_logits(prefix, data, "yours")
    other = tmp_path / "text"
    write_indexed(other, [np.zeros(TOKENS, np.uint16)])
    with pytest.raises(ValueError, match=r"some\.logits\.json was made of .*text\.bin is not that"):
        verify_logits(prefix, other)


def test_sizes_follow_from_tokens_and_entries(tmp_path: Path, data: Path) -> None:
    """Files and manifest agree with each other, not with the number of tokens or entries."""
    prefix = tmp_path / "some"
    written(prefix, data, distributions(509, 8, ragged=True))
    manifest = read_logits_manifest(prefix)
    for suffix in manifest.files:
        files = {**manifest.files}
        del files[suffix]
        text = dataclasses.replace(manifest, files=files).to_json()
        (tmp_path / "some.logits.json").write_text(text)
        with pytest.raises(ValueError, match=rf"some{suffix} must have .*it says no such file"):
            verify_logits(prefix, data)
    for wrong in (
        dataclasses.replace(manifest, entries=manifest.entries + 1),
        dataclasses.replace(
            manifest, origin=dataclasses.replace(manifest.origin, settings=make_settings(top_k=300))
        ),
    ):
        (tmp_path / "some.logits.json").write_text(wrong.to_json())
        with pytest.raises(ValueError, match=r"must have \d+ bytes for 2500 tokens"):
            verify_logits(prefix, data)


def test_the_same_content_has_the_same_fingerprint(tmp_path: Path, data: Path) -> None:
    made = distributions(509, 8, ragged=True)
    for name, settings in (("a", {}), ("b", {}), ("c", {"precision": "bf16"})):
        written(tmp_path / name, data, made, **settings)
    written(tmp_path / "d", data, {**made, "loss": made["loss"] + 1.0})
    prints = [read_logits_manifest(tmp_path / name).fingerprint for name in "abcd"]
    assert prints[0] == prints[1] and len(set(prints)) == 3
