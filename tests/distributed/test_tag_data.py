"""Tagging: what is written is what a slow reference says, whoever computed it and however often."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import runpy
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run_forked
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from ranks import RankError, run_ranks

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.corpus.preprocess import preprocess
from megatron_salt.data.selection import Rule, load_selection, read_table
from megatron_salt.data.sequences import Sequences
from megatron_salt.data.tags import (
    DataIdentity,
    FileRecord,
    TagSettings,
    as_fp16,
    open_indexed,
    read_tag_manifest,
    sequence_lengths,
    verify_tags,
)
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.kernels import Chunking, VocabShard
from megatron_salt.parallel.groups import initialize
from megatron_salt.scoring import shards as shard_files
from megatron_salt.scoring.request import TagRequest
from megatron_salt.scoring.scorer import Scorer, ShardScores
from megatron_salt.scoring.shards import write_shard
from megatron_salt.scoring.tagging import tag

VOCAB_SIZE = 509
TOP_K = 10
MAX_LENGTH = 16  # the teacher's
SHARD = 400  # tokens: a dozen shards
SUFFIXES = ("_mask.bin", "_mask.idx", "_loss.bin", "_loss.idx", "_entropy.bin", "_entropy.idx",
            "_sequences.parquet")  # fmt: skip


def _tag(request: TagRequest) -> None:
    tag(request, initialize(1, 1, 5.0))


def request_for(dataset: Path, teacher: Path, output: Path, **changes: Any) -> TagRequest:
    return TagRequest(
        data=str(dataset), teacher=str(teacher), output_prefix=str(output),
        **{"store": ("loss", "entropy"), "tokens_per_shard": SHARD, "top_k": TOP_K,
           "loss_impl": "reference", **changes},
    )  # fmt: skip


def stream_of(dataset: Path) -> tuple[list[int], list[int]]:
    """All tokens, and the lengths of the documents, read with megatron-core alone."""
    data = open_indexed(dataset)
    documents = [data[index].tolist() for index in range(len(data))]
    return [t for document in documents for t in document], [len(d) for d in documents]


def _slow_scores(dataset: Path, teacher: Path, window: int | None) -> dict[str, Any]:
    """Loss, rank and entropy of every token, one row of the model at a time, and the sequences'
    scores, one sequence at a time. Independent of the tool: it shares with it the model only."""
    folder = resolve(str(teacher), what="teacher")
    manifest = read_checkpoint_manifest(folder)
    model = load_frozen(
        folder, manifest, initialize(1, 1, 5.0), seq_length=MAX_LENGTH, dtype=torch.float32,
        head=VocabShard(size=VOCAB_SIZE, start=0, stop=VOCAB_SIZE), head_columns=VOCAB_SIZE,
    )  # fmt: skip
    eod = load_tokenizer(folder / "tokenizer").eod
    tokens, lengths = stream_of(dataset)
    row_length = window or MAX_LENGTH
    if window is not None:
        lengths = [min(window, len(tokens) - start) for start in range(0, len(tokens), window)]
    loss, kept, entropy, scores, at = [], [], [], [], 0
    for length in lengths:
        sequence_loss: list[float] = []
        sequence_kept: list[bool] = []
        for start in range(at, at + length, row_length):
            labels = tokens[start : min(start + row_length, at + length)]
            first_of_document = window is None and start == at
            before = eod if start == 0 or first_of_document else tokens[start - 1]
            inputs = [before, *labels[:-1]]
            inputs += [labels[-1]] * (row_length - len(inputs))  # rows have one length
            hidden = model.forward(torch.tensor([inputs]))[0]
            logits = hidden @ model.head_WE.T  # type: ignore[union-attr]
            for row, label in zip(logits[: len(labels)], labels, strict=True):
                centred = (row - row.max())[None]
                ce = centred.exp().sum(dim=1).log() - centred[:, label]
                sequence_loss.append(float(ce))
                own = row[label].item()
                likelier = [v for v in row.tolist() if v > own]
                sequence_kept.append(len(likelier) < TOP_K)
                p = row.double().softmax(dim=0)
                entropy.append(float(-(p * p.log()).sum()))
        drop = [v for v, one in zip(sequence_loss, sequence_kept, strict=True) if one]
        zero = [v if one else 0.0 for v, one in zip(sequence_loss, sequence_kept, strict=True)]
        scores.append({
            "median_drop": statistics.median(drop) if drop else float("nan"),
            "median_zero": statistics.median(zero),
            "median_all": statistics.median(sequence_loss),
            "mean_drop": sum(drop) / len(drop) if drop else float("nan"),
            "mean_zero": sum(zero) / len(zero),
            "mean_all": sum(sequence_loss) / len(sequence_loss),
        })  # fmt: skip
        loss += sequence_loss
        kept += sequence_kept
        at += length
    return {"loss": loss, "kept": kept, "entropy": entropy, "scores": scores, "lengths": lengths}


@pytest.fixture(scope="module")
def text(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the first 20 documents of the tests' dataset."""
    folder = tmp_path_factory.mktemp("text")
    lines = (dataset.parent / "short.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = dataset.parent / "tokenizer.model"
    preprocess([folder / "text.jsonl"], folder / "some", tokenizer, workers=1)
    return folder / "some_text_document"


@pytest.fixture(scope="module", params=[None, MAX_LENGTH, 12], ids=["documents", "w16", "w12"])
def tagged(
    request: pytest.FixtureRequest, text: Path, teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> TagRequest:  # fmt: skip
    """Tags by one rank."""
    output = tmp_path_factory.mktemp("tags") / "slm"
    made = request_for(text, teacher, output, window=request.param)
    run_ranks(1, _tag, made)
    return made


def test_tags_equal_a_slow_reference(tagged: TagRequest, text: Path, teacher: Path) -> None:
    """fp32, bit for bit: masks, losses and scores; entropies, computed otherwise, to 1e-3."""
    slow = run_ranks(1, _slow_scores, text, teacher, tagged.window)[0]
    mask = _values(tagged, "mask")
    assert mask.tolist() == [int(one) for one in slow["kept"]]
    assert 0.05 < mask.mean() < 0.95
    stored = as_fp16(_values(tagged, "loss"))
    np.testing.assert_array_equal(stored, np.array(slow["loss"], dtype=np.float32).astype("f2"))
    entropy = as_fp16(_values(tagged, "entropy")).astype(np.float64)
    np.testing.assert_allclose(entropy, slow["entropy"], rtol=1e-3, atol=1e-4)
    table = read_table(f"{tagged.output_prefix}_sequences.parquet")
    assert table.columns["tokens"].tolist() == slow["lengths"]
    for name in slow["scores"][0]:
        expected = np.array([score[name] for score in slow["scores"]]).astype(np.float32)
        np.testing.assert_array_equal(table.columns[name], expected, err_msg=name)
    kept = [sum(slow["kept"][start : start + tokens]) for start, tokens in zip(
        table.columns["start"].tolist(), slow["lengths"], strict=True)]  # fmt: skip
    assert table.columns["kept"].tolist() == kept
    # The highest half of the median over kept tokens is selected.
    assert table.columns["selected"].sum() == pytest.approx(len(table) / 2, abs=1)
    chosen = table.columns["score"][table.columns["selected"]]
    others = table.columns["score"][~table.columns["selected"]]
    assert chosen.min() >= np.nanmax(others)


def _values(request: TagRequest, kind: str) -> np.ndarray:
    """All tags of a kind, document by document, read with megatron-core alone."""
    dataset = open_indexed(f"{request.output_prefix}_{kind}")
    return np.concatenate([dataset[index] for index in range(len(dataset))])


def hashes(prefix: str | Path) -> dict[str, str]:
    return {
        suffix: hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest()
        for suffix in (*SUFFIXES, ".tags.json")
    }


@pytest.mark.parametrize(("ranks", "rows"), [(1, 3), (2, 8), (4, 8), (4, 1)])
def test_files_do_not_depend_on_ranks_or_batch_size(
    tagged: TagRequest, tmp_path: Path, ranks: int, rows: int
) -> None:
    again = dataclasses.replace(tagged, output_prefix=str(tmp_path / "slm"), micro_batch_size=rows)
    run_ranks(ranks, _tag, again)
    assert hashes(again.output_prefix) == hashes(tagged.output_prefix)


def test_files_are_megatron_datasets_in_lockstep(tagged: TagRequest, text: Path) -> None:
    for kind, dtype in (("mask", np.uint8), ("loss", np.uint16), ("entropy", np.uint16)):
        tags, data = open_indexed(f"{tagged.output_prefix}_{kind}"), open_indexed(text)
        assert tags.index.dtype is dtype
        np.testing.assert_array_equal(tags.sequence_lengths, data.sequence_lengths)
        np.testing.assert_array_equal(tags.document_indices, data.document_indices)
    manifest = verify_tags(tagged.output_prefix, text, hashes=True)
    assert manifest.origin.settings.window == tagged.window
    assert not Path(f"{tagged.output_prefix}.tags.partial").exists()


class BigramTeacher:
    """Hand-written logits: token a is followed by tokens ranked as in `RANKED[a]`."""

    def __init__(self) -> None:
        self.head_WE = torch.tensor(
            [[float(-RANKED[before].index(after)) for before in range(5)] for after in range(5)]
        )

    def chunk(self, number: int, num_chunks: int) -> list[Callable[..., torch.Tensor]]:
        return [lambda tokens_BS: torch.nn.functional.one_hot(tokens_BS.T, 5).float()]


EOD = 4
# After 0 comes 1 first; after 1 comes 2; after 2 comes 3; after 3 comes 0; after EOD comes 2.
RANKED = {0: [1, 4, 0, 2, 3], 1: [2, 0, 1, 3, 4], 2: [3, 0, 1, 2, 4], 3: [0, 4, 1, 2, 3],
          EOD: [2, 0, 1, 3, 4]}  # fmt: skip
DOCUMENTS = [[0, 1, 2, 3], [0, 1, EOD], [1, 2]]


def _scored_by_hand(folder: Path, window: int | None) -> list[int]:
    """Masks that `Scorer` gives the documents above with k = 1."""
    builder = IndexedDatasetBuilder(str(folder / "hand.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(folder / "hand.idx"))
    scorer = Scorer.__new__(Scorer)
    scorer.settings = TagSettings(
        window=window, max_length=window or 8, top_k=1, store=(), precision="fp32",
        loss_impl="reference",
    )  # fmt: skip
    scorer.data, scorer.eod, scorer.num_rows = open_indexed(folder / "hand"), EOD, 2
    scorer.data_prefix = str(folder / "hand")
    scorer.impl, scorer.vocab = "reference", VocabShard(size=5, start=0, stop=5)
    scorer.chunking = Chunking()
    scorer.groups, scorer.model = initialize(1, 1, 5.0), BigramTeacher()  # type: ignore[assignment]
    sequences = Sequences.of(sequence_lengths(folder / "hand"), window)
    kept: list[int] = []
    for first, last in sequences.shards(4):
        kept += scorer.shard(sequences, first, last, lambda count: None).kept_T.tolist()
    return [int(one) for one in kept]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        # EOD>0 0>1 1>2 2>3, EOD>0 0>1 1>EOD, EOD>1 1>2: a document begins after an EOD
        (None, [0, 1, 1, 1, 0, 1, 0, 0, 1]),
        # EOD>0 0>1 1>2 2>3, 3>0 0>1 1>EOD EOD>1, 1>2: a window after what is before it
        (4, [0, 1, 1, 1, 1, 1, 0, 0, 1]),
    ],
)
def test_a_tag_belongs_to_the_token_that_is_predicted(
    tmp_path: Path, window: int | None, expected: list[int]
) -> None:
    """Off-by-one: the first token's tag is not the second's."""
    assert run_ranks(1, _scored_by_hand, tmp_path, window)[0] == expected


def _tag_and_die(request: TagRequest, after: int) -> None:
    written = 0
    write = shard_files.write_shard

    def write_and_count(*arguments: Any) -> None:
        nonlocal written
        write(*arguments)
        written += 1
        if written == after:
            os.kill(os.getpid(), signal.SIGKILL)

    shard_files.write_shard = write_and_count
    _tag(request)


def _count_shards(request: TagRequest) -> int:
    """Shards that this run scores."""
    scored = 0
    shard = Scorer.shard

    def counting(self: Scorer, *arguments: Any) -> Any:
        nonlocal scored
        scored += 1
        return shard(self, *arguments)

    Scorer.shard = counting  # type: ignore[method-assign]
    _tag(request)
    return scored


def test_killed_run_goes_on_where_it_was(tagged: TagRequest, tmp_path: Path) -> None:
    """Killed after 4 shards on one rank, continued on two: the rest is scored, the files agree."""
    again = dataclasses.replace(tagged, output_prefix=str(tmp_path / "slm"))
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, _tag_and_die, again, 4)
    partial = tmp_path / "slm.tags.partial"
    done = len(list(partial.glob("shard_*.npz")))
    assert done == 4 and not list(tmp_path.glob("slm_*"))
    (partial / ".shard_00000009.npz.1.partial.npz").write_bytes(b"half")  # a write cut off
    with pytest.raises(RankError, match=r"slm\.tags\.partial holds shards.*settings\.top_k"):
        run_ranks(1, _tag, dataclasses.replace(again, top_k=7))
    rest = sum(run_ranks(2, _count_shards, again))
    tokens = int(sequence_lengths(again.data).sum())
    assert rest == pytest.approx(tokens / SHARD - done, abs=1.5)
    assert hashes(again.output_prefix) == hashes(tagged.output_prefix)
    # A requeued job finds the tags complete; another rule is not taken for the same tags.
    assert sum(run_ranks(1, _count_shards, again)) == 0
    other = dataclasses.replace(again, rule=Rule(fraction=0.25))
    with pytest.raises(RankError, match="megatron-salt select --tags"):
        run_ranks(1, _tag, other)


def test_damaged_shard_is_named(tagged: TagRequest, tmp_path: Path) -> None:
    again = dataclasses.replace(tagged, output_prefix=str(tmp_path / "slm"))
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, _tag_and_die, again, 3)
    shard = tmp_path / "slm.tags.partial" / "shard_00000001.npz"
    content = bytearray(shard.read_bytes())
    with np.load(shard) as arrays:
        content[content.index(arrays["loss"].tobytes()) + 10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RankError, match=r"shard_00000001\.npz is damaged .* delete it"):
        run_ranks(1, _tag, again)
    shard.unlink()
    run_ranks(1, _tag, again)
    assert hashes(again.output_prefix) == hashes(tagged.output_prefix)


