"""Merged datasets and subsets: megatron-core's bytes, sources, manifests, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from small_datasets import assert_bytes_of_builder, documents_of, write_dataset

from megatron_salt.corpus.rearrange import merge_datasets, subset_dataset
from megatron_salt.data.manifest import DatasetManifest, read_dataset_manifest, verify_dataset
from megatron_salt.data.sources import load_sources
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.files.disk import sha256_of

FIRST = [[1, 2, 3, 0], [4, 0], [5, 6, 0]]
SECOND = [[7, 0], [8, 9, 10, 11, 0], [4, 0]]
MANY = [[number, number // 100, 0] for number in range(1, 201)]


@pytest.fixture
def first(tmp_path: Path, sentencepiece_path: Path) -> Path:
    prefix = tmp_path / "first"
    write_dataset(prefix, sentencepiece_path, FIRST, ["web", "code", "web"], bad_lines=3)
    return prefix


@pytest.fixture
def second(tmp_path: Path, sentencepiece_path: Path) -> Path:
    write_dataset(tmp_path / "second", sentencepiece_path, SECOND, bad_lines=4)
    return tmp_path / "second"


@pytest.fixture
def many(tmp_path: Path, sentencepiece_path: Path) -> Path:
    sources = ["web" if number % 3 else "code" for number in range(200)]
    write_dataset(tmp_path / "many", sentencepiece_path, MANY, sources, bad_lines=4)
    return tmp_path / "many"


def sources_of(prefix: Path) -> list[str]:
    found = load_sources(prefix)
    assert found is not None
    return [found.names[place] for place in found.of_documents]


def written(made: DatasetManifest) -> DatasetManifest:
    """As it is after it was read from its file."""
    return DatasetManifest(**{**json.loads(made.to_json()), "inputs": made.inputs})


def test_merged_bytes_are_those_of_the_builder(
    first: Path, second: Path, sentencepiece_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    made = merge_datasets([first, second, first], out)
    assert_bytes_of_builder(out, [*FIRST, *SECOND, *FIRST], tmp_path)
    assert sources_of(out) == ["web", "code", "web", *["second"] * 3, "web", "code", "web"]
    assert (made.documents, made.tokens) == (9, 27) == (9, sum(map(len, documents_of(out))))
    assert (made.bad_lines, made.empty_documents) == (10, 3)
    assert [record.name for record in made.inputs] == ["first.bin", "second.bin", "first.bin"]
    assert made.inputs[1].sha256 == sha256_of(f"{second}.bin")
    assert [each["name"] for each in made.settings["datasets"]] == ["first", "second", "first"]
    assert made.settings["datasets"][1]["inputs"][0]["name"] == "second.jsonl"
    tokenizer = load_tokenizer(sentencepiece_path)
    assert verify_dataset(out, tokenizer, hashes=True) == written(made)
    assert load_tokenizer(f"{out}.tokenizer").fingerprint == tokenizer.fingerprint
    assert not Path(f"{out}.partial").exists()
    again = merge_datasets([out, second], tmp_path / "twice")
    assert again.documents == 12 and again.settings["append_eod"] is True


def test_what_does_not_fit_is_not_merged(
    first: Path,
    second: Path,
    tmp_path: Path,
    sentencepiece_path: Path,
    hugging_face_path: Path,
) -> None:
    write_dataset(tmp_path / "other", hugging_face_path, SECOND)
    with pytest.raises(
        ValueError, match=r"in the dataset .*/other, '<unk>' in the tokenizer .*/first"
    ):
        merge_datasets([first, tmp_path / "other"], tmp_path / "out")
    write_dataset(tmp_path / "no_eod", sentencepiece_path, SECOND, append_eod=False)
    with pytest.raises(ValueError, match=r"no_eod has .*False\), not .*True\) as .*first"):
        merge_datasets([first, tmp_path / "no_eod"], tmp_path / "out")
    builder = IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.uint16)
    builder.add_document([1, 2], [2])
    builder.finalize(str(tmp_path / "plain.idx"))
    with pytest.raises(ValueError, match="plain has no manifest"):
        merge_datasets([first, tmp_path / "plain"], tmp_path / "out")
    with pytest.raises(ValueError, match="no dataset to merge"):
        merge_datasets([], tmp_path / "out")
    with open(f"{second}.bin", "r+b") as file:
        file.write(b"\1")
    with pytest.raises(ValueError, match=r"corrupt: .*second.bin"):
        merge_datasets([first, second], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_ids_of_another_width_are_not_merged(first: Path, second: Path, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{second}.bin", dtype=np.int32)
    for tokens in SECOND:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{second}.idx")
    path = Path(f"{second}.manifest.json")
    content = json.loads(path.read_text())
    for end in ("bin", "idx"):
        written_file = Path(f"{second}.{end}")
        content |= {f"{end}_bytes": written_file.stat().st_size}
        content |= {f"{end}_sha256": sha256_of(written_file)}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"second has .*int32.*not .*uint16"):
        merge_datasets([first, second], tmp_path / "out")


def test_an_input_may_be_replaced_but_only_when_asked(first: Path, second: Path) -> None:
    before = Path(f"{first}.bin").read_bytes()
    for make in (merge_datasets, lambda prefixes, out: subset_dataset(second, out, documents=1)):
        with pytest.raises(ValueError, match="first is a dataset; --overwrite replaces it"):
            make([second], first)
    assert Path(f"{first}.bin").read_bytes() == before
    merge_datasets([first, second], first, overwrite=True)
    assert documents_of(first) == [*FIRST, *SECOND]
    subset_dataset(first, first, sources=["second"], overwrite=True)
    assert documents_of(first) == SECOND
    assert verify_dataset(first, hashes=True) is not None


def test_a_subset_keeps_the_order(many: Path, tmp_path: Path) -> None:
    code = [number for number in range(200) if number % 3 == 0]
    made = subset_dataset(many, tmp_path / "code", sources=["code"])
    assert_bytes_of_builder(tmp_path / "code", [MANY[number] for number in code], tmp_path)
    assert sources_of(tmp_path / "code") == ["code"] * len(code)
    assert (made.documents, made.bad_lines, made.empty_documents) == (len(code), 0, 0)
    assert made.settings["sources"] == ["code"] and made.settings["datasets"][0]["name"] == "many"
    assert made.inputs[0].name == "many.bin"
    assert verify_dataset(tmp_path / "code", hashes=True) == written(made)
    drawn = {}
    for name, asked in {
        "ten": {"documents": 10}, "same": {"share": 0.05}, "more": {"share": 0.3},
        "other": {"documents": 10, "seed": 7}, "all": {"share": 1.0},
        "web": {"documents": 10, "sources": ["web"]},
    }.items():  # fmt: skip
        subset_dataset(many, tmp_path / name, **asked)
        drawn[name] = [MANY.index(tokens) for tokens in documents_of(tmp_path / name)]
        assert drawn[name] == sorted(set(drawn[name]))
    assert len(drawn["ten"]) == 10 and len(drawn["more"]) == 60 and len(drawn["all"]) == 200
    assert drawn["ten"] == drawn["same"] and set(drawn["ten"]) < set(drawn["more"])
    assert drawn["other"] != drawn["ten"]
    # Spread over all of it, not its beginning.
    assert 60 < np.mean(drawn["more"]) < 140 and min(drawn["more"]) < 20 < 180 < max(drawn["more"])
    assert len(drawn["web"]) == 10 and not set(drawn["web"]) & set(code)
    assert sources_of(tmp_path / "more") == ["web" if n % 3 else "code" for n in drawn["more"]]


def test_documents_of_several_sequences_stay_whole(first: Path, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{first}.bin", dtype=np.uint16)
    for tokens, lengths in [([1, 2, 3], [1, 2]), ([4], [1]), ([5, 6, 7, 8], [2, 0, 2])]:
        builder.add_document(tokens, lengths)
    builder.finalize(f"{first}.idx")
    path = Path(f"{first}.manifest.json")
    content = json.loads(path.read_text())
    content |= {f"{end}_sha256": sha256_of(f"{first}.{end}") for end in ("bin", "idx")}
    content |= {f"{end}_bytes": Path(f"{first}.{end}").stat().st_size for end in ("bin", "idx")}
    content |= {"tokens": 8}
    path.write_text(json.dumps(content))
    made = subset_dataset(first, tmp_path / "web", sources=["web"])
    data = IndexedDataset(str(tmp_path / "web"))
    assert data.sequence_lengths.tolist() == [1, 2, 2, 0, 2]
    assert data.document_indices.tolist() == [0, 2, 5]
    assert np.concatenate([data[0:5]][0]).tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert (made.documents, made.tokens) == (2, 7)


def test_impossible_subsets_are_refused(first: Path, second: Path, tmp_path: Path) -> None:
    for asked, message in [
        ({}, "give one of them, or --source"),
        ({"share": 0.5, "documents": 3}, "give one of them"),
        ({"share": 0.5, "documents": 3, "sources": ["web"]}, "give one of them"),
        ({"share": 0.0}, "--share 0.0: above 0"),
        ({"share": 1.01}, "--share 1.01: above 0, at most 1"),
        ({"share": float("nan")}, "share nan"),
        ({"share": 0.5, "seed": -1}, "--seed -1: at least 0"),
        ({"documents": 4}, r"4 documents asked for, .*first has 3 such"),
        ({"documents": 0}, "0 documents asked for"),
        ({"share": 0.01}, "0 documents asked for"),
        ({"documents": 2, "sources": ["code"]}, "has 1 such"),
        ({"sources": ["coda"]}, r"no source 'coda'. Did you mean 'code'\? Of 2 sources: web, code"),
    ]:
        with pytest.raises(ValueError, match=message):
            subset_dataset(first, tmp_path / "out", **asked)
    with pytest.raises(ValueError, match=r"no source 'web'. Of 1 sources: second"):
        subset_dataset(second, tmp_path / "out", sources=["web"])
    assert not list(tmp_path.glob("out*"))
    assert read_dataset_manifest(first) is not None
