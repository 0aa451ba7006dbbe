"""Exported tokenizers: what transformers loads cuts every text as ours, or nothing is exported."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import normalizers, pre_tokenizers, processors

from megatron_salt.corpus.train_tokenizer import train_tokenizer
from megatron_salt.data.tokenizer import Tokenizer, check_reads, load_tokenizer
from megatron_salt.huggingface import tokenizer_export
from megatron_salt.huggingface.tokenizer_export import (
    PROBES,
    export_tokenizer,
    sentencepiece_pipeline,
)

VOCAB_SIZE, NUM_SENTINELS, LONGEST = 600, 6, 77
TEXTS = (
    *PROBES,
    "\n  x = {\n\t\t'a':  [1,  2],  # ▁\n}\n\r\n" * 3,
    "a\u0301\u0323 ｱｲｳ ﷺ 1⁄2",
    "😀\n日本\t語 é  ",
)


@pytest.fixture(scope="module")
def own(
    corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Tokenizer]:
    """Our own tokenizers of a kind, with sentinels."""
    folder, texts = tmp_path_factory.mktemp("own"), corpus_texts[:20]

    @functools.cache
    def trained(kind: str) -> Tokenizer:
        path = folder / f"{kind}.{'json' if kind == 'json' else 'model'}"
        train_tokenizer(texts, path, vocab_size=VOCAB_SIZE, num_sentinels=NUM_SENTINELS)
        return load_tokenizer(path)

    return trained


@pytest.fixture(scope="module")
def sentencepiece_model(
    corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Tokenizer]:
    """What sentencepiece trains by other settings than ours."""
    folder = tmp_path_factory.mktemp("others")
    lines = [line for text in corpus_texts[:20] for line in text.split("\n") if line.strip()]

    def trained(**settings: Any) -> Tokenizer:
        path = folder / f"{len(list(folder.iterdir()))}.model"
        with path.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=file, num_threads=1, minloglevel=2,
                **{"vocab_size": 500, "model_type": "bpe", "normalization_rule_name": "identity",
                   **settings},
            )  # fmt: skip
        return load_tokenizer(path)

    return trained


def changed_json(tokenizer: Tokenizer, path: Path, change: Callable[[Any], None]) -> Tokenizer:
    """A tokenizer.json after `change` of what the library has of it."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    change(library)
    library.save(str(path))
    return load_tokenizer(path)


def changed_model(tokenizer: Tokenizer, path: Path, change: Callable[[Any], None]) -> Tokenizer:
    """A sentencepiece model after `change` of its protocol buffer."""
    proto = ModelProto.FromString(tokenizer.path.read_bytes())
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return load_tokenizer(path)


def outside_of(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def ids_of(folder: Path, texts: list[str]) -> list[list[int]]:
    found = outside_of(folder).encode_batch(texts, add_special_tokens=True)
    return [encoding.ids for encoding in found]


@pytest.mark.parametrize("kind", ["json", "bpe"])
def test_transformers_loads_the_same_tokenizer(
    own: Callable[[str], Tokenizer], kind: str, tmp_path: Path
) -> None:
    """With its sentinels, beside a config of a model that has a tokenizer class of its own."""
    transformers = pytest.importorskip("transformers")
    tokenizer = own(kind)
    export_tokenizer(tokenizer, tmp_path, longest=LONGEST)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    eod = tokenizer.eod
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (eod, eod, eod)
    assert theirs.model_max_length == LONGEST and len(theirs) == VOCAB_SIZE
    ours = tokenizer.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, ours, strict=True):
        assert theirs(text).input_ids == ids, text[:80]
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs(list(TEXTS[:3]), padding=True).input_ids[0].count(eod) > 0
    sentinel = tokenizer.tokens().index("<extra_id_3>")
    assert theirs("<extra_id_3>").input_ids == [sentinel]  # text to us: the difference that stays
    assert theirs.decode([sentinel, eod, *ours[4]], skip_special_tokens=True) == TEXTS[4]
    assert (tmp_path / "tokenizer.model").exists() == (kind != "json")


