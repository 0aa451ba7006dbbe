"""Which checkpoints may teach a run: its tokens first, as many rows, the same end of documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from edited import edit_manifest
from larger_vocabulary import add_tokens, enlarged
from sentencepiece import sentencepiece_model_pb2

from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_salt.teacher.find import find_teacher

LENGTH = 16


@pytest.fixture
def tokenizer(dataset: Path) -> Tokenizer:
    return load_tokenizer(f"{dataset}.tokenizer")


def rewrite(path: Path, model: sentencepiece_model_pb2.ModelProto) -> None:
    """Make it the checkpoint's tokenizer."""
    (path / "tokenizer" / "tokenizer.model").write_bytes(model.SerializeToString())
    edit_manifest(path)


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (0, 3), (8, 8), (8, 11)])
def test_more_tokens_and_rows_are_accepted(
    teacher: Path, tokenizer: Tokenizer, tmp_path: Path, tokens: int, rows: int
) -> None:
    path = enlarged(teacher, tmp_path / "larger", tokens=tokens, rows=rows)
    folder, manifest = find_teacher(str(path), tokenizer, LENGTH, None)
    assert (folder, manifest.model.vocab_size) == (path, 509 + rows)


def test_teacher_without_some_of_the_tokens_is_refused(
    teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    file = tmp_path / "longer.model"
    file.write_bytes(Path(f"{dataset}.tokenizer", "tokenizer.model").read_bytes())
    add_tokens(file, 7)
    path = enlarged(teacher, tmp_path / "teacher", rows=7)
    with pytest.raises(ValueError) as caught:
        find_teacher(str(path), load_tokenizer(file), LENGTH, None)
    message = str(caught.value)
    assert f"teacher {path} (509 tokens) and the student's data (516 tokens) give 7 ids" in message
    assert f"id 509: absent in teacher {path}, '<more_0>' in the student's data" in message
    assert "and 2 more\ntake another teacher, or its tokenizer for the data" in message


def test_other_token_and_other_end_of_documents_are_refused(
    teacher: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = enlarged(teacher, tmp_path / "larger", tokens=8, rows=8)
    file = path / "tokenizer" / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    model.trainer_spec.eos_piece = "<more_3>"
    rewrite(path, model)
    message = f"documents with id 512, the student's data with {tokenizer.eod}\ntake another"
    with pytest.raises(ValueError, match=message):
        find_teacher(str(path), tokenizer, LENGTH, None)
    model.trainer_spec.eos_piece = "</s>"
    model.pieces[508].piece = "another"
    rewrite(path, model)
    with pytest.raises(ValueError, match=r"give 1 ids different tokens:\n  id 508: 'another' in"):
        find_teacher(str(path), tokenizer, LENGTH, None)


def test_fewer_rows_than_tokens_are_refused(
    teacher: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = enlarged(teacher, tmp_path / "larger")
    edit_manifest(path, lambda values: values["model"].update(vocab_size=508))
    with pytest.raises(ValueError, match="has 508 rows in its vocabulary for a tokenizer of 509"):
        find_teacher(str(path), tokenizer, LENGTH, None)
