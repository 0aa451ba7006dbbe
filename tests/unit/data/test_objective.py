"""What is made of a row: text comes back, masks count what is not in sight, draws repeat."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from original_text import original_text

from megatron_salt.config.fields import DataConfig, TextOrNumber
from megatron_salt.config.values import OBJECTIVES, parse_objective
from megatron_salt.corpus.train_tokenizer import train_tokenizer
from megatron_salt.data.objective import (
    Draws,
    Mixture,
    ObjectiveRow,
    check_sentinels,
    count_spans,
    fit_spans,
    make_mixture,
    sentinels_needed,
)
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer, sentinel_ids

EOD = 1
SENTINELS = tuple(range(100, 600))  # above all tokens of the made-up texts


def mixture(
    shares: dict[str, float], seq_length: int, *, rate: float = 0.15, mean_length: float = 3.0,
    eod: int = EOD, eod_mask_loss: bool = False, seed: int = 7,
) -> Mixture:  # fmt: skip
    data = DataConfig(
        seq_length=seq_length, span_corruption_rate=rate, span_mean_length=mean_length,
        eod_mask_loss=eod_mask_loss,
    )  # fmt: skip
    return Mixture(seed=seed, shares=shares, data=data, eod=eod, sentinels=SENTINELS)


def data_config(*words: object, **changes: Any) -> DataConfig:
    return DataConfig(objective=[TextOrNumber(word) for word in words], **changes)


@pytest.fixture(scope="session", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(
    request: pytest.FixtureRequest,
    corpus_texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    """Of both kinds, with 20 sentinels."""
    path = tmp_path_factory.mktemp("sentinels") / request.param
    train_tokenizer(corpus_texts[:8], path, vocab_size=460, num_sentinels=20)
    return load_tokenizer(path)


def test_causal_row_is_the_row_as_it_was_read() -> None:
    sample = mixture({"causal": 1.0}, 5).sample(np.arange(10, 16), row=3)
    assert (sample.objective, sample.prefix) == ("causal", 0)
    assert sample.tokens_S.tolist() == [10, 11, 12, 13, 14]
    assert sample.labels_S.tolist() == [11, 12, 13, 14, 15]
    assert sample.mask_S.tolist() == [1, 1, 1, 1, 1] and sample.mask_S.dtype == np.float32


def test_prefix_row_counts_what_is_not_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix 3: x0 x1 x2 are read in both directions, so the first to predict is x3, from x2."""
    monkeypatch.setattr(Draws, "uniform", lambda self: 0.5)
    text = np.array([10, 11, 12, EOD, 14, 15])
    sample = mixture({"prefix": 1.0}, 5).sample(text, row=0)
    assert (sample.objective, sample.prefix) == ("prefix", 3)
    assert sample.tokens_S.tolist() == [10, 11, 12, EOD, 14]
    assert sample.labels_S.tolist() == [11, 12, EOD, 14, 15]
    assert sample.mask_S.tolist() == [0, 0, 1, 1, 1]
    masked = mixture({"prefix": 1.0}, 5, eod_mask_loss=True).sample(text, row=0)
    assert masked.mask_S.tolist() == [0, 0, 1, 0, 1]


def test_prefix_is_uniform_over_all_lengths() -> None:
    prefixes = Counter(
        mixture({"prefix": 1.0}, 4).sample(np.arange(10, 15), row).prefix for row in range(4000)
    )
    assert sorted(prefixes) == [1, 2, 3, 4]
    assert all(900 < count < 1100 for count in prefixes.values())


def corrupted(
    monkeypatch: pytest.MonkeyPatch, seq_length: int, lengths: list[list[int]], **changes: Any
) -> ObjectiveRow:
    """A row of 10, 11, … whose spans (lengths of noise, of what stays) are given."""
    given = iter(lengths)
    monkeypatch.setattr(Draws, "lengths", lambda self, total, count: np.array(next(given)))
    mixed = mixture({"span_corruption": 1.0}, seq_length, rate=0.4, mean_length=2.0, **changes)
    return mixed.sample(np.arange(10, 11 + seq_length), row=0)


