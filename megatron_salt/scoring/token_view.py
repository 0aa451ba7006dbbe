"""Tokens as text that shows where each begins, what it is of, and what its tags say of it.

A token's text comes from its piece, never from decoding it alone: libraries drop or add spaces
then. Tokens that end within a character have a dot for each of its bytes, and the one that ends it
has the character. Spaces stand as they are; other white space is visible, newlines also break the
line, and what cannot be printed is escaped, so that text cannot command the terminal.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_salt.data.tokenizer import HuggingFaceTokenizer, Tokenizer

FIRST, LAST, BETWEEN, PART = "▶", "◀", "¦", "·"
SHOWN = {"\n": "⏎\n", "\r": "␍", "\t": "⇥   "}
LOSS_STEPS = (0.5, 1.5, 3.0, 6.0)
"""Nats at which the next stronger shade begins."""
# Backgrounds of the 256-colour palette, weakest first: kept tokens green, the others red. All
# are light enough for dark letters.
KEPT_SHADES = (194, 157, 120, 114, 78)
OTHER_SHADES = (230, 223, 216, 210, 203)
PLAIN_SHADE = 254
FLAT = 1  # the shade where no losses are stored
# Neighbours differ in the colour of their letters, or the border between them would be lost.
LETTERS = (16, 19)

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class TokenTags:
    """What tags say about some tokens; each as long as they are."""

    kept: NDArray[np.bool_]
    loss: NDArray[np.float16] | None = None
    entropy: NDArray[np.float16] | None = None


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What every id stands for in UTF-8 text; a byte may be part of a character only."""
    of_piece = _from_byte_level if _is_byte_level(tokenizer) else _from_piece
    return [of_piece(piece) for piece in tokenizer.tokens()]


def _from_piece(piece: str) -> bytes:
    """Of sentencepiece, or of the Hugging Face tokenizers that follow it."""
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(match[1]) if match else piece.replace("▁", " ").encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether pieces are written in GPT-2's alphabet of bytes."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    decoder = json.loads(tokenizer.path.read_text(encoding="utf-8")).get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _from_byte_level(piece: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()  # an added token, which is plain text


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def texts_of(ids: Sequence[int], names: Sequence[bytes]) -> list[str]:
    """The text of each token; names as `token_bytes` gives them."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    texts = []
    for token in ids:
        if not 0 <= token < len(names):
            decoder.reset()
            texts.append(f"<id {token}>")
            continue
        content = names[token]
        try:
            text = decoder.decode(content)
        except UnicodeDecodeError:
            # What went before was no character after all.
            decoder.reset()
            try:
                text = decoder.decode(content)
            except UnicodeDecodeError:
                decoder.reset()
                texts.append(_visible(content.decode("utf-8", "backslashreplace")))
                continue
        pending = decoder.getstate()[0]
        if content and not text:
            texts.append(PART * len(content))
        else:
            texts.append(_visible(text) + PART * len(pending))
    return texts


def _visible(text: str) -> str:
    def visible(c: str) -> str:
        return SHOWN.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode())

    return "".join(map(visible, text))


def render(texts: Sequence[str], tags: TokenTags | None, *, colour: bool) -> str:
    """All tokens as one text, the first and the last marked."""
    paint = _coloured if colour else _bracketed
    return f"{FIRST}{paint(texts, tags)}{LAST}"


def _bracketed(texts: Sequence[str], tags: TokenTags | None) -> str:
    parts: list[str] = []
    plain_before = False
    for place, text in enumerate(texts):
        if tags is None or tags.kept[place]:
            parts.append(BETWEEN + text if plain_before else text)
            plain_before = not text.endswith("\n")
        else:
            body = text.removesuffix("\n")
            parts.append(f"⟦{body}⟧{text[len(body) :]}")
            plain_before = False
    return "".join(parts)


def _coloured(texts: Sequence[str], tags: TokenTags | None) -> str:
    parts = []
    for place, text in enumerate(texts):
        background = PLAIN_SHADE
        if tags is not None:
            step = FLAT if tags.loss is None else bisect_right(LOSS_STEPS, float(tags.loss[place]))
            background = (KEPT_SHADES if tags.kept[place] else OTHER_SHADES)[step]
        parts.append(_painted(text, LETTERS[place % 2], background))
    return "".join(parts)


def _painted(text: str, letters: int, background: int) -> str:
    # Colour ends before a line does: terminals would fill the rest of the line with it.
    start = f"\x1b[38;5;{letters};48;5;{background}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def legend(tags: TokenTags | None, top_k: int | None, *, colour: bool) -> str:
    """What the signs and colours mean; top_k is needed with tags."""
    what = f"among the model's {top_k} most likely"
    signs = f"{FIRST} {LAST} first and last token; ⏎ ⇥ ␍ white space; {PART} part of a character"
    if not colour:
        boxes = "" if tags is None else f"⟦…⟧ not {what}; "
        return f"{boxes}{BETWEEN} between tokens; {signs}"
    if tags is None:
        return f"one colour of letters after the other: tokens; {signs}"
    lines = []
    for shades, not_ in ((KEPT_SHADES, ""), (OTHER_SHADES, "not ")):
        if tags.loss is None:
            lines.append(_painted(" kept " if not not_ else " not ", LETTERS[0], shades[FLAT]))
        else:
            edges = ("0", *(f"{edge:g}" for edge in LOSS_STEPS))
            steps = zip(edges, shades, strict=True)
            lines.append("".join(_painted(f" {e} ", LETTERS[0], s) for e, s in steps))
            lines[-1] += " nats or more,"
        lines[-1] += f" {not_}{what}"
    return "\n".join([*lines, signs])


def listing(
    ids: Sequence[int], texts: Sequence[str], tags: TokenTags | None, start: int
) -> list[str]:
    """A line for every token: place in the stream, id, tags, text."""
    numbers = [] if tags is None else [("loss", tags.loss), ("entropy", tags.entropy)]
    present = [(name, values) for name, values in numbers if values is not None]
    head = ["place", "id", *([] if tags is None else ["top k"]), *(name for name, _ in present)]
    lines = ["".join(f"{name:>9}" for name in head) + "  token"]
    for place, (token, text) in enumerate(zip(ids, texts, strict=True)):
        line = f"{start + place:9d}{token:9d}"
        if tags is not None:
            line += f"{'yes' if tags.kept[place] else 'no':>9}"
        line += "".join(f"{float(values[place]):9.3f}" for _, values in present)
        text = text.replace("\n", "")  # the sign for it stays
        lines.append(f"{line}  {text!r}")
    return lines
