"""One face for sentencepiece and Hugging Face tokenizers, and proof that two of them agree.

Text is always text: no token is added to it, nothing is cut off, and the string `<|endoftext|>`
inside a document does not become the end of a document.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

SENTENCEPIECE_NAME = "tokenizer.model"
HUGGING_FACE_NAME = "tokenizer.json"
SENTINEL = "<extra_id_{}>"
HUGGING_FACE_EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
SHOWN_DIFFERENCES = 5
MOST_UNUSED_IDS = 1 << 20  # all tokens are listed by id, those that are none too


class Tokenizer(ABC):
    """Text to token ids and back; also what `megatron.core.datasets` expects of a tokenizer.

    `vocab_size` is the real size, one more than the largest id, never padded. `eod` is the id that
    ends a document.
    """

    # megatron-core turns every label equal to `pad` into id 0 and masks its loss. No token may be
    # lost that way (many tokenizers pad with their end of document), and no damaged id be taken for
    # padding, so it is a number that no file of 32-bit ids holds.
    pad = -(2**63)

    path: Path
    vocab_size: int
    eod: int
    _saved_name: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any special token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are shown as text where the library can."""

    @abstractmethod
    def tokens(self) -> list[str]:
        """The token strings by id; "" where an id has no token."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end (int32), and the length of each text in tokens (int64).

        What preprocessing wants: the same ids as `encode_batch` in two arrays.
        """
        ids = self.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
        return flat, lengths

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the token strings in the order of their ids, in hex.

        It says which token an id means, which is what a data set, a teacher and a student must
        agree on. How text is cut into tokens (scores, merges) is not part of it: two tokenizers
        that cut differently but name ids alike may share data and models.
        """
        digest = hashlib.sha256()
        for token in self.tokens():
            content = token.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(content) + content)
        return digest.hexdigest()

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What megatron-core puts in the key of its index cache; a moved file keeps its cache."""
        return OrderedDict({"class": type(self).__name__, "fingerprint": self.fingerprint})

    def save(self, directory: str | Path) -> Path:
        """Copies the tokenizer's file to `directory`, from where `load_tokenizer` reads it."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(self.path, Path(directory, self._saved_name)))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`; its end of document is the eos piece `</s>`.

    Sentencepiece writes a space as `▁` (U+2581), so a `▁` in the text comes back as a space.
    """

    _saved_name = SENTENCEPIECE_NAME

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size = int(self._processor.vocab_size())
            self.tokens()  # their bytes may be no text
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        self.eod = int(self._processor.eos_id())
        if self.eod < 0:
            raise ValueError(
                f"{path} has no eos piece to end documents with; train it with eos_id >= 0"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(
            list(texts), out_type=int, add_bos=False, add_eos=False, num_threads=1
        )

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # Releases before 0.2.2 cannot return arrays; lists cost a fifth of the time more.
        if not texts or not hasattr(self._processor, "EncodeAsNumpy"):
            return super().encode_flat(texts)
        arrays = self._processor.encode(
            list(texts), out_type="numpy", add_bos=False, add_eos=False, num_threads=1
        )
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        return np.concatenate(arrays).astype(np.int32, copy=False), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def tokens(self) -> list[str]:
        return [self._processor.id_to_piece(token) for token in range(self.vocab_size)]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` `.json`."""

    _saved_name = HUGGING_FACE_NAME

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer file: {error}") from error
        # Settings of the model the file comes from, which would silently cut or pad documents, and
        # control tokens out of ordinary text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{path} holds a tokenizer without any token")
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > 2 * len(vocabulary) + MOST_UNUSED_IDS:
            raise ValueError(
                f"{path} has {len(vocabulary)} tokens with ids up to {self.vocab_size - 1}: an id "
                "is damaged"
            )
        present = [token for token in HUGGING_FACE_EOD_TOKENS if token in vocabulary]
        if not present:
            raise ValueError(
                f"{path} has no token to end documents with (looked for"
                f" {', '.join(HUGGING_FACE_EOD_TOKENS)}); add one of them as a special token"
            )
        self.eod = vocabulary[present[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def tokens(self) -> list[str]:
        tokens = [""] * self.vocab_size
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for token, index in sorted(vocabulary.items()):
            tokens[index] = token
        return tokens


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a sentencepiece `*.model`, a Hugging Face `*.json`, or a directory with one of them.

    In a directory that has both, `tokenizer.json` is taken: tokens that were added to a
    sentencepiece model are in it alone.

    Raises: FileNotFoundError when nothing is there, ValueError when it is not a usable tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: no such file or directory")
    if path.is_dir():
        found = [path / n for n in (HUGGING_FACE_NAME, SENTENCEPIECE_NAME) if (path / n).is_file()]
        if not found:
            raise FileNotFoundError(
                f"the directory {path} has neither {SENTENCEPIECE_NAME} nor {HUGGING_FACE_NAME}"
            )
        path = found[0]
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise ValueError(
        f"{path} is not a tokenizer: expected a sentencepiece *.model, a Hugging Face *.json or a"
        " directory with one"
    )


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the tokenizer has them without a gap."""
    by_token = {token: index for index, token in enumerate(tokenizer.tokens())}
    found: list[int] = []
    while SENTINEL.format(len(found)) in by_token:
        found.append(by_token[SENTINEL.format(len(found))])
    return found


def check_same_tokens(
    name_a: str, tokenizer_a: Tokenizer, name_b: str, tokenizer_b: Tokenizer
) -> None:
    """Raises ValueError with the first differing ids unless every id names the same token."""
    size = max(tokenizer_a.vocab_size, tokenizer_b.vocab_size)
    _check_tokens(size, name_a, tokenizer_a, name_b, tokenizer_b)


def check_reads(name: str, tokenizer: Tokenizer, data_name: str, data_tokenizer: Tokenizer) -> None:
    """Raises ValueError unless every id of `data_tokenizer` means the same to `tokenizer`, which
    may have more behind them, and the same id ends documents; the first differing ids are named."""
    _check_tokens(data_tokenizer.vocab_size, name, tokenizer, data_name, data_tokenizer)
    if tokenizer.eod != data_tokenizer.eod:
        raise ValueError(
            f"{name} ends documents with id {tokenizer.eod}, {data_name} with {data_tokenizer.eod}"
        )


def _check_tokens(
    size: int, name_a: str, tokenizer_a: Tokenizer, name_b: str, tokenizer_b: Tokenizer
) -> None:
    """Of the ids below `size`."""
    pairs = enumerate(zip_longest(tokenizer_a.tokens()[:size], tokenizer_b.tokens()[:size]))
    differences = [(index, *pair) for index, pair in pairs if pair[0] != pair[1]]
    if not differences:
        return
    shown = [
        f"  id {index}: {_shown_token(token_a)} in {name_a}, {_shown_token(token_b)} in {name_b}"
        for index, token_a, token_b in differences[:SHOWN_DIFFERENCES]
    ]
    if len(differences) > SHOWN_DIFFERENCES:
        shown.append(f"  and {len(differences) - SHOWN_DIFFERENCES} more")
    raise ValueError(
        f"{name_a} ({tokenizer_a.vocab_size} tokens) and {name_b} ({tokenizer_b.vocab_size}"
        f" tokens) give {len(differences)} ids different tokens:\n" + "\n".join(shown)
    )


def _shown_token(token: str | None) -> str:
    return "absent" if token is None else repr(token)