def test_corrupted_row_is_input_then_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 tokens, 3 of them in 2 spans: 10 11 12 (13) 14 (15 16)."""
    x, y, z = SENTINELS[:3]
    sample = corrupted(monkeypatch, 11, [[1, 2], [3, 1]])
    assert (sample.objective, sample.prefix) == ("span_corruption", 6)
    places = [10, 11, 12, x, 14, y, x, 13, y, 15, 16, z]
    assert sample.tokens_S.tolist() == places[:-1]
    assert sample.labels_S.tolist() == places[1:]
    # From the last token of the input, which predicts the first sentinel, to the last sentinel.
    assert sample.mask_S.tolist() == [0] * 5 + [1] * 6
    assert original_text(sample, SENTINELS).tolist() == [10, 11, 12, 13, 14, 15, 16]


def test_corrupted_row_is_filled_up_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 tokens give 9 places, 7 would give 12: 2 of the 11 are filling."""
    x, y = SENTINELS[:2]
    sample = corrupted(monkeypatch, 10, [[2], [4]])
    assert sample.tokens_S.tolist() == [10, 11, 12, 13, x, x, 14, 15, y, EOD]
    assert sample.labels_S.tolist() == [11, 12, 13, x, x, 14, 15, y, EOD, EOD]
    assert sample.mask_S.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    # With the end of a document inside the span, what follows it does not count.
    masked = corrupted(monkeypatch, 10, [[2], [4]], eod_mask_loss=True, eod=14)
    assert masked.mask_S.tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 0, 0]


@given(
    seq_length=st.integers(4, 300),
    rate=st.floats(0.01, 0.99),
    mean_length=st.floats(1.0, 40.0),
    row=st.integers(0, 10**6),
)
@settings(max_examples=300, deadline=None)
def test_corrupted_row_loses_nothing(
    seq_length: int, rate: float, mean_length: float, row: int
) -> None:
    mixed = mixture({"span_corruption": 1.0}, seq_length, rate=rate, mean_length=mean_length)
    text = np.random.default_rng(row).integers(2, 100, size=seq_length + 1)
    sample = mixed.sample(text, row)
    counts = mixed.counts
    np.testing.assert_array_equal(original_text(sample, SENTINELS), text[: counts.num_tokens])
    assert len(sample.tokens_S) == len(sample.labels_S) == len(sample.mask_S) == seq_length
    np.testing.assert_array_equal(sample.tokens_S[1:], sample.labels_S[:-1])
    assert 0 <= seq_length + 1 - counts.length <= 2
    assert sample.mask_S.sum() == counts.target_length
    assert (sample.tokens_S[: sample.prefix] >= SENTINELS[0]).sum() == counts.num_spans
    needed = sentinels_needed(
        data_config(
            "span_corruption", seq_length=seq_length, span_corruption_rate=rate,
            span_mean_length=mean_length,
        )
    )  # fmt: skip
    assert sample.labels_S.max() == SENTINELS[needed - 1]


@given(num_places=st.integers(5, 400), rate=st.floats(0.01, 0.99), mean_length=st.floats(1.0, 40.0))
@settings(max_examples=200, deadline=None)
def test_most_text_is_read_and_shorter_texts_need_no_more_sentinels(
    num_places: int, rate: float, mean_length: float
) -> None:
    best = fit_spans(num_places, rate, mean_length)
    every = [count_spans(n, rate, mean_length) for n in range(2, num_places + 1)]
    fitting = [counts for counts in every if counts.length <= num_places]
    assert best == max(fitting, key=lambda counts: counts.num_tokens)
    assert best.num_spans == max(counts.num_spans for counts in fitting)
    assert 1 <= best.num_spans <= min(best.num_noise, best.num_tokens - best.num_noise)


def test_counts_are_those_of_t5() -> None:
    """512 tokens of text: 77 of them (15 %) in 26 spans, the numbers of T5's own code."""
    counts = count_spans(512, 0.15, 3.0)
    assert (counts.num_noise, counts.num_spans) == (77, 26)
    assert (counts.input_length, counts.target_length) == (512 - 77 + 26, 77 + 26 + 1)


def test_segments_are_all_equally_likely() -> None:
    seen = Counter(tuple(Draws(3, row).lengths(5, 3).tolist()) for row in range(6000))
    assert len(seen) == 6  # 2 cuts in 4 places
    assert all(sum(lengths) == 5 and min(lengths) >= 1 for lengths in seen)
    assert all(850 < count < 1150 for count in seen.values())


def test_real_text_comes_back(tokenizer: Tokenizer, corpus_texts: list[str]) -> None:
    data = data_config(0.4, "causal", 0.3, "prefix", 0.3, "span_corruption", seq_length=100)
    mixed = make_mixture(data, tokenizer, seed=5)
    assert mixed is not None
    ids = np.concatenate([tokenizer.encode_batch([text])[0] for text in corpus_texts[:6]])
    seen = set()
    for row in range(60):
        text = ids[row * 101 : (row + 1) * 101]
        assert len(text) == 101
        sample = mixed.sample(text, row)
        seen.add(sample.objective)
        back = original_text(sample, mixed.sentinels)
        assert tokenizer.decode(back) == tokenizer.decode(text[: len(back)])
        assert len(back) == (mixed.counts.num_tokens if sample.objective[0] == "s" else 101)
        assert tokenizer.decode(back)
    assert seen == set(OBJECTIVES)


