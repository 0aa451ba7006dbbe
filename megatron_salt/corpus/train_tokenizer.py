"""Training a small tokenizer that loses nothing: `decode(encode(text)) == text`.

Two formats, as `load_tokenizer` reads them: a sentencepiece `.model` (unigram or BPE with byte
fallback) and a Hugging Face `.json` (byte-level BPE). Both are deterministic functions of the
text, the options and the library version.
"""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_salt.corpus.text_files import BadLine, iter_line_blocks, parse_documents
from megatron_salt.data.tokenizer import SENTINEL
from megatron_salt.files.disk import atomic_path

END_OF_TEXT = "<|endoftext|>"


def sample_documents(
    paths: Sequence[str | Path], *, json_key: str, sample_bytes: int, seed: int = 1234
) -> tuple[list[str], list[BadLine]]:
    """A uniform sample of whole documents, about `sample_bytes` of UTF-8, in input order.

    Every document draws a random key; those with the smallest keys stay. One pass, and memory is
    bounded by the sample, whatever the size of the input.
    """
    generator = random.Random(seed)
    heap: list[tuple[float, int, str]] = []  # largest key first (negated)
    kept_bytes = 0
    bad_lines: list[BadLine] = []
    for order, text in enumerate(_iter_texts(paths, json_key, bad_lines)):
        heapq.heappush(heap, (-generator.random(), order, text))
        kept_bytes += len(text.encode("utf-8"))
        while kept_bytes > sample_bytes and len(heap) > 1:
            kept_bytes -= len(heapq.heappop(heap)[2].encode("utf-8"))
    return [text for _, _, text in sorted(heap, key=lambda entry: entry[1])], bad_lines


def _iter_texts(
    paths: Sequence[str | Path], json_key: str, bad_lines: list[BadLine]
) -> Iterator[str]:
    for path in paths:
        for block in iter_line_blocks(path):
            documents, bad = parse_documents(block, json_key)
            bad_lines.extend(bad)
            yield from (text for (text,) in documents)


def train_tokenizer(
    texts: Sequence[str], output: str | Path, *, vocab_size: int, model_type: str = "bpe",
    num_sentinels: int = 0,
) -> None:  # fmt: skip
    """Trains on `texts` and writes `output`: `.model` sentencepiece, `.json` Hugging Face.

    `num_sentinels` of the `vocab_size` tokens are `<extra_id_0>`, `<extra_id_1>`, …, which no text
    becomes.

    Raises: ValueError when the text is too small for `vocab_size`, or the name says no format.
    """
    if not any(texts):
        raise ValueError("no text to train a tokenizer on")
    if num_sentinels < 0:
        raise ValueError(f"--sentinels {num_sentinels}: must not be negative")
    output = Path(output)
    sentinels = [SENTINEL.format(index) for index in range(num_sentinels)]
    if output.suffix == ".model":
        _train_sentencepiece(texts, output, vocab_size, model_type, sentinels)
    elif output.suffix == ".json":
        if model_type != "bpe":
            raise ValueError(
                f"a .json tokenizer is byte-level BPE; --model-type {model_type} is not"
            )
        _train_hugging_face(texts, output, vocab_size, sentinels)
    else:
        raise ValueError(f"--output {output} must end in .model (sentencepiece) or .json")


def _train_sentencepiece(
    texts: Sequence[str], output: Path, vocab_size: int, model_type: str, sentinels: list[str]
) -> None:
    import sentencepiece

    with atomic_path(output) as temporary:
        try:
            with open(temporary, "wb") as file:
                sentencepiece.SentencePieceTrainer.train(
                    # Lines, without the symbols that are pieces of their own.
                    sentence_iterator=(
                        part for text in texts for part in re.split("[\n\t]", text) if part
                    ),
                    model_writer=file,
                    model_type=model_type,
                    vocab_size=vocab_size,
                    hard_vocab_limit=True,
                    # Exact round trip: nothing is normalised, inserted, trimmed or unknown.
                    normalization_rule_name="identity",
                    add_dummy_prefix=False,
                    remove_extra_whitespaces=False,
                    byte_fallback=True,
                    # Runs of spaces (indentation) become single pieces.
                    allow_whitespace_only_pieces=True,
                    # White space that sentencepiece does not carry inside a piece.
                    user_defined_symbols=["\n", "\t"],
                    # Control symbols, unlike user-defined ones, are never found in text.
                    control_symbols=sentinels,
                    split_digits=True,
                    character_coverage=0.9995,
                    # Threads change the order of float sums in unigram training.
                    num_threads=1,
                    max_sentence_length=1 << 20,
                    minloglevel=2,
                )
        except RuntimeError as error:
            raise ValueError(
                f"sentencepiece could not train a vocabulary of {vocab_size}: {error};"
                " give more text or another --vocab-size"
            ) from error


def _train_hugging_face(
    texts: Sequence[str], output: Path, vocab_size: int, sentinels: list[str]
) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *sentinels],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size};"
            " give more text or another --vocab-size"
        )
    with atomic_path(output) as temporary:
        tokenizer.save(str(temporary))
