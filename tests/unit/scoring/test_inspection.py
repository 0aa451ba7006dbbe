"""Showing tokens with their tags so that they can be read, and finding every wrong byte."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from ranks import run_ranks
from small_datasets import write_dataset
from tiny_tags import write_indexed, write_manifest, write_tags

from megatron_salt.data.manifest import (
    bin_path,
    idx_path,
    read_dataset_manifest,
    tokenizer_directory,
    verify_dataset,
)
from megatron_salt.data.scores import MASKED, SCORES, column
from megatron_salt.data.selection import Rule, read_table, write_table
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import (
    open_indexed,
    read_stream,
    read_tag_manifest,
    sequence_lengths,
    table_path,
    tag_manifest_path,
)
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.scoring.token_view import TokenTags, legend, render, texts_of, token_bytes

Capture = pytest.CaptureFixture[str]
TEXT = "def f(x):\n\treturn  'äé€😀 日本'  # \x1b[31m\u200b\r\n"
FILES = ["_mask.bin", "_mask.idx", "_loss.bin", "_loss.idx", "_entropy.bin", "_entropy.idx",
         "_sequences.parquet"]  # fmt: skip


@pytest.fixture
def data(dataset: Path, tmp_path: Path) -> Path:
    """A copy of a dataset of real text."""
    shutil.copytree(dataset.parent, tmp_path / "data")
    return tmp_path / "data" / dataset.name


@pytest.fixture(params=[None, 64], ids=["documents", "windows"])
def tagged(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Path:
    """Prefix of tags of `data`."""
    write_tags(tmp_path / "slm", data, window=request.param)
    return tmp_path / "slm"


def shown(capsys: Capture, *words: object) -> str:
    assert call("inspect", *words) == 0
    return capsys.readouterr().out


def refusal(capsys: Capture, *words: object) -> str:
    """The one line of error that a command ends with."""
    assert call("inspect", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-salt inspect: error: ") and error.count("\n") == 1
    return error


# Text of tokens


@pytest.mark.parametrize("kind", ["sentencepiece_path", "hugging_face_path"])
def test_bytes_of_tokens_are_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    names = token_bytes(tokenizer)
    ids = tokenizer.encode_batch([TEXT])[0]
    assert b"".join(names[token] for token in ids).decode() == TEXT
    texts = texts_of(ids, names)
    assert len(texts) == len(ids) and all(texts)
    without_parts = "".join(text.strip("·") for text in texts)
    assert without_parts == ("def f(x):⏎\n⇥   return  'äé€😀 日本'  # \\x1b[31m\\u200b␍⏎\n")
    assert "".join(texts).count("·") == sum(len(c.encode()) - 1 for c in "äé€😀日本\u200b")


def test_bytes_that_are_no_character_are_shown_escaped() -> None:
    names = [b"a", b"\xe2", b"\x82", b"\xac", b"\xff", "é".encode(), b"b\xe2"]
    assert texts_of([1, 2, 3, 0], names) == ["·", "·", "€", "a"]
    assert texts_of([1, 0, 5], names) == ["·", "a", "é"]
    assert texts_of([4, 2, 0], names) == ["\\xff", "\\x82", "a"]
    assert texts_of([6, 2, 3, 7, -1], names) == ["b·", "·", "€", "<id 7>", "<id -1>"]


def test_tokens_stand_out_with_colour_and_without() -> None:
    texts = ["a", " b", "⏎\n", "c", "d"]
    kept = np.array([True, True, False, True, False])
    tags = TokenTags(kept=kept, loss=np.array([0.1, 0.6, 9.0, 1.5, 0.1], dtype=np.float16))
    assert render(texts, tags, colour=False) == "▶a¦ b⟦⏎⟧\nc⟦d⟧◀"
    assert render(texts, None, colour=False) == "▶a¦ b¦⏎\nc¦d◀"
    coloured = render(texts, tags, colour=True)
    painted = re.findall(r"\x1b\[38;5;(\d+);48;5;(\d+)m([^\x1b]*)\x1b\[0m", coloured)
    assert [text for *_, text in painted] == ["a", " b", "⏎", "c", "d"]
    assert "⏎\x1b[0m\n" in coloured  # colour ends before the line
    letters, backgrounds = ([int(part[i]) for part in painted] for i in (0, 1))
    assert all(one != two for one, two in pairwise(letters))
    assert len(set(backgrounds)) == 5  # of two colours, by loss
    assert backgrounds[0] != backgrounds[4]  # the same loss, kept and not
    flat = TokenTags(kept=kept)
    plain = re.findall(r"48;5;(\d+)m", render(texts, flat, colour=True))
    assert plain[0] == plain[1] == plain[3] != plain[2] == plain[4]
    for each in (tags, flat):
        key = legend(each, 10, colour=True)
        used = re.findall(r"48;5;(\d+)m", render(texts, each, colour=True))
        assert set(used) <= set(re.findall(r"48;5;(\d+)m", key))
        assert "not among the model's 10 most likely" in key
    assert "⟦…⟧ not among the model's 10 most likely" in legend(tags, 10, colour=False)


# Showing


def test_document_is_shown_with_its_tags(data: Path, tagged: Path, capsys: Capture) -> None:
    number = 7
    out = shown(capsys, data, "--document", number, "--tags", tagged)
    assert "\x1b" not in out  # not a terminal
    text, rest = out.split("◀\n\n", 1)
    lengths = sequence_lengths(data)
    start = int(lengths[:number].sum())
    stop = start + int(lengths[number])
    tokenizer = load_tokenizer(f"{data}.tokenizer")
    ids = read_stream(open_indexed(data), start, stop)
    expected = tokenizer.decode(ids[:-1].tolist())
    plain = text.removeprefix("▶").removesuffix("⟦</s>⟧").removesuffix("¦</s>")
    plain = plain.removesuffix("</s>").replace("⏎", "").replace("⇥   ", "\t")
    assert re.sub("[⟦⟧¦]", "", plain) == expected
    kept = read_stream(open_indexed(f"{tagged}_mask"), start, stop)
    assert text.count("⟦") == np.sum(kept == 0)
    loss = read_stream(open_indexed(f"{tagged}_loss"), start, stop).view(np.float16)
    assert (
        f"document 7 of {data.name}: {len(ids)} tokens, [{start}, {stop}), kept "
        f"{kept.mean():.1%}, mean loss {loss.mean(dtype=np.float64):.3f} nats, mean entropy "
        in rest
    )
    table = read_table(table_path(tagged))
    scores = table.columns["score"]
    if table.origin.settings.window is None:
        row = {name: values[number] for name, values in table.columns.items()}
        for name in (column(score, masked) for score in SCORES for masked in MASKED):
            assert f"{name} {row[name]:.4g}" in rest
        assert f"document 7: score {row['score']:.4g}, {'not ' * (not row['selected'])}sel" in rest
    else:
        found = re.findall(r"^window (\d+)(.*?): score (\S+),", rest, flags=re.MULTILINE)
        windows = range(start // 64, (stop - 1) // 64 + 1)
        assert [int(name) for name, *_ in found] == list(windows)
        assert [score for *_, score in found] == [f"{scores[i]:.4g}" for i in windows]
        assert found[0][1] == f" ({64 - start % 64} of its 64 tokens)"


def test_sequence_of_the_table_or_of_a_selection(
    data: Path, tagged: Path, tmp_path: Path, capsys: Capture
) -> None:
    table = read_table(table_path(tagged))
    row = {name: values[3] for name, values in table.columns.items()}
    out = shown(capsys, data, "--sequence", 3, "--tags", tagged)
    where = f"sequence 3 of {data.name}: {row['tokens']} tokens, [{row['start']}, "
    assert where in out and f"median_drop {row['median_drop']:.4g}, median_zero" in out
    for share in ("1.0", "0.02"):
        path = tmp_path / f"out{share}.parquet"
        words = ["--tags", str(tagged), "--output-prefix", str(path).removesuffix(".parquet")]
        assert call("select", *words, "--random-fraction", share) == 0
        capsys.readouterr()
        out = shown(capsys, data, "--sequence", 3, "--selection", path)
        chosen = bool(read_table(path).columns["selected"][3])
        assert where in out and "⟦" not in out  # a table without tags
        assert (", selected;" in out, ", not selected;" in out) == (chosen, not chosen)
    assert not chosen


def test_overview_says_what_a_dataset_holds(
    data: Path, tagged: Path, tmp_path: Path, capsys: Capture
) -> None:
    manifest, lengths = verify_dataset(data), sequence_lengths(data)
    assert manifest is not None
    lines = shown(capsys, data, "--tags", tagged).splitlines()
    assert f": {manifest.documents} documents, {manifest.tokens} tokens, " in lines[0]
    low, middle, high = lengths.min(), int(np.median(lengths)), lengths.max()
    assert lines[1] == f"tokens of a document: {low} to {high}, median {middle}"
    assert lines[3].startswith(f"made of: {manifest.inputs[0].name} (")
    assert lines[4].startswith("tags: mask, ") and "% of the tokens kept" in lines[4]
    tokenizer = tokenizer_directory(data)
    write_dataset(tmp_path / "two", tokenizer, [[1, 2, 2], [3, 2], [4, 2]], ["web", "code", "web"])
    assert "documents of each source: web 2, code 1" in shown(capsys, tmp_path / "two")


def test_listing_has_a_line_for_every_token(data: Path, tagged: Path, capsys: Capture) -> None:
    out = shown(capsys, data, "--document", 2, "--tags", tagged, "--list")
    lines = out.split(f"document 2 of {data.name}")[0].rstrip("\n").split("\n")
    assert lines[0].split() == ["place", "id", "top", "k", "loss", "entropy", "token"]
    lengths = sequence_lengths(data)
    start, count = int(lengths[:2].sum()), int(lengths[2])
    ids = read_stream(open_indexed(data), start, start + count)
    kept = read_stream(open_indexed(f"{tagged}_mask"), start, start + count)
    loss = read_stream(open_indexed(f"{tagged}_loss"), start, start + count).view(np.float16)
    for place, line in enumerate(lines[1:]):
        assert line.split()[:4] == [
            str(start + place), str(ids[place]), "yes" if kept[place] else "no",
            f"{float(loss[place]):.3f}",
        ]  # fmt: skip
    assert len(lines) == count + 1


def test_colour_is_asked_for_or_seen(
    data: Path, tagged: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (data, "--document", 0, "--tags", tagged)
    assert "\x1b[" in shown(capsys, *words, "--colour", "always")
    assert "\x1b[" not in shown(capsys, *words)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[" in shown(capsys, *words)
    assert "\x1b[" not in shown(capsys, *words, "--colour", "never")


def test_what_is_not_there_is_said(
    data: Path, tagged: Path, tmp_path: Path, capsys: Capture
) -> None:
    last = len(sequence_lengths(data)) - 1
    for number in (-1, last + 1):
        error = refusal(capsys, data, "--document", number)
        assert f"document {number}: {data.name} has documents 0 to {last}" in error
    sequences = len(read_table(table_path(tagged)))
    error = refusal(capsys, data, "--sequence", sequences, "--tags", tagged)
    assert f"slm_sequences.parquet has sequences 0 to {sequences - 1}" in error
    assert "--sequence needs the table" in refusal(capsys, data, "--sequence", 0)
    error = refusal(capsys, data, "--document", 0, "--tags", tmp_path / "none")
    assert "none.tags.json: no such file" in error
    tokenizer = Path(f"{data}.tokenizer").rename(tmp_path / "moved")
    assert "give --tokenizer" in refusal(capsys, data, "--document", 0)
    assert "◀" in shown(capsys, data, "--document", 0, "--tokenizer", tokenizer)


# Checking


def test_good_files_are_verified(data: Path, tagged: Path, tmp_path: Path, capsys: Capture) -> None:
    output = str(tmp_path / "out")
    assert call("select", "--tags", str(tagged), "--output-prefix", output) == 0
    capsys.readouterr()
    out = shown(capsys, data, "--verify", "--tags", tagged, "--selection", f"{output}.parquet")
    for path in (bin_path(data), idx_path(data), *(Path(f"{tagged}{name}") for name in FILES)):
        assert f"{path}: {path.stat().st_size} bytes, as in " in out
    manifest = read_tag_manifest(tagged)
    assert f"{manifest.sequences} sequences, " in out
    assert f"{manifest.kept_tokens} kept tokens; those of each sequence are as in the mask" in out
    assert out.count("the same when selected again: top") == 2
    assert f"scores as in {table_path(tagged)}" in out
    assert out.endswith("all of it verified\n")
    assert shown(capsys, data, "--verify").endswith("all of it verified\n")


@pytest.mark.parametrize("name", [".bin", ".idx", *FILES])
def test_one_flipped_bit_is_found(name: str, data: Path, tmp_path: Path, capsys: Capture) -> None:
    write_tags(tmp_path / "slm", data)
    path = Path(f"{data}{name}" if name in (".bin", ".idx") else f"{tmp_path / 'slm'}{name}")
    content = bytearray(path.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        content[place] ^= 4
        path.write_bytes(content)
        error = refusal(capsys, data, "--verify", "--tags", tmp_path / "slm")
        assert path.name in error, place
        content[place] ^= 4
    path.write_bytes(content)
    shown(capsys, data, "--verify", "--tags", tmp_path / "slm")


def test_manifest_that_miscounts_is_found(data: Path, tmp_path: Path, capsys: Capture) -> None:
    manifest = write_tags(tmp_path / "slm", data)
    for changed, message in (
        ({"kept_tokens": manifest.kept_tokens + 1}, "kept tokens in"),
        ({"sequences": manifest.sequences + 1}, "kept tokens in"),
        ({"format_version": 2}, "format 2, expected 1"),
        ({"files": []}, "is not a manifest of `megatron-salt tag`"),
    ):
        text = dataclasses.replace(manifest, **changed).to_json()
        tag_manifest_path(tmp_path / "slm").write_text(text)
        error = refusal(capsys, data, "--verify", "--tags", tmp_path / "slm")
        assert "slm.tags.json" in error and message in error


def test_tags_of_other_data_or_another_model_are_found(
    data: Path, tmp_path: Path, capsys: Capture
) -> None:
    write_tags(tmp_path / "slm", data)
    write_tags(tmp_path / "two", data, seed=1, model="two")
    lengths = sequence_lengths(data)
    stream = read_stream(open_indexed(data), 0, int(lengths.sum()))[::-1].copy()
    write_indexed(tmp_path / "other", np.split(stream, np.cumsum(lengths)[:-1]))
    words = ("--verify", "--tokenizer", f"{data}.tokenizer", "--tags", tmp_path / "slm")
    error = refusal(capsys, tmp_path / "other", *words)
    assert f"made of the dataset {data.name}, and" in error and "other.bin is not that one" in error
    error = refusal(capsys, tmp_path / "other", "--document", 0, *words[1:])
    assert "other.bin is not that one" in error
    # Files of another set of tags, and then a manifest that believes them.
    for name in ("_mask.bin", "_loss.bin", "_sequences.parquet"):
        kept = Path(f"{tmp_path / 'slm'}{name}").read_bytes()
        shutil.copy(f"{tmp_path / 'two'}{name}", f"{tmp_path / 'slm'}{name}")
        error = refusal(capsys, data, "--verify", "--tags", tmp_path / "slm")
        assert f"slm{name}" in error
        manifest = read_tag_manifest(tmp_path / "slm")
        write_manifest(tmp_path / "slm", manifest.origin, manifest.kept_tokens)
        error = refusal(capsys, data, "--verify", "--tags", tmp_path / "slm")
        expected = {
            "_mask.bin": r"slm_sequences.parquet: kept of sequence \d+ is \d+, by .*slm_mask.bin",
            "_loss.bin": r"slm_sequences.parquet: mean_all of sequence 0 is .*, by .*slm_loss.bin",
            "_sequences.parquet": r"do not belong together: they are of two/step_7 and slm/step_7",
        }
        assert re.search(expected[name], error)
        Path(f"{tmp_path / 'slm'}{name}").write_bytes(kept)
        write_manifest(tmp_path / "slm", manifest.origin, manifest.kept_tokens)
        shown(capsys, data, "--verify", "--tags", tmp_path / "slm")


def changed(name: str, place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[name] = columns[name].copy()
        columns[name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("kept", 5, 0), "kept"),
        (changed("start", 5, 0), "start of sequence 5 is 0, by the data it is"),
        (changed("tokens", 5, 0), "tokens of sequence 5 is 0, by the data it is"),
        (changed("sequence", 5, 4), "sequence of sequence 5 is 4, by the data it is 5"),
        (changed("score", 5, 1.0), "its scores are not its median_drop"),
        (changed("mean_all", 5, 1.0), "mean_all"),
        (lambda columns: columns.update(selected=~columns["selected"]), "not those of its rule"),
        (lambda columns: columns.pop("selected"), "column selected is missing"),
        (lambda columns: columns.update(kept=columns["score"]), "column kept is of type float32"),
        (lambda columns: columns.update({k: v[:-1] for k, v in columns.items()}), "sequences, its"),
    ],
)
def test_wrong_table_is_found(
    change: Callable[[dict[str, Any]], None],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """As the tags' own table, whose manifest believes it, and as a selection, which has none."""
    manifest = write_tags(tmp_path / "slm", data)
    good = read_table(table_path(tmp_path / "slm"))
    columns = dict(good.columns)
    change(columns)
    bad = dataclasses.replace(good, columns=columns)
    write_table(tmp_path / "bad.parquet", bad)
    words = ("--verify", "--tags", tmp_path / "slm")
    error = refusal(capsys, data, *words, "--selection", tmp_path / "bad.parquet")
    assert "bad.parquet" in error and message in error
    write_table(table_path(tmp_path / "slm"), bad)
    write_manifest(tmp_path / "slm", manifest.origin, manifest.kept_tokens)
    error = refusal(capsys, data, *words)
    assert "slm_sequences.parquet" in error and message in error


