"""Both kinds of tokenizer behind one face: ids, round trips, fingerprints, errors."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from commands import call

from megatron_salt.corpus.train_tokenizer import sample_documents, train_tokenizer
from megatron_salt.data.tokenizer import (
    Tokenizer,
    check_reads,
    check_same_tokens,
    load_tokenizer,
    sentinel_ids,
)

AWKWARD_TEXTS = (
    "",
    " ",
    "  leading and trailing  ",
    "\tif x:\n\t\treturn  1\r\n\n\n    # indented\n",
    "NUL \0 and bell \a",
    "é 日本語 😀 \u2028 \ufeff ﬁ ①",  # identity: no compatibility form is folded
    "<s></s><unk><|endoftext|>",
    "12345 0x7f",
)


@pytest.fixture(params=["sentencepiece", "hugging_face"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(f"{request.param}_path"))


def rewritten(path: Path, destination: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a tokenizer.json with something changed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    destination.write_text(json.dumps(content), encoding="utf-8")
    return destination


def test_source_code_comes_back_exactly(tokenizer: Tokenizer, corpus_texts: list[str]) -> None:
    texts = corpus_texts[:60]
    assert sum(map(len, texts)) > 500_000
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_awkward_text_comes_back_and_holds_no_control_token(
    tokenizer: Tokenizer, text: str
) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_flat_encoding_is_the_batch_end_to_end(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(AWKWARD_TEXTS)
    flat, lengths = tokenizer.encode_flat(AWKWARD_TEXTS)
    assert flat.dtype == np.int32 and flat.tolist() == [token for ids in batch for token in ids]
    assert lengths.tolist() == [len(ids) for ids in batch]
    flat, lengths = tokenizer.encode_flat([])
    assert flat.tolist() == [] and lengths.tolist() == []


def test_sizes_and_token_strings(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.tokens()
    assert tokenizer.vocab_size == 512 == len(tokens) == len(set(tokens))
    assert tokens[tokenizer.eod] in ("</s>", "<|endoftext|>")


def test_indentation_is_one_token(sentencepiece_path: Path) -> None:
    (ids,) = load_tokenizer(sentencepiece_path).encode_batch([" " * 8])
    assert len(ids) == 1


def test_saved_copy_has_the_same_fingerprint_wherever_it_lies(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint and len(copy.fingerprint) == 64
    assert copy.path != tokenizer.path
    assert json.dumps(copy.unique_identifiers) == json.dumps(tokenizer.unique_identifiers)
    check_same_tokens("a", tokenizer, "b", copy)


def test_differing_tokens_are_named(hugging_face_path: Path, tmp_path: Path) -> None:
    def swap(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    original = load_tokenizer(hugging_face_path)
    swapped = load_tokenizer(rewritten(hugging_face_path, tmp_path / "swapped.json", swap))
    a, b = original.tokens().index("a"), original.tokens().index("b")
    with pytest.raises(ValueError) as caught:
        check_same_tokens("teacher", original, "student", swapped)
    message = str(caught.value)
    assert "teacher (512 tokens) and student (512 tokens) give 2 ids different" in message
    assert f"id {a}: 'a' in teacher, 'b' in student" in message
    assert f"id {b}: 'b' in teacher, 'a' in student" in message


def test_at_most_five_differences_are_shown_and_the_shorter_lacks_ids(
    hugging_face_path: Path, tmp_path: Path
) -> None:
    longer = tokenizers.Tokenizer.from_file(str(hugging_face_path))
    longer.add_tokens([f"<extra {index}>" for index in range(7)])
    longer.save(str(tmp_path / "longer.json"))
    with pytest.raises(ValueError) as caught:
        check_same_tokens(
            "small",
            load_tokenizer(hugging_face_path),
            "large",
            load_tokenizer(tmp_path / "longer.json"),
        )
    message = str(caught.value)
    assert "small (512 tokens) and large (519 tokens)" in message
    assert "id 512: absent in small, '<extra 0>' in large" in message
    assert message.count("  id ") == 5 and "and 2 more" in message


def test_more_tokens_behind_are_read_too(hugging_face_path: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(hugging_face_path))
    library.add_tokens(["<extra>"])
    library.save(str(tmp_path / "longer.json"))
    small, large = load_tokenizer(hugging_face_path), load_tokenizer(tmp_path / "longer.json")
    check_reads("large", large, "data", small)
    with pytest.raises(ValueError, match="give 1 ids different tokens:\n  id 512: absent in small"):
        check_reads("small", small, "data", large)
    large.eod = 7
    with pytest.raises(ValueError, match="large ends documents with id 7, data with 0"):
        check_reads("large", large, "data", small)


def test_of_both_files_in_a_folder_the_json_is_taken(
    sentencepiece_path: Path, hugging_face_path: Path, tmp_path: Path
) -> None:
    """It alone knows tokens that were added to a sentencepiece model."""
    shutil.copyfile(sentencepiece_path, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model"
    shutil.copyfile(hugging_face_path, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).path.name == "tokenizer.json"


def test_truncation_and_padding_of_the_file_do_not_apply(
    hugging_face_path: Path, tmp_path: Path
) -> None:
    library = tokenizers.Tokenizer.from_file(str(hugging_face_path))
    library.enable_truncation(max_length=4)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "short.json"))
    texts = ["x = 1", "def function(argument):\n    return argument\n"]
    expected = load_tokenizer(hugging_face_path).encode_batch(texts)
    assert load_tokenizer(tmp_path / "short.json").encode_batch(texts) == expected


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["<eos>", "</s>"], "</s>"),
        (["<|end_of_text|>", "<eos>"], "<eos>"),
        (["<|end_of_text|>"], "<|end_of_text|>"),
        (["</s>", "<|endoftext|>"], "<|endoftext|>"),
    ],
)
def test_end_of_document_is_the_first_known_token(
    present: list[str], expected: str, tmp_path: Path
) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.add_special_tokens(present)
    library.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.tokens()[tokenizer.eod] == expected


def test_no_end_of_document_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.add_special_tokens(["<pad>"])
    library.save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"no token to end documents with.*add one of them"):
        load_tokenizer(tmp_path / "t.json")


def test_holes_in_the_ids_count_as_ids(hugging_face_path: Path, tmp_path: Path) -> None:
    def move(content: dict) -> None:
        content["model"]["vocab"]["z"] = 600

    tokenizer = load_tokenizer(rewritten(hugging_face_path, tmp_path / "t.json", move))
    assert tokenizer.vocab_size == 601 == len(tokenizer.tokens())
    assert tokenizer.tokens()[599:] == ["", "z"]


def test_load_errors_say_what_is_wrong(sentencepiece_path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"vocab.txt is not a tokenizer: expected"):
        load_tokenizer(tmp_path / "vocab.txt")
    content = sentencepiece_path.read_bytes()
    (tmp_path / "broken.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"broken.model is not a sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "broken.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"broken.json is not a Hugging Face tokenizer"):
        load_tokenizer(tmp_path / "broken.json")


def test_megatron_dataset_masks_no_real_token(
    tokenizer: Tokenizer, corpus_texts: list[str], tmp_path: Path
) -> None:
    """`pad` and `eod` as megatron-core uses them: every label of a full sample counts."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    for ids in tokenizer.encode_batch([text[:300] for text in corpus_texts[:30]]):
        builder.add_document(np.array([*ids, tokenizer.eod]), [len(ids) + 1])
    builder.finalize(str(tmp_path / "d.idx"))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        split="1",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    data = IndexedDataset(str(tmp_path / "d"))
    samples = GPTDataset(data, str(tmp_path / "d"), np.arange(30), None, Split.train, config)
    eods = 0
    for index in range(len(samples)):
        assert samples[index]["loss_mask"].min() == 1
        eods += int((samples[index]["labels"] == tokenizer.eod).sum())
    assert eods > 20
    assert tokenizer.fingerprint in samples.unique_description
    assert str(tokenizer.path) not in samples.unique_description


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("t.model", "bpe"), ("t.model", "unigram"), ("t.json", "bpe")],
)
def test_training_is_deterministic(
    name: str, model_type: str, corpus_texts: list[str], tmp_path: Path
) -> None:
    texts = corpus_texts[:4]
    contents = []
    for run in "ab":
        path = tmp_path / run / name
        train_tokenizer(texts, path, vocab_size=400, model_type=model_type)
        assert [file.name for file in path.parent.iterdir()] == [name]
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert load_tokenizer(tmp_path / "a" / name).vocab_size == 400


