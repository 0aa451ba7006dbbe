"""Prompts continued by checkpoints, whose texts stand under one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest, tokenizer_folder
from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.corpus.text_files import iter_line_blocks, parse_documents
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.generation.decode import decode_tokens
from megatron_salt.generation.sampling import GenerationRequest, choose_token, prompt_generator
from megatron_salt.kernels import VocabShard
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import Groups


def read_prompts(path: Path) -> list[str]:
    """The lines of a `.txt`, or the values of "prompt" in a `.jsonl`. Raises: ValueError naming the
    file and what is no prompt."""
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}") from error
    parsed = [parse_documents(block, "prompt") for block in iter_line_blocks(path)]
    if problems := [problem for _, bad in parsed for problem in bad]:
        raise ValueError(f"{problems[0]}; prompts are read from .jsonl, or the lines of a .txt")
    return [text for documents, _ in parsed for (text,) in documents]


def continuer(
    path: str, asked: GenerationRequest, note: Callable[[str], None]
) -> Callable[[Groups], list[dict[str, Any]]]:
    """What loads a checkpoint and continues the prompts, in their order, on this one rank; `note`
    is told what people should know about the texts.

    An empty prompt is the token that ends documents: behind it the next one begins.
    Raises: ValueError naming the checkpoint and what is wrong with it or does not fit.
    """
    folder = resolve(path, what="--checkpoint")
    manifest = read_checkpoint_manifest(folder)
    tokenizer = load_tokenizer(tokenizer_folder(folder, manifest))
    model, end, most = manifest.model, tokenizer.eod, asked.max_new_tokens
    prompts = [ids or [end] for ids in tokenizer.encode_batch(asked.prompts)]
    for text, ids in zip(asked.prompts, prompts, strict=True):
        if text and (read := tokenizer.decode(ids)) != text:
            note(f"{path} cannot read prompt {text!r}: its tokenizer makes {read!r} of it")
    longest, rows = max(map(len, prompts)), model.num_positions
    length = longest + most - 1  # the last new token is not read
    what = f"{path}: a prompt of {longest} tokens with --max-new-tokens {most} takes {length}"
    if length > rows and model.config.position_embedding_type == "learned_absolute":
        raise ValueError(f"{what} positions, its table has {rows}: shorten the prompt or the text")
    if length > model.seq_length:
        note(f"{what} positions; beyond the {model.seq_length} of its training it writes poorly")
    size = min(model.vocab_size, tokenizer.vocab_size)  # rows beyond the tokens mean nothing
    vocab = VocabShard(size=size, start=0, stop=size)

    def continued(groups: Groups) -> list[dict[str, Any]]:
        frozen = load_frozen(
            folder, manifest, groups, seq_length=length, head=vocab, head_columns=vocab.size,
            dtype=DTYPES[asked.precision or model.precision],
        )  # fmt: skip
        found: list[dict[str, Any]] = []
        for text, prompt in zip(asked.prompts, prompts, strict=True):
            choose = partial(choose_token, asked, prompt_generator(asked.seed, text))
            tokens = decode_tokens(frozen, prompt, choose, most, end)
            ended = tokens[-1] == end
            whole = tokenizer.decode(prompt + tokens[: len(tokens) - ended])
            # Decoded alone, a text may lose or gain a space.
            new = whole.removeprefix(tokenizer.decode(prompt))
            found.append({"prompt": text, "checkpoint": path, "step": model.step, "text": new})
            found[-1] |= {"tokens": tokens, "ended": ended}
        return found

    return continued


def side_by_side(of_checkpoints: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Each prompt, and under it what every checkpoint made of it."""
    lines = []
    for number, row in enumerate(zip(*of_checkpoints, strict=True), 1):
        lines += [f"prompt {number}", *_quoted(row[0]["prompt"], "  > ")]
        for each in row:
            end = ", the last ends the document" if each["ended"] else ""
            name = f"{each['checkpoint']}, step {each['step']}"
            lines.append(f"{name}: {len(each['tokens'])} tokens{end}")
            lines += _quoted(each["text"], "  | ")
    return "\n".join([*lines, ""])


def _quoted(text: str, mark: str) -> list[str]:
    # What cannot be printed is escaped: no text may command the terminal.
    shown = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return [mark + line for line in "".join(shown).split("\n")]