@pytest.mark.parametrize("kind", ["json", "bpe"])
def test_real_text_is_cut_alike(
    own: Callable[[str], Tokenizer], kind: str, tmp_path: Path, corpus_texts: list[str]
) -> None:
    """Whole source files, and read by ourselves too."""
    tokenizer = own(kind)
    export_tokenizer(tokenizer, tmp_path, longest=LONGEST)
    texts = corpus_texts[20:50]
    assert sum(map(len, texts)) > 200_000
    exported, ours = load_tokenizer(tmp_path), tokenizer.encode_batch(texts)
    check_reads("exported", exported, "ours", tokenizer)
    assert exported.encode_batch(texts) == ids_of(tmp_path, texts) == ours


@pytest.mark.parametrize("kind", ["json", "bpe"])
def test_read_by_ourselves_text_stays_text(
    own: Callable[[str], Tokenizer], kind: str, tmp_path: Path
) -> None:
    export_tokenizer(own(kind), tmp_path, longest=LONGEST)
    exported = load_tokenizer(tmp_path)
    text = "</s><extra_id_1> <unk> <|endoftext|> <0x41>"
    (ids,) = exported.encode_batch([text])
    special = [i for i, token in enumerate(exported.tokens()) if token.startswith("<extra_id")]
    assert exported.decode(ids) == text and not {exported.eod, *special} & set(ids)


def test_what_cuts_fills_or_adds_is_left_out(
    own: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    def change(library: Any) -> None:
        library.add_special_tokens(["<bos>"])
        bos = library.token_to_id("<bos>")
        library.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)]),
        ])  # fmt: skip
        library.enable_truncation(max_length=5)
        library.enable_padding(length=9)
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    tokenizer = changed_json(own("json"), tmp_path / "t.json", change)
    export_tokenizer(tokenizer, tmp_path / "out", longest=LONGEST)
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert content["truncation"] is None and content["padding"] is None
    assert content["post_processor"]["type"] == "ByteLevel"
    assert ids_of(tmp_path / "out", list(TEXTS)) == tokenizer.encode_batch(TEXTS)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is True
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs(text).input_ids for text in TEXTS] == tokenizer.encode_batch(TEXTS)


@pytest.mark.parametrize("processor", ["bert", "template"])
def test_processors_that_only_add_go(
    own: Callable[[str], Tokenizer], tmp_path: Path, processor: str
) -> None:
    made = {
        "bert": processors.BertProcessing(("<|endoftext|>", 0), ("<|endoftext|>", 0)),
        "template": processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        ),
    }[processor]
    tokenizer = changed_json(
        own("json"), tmp_path / "t.json", lambda library: setattr(library, "post_processor", made)
    )
    export_tokenizer(tokenizer, tmp_path / "out", longest=LONGEST)
    assert ids_of(tmp_path / "out", ["a"]) == tokenizer.encode_batch(["a"])


