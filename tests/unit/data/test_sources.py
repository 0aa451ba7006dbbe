"""Sources of documents: written as ranges, read back, and refused when they do not fit."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_datasets import write_dataset

from megatron_salt.data.manifest import sources_path, verify_dataset
from megatron_salt.data.sources import load_sources
from megatron_salt.files.disk import sha256_of

DOCUMENTS = [[1, 2, 0], [3, 0], [4, 5, 6, 0], [7, 0], [8, 0]]
SOURCES = ["web", "web", "code", "web", "äöü"]


@pytest.fixture
def prefix(tmp_path: Path, sentencepiece_path: Path) -> Path:
    write_dataset(tmp_path / "some", sentencepiece_path, DOCUMENTS, SOURCES)
    return tmp_path / "some"


def test_sources_come_back_from_their_ranges(prefix: Path) -> None:
    ranges = pyarrow.parquet.read_table(sources_path(prefix)).to_pylist()
    assert [(row["start"], row["stop"], row["source"]) for row in ranges] == [
        (0, 2, "web"), (2, 3, "code"), (3, 4, "web"), (4, 5, "äöü"),
    ]  # fmt: skip
    found = load_sources(prefix)
    assert found is not None and sorted(found.names) == ["code", "web", "äöü"]
    assert [found.names[place] for place in found.of_documents] == SOURCES
    assert found.documents_of(["web", "äöü"]).tolist() == [0, 1, 3, 4]
    with pytest.raises(ValueError, match=r"no source 'wed'. Did you mean 'web'\? Of 3 sources: "):
        found.documents_of(["web", "wed"])
    assert verify_dataset(prefix, hashes=True) is not None


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 2), (2, 4)],  # too few
        [(0, 2), (2, 6)],  # too many
        [(0, 2), (3, 5)],  # a gap
        [(0, 3), (2, 5)],  # an overlap
        [(1, 2), (2, 5)],  # not from the start
        [(0, 2), (2, 2), (2, 5)],  # an empty one
        [],
    ],
)
def test_ranges_must_cover_the_documents(prefix: Path, ranges: list[tuple[int, int]]) -> None:
    starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
    columns = {"start": pyarrow.array(starts, pyarrow.int64()),
               "stop": pyarrow.array(stops, pyarrow.int64()),
               "source": pyarrow.array(["x"] * len(ranges), pyarrow.string())}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), sources_path(prefix))
    path = Path(f"{prefix}.manifest.json")
    content = json.loads(path.read_text())
    content["settings"]["sources_sha256"] = sha256_of(sources_path(prefix))
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"sources.parquet does not cover exactly the 5 documents"):
        load_sources(prefix)


def test_file_and_manifest_belong_together(
    prefix: Path, tmp_path: Path, sentencepiece_path: Path
) -> None:
    plain = tmp_path / "plain"
    write_dataset(plain, sentencepiece_path, DOCUMENTS)
    assert load_sources(plain) is None and not sources_path(plain).exists()
    content = sources_path(prefix).read_bytes()
    sources_path(plain).write_bytes(content)  # of another dataset
    sources_path(prefix).write_bytes(content[:-1] + b"?")
    for each in (plain, prefix):
        for check in (load_sources, lambda prefix: verify_dataset(prefix, hashes=True)):
            with pytest.raises(ValueError, match=rf"corrupt: {each}.sources.parquet has sha256"):
                check(each)
        verify_dataset(each)  # training reads no sources
    sources_path(prefix).unlink()
    for check in (load_sources, lambda prefix: verify_dataset(prefix, hashes=True)):
        with pytest.raises(FileNotFoundError, match="missing dataset file .*sources.parquet"):
            check(prefix)
