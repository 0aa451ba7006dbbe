"""Selecting anew: shares and quotas, two models' difference, what is written, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from matplotlib import image
from tiny_tags import write_scores, write_tags

from megatron_salt.data.manifest import read_dataset_manifest
from megatron_salt.data.selection import SequenceTable, load_selection, read_table, write_table
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import DataIdentity, open_indexed, read_stream, sequence_lengths
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.report.score_histogram import plot_scores
from megatron_salt.scoring.reselect import sample_places

NAN = float("nan")


def run(output: Path, *words: object, tags: Any) -> None:
    prefixes = [str(prefix) for prefix in ([tags] if isinstance(tags, Path) else tags)]
    arguments = ["--tags", *prefixes, "--output-prefix", str(output), *map(str, words)]
    for before in output.parent.glob(f"{output.name}*.parquet"):
        before.unlink()
    assert call("select", *arguments) == 0


def refusal(capsys: pytest.CaptureFixture[str], output: Path, *words: object, tags: Any) -> str:
    prefixes = [str(prefix) for prefix in tags]
    before = sorted(output.parent.iterdir())
    arguments = ["--tags", *prefixes, "--output-prefix", str(output), *map(str, words)]
    assert call("select", *arguments) == 2
    assert sorted(output.parent.iterdir()) == before, "a refused selection wrote something"
    return capsys.readouterr().err


def selected(path: Path) -> list[int]:
    table = read_table(path)
    return table.columns["sequence"][table.columns["selected"]].tolist()


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Tags of two sources by one model: all that is hard is in the second."""
    low = write_scores(tmp_path / "low", [1.0, 2.0, 3.0, NAN], data="low")
    high = write_scores(tmp_path / "high", [4.0, 6.0, 5.0, 0.5], data="high")
    return low, high