def test_other_tags_are_not_overwritten(text: Path, teacher: Path, tmp_path: Path) -> None:
    """They take hours. Given up, nothing of them stays, not even what the new ones lack."""
    made = request_for(text, teacher, tmp_path / "slm")
    run_ranks(1, _tag, made)
    before = hashes(made.output_prefix)
    other = dataclasses.replace(made, store=(), top_k=5)
    with pytest.raises(RankError, match=r"differ in settings\.top_k, settings\.store"):
        run_ranks(1, _tag, other)
    assert hashes(made.output_prefix) == before
    (tmp_path / "slm.tags.json").unlink()
    run_ranks(1, _tag, other)
    names = {path.name.removeprefix("slm") for path in tmp_path.iterdir()}
    assert names == {"_mask.bin", "_mask.idx", "_sequences.parquet", ".tags.json"}
    assert verify_tags(made.output_prefix, text, hashes=True).origin.settings.top_k == 5


def test_moved_data_and_teacher_are_known_again(text: Path, teacher: Path, tmp_path: Path) -> None:
    made = request_for(text, teacher, tmp_path / "slm")
    run_ranks(1, _tag, made)
    for path in text.parent.glob(f"{text.name}*"):
        target = tmp_path / path.name.replace(text.name, "moved")
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    shutil.copytree(teacher, tmp_path / "elsewhere")
    moved = dataclasses.replace(
        made, data=str(tmp_path / "moved"), teacher=str(tmp_path / "elsewhere")
    )
    assert sum(run_ranks(1, _count_shards, moved)) == 0