@pytest.mark.parametrize(
    "words",
    [
        ["--top-fraction", "0.3"],
        ["--top-fraction", "0.3", "0.1"],
        ["--random-fraction", "0.3", "0.1"],
        ["--random-fraction", "0.4"],
        ["--bottom-fraction", "0.3", "--reference", "{ref}", "{ref}"],
        ["--score-range", "0.2", "1.5", "--score", "mean", "--masked", "zero"],
    ],
)
def test_selections_of_several_sources_are_verified(
    words: list[str], data: Path, tmp_path: Path, capsys: Capture
) -> None:
    for place, name in enumerate(("one", "two")):
        write_tags(tmp_path / name, data, seed=place)
    write_tags(tmp_path / "ref", data, seed=9, model="small")
    words = [word.format(ref=tmp_path / "ref") for word in words]
    tags = [str(tmp_path / name) for name in ("one", "two")]
    output = tmp_path / "out"
    assert call("select", "--tags", *tags, "--output-prefix", str(output), *words) == 0
    rules = []
    for name in ("one", "two"):
        path = Path(f"{output}_{name}.parquet")
        out = shown(capsys, data, "--verify", "--tags", tmp_path / name, "--selection", path)
        rules.append(read_table(path).rule)
        selection = out[out.index(f"{path}: ") :]
        again = "other sources competed: one, two" if "sources" in rules[-1] else "selected again:"
        assert again in selection
        # It says so at the end, too, if something was not made again.
        partly = "sources" in rules[-1] or "reference" in rules[-1]
        assert out.endswith(
            "verified, but for what was not made again\n" if partly else "all of it verified\n"
        )
        assert ("scores not made again, other tags are needed: small" in selection) == (
            "reference" in rules[-1] and "sources" not in rules[-1]
        )
    joint = words[0] != "--score-range" and sum(word.startswith("0.") for word in words) == 1
    assert [("sources" in rule) for rule in rules] == [joint, joint]