def test_a_selection_is_not_overwritten_by_another(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed in its KD phase needs it to go on."""
    run(tmp_path / "out", "--top-fraction", 0.5, tags=two[0])
    message = refusal(capsys, tmp_path / "out", "--top-fraction", 0.25, tags=[two[0]])
    assert "is there already, with another selection (top 0.5 by median_drop)" in message
    words = ["--tags", str(two[0]), "--output-prefix", str(tmp_path / "out"), "--top-fraction"]
    assert call("select", *words, "0.5") == 0  # the same once more is no harm


def test_a_reference_that_is_better_is_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strong = write_scores(tmp_path / "strong", [1.0, 2.0, 3.0], data="d", model="strong")
    weak = write_scores(tmp_path / "weak", [3.0, 3.0, 5.0], data="d", model="weak")
    run(tmp_path / "right", "--reference", weak, tags=strong)
    assert "swapped" not in capsys.readouterr().err
    run(tmp_path / "wrong", "--reference", strong, tags=weak)
    assert "are the two swapped?" in capsys.readouterr().err


# Which sequences


def test_one_fraction_lets_sources_compete_and_several_are_quotas(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "joint", "--top-fraction", 0.5, tags=two)
    assert selected(tmp_path / "joint_low.parquet") == [2]
    assert selected(tmp_path / "joint_high.parquet") == [0, 1, 2]
    printed = capsys.readouterr().out
    assert (
        "low: selected 1 of 4 sequences (25.0%), 10 of 40 tokens (25.0%), median_drop 3 to 3; "
        "1 sequences without a score" in printed
    )
    assert "high: selected 3 of 4 sequences (75.0%), 30 of 40 tokens" in printed
    run(tmp_path / "quota", "--top-fraction", 0.5, 0.25, tags=two)
    assert selected(tmp_path / "quota_low.parquet") == [1, 2]
    assert selected(tmp_path / "quota_high.parquet") == [1]
    joint, quota = (read_table(tmp_path / f"{name}_high.parquet") for name in ("joint", "quota"))
    assert joint.rule["sources"] == {"low": "bin of low", "high": "bin of high"}
    assert joint.rule["fraction"] == 0.5
    assert (quota.rule["fraction"], "sources" in quota.rule) == (0.25, False)


def test_bottom_is_the_other_end_and_nothing_without_a_score_is_at_either(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).permutation(40).astype(np.float32)
    scores[::8] = NAN
    tags = write_scores(tmp_path / "slm", scores)
    order = np.argsort(scores)[:35].tolist()  # nan comes last
    for share, count in ((0.25, 10), (1.0, 35)):
        run(tmp_path / "top", "--top-fraction", share, tags=tags)
        run(tmp_path / "bottom", "--bottom-fraction", share, tags=tags)
        assert selected(tmp_path / "top.parquet") == sorted(order[-count:])
        assert selected(tmp_path / "bottom.parquet") == sorted(order[:count])
    run(tmp_path / "range", "--score-range", -1e9, 1e9, tags=tags)
    assert selected(tmp_path / "range.parquet") == sorted(order)


def test_random_is_of_the_same_size_and_reproducible(tmp_path: Path) -> None:
    tags = write_scores(tmp_path / "slm", np.arange(200))
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        run(tmp_path / name, "--random-fraction", 0.3, "--seed", seed, tags=tags)
    one, again, two = (selected(tmp_path / f"{name}.parquet") for name in ("one", "again", "two"))
    assert len(one) == len(two) == 60 and one == again
    assert one != two and max(one) >= 140 > min(one)
    assert read_table(tmp_path / "one.parquet").rule["seed"] == 1


def test_other_scores_are_found_in_the_same_table(tmp_path: Path) -> None:
    tags = write_scores(tmp_path / "slm", [1.0, 2.0, 3.0, 4.0])
    table = read_table(f"{tags}_sequences.parquet")
    columns = {**table.columns, "mean_zero": -table.columns["mean_zero"]}
    changed = SequenceTable(origin=table.origin, columns=columns, rule=table.rule)
    write_table(Path(f"{tags}_sequences.parquet"), changed)
    run(tmp_path / "out", "--score", "mean", "--masked", "zero", tags=tags)
    found = read_table(tmp_path / "out.parquet")
    assert selected(tmp_path / "out.parquet") == [0, 1]
    np.testing.assert_array_equal(found.columns["score"], [-1.0, -2.0, -3.0, -4.0])
    assert (found.rule["score"], found.rule["masked"], found.rule["fraction"]) == (
        "mean", "zero", 0.5,
    )  # fmt: skip
    for name in table.columns:  # what is not the selection stays
        if name not in ("score", "selected"):
            np.testing.assert_array_equal(found.columns[name], columns[name])
    assert found.origin == table.origin


# The difference of two models


def test_difference_keeps_what_only_the_smaller_model_finds_hard(tmp_path: Path) -> None:
    large = write_scores(tmp_path / "large", [1.0, 5.0, 2.0, NAN, 1.0], model="large")
    small = write_scores(tmp_path / "small", [1.5, 5.5, 4.0, 9.0, NAN], model="small")
    run(
        tmp_path / "out", "--reference", small, "--score", "mean", "--masked", "all",
        "--top-fraction", 0.2, tags=large,
    )  # fmt: skip
    table = read_table(tmp_path / "out.parquet")
    np.testing.assert_array_equal(table.columns["score"], [0.5, 0.5, 2.0, NAN, NAN])
    assert selected(tmp_path / "out.parquet") == [2]
    assert table.origin.model.fingerprint == "weights of large"
    assert table.rule["reference"] == {
        "fingerprint": "weights of small", "step": 7, "name": "small/step_7",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"data": "elsewhere"}, "not of the same data .corpus and elsewhere differ in idx_sha256"),
        ({"window": 10}, "--window None and 10"),
        ({"tokenizer": "another"}, "tokenizer tok and another"),
        ({"model": "slm"}, "of one model, slm/step_7"),
    ],
)
def test_reference_that_does_not_fit_is_refused_by_the_names_of_both(
    other: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = write_scores(tmp_path / "large", [1.0, 2.0])
    small = write_scores(tmp_path / "small", [1.0, 2.0], **{"model": "small", **other})
    error = refusal(capsys, tmp_path / "out", "--reference", small, tags=[large])
    assert re.search(message, error)
    assert "large_sequences.parquet and " in error and "small_sequences.parquet" in error


def test_reference_of_other_sequences_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = write_scores(tmp_path / "large", [1.0, 2.0])
    small = write_scores(tmp_path / "small", [1.0, 2.0, 3.0], model="small")
    error = refusal(capsys, tmp_path / "out", "--reference", small, tags=[large])
    assert "corpus and corpus differ in sequences" in error
    error = refusal(capsys, tmp_path / "out", "--reference", small, small, tags=[large])
    assert "2 --reference for 1 --tags" in error


# What is refused


def test_wrong_numbers_and_names_are_refused(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(capsys, tmp_path / "out", "--top-fraction", 0.1, 0.2, 0.3, tags=two)
    assert "3 fractions for 2 --tags: give one, for which all compete, or one for each" in error
    error = refusal(capsys, tmp_path / "out", "--top-fraction", 0.1, 0.2, tags=two[:1])
    assert "2 fractions for 1 --tags" in error
    error = refusal(capsys, tmp_path / "out", "--top-fraction", 0.1, 1.5, tags=two)
    assert "1.5: must be above 0, at most 1" in error
    error = refusal(capsys, tmp_path / "out", tags=[two[0], two[0]])
    assert "several --tags are named low" in error
    error = refusal(capsys, tmp_path / "out", "--data", "a", tags=two)
    assert "1 --data for 2 --tags" in error
    error = refusal(capsys, tmp_path / "out", tags=[tmp_path / "none"])
    assert "none_sequences.parquet: no such file" in error
    error = refusal(capsys, tmp_path / "low_sequences", tags=two[:1])
    assert "is the table of the tags; give another --output-prefix" in error


@pytest.mark.parametrize("other", [{"model": "other"}, {"top_k": 5}, {"window": 10}])
def test_scores_of_another_kind_cannot_compete_but_have_quotas(
    other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [
        write_scores(tmp_path / "a", [1.0, 2.0], data="a"),
        write_scores(tmp_path / "b", [3.0, 4.0], data="b", **other),
    ]
    error = refusal(capsys, tmp_path / "out", tags=pair)
    (what,) = other
    assert f"cannot compete: their scores differ in {what}; give one fraction for each" in error
    run(tmp_path / "out", "--top-fraction", 0.5, 0.5, tags=pair)
    run(tmp_path / "out", "--random-fraction", 0.5, tags=pair)  # goes by no score


def test_selection_of_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = write_scores(tmp_path / "slm", [1.0, 2.5, NAN])
    error = refusal(capsys, tmp_path / "out", "--score-range", 3, 4, tags=[tags])
    assert "no sequence has a score from 3.0 to 4.0: the scores lie between 1 and 2.5" in error
    error = refusal(capsys, tmp_path / "out", "--top-fraction", 0.1, tags=[tags])
    assert "a fraction of 0.1 selects no sequence of 3" in error
    tags = write_scores(tmp_path / "none", [NAN, NAN])
    error = refusal(capsys, tmp_path / "out", tags=[tags])
    assert "none has a score" in error


# Picture and text


def test_picture_holds_every_score_by_its_side(tmp_path: Path) -> None:
    scores = np.append(np.random.default_rng(0).normal(size=5000), [NAN, NAN, 1e6])
    low = write_scores(tmp_path / "low", scores, data="low")
    high = write_scores(tmp_path / "high", [1.0, 1.0], data="high")
    run(tmp_path / "out", "--top-fraction", 0.2, tags=[low, high])
    tables = {name: read_table(tmp_path / f"out_{name}.parquet") for name in ("low", "high")}
    figure = plot_scores(tables, "median_drop")
    assert len(figure.axes) == 2
    for ax, (name, table) in zip(figure.axes, tables.items(), strict=True):
        chosen = table.columns["selected"]
        present = ~np.isnan(table.columns["score"])
        heights = [sum(bar.get_height() for bar in side.patches) for side in ax.containers]
        assert heights == [np.sum(chosen & present), np.sum(~chosen & present)]
        assert ax.get_title() == (
            f"{name}: {len(table)} sequences, {int(np.sum(~present))} of them without a score"
        )
        assert ax.containers[0].patches[0].get_facecolor() != (
            ax.containers[1].patches[0].get_facecolor()
        )
    # One far score must not press all others into one bar.
    assert sum(bar.get_height() > 0 for bar in figure.axes[0].containers[1].patches) > 20
    label = "median loss of kept tokens (nats); the outermost bars hold the rest"
    assert figure.axes[1].get_xlabel() == label
    label = plot_scores(tables, "difference of mean_zero").axes[1].get_xlabel()
    assert label.startswith(
        "reference model's less the tagging model's mean loss of all tokens, those not kept as 0"
    )
    pixels = image.imread(tmp_path / "out.png")
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 3


def test_samples_are_quantiles_of_either_side() -> None:
    scores = np.array([5, 1, NAN, 4, 2, 3, 0], dtype=np.float32)
    side = np.array([True] * 6 + [False])
    assert sample_places(scores, side, 3) == [1, 5, 0]
    assert sample_places(scores, side, 9) == [1, 4, 5, 3, 0]
    assert sample_places(scores, ~side, 2) == [6]
    assert sample_places(scores, np.zeros(7, dtype=np.bool_), 2) == []
    assert sample_places(scores, side, 1) == [1]


@pytest.mark.parametrize("window", [None, 64])
def test_samples_show_text_of_kept_and_dropped_sequences(
    window: int | None, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tags(tmp_path / "slm", dataset, window=window)
    run(tmp_path / "out", "--data", dataset, "--samples", 3, tags=tmp_path / "slm")
    text = (tmp_path / "out.txt").read_text(encoding="utf-8")
    table = read_table(tmp_path / "out.parquet")
    found = re.findall(
        r"-- sequence (\d+) of slm, (selected|not selected): median_drop (\S+), (\d+) tokens, "
        r"(\S+)% of them kept\n((?:    .*\n)+)",
        text,
    )
    assert [side for _, side, *_ in found] == ["selected"] * 3 + ["not selected"] * 3
    tokenizer = load_tokenizer(f"{dataset}.tokenizer")
    data = open_indexed(dataset)
    stream = read_stream(data, 0, int(sequence_lengths(dataset).sum()))
    for number, side, score, tokens, share, shown in found:
        row = {name: values[int(number)] for name, values in table.columns.items()}
        assert row["selected"] == (side == "selected")
        assert (int(tokens), f"{row['score']:.4g}") == (row["tokens"], score)
        assert float(share) == pytest.approx(100 * row["kept"] / row["tokens"], abs=0.06)
        ids = stream[row["start"] : row["start"] + row["tokens"]]
        whole = tokenizer.decode(ids.tolist())
        lines = shown.removesuffix("\n").split("\n")
        beginning = "\n".join(line.removeprefix("    ") for line in lines).removesuffix(" …")
        assert whole.startswith(beginning.rstrip()) and 20 < len(beginning) <= 400
    for side in (found[:3], found[3:]):
        assert [float(one[2]) for one in side] == sorted(float(one[2]) for one in side)
    assert (tmp_path / "out.png").is_file()
    run(tmp_path / "out", tags=tmp_path / "slm")  # the text is of the earlier selection
    assert not (tmp_path / "out.txt").exists()
    assert "text of some sequences is shown with --data" in capsys.readouterr().out


def test_text_of_another_dataset_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_dataset_manifest(dataset)
    assert manifest is not None
    tags = write_scores(tmp_path / "slm", [1.0, 2.0], tokenizer=manifest.tokenizer_fingerprint)
    error = refusal(capsys, tmp_path / "out", "--data", dataset, tags=[tags])
    assert "slm_sequences.parquet was made of the dataset corpus, and" in error
    assert f"is not that one: sequences {manifest.documents}, expected 2" in error
    tags = write_scores(tmp_path / "slm", [1.0, 2.0])
    error = refusal(capsys, tmp_path / "out", "--data", tmp_path / "none", tags=[tags])
    assert "no tokenizer at" in error


def test_training_reads_the_selection(dataset: Path, tmp_path: Path) -> None:
    write_tags(tmp_path / "slm", dataset, window=64)
    run(tmp_path / "out", "--bottom-fraction", 0.25, tags=tmp_path / "slm")
    manifest = read_dataset_manifest(dataset)
    assert manifest is not None
    path = tmp_path / "out.parquet"
    selection = load_selection(path, dataset, manifest.tokenizer_fingerprint)
    count = len(Sequences.of(sequence_lengths(dataset), 64))
    assert selection.sequences.tolist() == selected(path)
    assert len(selection.sequences) == round(count / 4)
    assert selection.window == 64 and selection.rule["kind"] == "bottom"
    assert selection.origin.data == DataIdentity.of(dataset)
