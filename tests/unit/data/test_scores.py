"""Scores of sequences against plain Python, and selections by them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tags import make_origin

from megatron_salt.data.scores import column, sequence_scores
from megatron_salt.data.selection import (
    Rule,
    Selection,
    SequenceTable,
    check_same_origin,
    load_selection,
    read_table,
    select,
    write_table,
)

losses = st.floats(0, 20, width=32)


@given(
    st.lists(st.lists(st.tuples(losses, st.booleans(), losses), max_size=9), min_size=1, max_size=6)
)
def test_scores_equal_plain_python(sequences: list[list[tuple[float, bool, float]]]) -> None:
    tokens = [token for sequence in sequences for token in sequence]
    found = sequence_scores(
        np.array([token[0] for token in tokens], dtype=np.float32),
        np.array([token[1] for token in tokens], dtype=np.bool_),
        np.array([token[2] for token in tokens], dtype=np.float32),
        np.array([len(sequence) for sequence in sequences]),
    )
    for number, sequence in enumerate(sequences):
        for masked in ("drop", "zero", "all"):
            for which, score in ((0, "median"), (0, "mean"), (2, "entropy")):
                values = [
                    token[which] if token[1] or masked == "all" else 0.0
                    for token in sequence
                    if token[1] or masked != "drop"
                ]
                got = found[column(score, masked)][number]
                assert got.dtype == np.float32
                if not values:
                    assert math.isnan(got)
                elif score == "median":
                    assert got == np.float32(statistics.median(np.float64(values)))
                else:
                    assert got == np.float32(sum(values) / len(values))


def test_scores_of_a_hand_written_sequence() -> None:
    """Losses 4, 1, 3, 8 of which 4, 3 and 8 are kept; then an empty sequence, then none kept."""
    found = sequence_scores(
        np.array([4, 1, 3, 8, 5], dtype=np.float32),
        np.array([True, False, True, True, False]),
        None,
        np.array([4, 0, 1]),
    )
    assert found["median_drop"][0] == 4.0
    assert found["median_zero"][0] == 3.5
    assert found["median_all"][0] == 3.5
    assert found["mean_drop"][0] == 5.0
    assert found["mean_zero"][0] == 3.75
    assert np.isnan(found["median_drop"][1:]).all()
    assert found["median_zero"][2] == 0.0
    assert "entropy_all" not in found


SCORES = np.array([1.0, 5.0, np.nan, 3.0, 5.0, 2.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(fraction=0.5), [1, 3, 4]),
        (Rule(fraction=1 / 6), [1]),  # of equal scores the earlier one
        (Rule(fraction=1.0), [0, 1, 3, 4, 5]),  # nan is never selected by its score
        (Rule(kind="bottom", fraction=0.5), [0, 3, 5]),
        (Rule(kind="range", fraction=None, low=2.0, high=3.0), [3, 5]),
    ],
)
def test_rules(rule: Rule, expected: list[int]) -> None:
    assert np.flatnonzero(select([SCORES], rule)[0]).tolist() == expected


def test_sources_compete_or_have_quotas() -> None:
    other = np.array([9.0, 8.0, 7.0, 0.0], dtype=np.float32)
    together = select([SCORES, other], Rule(fraction=0.4))
    assert [np.flatnonzero(each).tolist() for each in together] == [[1], [0, 1, 2]]
    quotas = select([SCORES, other], Rule(), fractions=[0.5, 0.25])
    assert [np.flatnonzero(each).tolist() for each in quotas] == [[1, 3, 4], [0]]


def test_random_selection_has_the_size_and_hits_everything() -> None:
    scores = np.arange(1000, dtype=np.float32)
    picks = [select([scores], Rule(kind="random", fraction=0.3, seed=seed))[0] for seed in (1, 2)]
    again = select([scores], Rule(kind="random", fraction=0.3, seed=1))[0]
    assert [pick.sum() for pick in picks] == [300, 300]
    assert (picks[0] == again).all() and (picks[0] != picks[1]).any()
    assert abs(scores[picks[0]].mean() - 499.5) < 50  # not the highest, not the lowest


def test_random_quotas_of_equal_sources_differ() -> None:
    scores = np.zeros(200, dtype=np.float32)
    rule = Rule(kind="random", fraction=0.5, seed=1)
    first, second = select([scores, scores], rule, fractions=[0.5, 0.5])
    assert (first != second).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fraction": 0.0}, "above 0"),
        ({"fraction": 1.5}, "at most 1"),
        ({"kind": "range", "low": 2.0, "high": 1.0}, "LOW <= HIGH"),
        ({"kind": "random"}, "seed"),
    ],
)
def test_rules_that_contradict_themselves(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**fields)


def test_table_comes_back_as_written(tmp_path: Path) -> None:
    columns = {
        "sequence": np.arange(6),
        "tokens": np.full(6, 4),
        "median_drop": SCORES,
    }
    table = SequenceTable(origin=make_origin(), columns=columns, rule={})
    chosen = table.with_selection(SCORES, select([SCORES], Rule())[0], vars(Rule()))
    write_table(tmp_path / "t.parquet", chosen)
    back = read_table(tmp_path / "t.parquet")
    assert back.origin == make_origin() and back.rule == vars(Rule())
    assert set(back.columns) == {*columns, "score", "selected"}
    for name, value in chosen.columns.items():
        np.testing.assert_array_equal(back.columns[name], value)
        assert back.columns[name].dtype == value.dtype
    with pytest.raises(ValueError, match=r"no scores entropy_drop.*--store entropy"):
        back.score("entropy", "drop")


def test_flipped_bit_of_a_table_is_found(tmp_path: Path) -> None:
    """Training believes a selection that no manifest vouches for: its pages carry checksums."""
    import pyarrow.parquet

    number = np.arange(5000)
    scores = np.sin(number).astype(np.float32)
    table = SequenceTable(
        origin=make_origin(), rule={}, columns={"sequence": number, "tokens": number}
    ).with_selection(scores, scores > 0, {})
    path = tmp_path / "t.parquet"
    write_table(path, table)
    content = path.read_bytes()
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    for index in range(group.num_columns):
        chunk = group.column(index)
        damaged = bytearray(content)
        damaged[chunk.data_page_offset + chunk.total_compressed_size - 9] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t\.parquet is not a table of sequences"):
            read_table(path)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with pytest.raises(ValueError, match=r"absent\.parquet: no such file"):
        read_table(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.parquet is not a table of sequences"):
        read_table(tmp_path / "text.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet is not a table of sequences"):
        load_selection(tmp_path / "other.parquet", "data", "tok")


def test_selection_and_tags_of_two_models_are_refused() -> None:
    selection = Selection(
        path=Path("t.parquet"), origin=make_origin(), rule={}, sequences=np.arange(1), tokens=1,
        fingerprint="f",
    )  # fmt: skip
    check_same_origin(selection, make_origin(), Path("tags.json"))
    with pytest.raises(ValueError, match=r"parquet and tags\.json do not belong .*: model"):
        check_same_origin(selection, make_origin(model="another"), Path("tags.json"))
    with pytest.raises(ValueError, match="do not belong together: top_k 10 and 11"):
        check_same_origin(selection, make_origin(top_k=11), Path("tags.json"))