def test_damaged_tags_are_made_anew(tagged: TagRequest, tmp_path: Path) -> None:
    prefix = copied(tagged, tmp_path)
    path = Path(f"{prefix}_mask.bin")
    path.write_bytes(path.read_bytes()[:-1])
    again = dataclasses.replace(tagged, output_prefix=str(prefix))
    assert sum(run_ranks(1, _count_shards, again)) > 0
    assert hashes(prefix) == hashes(tagged.output_prefix)


def test_shards_of_nobody_or_of_others_are_refused(tagged: TagRequest, tmp_path: Path) -> None:
    again = dataclasses.replace(tagged, output_prefix=str(tmp_path / "slm"))
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, _tag_and_die, again, 4)
    partial = tmp_path / "slm.tags.partial"
    shards = [partial / f"shard_0000000{index}.npz" for index in (1, 2)]
    kept = shards[0].read_bytes()
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(RankError, match=r"shard_00000001\.npz .*of other sequences"):
        run_ranks(1, _tag, again)
    shards[0].write_bytes(kept)
    (partial / "identity.json").unlink()
    with pytest.raises(RankError, match=r"holds shards, but not identity\.json"):
        run_ranks(1, _tag, again)


def test_an_error_of_one_rank_ends_all(text: Path, teacher: Path, tmp_path: Path) -> None:
    """An id that the teacher does not know, in data without a manifest; finished shards stay."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{text}{suffix}", tmp_path / f"bare{suffix}")
    tokens = np.fromfile(tmp_path / "bare.bin", dtype=np.uint16)
    tokens[1000] = VOCAB_SIZE
    tokens.tofile(tmp_path / "bare.bin")
    made = request_for(tmp_path / "bare", teacher, tmp_path / "slm")
    with pytest.raises(RankError, match=f"bare.bin: token 1000 is id {VOCAB_SIZE}, the teacher's"):
        run_ranks(2, _tag, made)
    assert list((tmp_path / "slm.tags.partial").glob("shard_*.npz"))


def _tag_with_another_view(request: TagRequest) -> None:
    if os.environ["RANK"] == "1":
        of = DataIdentity.of
        DataIdentity.of = lambda prefix: dataclasses.replace(of(prefix), bin_sha256="other")  # type: ignore[method-assign]
    _tag(request)


def test_ranks_that_see_other_data_stop(text: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 sees other data"):
        run_ranks(2, _tag_with_another_view, request_for(text, teacher, tmp_path / "slm"))


def _die_at_rename(request: TagRequest, number: int) -> None:
    replace, done = os.replace, 0

    def replace_or_die(source: Any, target: Any) -> None:
        nonlocal done
        if Path(target).parent == Path(request.output_prefix).parent:
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]
    _tag(request)


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_killed_while_publishing(text: Path, teacher: Path, tmp_path: Path, number: int) -> None:
    """New tags over damaged ones, killed between the renames: no manifest vouches for a mixture."""
    made = request_for(text, teacher, tmp_path / "slm")
    run_ranks(1, _tag, made)
    (tmp_path / "slm_loss.bin").write_bytes(b"")
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, _die_at_rename, made, number)
    with pytest.raises(ValueError, match=r"slm\.tags\.json: no such file"):
        verify_tags(made.output_prefix, text)
    assert sum(run_ranks(1, _count_shards, made)) == 0  # the shards are still there
    verify_tags(made.output_prefix, text, hashes=True)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.partial"))


def copied(tagged: TagRequest, folder: Path) -> Path:
    for suffix in (*SUFFIXES, ".tags.json"):
        shutil.copy(f"{tagged.output_prefix}{suffix}", folder / f"slm{suffix}")
    return folder / "slm"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_file_is_checked(tagged: TagRequest, text: Path, tmp_path: Path, suffix: str) -> None:
    prefix = copied(tagged, tmp_path)
    path = Path(f"{prefix}{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"truncated: .*slm{suffix} has .*slm\.tags\.json"):
        verify_tags(prefix, text)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"slm{suffix} is not the file .*slm\.tags\.json"):
        verify_tags(prefix, text)
    path.unlink()
    with pytest.raises(ValueError, match=rf"slm{suffix}: missing"):
        verify_tags(prefix, text)


def test_tags_of_other_data_are_refused(tagged: TagRequest, text: Path, tmp_path: Path) -> None:
    """The same number of tokens and documents, one token changed."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{text}{suffix}", tmp_path / f"other{suffix}")
    content = bytearray((tmp_path / "other.bin").read_bytes())
    content[1000] ^= 1
    (tmp_path / "other.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"slm\.tags\.json was made of .*other\.bin is not that"):
        verify_tags(tagged.output_prefix, tmp_path / "other")
    table = f"{tagged.output_prefix}_sequences.parquet"
    with pytest.raises(ValueError, match=r"slm_sequences\.parquet was made of .*other\.bin"):
        load_selection(table, tmp_path / "other", read_tag_manifest(
            tagged.output_prefix).origin.tokenizer_fingerprint)  # fmt: skip
    with pytest.raises(ValueError, match=r"tokenizer of fingerprint"):
        verify_tags(tagged.output_prefix, text, "another")
    with pytest.raises(ValueError, match=r"slm_sequences\.parquet: made with a tokenizer of"):
        load_selection(table, text, "another")
    # Files that agree with their manifest, of as many tokens, with other documents.
    prefix = copied(tagged, tmp_path)
    lengths = sequence_lengths(text)[::-1]
    assert lengths.tolist() != sequence_lengths(text).tolist()
    builder = IndexedDatasetBuilder(str(tmp_path / "other.bin"), dtype=np.uint8)
    builder.sequence_lengths = lengths.tolist()
    builder.document_indices = list(range(len(lengths) + 1))
    builder.finalize(f"{prefix}_mask.idx")
    manifest = read_tag_manifest(prefix)
    files = {**manifest.files, "_mask.idx": FileRecord.of(Path(f"{prefix}_mask.idx"))}
    (tmp_path / "slm.tags.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(ValueError, match=r"slm_mask\.idx and .*sequences of different lengths"):
        verify_tags(prefix, text)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    sequences = Sequences.of(np.array([3, 2]), None)
    scores = ShardScores(
        loss_T=np.array([1.0, 2.0, np.nan, 1.0, 1.0], dtype=np.float32),
        kept_T=np.ones(5, dtype=bool), entropy_T=None,
    )  # fmt: skip
    settings = TagSettings(
        window=None, max_length=8, top_k=1, store=(), precision="fp16", loss_impl="reference"
    )
    with pytest.raises(ValueError, match="loss of token 2 is nan: .* in fp16; try --precision"):
        write_shard(tmp_path / "shard.npz", sequences, 0, 2, scores, settings)
    assert not list(tmp_path.iterdir())


def _as_launched(words: list[str]) -> None:
    sys.argv = words[1:]
    with contextlib.suppress(SystemExit):
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def test_command_line(
    text: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks as a launcher starts them; the errors of bad arguments."""
    words = ["-m", "megatron_salt", "tag", "--data", str(text), "--teacher", str(teacher),
             "--output-prefix", str(tmp_path / "slm"), "--tokens-per-shard", "9000"]  # fmt: skip
    run_ranks(2, _as_launched, [*words, "--window", "16", "--bottom-fraction", "0.25"])
    printed = capfd.readouterr()
    assert "% among the 10 most likely" in printed.out and "tokens/s" in printed.err
    manifest = json.loads((tmp_path / "slm.tags.json").read_text(encoding="utf-8"))
    assert manifest["origin"]["settings"]["window"] == 16
    assert sorted(manifest["files"]) == ["_mask.bin", "_mask.idx", "_sequences.parquet"]
    assert read_table(tmp_path / "slm_sequences.parquet").rule["kind"] == "bottom"
    failed = run_forked(*words, "--top-fraction", "2", folder=tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.endswith(
        "salt tag: error: --top-fraction 2.0: must be above 0, at most 1\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 17}, "trained on sequences of 16 tokens"),
        ({"window": 0}, "--window 0: must be at least 1"),
        ({"top_k": 509}, "--top_k 509: must lie between 1 and"),
        ({"rule": Rule(score="entropy"), "store": ()}, "--score entropy needs --store"),
        ({"teacher": "nowhere"}, "--teacher = nowhere: does not exist"),
        ({"data": "nowhere"}, "there is no dataset nowhere: nowhere.idx is missing"),
    ],
    ids=str,
)
def test_bad_arguments(
    text: Path, teacher: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RankError, match=message):
        made = request_for(text, teacher, tmp_path / "slm")
        run_ranks(1, _tag, dataclasses.replace(made, **changes))
    assert not list(tmp_path.iterdir())
