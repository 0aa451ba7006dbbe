"""The corpus made of source files: what is taken, in which order, and what is left out."""

import json
from pathlib import Path

import pytest
from commands import call

from megatron_salt.corpus.python_sources import make_corpus

LONG = "value = 1  # a line that is long enough to be kept as a document\n" * 2


def read_records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree with files to keep and files of each kind to leave out."""
    root = tmp_path / "tree"
    for index in range(20):
        folder = root / f"package{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{index}.py").write_text(f"# {index}\n{LONG}")
    (root / "notes.rst").write_text("é" + LONG, encoding="utf-8")
    (root / "short.py").write_text("x = 1\n" + " " * 1000)
    (root / "twin.py").write_text(f"# 0\n{LONG}")
    (root / "latin1.py").write_bytes(b"# caf\xe9\n" + LONG.encode())
    (root / "data.bin").write_text(LONG)
    for name in ("site-packages", "__pycache__"):
        (root / name).mkdir()
        (root / name / "other.py").write_text(f"# {name}\n{LONG}")
    return root


def test_keeps_each_text_once_with_its_relative_path(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "corpus.jsonl"
    report = make_corpus(output, sources=[source])
    records = read_records(output)
    assert (report.documents, report.short, report.duplicate, report.not_utf8) == (21, 1, 1, 1)
    assert report.output_bytes == output.stat().st_size
    assert {record["source"] for record in records} == {"notes.rst"} | {
        f"package{index % 3}/module{index}.py" for index in range(20)
    }
    assert [path.name for path in output.parent.iterdir()] == ["corpus.jsonl"]
    for record in records:
        assert record["text"] == (source / record["source"]).read_text(encoding="utf-8")


def test_order_depends_on_the_seed_only(source: Path, tmp_path: Path) -> None:
    contents = []
    for seed in (1, 1, 2):
        make_corpus(tmp_path / "corpus.jsonl", sources=[source], seed=seed)
        contents.append((tmp_path / "corpus.jsonl").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert sorted(contents[0].splitlines()) == sorted(contents[2].splitlines())
    names = [json.loads(line)["source"] for line in contents[0].splitlines()]
    assert names != sorted(names)


def test_max_bytes_bounds_the_output(source: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "all.jsonl", sources=[source])
    report = make_corpus(tmp_path / "some.jsonl", sources=[source], max_bytes=1000)
    assert 700 < (tmp_path / "some.jsonl").stat().st_size <= 1000
    assert report.documents + report.over_limit == 21
    content = (tmp_path / "some.jsonl").read_bytes()
    assert (tmp_path / "all.jsonl").read_bytes().startswith(content)


def test_default_source_is_the_standard_library(corpus_path: Path) -> None:
    records = read_records(corpus_path)
    assert len(records) > 50
    for record in records:
        assert not record["source"].startswith("/") and "site-packages" not in record["source"]
        assert set(record) == {"text", "source"}


def test_nothing_to_write_is_an_error_and_keeps_the_old_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "corpus.jsonl"
    output.write_text("old")
    arguments = ["--output", str(output), "--source"]
    assert call("corpus", *arguments, str(source), "--max-bytes", "10") == 2
    assert "no document to write: 21 usable files" in capsys.readouterr().err
    assert call("corpus", *arguments, str(tmp_path / "absent")) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert output.read_text() == "old"
    assert call("corpus", *arguments, str(source)) == 0
    assert "21 documents" in capsys.readouterr().out