def test_special_tokens_within_texts_are_not_compared(
    own: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    """Here a letter, which every character's probe has: a token there, text to us."""
    tokenizer = changed_json(
        own("json"), tmp_path / "t.json", lambda library: library.add_special_tokens(["日"])
    )
    export_tokenizer(tokenizer, tmp_path / "out", longest=LONGEST)
    assert ids_of(tmp_path / "out", ["日"]) == [[VOCAB_SIZE]] != tokenizer.encode_batch(["日"])


@pytest.mark.parametrize("added", [True, False], ids=["an ordinary added token", "of the model"])
def test_end_of_document_becomes_special(
    own: Callable[[str], Tokenizer], tmp_path: Path, added: bool
) -> None:
    content = json.loads(own("json").path.read_text())
    first, *rest = content["added_tokens"]
    assert first["content"] == "<|endoftext|>"
    content["added_tokens"] = [*rest, {**first, "special": False}] if added else rest
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    export_tokenizer(tokenizer, tmp_path / "out", longest=LONGEST)
    ids = [tokenizer.eod, *tokenizer.encode_batch(["a b"])[0]]
    assert outside_of(tmp_path / "out").decode(ids, skip_special_tokens=True) == "a b"


@pytest.mark.parametrize(
    "settings",
    [
        {"byte_fallback": True, "add_dummy_prefix": True, "remove_extra_whitespaces": False},
        {"byte_fallback": True, "allow_whitespace_only_pieces": True,
         "remove_extra_whitespaces": False, "user_defined_symbols": ["<x>", "é"],
         "add_dummy_prefix": False},
        {"byte_fallback": True},
        {"add_dummy_prefix": False},
    ],
    ids=lambda settings: " ".join(settings),
)  # fmt: skip
def test_other_sentencepiece_models_are_cut_alike(
    sentencepiece_model: Callable[..., Tokenizer], settings: dict[str, Any], tmp_path: Path,
    corpus_texts: list[str],
) -> None:  # fmt: skip
    """Llama 2's settings first: a space before each text, none removed."""
    tokenizer = sentencepiece_model(**settings)
    export_tokenizer(tokenizer, tmp_path, longest=LONGEST)
    texts = [line for text in corpus_texts[20:30] for line in text.split("\n") if len(line) < 200]
    texts = [t for t in [*TEXTS, *texts, "<x>a é <x>"] if not re.search(r"(.)\1{9}", t)]
    assert len(texts) > 1000
    ours = tokenizer.encode_batch(texts)
    assert ids_of(tmp_path, texts) == ours
    unknown = tokenizer.tokens().index("<unk>")
    shown = [outside_of(tmp_path).decode(ids) for ids in ours if unknown not in ids]
    assert shown == [tokenizer.decode(ids) for ids in ours if unknown not in ids]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc", "byte_fallback": True}, r"characters \(nmt_nfkc"),
        ({"model_type": "word", "vocab_size": 300}, "is not a BPE model"),
        ({"model_type": "unigram"}, "is not a BPE model"),
        ({"treat_whitespace_as_suffix": True}, "writes spaces behind words"),
        # Each part of a text would get a space of its own.
        ({"user_defined_symbols": ["\n"], "byte_fallback": True}, "cuts '.*' otherwise: from tok"),
        ({"user_defined_symbols": ["  "], "add_dummy_prefix": False}, "cuts '.*' otherwise"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_alike_is_refused(
    sentencepiece_model: Callable[..., Tokenizer], settings: dict[str, Any], message: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    tokenizer = sentencepiece_model(**settings)
    with pytest.raises(ValueError, match=message) as caught:
        export_tokenizer(tokenizer, tmp_path, longest=LONGEST)
    assert "--tokenizer-as-is" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["unused pieces", "spaces as they are"])
def test_models_of_other_makers_are_refused(
    own: Callable[[str], Tokenizer], tmp_path: Path, what: str
) -> None:
    def change(proto: Any) -> None:
        if what == "unused pieces":
            proto.pieces[400].type = proto.SentencePiece.UNUSED
        else:
            proto.normalizer_spec.escape_whitespaces = False

    tokenizer = changed_model(own("bpe"), tmp_path / "t.model", change)
    with pytest.raises(ValueError, match=what):
        export_tokenizer(tokenizer, tmp_path / "out", longest=LONGEST)


@pytest.mark.parametrize(
    ("normalizer", "decoder", "message"),
    [
        (normalizers.NFC(), None, r"cuts '.*' otherwise: from token \d+ \[[\d, ]+\], not \[[\d, ]"),
        (normalizers.Replace("▁▁", "▁"), None, "cuts ' +' otherwise"),
        (None, tokenizers.decoders.Fuse(), "shows the tokens of ' ' as '▁', not ' '; `"),
    ],
)
def test_broken_pipeline_is_refused(
    own: Callable[[str], Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    normalizer: Any, decoder: Any, message: str,
) -> None:  # fmt: skip
    def broken(path: Path, remedy: str) -> Any:
        pipeline = sentencepiece_pipeline(path, remedy)
        if normalizer is not None:
            pipeline.normalizer = normalizers.Sequence([pipeline.normalizer, normalizer])
        if decoder is not None:
            pipeline.decoder = decoder
        return pipeline

    monkeypatch.setattr(tokenizer_export, "sentencepiece_pipeline", broken)
    with pytest.raises(ValueError, match=message):
        export_tokenizer(own("bpe"), tmp_path, longest=LONGEST)
    assert not (tmp_path / "tokenizer.json").exists()
