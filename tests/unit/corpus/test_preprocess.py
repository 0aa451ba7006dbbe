"""Preprocessing: exact tokens, any worker count, bad input, killed runs, checks at load."""

import dataclasses
import fcntl
import gzip
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard
from commands import ROOT, call
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from small_datasets import assert_bytes_of_builder
from small_datasets import documents_of as documents

from megatron_salt.corpus import preprocess as library
from megatron_salt.corpus.preprocess import PreprocessSettings, preprocess
from megatron_salt.corpus.text_files import LineBlock, iter_line_blocks, parse_documents
from megatron_salt.data.manifest import (
    dataset_manifest_path,
    idx_path,
    read_dataset_manifest,
    verify_dataset,
)
from megatron_salt.data.sources import load_sources
from megatron_salt.data.tags import open_indexed
from megatron_salt.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.processes

REPO = ROOT
TEXTS = ("first document\n", "zweites Dokument: äöü", "third 😀\tdocument")
WriteJsonl = Callable[[str, Sequence[str]], Path]


@pytest.fixture(scope="session")
def dataset(
    corpus_path: Path, sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The prefix of the whole test corpus, tokenised by one worker."""
    prefix = tmp_path_factory.mktemp("dataset") / "corpus"
    preprocess([corpus_path], prefix, sentencepiece_path, workers=1)
    return Path(f"{prefix}_text_document")


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset to damage."""
    shutil.copytree(dataset.parent, tmp_path / "copy")
    return tmp_path / "copy" / dataset.name


def file_names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# What is written


def test_megatron_reads_back_exactly_the_tokens(
    dataset: Path, corpus_texts: list[str], sentencepiece_path: Path
) -> None:
    tokenizer = load_tokenizer(sentencepiece_path)
    expected = [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch(corpus_texts)]
    data = open_indexed(dataset)
    assert documents(dataset) == expected
    assert data.sequence_lengths.tolist() == [len(ids) for ids in expected]
    assert data.document_indices.tolist() == list(range(len(expected) + 1))
    assert data.index.dtype == np.uint16
    assert tokenizer.decode(expected[7][:-1]) == corpus_texts[7]


def test_bytes_are_those_of_the_builders_own_add_document(dataset: Path, tmp_path: Path) -> None:
    assert_bytes_of_builder(dataset, documents(dataset), tmp_path)


def test_number_of_workers_changes_no_byte(
    dataset: Path, corpus_path: Path, sentencepiece_path: Path, tmp_path: Path
) -> None:
    assert len(list(iter_line_blocks(corpus_path))) > 2  # several batches to get out of order
    preprocess([corpus_path], tmp_path / "corpus", sentencepiece_path, workers=2)
    for suffix in ("bin", "idx", "manifest.json"):
        two = tmp_path / f"{dataset.name}.{suffix}"
        assert two.read_bytes() == Path(f"{dataset}.{suffix}").read_bytes()
    assert file_names(tmp_path) == file_names(dataset.parent)


def test_manifest_says_what_was_read_and_written(
    dataset: Path, corpus_path: Path, corpus_texts: list[str], sentencepiece_path: Path
) -> None:
    manifest = read_dataset_manifest(dataset)
    assert manifest is not None
    tokenizer = load_tokenizer(sentencepiece_path)
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert (manifest.vocab_size, manifest.eod) == (512, tokenizer.eod)
    assert manifest.documents == len(corpus_texts)
    assert manifest.tokens == sum(map(len, documents(dataset)))
    (source,) = manifest.inputs
    assert source.name == corpus_path.name
    assert source.sha256 == hashlib.sha256(corpus_path.read_bytes()).hexdigest()
    assert source.size_bytes == manifest.input_bytes == corpus_path.stat().st_size
    for suffix in ("bin", "idx"):
        content = Path(f"{dataset}.{suffix}").read_bytes()
        assert getattr(manifest, f"{suffix}_bytes") == len(content)
        assert getattr(manifest, f"{suffix}_sha256") == hashlib.sha256(content).hexdigest()
    assert manifest.versions["megatron-core"]
    assert str(corpus_path.parent) not in Path(f"{dataset}.manifest.json").read_text()
    assert load_tokenizer(f"{dataset}.tokenizer").fingerprint == tokenizer.fingerprint


def test_compressed_and_several_files_in_the_given_order(
    write_jsonl: WriteJsonl, hugging_face_path: Path, tmp_path: Path
) -> None:
    plain = write_jsonl("a.jsonl", TEXTS[:1])
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    zipped = tmp_path / "b.jsonl.gz"  # two members, zero padding between and after them
    zipped.write_bytes(gzip.compress(lines[1]) + b"\0" * 512 + gzip.compress(lines[2]) + b"\0" * 9)
    packed = tmp_path / "c.jsonl.zst"  # two frames, the last line without an end
    compress = zstandard.ZstdCompressor().compress
    packed.write_bytes(compress(lines[2]) + compress(lines[0].rstrip()))
    manifest = preprocess([packed, plain, zipped], tmp_path / "out", hugging_face_path, workers=2)
    tokenizer = load_tokenizer(hugging_face_path)
    decoded = [tokenizer.decode(ids[:-1]) for ids in documents(tmp_path / "out_text_document")]
    assert decoded == [TEXTS[2], TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[2]]
    assert [record.name for record in manifest.inputs] == [packed.name, plain.name, zipped.name]
    assert manifest.inputs[0].sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()


def test_other_key_and_no_eod(hugging_face_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "no", "content": "yes"}\n')
    settings = PreprocessSettings(json_key="content", append_eod=False)
    preprocess([path], tmp_path / "out", hugging_face_path, settings, workers=1)
    expected = load_tokenizer(hugging_face_path).encode_batch(["yes"])
    assert documents(tmp_path / "out_content_document") == expected


def test_large_vocabulary_is_written_in_int32(
    hugging_face_path: Path, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    content = json.loads(hugging_face_path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["z"] = 70_000
    (tmp_path / "large.json").write_text(json.dumps(content))
    preprocess([write_jsonl("in.jsonl", ["z"])], tmp_path / "out", tmp_path / "large.json")
    data = open_indexed(tmp_path / "out_text_document")
    assert data.index.dtype == np.int32 and data[0].tolist() == [70_000, 0]


def test_ids_outside_the_vocabulary_are_never_written(
    sentencepiece_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(sentencepiece_path)
    tokenizer.vocab_size = 100
    monkeypatch.setattr(library, "_load_tokenizer_once", lambda path: tokenizer)
    block = LineBlock("in.jsonl", 5, b'{"text": "import os"}\n')
    with pytest.raises(ValueError, match=r"outside its vocabulary of 100, near in.jsonl:5"):
        library._encode_block(block, sentencepiece_path, PreprocessSettings())


# Sources, duplicates, order

RECORDS = [  # three files: so many blocks; text, source
    [("one", "a"), ("two", "b"), ("one", "b"), ("", "c"), ("three", "b")],
    [("four", "a"), ("two", "a"), *((f"more {number}", "d") for number in range(40))],
    [("one", "a"), ("five", "e"), ("more 3", "e"), ("six", "a")],
]


@pytest.fixture
def record_paths(tmp_path: Path) -> list[Path]:
    paths = []
    for number, records in enumerate(RECORDS):
        paths.append(tmp_path / f"{number}.jsonl")
        lines = [json.dumps({"text": text, "source": source}) for text, source in records]
        paths[-1].write_text("\n".join(lines))
    return paths


def test_sources_change_no_byte(
    record_paths: list[Path], sentencepiece_path: Path, tmp_path: Path
) -> None:
    settings = PreprocessSettings(source_key="source")
    made = preprocess(record_paths, tmp_path / "out", sentencepiece_path, settings, workers=1)
    kept = [record for records in RECORDS for record in records if record[0]]
    tokenizer = load_tokenizer(sentencepiece_path)
    expected = [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch([text for text, _ in kept])]
    prefix = tmp_path / "out_text_document"
    assert_bytes_of_builder(prefix, expected, tmp_path)
    found = load_sources(prefix)
    assert found is not None and found.names == ["a", "b", "d", "e"]
    assert [found.names[place] for place in found.of_documents] == [name for _, name in kept]
    assert (made.empty_documents, made.bad_lines, made.settings["duplicates"]) == (1, 0, 0)
    assert verify_dataset(prefix, hashes=True) == made
    preprocess(record_paths, tmp_path / "out", sentencepiece_path, workers=1, overwrite=True)
    assert_bytes_of_builder(prefix, expected, tmp_path)
    assert load_sources(prefix) is None  # the old set went as a whole


@pytest.mark.parametrize("workers", [1, 2])
def test_first_duplicates_stay_and_the_order_is_drawn(
    workers: int,
    record_paths: list[Path],
    sentencepiece_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    settings = PreprocessSettings(source_key="source", deduplicate=True, shuffle_seed=7)
    made = preprocess(record_paths, tmp_path / "out", sentencepiece_path, settings, workers=workers)
    first: dict[str, str] = {}
    for text, source in [record for records in RECORDS for record in records]:
        first.setdefault(text, source)
    del first[""]
    state = np.random.RandomState(np.random.SeedSequence([7]).generate_state(4))
    kept = [list(first.items())[place] for place in state.permutation(len(first))]
    assert kept[-5:] != list(first.items())[-5:]
    tokenizer = load_tokenizer(sentencepiece_path)
    expected = [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch([text for text, _ in kept])]
    prefix = tmp_path / "out_text_document"
    assert_bytes_of_builder(prefix, expected, tmp_path)
    found = load_sources(prefix)
    assert found is not None
    assert [found.names[place] for place in found.of_documents] == [name for _, name in kept]
    assert (made.documents, made.tokens) == (len(kept), sum(map(len, expected)))
    assert (made.settings["duplicates"], made.empty_documents) == (4, 1)
    assert made.settings["deduplicate"] and made.settings["shuffle_seed"] == 7
    assert verify_dataset(prefix, tokenizer, hashes=True) == made
    # A log tells of tokens that are there, not of bytes that were only read.
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text and lines[0].startswith("tokenising: ") and "tokens/s" in lines[0]
    assert "100%" not in lines[0] and ", 0 tokens/s" not in text
    assert any("tokenising: 100%" in line for line in lines)
    assert lines[-1].startswith("writing: 100%")


def test_duplicates_leave_alone_the_order(
    record_paths: list[Path], sentencepiece_path: Path, tmp_path: Path
) -> None:
    settings = PreprocessSettings(deduplicate=True, append_eod=False)
    preprocess(record_paths, tmp_path / "out", sentencepiece_path, settings, workers=1)
    tokenizer = load_tokenizer(sentencepiece_path)
    texts = dict.fromkeys(text for records in RECORDS for text, _ in records if text)
    decoded = [tokenizer.decode(ids) for ids in documents(tmp_path / "out_text_document")]
    assert decoded == list(texts)


def test_a_line_without_a_source_is_bad(sentencepiece_path: Path) -> None:
    lines = ['{"text": "no"}', '{"text": "x", "source": 5}', '{"text": "good", "source": "a"}']
    block = LineBlock("in.jsonl", 1, "\n".join(lines).encode())
    encoded = library._encode_block(
        block, sentencepiece_path, PreprocessSettings(source_key="source")
    )
    assert encoded.bad_lines == 2 and encoded.sources == ["a"] and len(encoded.lengths) == 1
    assert [bad.reason for bad in encoded.shown_bad_lines] == [
        "no key 'source'", "the value of 'source' is int, not a string",
    ]  # fmt: skip
    assert library._encode_block(block, sentencepiece_path, PreprocessSettings()).bad_lines == 0


def test_a_seed_below_zero_is_refused_at_once(record_paths: list[Path], tmp_path: Path) -> None:
    settings = PreprocessSettings(shuffle_seed=-1)
    with pytest.raises(ValueError, match="--shuffle-seed is -1, it must not be negative"):
        preprocess(record_paths, tmp_path / "out", tmp_path / "no tokenizer", settings)


# Bad input

BAD_LINES = (
    b'{"text": "good"}',
    b'{"text": "cut',  # 2
    b"",
    b'{"txt": "no such key"}',  # 4
    b'{"text": 5}',  # 5
    b'["text"]',  # 6
    b'{"text": "\xff\xfe"}',  # 7
    b'{"text": "\\ud800"}',  # 8
    b'{"text": ""}',
    b"[" * 100_000,  # 10
    b'{"text": "also good"}',
)
BAD_NUMBERS = [2, 4, 5, 6, 7, 8, 10]


def test_bad_lines_are_counted_and_named(
    hugging_face_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(BAD_LINES))
    with caplog.at_level(logging.WARNING):
        manifest = preprocess([path], tmp_path / "out", hugging_face_path, workers=1)
    assert (manifest.documents, manifest.bad_lines, manifest.empty_documents) == (2, 7, 1)
    reported = [record.getMessage() for record in caplog.records]
    assert [text.split(": ")[0] for text in reported] == [
        f"bad line {path}:{number}" for number in BAD_NUMBERS
    ]
    assert "no key 'text'" in reported[1] and "int, not a string" in reported[2]
    tokenizer = load_tokenizer(hugging_face_path)
    decoded = [tokenizer.decode(ids[:-1]) for ids in documents(tmp_path / "out_text_document")]
    assert decoded == ["good", "also good"]


def test_twenty_bad_lines_are_shown_and_all_counted(
    hugging_face_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        (tmp_path / name).write_text("{\n" * 15 + '{"text": "good"}\n')
    paths = [tmp_path / name for name in "ab"]
    with caplog.at_level(logging.WARNING):
        manifest = preprocess(paths, tmp_path / "out", hugging_face_path, workers=1)
    assert manifest.bad_lines == 30 and manifest.documents == 2
    assert len(caplog.records) == 20
    assert caplog.records[-1].getMessage().startswith(f"bad line {paths[1]}:5: not JSON")


def test_strict_stops_at_the_first_bad_line(
    hugging_face_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(BAD_LINES))
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "out"), "--strict"]
    arguments += ["--tokenizer", str(hugging_face_path), "--workers", "2"]
    assert call("preprocess", *arguments) == 2
    assert f"bad line {path}:2: not JSON" in capsys.readouterr().err
    assert file_names(tmp_path) == {"in.jsonl"}


def test_line_numbers_hold_across_blocks(tmp_path: Path) -> None:
    lines = [b"{}" if index % 7 == 0 else b'{"text": "%d"}' % index for index in range(1, 400)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    for block_bytes in (1, 10, 64, 1000, 10**6):
        texts, bad_numbers = [], []
        for block in iter_line_blocks(tmp_path / "in.jsonl", block_bytes=block_bytes):
            good, bad = parse_documents(block, "text")
            texts += good
            bad_numbers += [line.line for line in bad]
        assert texts == [[str(index)] for index in range(1, 400) if index % 7]
        assert bad_numbers == list(range(7, 400, 7))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_damaged_compressed_input_is_an_error(
    suffix: str, damage: str, hugging_face_path: Path, tmp_path: Path
) -> None:
    content = b"".join(b'{"text": "%d"}\n' % index for index in range(2000))
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    packed = gzip.compress(content) if suffix == "gz" else compressor.compress(content)
    broken = packed[:-2] if damage == "truncated" else packed[:-6] + b"\1" + packed[-5:]
    if damage == "corrupt" and suffix == "zst":
        broken = packed[:-1] + bytes([packed[-1] ^ 1])
    path = tmp_path / f"in.jsonl.{suffix}"
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=rf"in.jsonl.{suffix}: {damage} compressed data"):
        preprocess([path], tmp_path / "out", hugging_face_path, workers=1)
    assert file_names(tmp_path) == {path.name}


def test_empty_corpus_is_an_error(
    write_jsonl: WriteJsonl, hugging_face_path: Path, tmp_path: Path
) -> None:
    paths = [write_jsonl("a.jsonl", ["", ""]), write_jsonl("b.jsonl", [])]
    with pytest.raises(ValueError, match=r"no document in 2 input files: 2 empty documents"):
        preprocess(paths, tmp_path / "out", hugging_face_path, workers=1)
    assert file_names(tmp_path) == {"a.jsonl", "b.jsonl"}
    with pytest.raises(FileNotFoundError, match=r"--input .*absent.jsonl: no such file"):
        preprocess([tmp_path / "absent.jsonl"], tmp_path / "out", hugging_face_path)
    with pytest.raises(ValueError, match="--workers is 0"):
        preprocess(paths, tmp_path / "out", hugging_face_path, workers=0)


# Runs that end early


def test_death_of_a_worker_is_an_error_not_a_hang(
    corpus_path: Path, sentencepiece_path: Path, tmp_path: Path
) -> None:
    stopped = threading.Event()

    def kill_first_worker() -> None:
        while not stopped.wait(0.01):
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill_first_worker)
    killer.start()
    try:
        with pytest.raises(RuntimeError, match=r"a worker process died.*fewer --workers"):
            preprocess([corpus_path], tmp_path / "out", sentencepiece_path, workers=1)
    finally:
        stopped.set()
        killer.join()
    assert file_names(tmp_path) == set()


RUN_WITH_SMALL_WINDOW = """
import sys
from megatron_salt.corpus import preprocess
preprocess.MIN_BLOCKS_IN_FLIGHT = 1  # write the first block soon
from megatron_salt.__main__ import main
if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
"""


@pytest.fixture
def half_done_run(
    corpus_path: Path, sentencepiece_path: Path, tmp_path: Path
) -> Iterator[subprocess.Popen]:
    """A run that has written tokens and waits for the rest of its input, a named pipe."""
    pipe = tmp_path / "in.jsonl"
    os.mkfifo(pipe)
    arguments = ["--input", str(pipe), "--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    command = [sys.executable, "-c", RUN_WITH_SMALL_WINDOW, *arguments]
    run = subprocess.Popen([*command, "--tokenizer", str(sentencepiece_path)], cwd=REPO)
    partial = tmp_path / "out_text_document.partial" / "out_text_document.bin"
    with open(pipe, "wb", buffering=0) as feed:
        for _ in range(3):
            feed.write(corpus_path.read_bytes())
        wait_until(lambda: partial.exists() and partial.stat().st_size > 0, run)
        yield run
        run.kill()
        run.wait()


def wait_until(condition: Callable[[], bool], run: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited a minute"
        assert run is None or run.poll() is None, "the run ended by itself"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_killed_run_leaves_no_final_file_and_no_worker(
    half_done_run: subprocess.Popen,
    write_jsonl: WriteJsonl,
    sentencepiece_path: Path,
    tmp_path: Path,
) -> None:
    workers = children(half_done_run.pid)
    assert workers
    small = write_jsonl("small.jsonl", TEXTS)
    with pytest.raises(ValueError, match="another run is writing"):
        preprocess([small], tmp_path / "out", sentencepiece_path, workers=1)
    half_done_run.send_signal(signal.SIGKILL)
    half_done_run.wait()
    assert file_names(tmp_path) == {"in.jsonl", "small.jsonl", "out_text_document.partial"}
    wait_until(lambda: not any(map(is_running, workers)))
    with pytest.raises(FileNotFoundError, match="there is no dataset"):
        verify_dataset(tmp_path / "out_text_document")
    preprocess([small], tmp_path / "out", sentencepiece_path, workers=1)
    assert "out_text_document.partial" not in file_names(tmp_path)
    assert len(documents(tmp_path / "out_text_document")) == 3


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_interrupted_replacement_never_mixes_two_runs(
    renames: int,
    copied: Path,
    write_jsonl: WriteJsonl,
    hugging_face_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    done = []

    def rename(source: Path, destination: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(destination)
        os.replace(source, destination)

    monkeypatch.setattr(library.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        output = str(copied).removesuffix("_text_document")
        path = write_jsonl("in.jsonl", TEXTS)
        preprocess([path], output, hugging_face_path, workers=1, overwrite=True)
    assert not Path(f"{copied}.manifest.json").exists()
    if renames < 3:
        with pytest.raises(FileNotFoundError, match="there is no dataset|missing dataset file"):
            verify_dataset(copied)
    else:  # complete but for the manifest
        assert verify_dataset(copied) is None and len(documents(copied)) == 3
    monkeypatch.undo()
    if renames == 2:  # a part of a dataset is nobody's, so the next run clears up
        preprocess([path], output, hugging_face_path, workers=1)
        assert verify_dataset(copied, hashes=True) is not None


@pytest.mark.parametrize("lost", [[], ["manifest.json"], ["bin", "idx"]])
def test_a_dataset_is_not_overwritten_unasked(
    lost: list[str],
    copied: Path,
    write_jsonl: WriteJsonl,
    hugging_face_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for end in lost:  # one without a manifest may be Megatron-LM's
        Path(f"{copied}.{end}").unlink()
    before = {path: path.read_bytes() for path in copied.parent.iterdir() if path.is_file()}
    monkeypatch.setattr(library, "_encode_all", lambda *arguments: pytest.fail("it tokenises"))
    output = str(copied).removesuffix("_text_document")
    with pytest.raises(ValueError, match=rf"{copied} is a dataset; --overwrite replaces it, or "):
        preprocess([write_jsonl("in.jsonl", TEXTS)], output, hugging_face_path, workers=1)
    assert before == {path: path.read_bytes() for path in copied.parent.iterdir() if path.is_file()}
    assert not Path(f"{copied}.partial").exists()


def test_leftovers_of_a_killed_run_are_cleared(
    write_jsonl: WriteJsonl, hugging_face_path: Path, tmp_path: Path
) -> None:
    partial = tmp_path / "out_text_document.partial"
    (partial / "out_text_document.tokenizer").mkdir(parents=True)
    (partial / "out_text_document.bin").write_bytes(b"old")
    path = write_jsonl("in.jsonl", TEXTS)
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing"):
            preprocess([path], tmp_path / "out", hugging_face_path, workers=1)
        assert (partial / "out_text_document.bin").read_bytes() == b"old"
    preprocess([path], tmp_path / "out", hugging_face_path, workers=1)
    assert not partial.exists()


# Checks at load


def test_good_dataset_verifies(dataset: Path, sentencepiece_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_path)
    assert verify_dataset(dataset, tokenizer, hashes=True) == read_dataset_manifest(dataset)
    assert verify_dataset(str(dataset)) is not None


def test_truncated_or_missing_files_are_named(copied: Path) -> None:
    bin_file, idx_file = Path(f"{copied}.bin"), Path(f"{copied}.idx")
    size, idx_content = bin_file.stat().st_size, idx_file.read_bytes()
    os.truncate(bin_file, size - 10)
    expected = rf"truncated: .*\.bin has {size - 10} bytes, its index says {size}; run"
    with pytest.raises(ValueError, match=expected):
        verify_dataset(copied)
    os.truncate(bin_file, size + 2)
    with pytest.raises(ValueError, match=r"overlong: .*\.bin"):
        verify_dataset(copied)
    os.truncate(bin_file, size)
    for content, message in [
        (idx_content[:-1], r"truncated or overlong: .*\.idx"),
        (idx_content[:20], r"\.idx is not a Megatron index \(bad header\)"),
        (b"X" + idx_content[1:], r"\.idx is not a Megatron index \(bad header\)"),
        (idx_content[:9] + b"\2" + idx_content[10:], "version 2"),
        (idx_content[:-8] + bytes(8), "documents do not end at its end"),
    ]:
        idx_file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            verify_dataset(copied)
    idx_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"missing dataset file .*\.idx; run"):
        verify_dataset(copied)


def test_changed_token_is_found_by_samples_or_by_hashes(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A dataset of a version that took no samples is accepted, and it is said."""
    with open(f"{copied}.bin", "r+b") as file:
        file.write(b"\7")
    with pytest.raises(ValueError, match=r"corrupt: .*\.bin is not the file that its manifest"):
        verify_dataset(copied)
    path = dataset_manifest_path(copied)
    content = json.loads(path.read_text())
    del content["bin_sampled_sha256"]
    path.write_text(json.dumps(content))
    assert verify_dataset(copied) is not None
    assert f"{path} has no hash of samples, so only the size" in caplog.text
    with pytest.raises(ValueError, match=r"corrupt: .*\.bin has sha256"):
        verify_dataset(copied, hashes=True)


def test_index_is_hashed_at_every_start(copied: Path) -> None:
    """Documents that are cut elsewhere agree with all sizes."""
    content = bytearray(idx_path(copied).read_bytes())
    sequences = int.from_bytes(content[18:26], "little")
    lengths = np.frombuffer(content, "<i4", sequences, 34).copy()
    assert lengths[0] > 1
    lengths[:2] += [-1, 1]
    pointers = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]]) * 2
    content[34 : 34 + 12 * sequences] = lengths.tobytes() + pointers.tobytes()
    idx_path(copied).write_bytes(content)
    with pytest.raises(ValueError, match=r"corrupt: .*\.idx has sha256"):
        verify_dataset(copied)
    dataset_manifest_path(copied).unlink()
    assert verify_dataset(copied) is None  # another dataset, as far as anyone can tell


@pytest.mark.parametrize(
    ("table", "place", "value", "problem"),
    [
        ("pointers", 1, 3, "sequences do not lie end to end"),
        ("pointers", 0, 2, "sequences do not lie end to end"),
        ("pointers", 2, -2, "sequences do not lie end to end"),
        ("documents", 0, 1, "documents do not end at its end"),
        ("documents", 1, 3, "documents do not end at its end"),
        ("documents", 2, -1, "documents do not end at its end"),
    ],
)
def test_index_without_manifest_must_agree_with_itself(
    table: str, place: int, value: int, problem: str, tmp_path: Path
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.uint16)
    for length in (3, 1, 2):
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(tmp_path / "plain.idx"))
    content = bytearray((tmp_path / "plain.idx").read_bytes())
    offset = 34 + 3 * 4 + (3 * 8 if table == "documents" else 0)
    content[offset + 8 * place : offset + 8 * place + 8] = value.to_bytes(8, "little", signed=True)
    (tmp_path / "plain.idx").write_bytes(content)
    with pytest.raises(ValueError, match=rf"plain\.idx contradicts itself: {problem}"):
        verify_dataset(tmp_path / "plain")


def test_files_of_another_run_do_not_match_the_manifest(
    copied: Path, write_jsonl: WriteJsonl, sentencepiece_path: Path, tmp_path: Path
) -> None:
    path = write_jsonl("in.jsonl", TEXTS)
    preprocess([path], tmp_path / "other", sentencepiece_path, workers=1)
    for suffix in ("bin", "idx"):
        os.replace(tmp_path / f"other_text_document.{suffix}", f"{copied}.{suffix}")
    with pytest.raises(ValueError, match=r"\.bin has .* bytes, its manifest says"):
        verify_dataset(copied)


def test_wrong_tokenizer_shows_the_first_differing_tokens(
    copied: Path, hugging_face_path: Path
) -> None:
    other = load_tokenizer(hugging_face_path)
    with pytest.raises(ValueError) as caught:
        verify_dataset(copied, other)
    message = str(caught.value)
    assert f"id 0: '<unk>' in the dataset {copied}, '<|endoftext|>' in the tokenizer" in message
    assert message.endswith(
        "give the tokenizer that made the dataset, or run `megatron-salt preprocess` again"
    )
    shutil.rmtree(f"{copied}.tokenizer")
    with pytest.raises(ValueError, match=rf"512 tokens and fingerprint .*{other.fingerprint}"):
        verify_dataset(copied, other)


def test_dataset_of_megatron_itself_verifies_with_a_warning(
    tmp_path: Path, sentencepiece_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.int32)
    builder.add_document(np.arange(5), [2, 3])
    builder.add_document(np.arange(4), [4])
    builder.finalize(str(tmp_path / "plain.idx"))
    with caplog.at_level(logging.WARNING):
        assert verify_dataset(tmp_path / "plain", load_tokenizer(sentencepiece_path)) is None
    assert "nothing tells which tokenizer made this dataset" in caplog.text


def test_a_plain_dataset_is_one_of_older_releases(copied: Path) -> None:
    path = Path(f"{copied}.manifest.json")
    content = json.loads(path.read_text())
    assert list(content) == [
        "format_version", "tokenizer_fingerprint", "vocab_size", "eod", "documents", "tokens",
        "bad_lines", "empty_documents", "input_bytes", "inputs", "settings", "versions",
        "bin_bytes", "bin_sha256", "idx_bytes", "idx_sha256", "bin_sampled_sha256",
    ]  # fmt: skip
    del content["bin_sampled_sha256"]
    content["settings"] = {"json_key": "text", "append_eod": True, "strict": False}
    path.write_text(json.dumps(content))
    assert verify_dataset(copied, hashes=True) is not None and load_sources(copied) is None


def test_unreadable_manifest_is_an_error(copied: Path) -> None:
    manifest = read_dataset_manifest(copied)
    assert manifest is not None
    path = Path(f"{copied}.manifest.json")
    path.write_text(dataclasses.replace(manifest, format_version=2).to_json())
    with pytest.raises(ValueError, match="has format version 2, this release reads 1"):
        read_dataset_manifest(copied)
    for content in ("{", "[]", '{"format_version": 1}', '{"format_version": 1, "inputs": []}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a dataset manifest"):
            read_dataset_manifest(copied)
