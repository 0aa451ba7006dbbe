"""Tokenizers for Hugging Face's libraries: files that cut text as ours do, or none.

`transformers` reads a sentencepiece model as if it were Llama's, without a word where it is
another. So a pipeline of `tokenizers` is built from what the model says, and both are compared.
"""

from __future__ import annotations

import json
import math
import random
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_salt.data.tokenizer import (
    HUGGING_FACE_NAME,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_salt.files.disk import atomic_path

CONFIG_NAME = "tokenizer_config.json"
SPACE = "▁"
SHOWN_IDS, SHOWN_CHARACTERS = 12, 80
PROBES = (
    "", " ", "   ", " a", "a ", "  leading and  trailing  ", "\n", "\n\n a\n", "\r\n \r\n\r",
    "\t \ta", "def f(x):\n\tif x:\n\t\treturn  {'a': 1}\r\n\n\n    # indented\n", "▁", "▁a ▁▁b▁",
    "a▁ ▁b", "NUL \0 bell \a escape \x1b delete \x7f", "e\u0301 A\u030a x\u0300\u0301\u0302",
    "ﬁ ① ½ Ａ ｶﾞ", "👩\u200d👩\u200d👧 🇩🇪 👍🏽 😀", "日本語、中文。한국어", "שלום \u202bمرحبا\u202c",
    "𝔘𐍈𠜎 \U0010fffd", "\u2028\u2029\u00a0\u3000\ufeff\u200b\u00ad", "<0x0A> <0x41>",
    "0 12 345 6,789.01 0x7f 1e-9 ²³", "a" * 3000, " " * 777, "\n" * 500, "=" * 600, "ab" * 900,
    "x" + "\u0300" * 40, "1" * 400,
)  # fmt: skip


def export_tokenizer(tokenizer: Tokenizer, folder: Path, *, longest: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` of a tokenizer, and `tokenizer.model` if
    it is a sentencepiece model; what `transformers.AutoTokenizer` loads gives the same ids.

    Nothing is added to a text, cut off or filled up; eos, bos and padding are our end of document.
    Two differences stay:
    - The string of a special token within a text (`</s>`, `<extra_id_0>`) is that token there, and
      text to us. Our end of document is special there, whatever the file says.
    - An unknown character, of a sentencepiece model without byte fallback, is shown there as
      `<unk>`, by sentencepiece as `⁇`.

    Args:
        longest: tokens that the model reads at most.
    Raises: ValueError naming text and ids where the files would give others, or what of the
        sentencepiece model has no counterpart. Then nothing is written.
    """
    import tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    remedy = f"{tokenizer.path} cannot be exported"
    if isinstance(tokenizer, SentencePieceTokenizer):
        remedy = (
            "`megatron-salt convert --tokenizer-as-is` lays it beside the model as it is, for use"
            " through sentencepiece itself; or train a .json tokenizer, and a model with it"
        )
        content = json.loads(sentencepiece_pipeline(tokenizer.path, remedy).to_str())
    else:
        content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    eod = _prepare(content, tokenizer)
    text = json.dumps(content, ensure_ascii=False, indent=2)
    _compare(tokenizer, tokenizers.Tokenizer.from_str(text), remedy)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod, "bos_token": eod,
        "pad_token": eod, "model_max_length": longest, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if "add_prefix_space" in (before := content["pre_tokenizer"] or {}):
        config["add_prefix_space"] = before["add_prefix_space"]  # transformers 4 else clears it
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder)
    for name, written in ((HUGGING_FACE_NAME, text), (CONFIG_NAME, json.dumps(config, indent=2))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(written + "\n", encoding="utf-8")


def _prepare(content: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Take what cuts, fills or adds from a tokenizer.json; the end of document's string, which
    becomes a special token. Mutates: content."""
    content["truncation"] = content["padding"] = None
    processor = content["post_processor"] or {"type": None}
    steps = processor["processors"] if processor["type"] == "Sequence" else [processor]
    kept = [step for step in steps if step["type"] == "ByteLevel"]  # it only moves offsets
    content["post_processor"] = kept[0] if kept else None
    eod = tokenizer.tokens()[tokenizer.eod]
    rest = [token for token in content["added_tokens"] if token["id"] != tokenizer.eod]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    mine = {"id": tokenizer.eod, "content": eod, **plain, "special": True}
    content["added_tokens"] = sorted([*rest, mine], key=lambda token: token["id"])
    return eod


def sentencepiece_pipeline(path: Path, remedy: str) -> Any:
    """What does as a sentencepiece model does, as a `tokenizers.Tokenizer`.

    Raises: ValueError for what has no counterpart.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from tokenizers import AddedToken, Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as Pipeline

    proto = ModelProto.FromString(path.read_bytes())
    kinds, trainer, normal = proto.SentencePiece, proto.trainer_spec, proto.normalizer_spec
    for present, what in (
        # sentencepiece adds up a unigram model's scores in 32 bits, `tokenizers` in 64: of two cuts
        # that are nearly as good they may take different ones.
        (trainer.model_type != trainer.BPE, "is not a BPE model"),
        (any(piece.type == kinds.UNUSED for piece in proto.pieces), "has unused pieces"),
        (trainer.treat_whitespace_as_suffix, "writes spaces behind words"),
        (not normal.escape_whitespaces, "keeps spaces as they are"),
        # `Precompiled` reads the same table, but composes marks in another way.
        (normal.precompiled_charsmap, f"normalises characters ({normal.name})"),
    ):
        if present:
            raise ValueError(f"{path} {what}, which tokenizers cannot do alike; {remedy}")
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN)
    names = [piece.piece for piece in proto.pieces]
    scores = [p.score if p.type == kinds.NORMAL else math.nan for p in proto.pieces]
    model = models.BPE(
        {name: i for i, name in enumerate(names)}, _merges(names, scores),
        unk_token=names[unknown], fuse_unk=True, byte_fallback=trainer.byte_fallback,
    )  # fmt: skip
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normal.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
    if normal.remove_extra_whitespaces:
        steps.insert(0, normalizers.Replace(Regex(" +"), " "))
        steps.insert(0, normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        back.append(decoders.Strip(" ", 1 << 16, 0))
    elif normal.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    pipeline = Pipeline(model)
    pipeline.normalizer, pipeline.decoder = normalizers.Sequence(steps), decoders.Sequence(back)
    for piece in proto.pieces:
        if piece.type in (kinds.USER_DEFINED, kinds.CONTROL, kinds.UNKNOWN):
            special = piece.type != kinds.USER_DEFINED
            pipeline.add_tokens([AddedToken(piece.piece, special=special, normalized=False)])
    return pipeline


def _merges(names: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs that make a piece, best piece first; sentencepiece merges whatever makes one."""
    usable = [i for i, score in enumerate(scores) if not math.isnan(score)]
    normal = {names[i] for i in usable}
    return [
        (word[:cut], word[cut:])
        for word in (names[i] for i in sorted(usable, key=lambda i: -scores[i]))
        for cut in range(len(word) - 1, 0, -1)
        if word[:cut] in normal and word[cut:] in normal
    ]


@cache
def _all_characters() -> list[str]:
    """Every assigned character, in texts of 64."""
    no_text = ("Cs", "Co", "Cn")  # surrogates, private and unassigned ones
    found = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in no_text]
    return ["".join(found[start : start + 64]) for start in range(0, len(found), 64)]


def _probes(tokenizer: Tokenizer, special: dict[int, str]) -> Iterator[str]:
    """Texts that tell tokenizers apart: awkward ones, every character as it is and taken apart, and
    every token but the special ones, in random order."""
    yield from PROBES
    for characters in _all_characters():
        yield characters
        yield unicodedata.normalize("NFD", characters)
    ids = [token for token in range(tokenizer.vocab_size) if token not in special]
    random.Random(0).shuffle(ids)
    yield from (tokenizer.decode(ids[start : start + 20]) for start in range(0, len(ids), 20))


def _compare(tokenizer: Tokenizer, outside: Any, remedy: str) -> None:
    """Raises: ValueError naming the first text that `outside` cuts or shows otherwise."""
    added = outside.get_added_tokens_decoder()
    special = {index: token.content for index, token in added.items() if token.special}
    strings = special.values()
    texts = [t for t in _probes(tokenizer, special) if not any(s in t for s in strings)]
    encoded = zip(
        texts,
        tokenizer.encode_batch(texts),
        outside.encode_batch(texts, add_special_tokens=True),
        strict=True,
    )
    what = f"{tokenizer.path} as a {HUGGING_FACE_NAME}"
    for text, ours, encoding in encoded:
        theirs, probe = encoding.ids, repr(text[:SHOWN_CHARACTERS])
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            a, b = (ids[at : at + SHOWN_IDS] for ids in (ours, theirs))
            raise ValueError(
                f"{what} cuts {probe} otherwise: from token {at} {b}, not {a}; {remedy}"
            )
        here, there = tokenizer.decode(ours), outside.decode(ours, skip_special_tokens=False)
        if here != there and special.keys().isdisjoint(ours):
            a, b = repr(here[:SHOWN_CHARACTERS]), repr(there[:SHOWN_CHARACTERS])
            raise ValueError(f"{what} shows the tokens of {probe} as {b}, not {a}; {remedy}")