def test_sample_is_uniform_bounded_and_in_order(
    write_jsonl: Callable[[str, Sequence[str]], Path],
) -> None:
    texts = [f"{index:05d}" * 20 for index in range(2000)]
    path = write_jsonl("in.jsonl", texts)
    sample, bad = sample_documents([path], json_key="text", sample_bytes=50_000)
    assert bad == [] and len(sample) == 500 and sample == sorted(sample)
    assert 0.4 < sum(text < texts[1000] for text in sample) / 500 < 0.6
    assert sample_documents([path], json_key="text", sample_bytes=50_000)[0] == sample
    assert sample_documents([path], json_key="text", sample_bytes=10**9)[0] == texts


def test_training_tool(corpus_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--input", str(corpus_path), "--sample-bytes", "300000", "--vocab-size", "400"]
    output = tmp_path / "new" / "tokenizer.model"
    assert call("tokenizer", *arguments, "--output", str(output)) == 0
    assert load_tokenizer(output.parent).vocab_size == 400
    kept = shutil.copyfile(output, tmp_path / "kept.model")
    assert call("tokenizer", *arguments, "--output", str(tmp_path / "t.bin")) == 2
    assert "must end in .model" in capsys.readouterr().err
    too_many = [*arguments[:-1], "300000", "--output", str(kept)]
    assert call("tokenizer", *too_many) == 2
    assert "could not train a vocabulary of 300000" in capsys.readouterr().err
    assert kept.read_bytes() == output.read_bytes()  # a failure leaves what was there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.model", "new"]


@pytest.mark.parametrize("name", ["t.model", "t.json"])
def test_no_text_becomes_a_sentinel(
    name: str, corpus_path: Path, corpus_texts: list[str], tmp_path: Path
) -> None:
    arguments = ["--input", str(corpus_path), "--sample-bytes", "300000", "--vocab-size", "400"]
    assert call("tokenizer", *arguments, "--sentinels", "12", "--output", str(tmp_path / name)) == 0
    tokenizer = load_tokenizer(tmp_path / name)
    sentinels = sentinel_ids(tokenizer)
    assert tokenizer.vocab_size == 400 and len(set(sentinels)) == 12
    assert [tokenizer.tokens()[index] for index in sentinels] == [
        f"<extra_id_{number}>" for number in range(12)
    ]
    text = "".join(f"<extra_id_{number}>" for number in range(12)) + " <extra_id_3>x<extra_id_11>"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text and not {*sentinels, tokenizer.eod} & set(ids)
    flat, _ = tokenizer.encode_flat([text, *corpus_texts[:20]])
    assert not set(sentinels) & set(flat.tolist())


def test_sentinels_are_made_only_where_asked_for(
    tokenizer: Tokenizer, corpus_texts: list[str], tmp_path: Path
) -> None:
    assert sentinel_ids(tokenizer) == []
    assert b"extra_id" not in tokenizer.path.read_bytes()
    with pytest.raises(ValueError, match="--sentinels -1"):
        train_tokenizer(corpus_texts[:4], tmp_path / "t.json", vocab_size=400, num_sentinels=-1)


def test_sentinels_count_up_to_the_first_gap(hugging_face_path: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(hugging_face_path))
    library.add_special_tokens(["<extra_id_3>", "<extra_id_1>", "<extra_id_0>"])
    library.save(str(tmp_path / "t.json"))
    assert sentinel_ids(load_tokenizer(tmp_path / "t.json")) == [514, 513]