def test_shares_are_approached() -> None:
    shares = {"causal": 0.6, "prefix": 0.1, "span_corruption": 0.3}
    mixed = mixture(shares, 8)
    counts = Counter(mixed.sample(np.arange(10, 19), row).objective for row in range(5000))
    for name, share in shares.items():
        assert counts[name] / 5000 == pytest.approx(share, abs=0.02)


def same(one: ObjectiveRow, other: ObjectiveRow) -> bool:
    fields = [field.name for field in dataclasses.fields(ObjectiveRow)]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


def test_row_is_a_function_of_seed_and_row() -> None:
    shares = parse_objective(["1", "prefix", "1", "span_corruption"])
    text = np.arange(10, 75)
    rows = [mixture(shares, 64).sample(text, row) for row in range(20)]
    again = mixture(shares, 64)
    for row in reversed(range(20)):  # what was drawn before does not matter
        assert same(again.sample(text, row), rows[row])
    for other in (
        [mixture(shares, 64, seed=8).sample(text, row) for row in range(20)],
        [again.sample(text, row + 1) for row in range(20)],
    ):
        assert sum(same(a, b) for a, b in zip(rows, other, strict=True)) < 3


def test_draws_stay_what_they_were() -> None:
    """Runs resume under later versions of NumPy and of this code: the values stand here."""
    mixed = mixture({"causal": 0.5, "prefix": 0.25, "span_corruption": 0.25}, 64, seed=1234)
    text = np.arange(2, 67)
    drawn = [mixed.sample(text, row) for row in range(8)]
    assert [(sample.objective[0], sample.prefix) for sample in drawn] == [
        ("c", 0), ("p", 2), ("c", 0), ("s", 52), ("s", 52), ("c", 0), ("p", 14), ("p", 50),
    ]  # fmt: skip
    assert Draws(1234, 5).lengths(20, 6).tolist() == [1, 2, 4, 2, 1, 10]


def test_order_of_the_names_and_scale_of_the_weights_do_not_matter() -> None:
    one = parse_objective(["6", "causal", "2", "prefix", "2", "span_corruption"])
    other = parse_objective(["1", "span_corruption", "3", "causal", "1", "prefix"])
    assert list(one) == list(other) == list(OBJECTIVES)
    assert list(one.values()) == list(other.values()) == [0.6, 0.2, 0.2]


def test_causal_alone_needs_no_mixture(tokenizer: Tokenizer, sentencepiece_path: Path) -> None:
    without = load_tokenizer(sentencepiece_path)
    assert make_mixture(DataConfig(), without, seed=1) is None
    assert make_mixture(data_config(2.5, "causal"), without, seed=1) is None
    prefix = make_mixture(data_config("prefix"), without, seed=1)
    assert prefix is not None and prefix.sentinels == ()


def test_too_few_sentinels_are_refused(tokenizer: Tokenizer, sentencepiece_path: Path) -> None:
    data = data_config("span_corruption", seq_length=2048)
    needed = sentinels_needed(data)
    assert needed == fit_spans(2049, 0.15, 3.0).num_spans + 1 > 90
    with pytest.raises(ValueError) as caught:
        check_sentinels(data, tokenizer)
    for words in (f"needs {needed} sentinels", f"<extra_id_{needed - 1}>", str(tokenizer.path),
                  "has 20", f"--sentinels {needed}", "data.seq_length = 2048"):  # fmt: skip
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="has 0"):
        make_mixture(data, load_tokenizer(sentencepiece_path), seed=1)
    exact = data_config("span_corruption", seq_length=380)
    assert sentinels_needed(exact) <= 20 < sentinels_needed(data_config(
        "span_corruption", seq_length=460))  # fmt: skip
    assert check_sentinels(exact, tokenizer) == sentinel_ids(tokenizer)[: sentinels_needed(exact)]


def test_tokens_that_text_can_become_are_no_sentinels(
    hugging_face_path: Path, tmp_path: Path
) -> None:
    library = tokenizers.Tokenizer.from_file(str(hugging_face_path))
    library.add_tokens(["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"])
    library.save(str(tmp_path / "t.json"))
    added = load_tokenizer(tmp_path / "t.json")
    assert len(sentinel_ids(added)) == 3
    with pytest.raises(ValueError, match=r"out of the text.*special token \(Hugging Face\)"):
        check_sentinels(data_config("span_corruption", seq_length=16), added)