def test_real_tags_are_shown_verified_and_selected_from(
    dataset: Path, teacher: Path, tmp_path: Path, capsys: Capture
) -> None:
    """From a model to a selection, through the commands."""
    run_ranks(1, _tag, str(dataset), str(teacher), str(tmp_path / "slm"))
    output = tmp_path / "out"
    assert call(
        "select", "--tags", tmp_path / "slm", "--output-prefix", output, "--data", dataset,
        "--top-fraction", "0.25", "--score", "entropy",
    ) == 0  # fmt: skip
    table = read_table(f"{output}.parquet")
    count = len(Sequences.of(sequence_lengths(dataset), 16))
    assert np.count_nonzero(table.columns["selected"]) == int(count / 4 + 0.5)
    entropy = table.columns["entropy_drop"]
    low = entropy[table.columns["selected"]].min()
    assert low >= np.nanmax(entropy[~table.columns["selected"]])
    capsys.readouterr()
    words = ("--tags", tmp_path / "slm", "--selection", f"{output}.parquet")
    out = shown(capsys, dataset, "--verify", *words)
    assert f"{count} sequences, windows of 16 tokens, cover the stream" in out
    assert "of the stored loss" in out and "of the stored entropy" in out
    assert out.endswith("all of it verified\n")
    out = shown(capsys, dataset, "--sequence", 3, *words)
    assert "window 3: score " in out and "16 tokens, [48, 64)" in out
    manifest = json.loads(tag_manifest_path(tmp_path / "slm").read_text())
    assert manifest["origin"]["tokenizer_fingerprint"] == (
        load_tokenizer(f"{dataset}.tokenizer").fingerprint
    )
    assert read_dataset_manifest(dataset) is not None


def _tag(dataset: str, teacher: str, output_prefix: str) -> None:
    from megatron_salt.parallel.groups import initialize
    from megatron_salt.scoring.tagging import TagRequest, tag

    request = TagRequest(
        data=dataset, teacher=teacher, output_prefix=output_prefix, window=16, top_k=20,
        store=("loss", "entropy"), rule=Rule(fraction=0.5),
    )  # fmt: skip
    tag(request, initialize(1, 1, timeout_minutes=2.0))
