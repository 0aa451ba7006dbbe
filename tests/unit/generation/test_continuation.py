"""Checkpoints that continue prompts: what is read, what is said of it, and how it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import GPT, LLAMA, make_config, make_deepspeed, run_to_end

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest
from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.generation.continuation import continuer, read_prompts, side_by_side
from megatron_salt.generation.sampling import GenerationRequest
from megatron_salt.kernels import VocabShard
from megatron_salt.parallel.groups import initialize

PROMPTS = ["def ", "import os\n\nclass A", "", "def "]


KINDS: dict[str, dict[str, Any]] = {
    "qwen": {**LLAMA, "qk_layernorm": True, "add_qkv_bias": True, "rope_scaling": {"factor": 4.0}},
    "pythia": {**GPT, "position_embedding_type": "rope", "rotary_percent": 0.25,
               "parallel_residual": True},
}  # fmt: skip


def asked(**values: Any) -> GenerationRequest:
    given: dict[str, Any] = {
        "prompts": PROMPTS, "max_new_tokens": 6, "greedy": False, "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "seed": 1, "precision": None,
    }  # fmt: skip
    return GenerationRequest(**given | values)


def texts_of(path: str, *requests: GenerationRequest) -> list[list[dict[str, Any]]]:
    """On a rank: what a checkpoint makes of each request."""
    groups = initialize(1, 1, 1.0)
    return [continuer(path, each, lambda line: None)(groups) for each in requests]


def likeliest(path: str, prompts: list[list[int]], most: int, end: int) -> list[list[int]]:
    """On a rank: each next token from a whole forward pass in fp32, with a padded head."""
    folder = resolve(path, what="")
    manifest = read_checkpoint_manifest(folder)
    vocab = VocabShard(size=manifest.model.vocab_size, start=0, stop=manifest.model.vocab_size)
    model = load_frozen(
        folder, manifest, initialize(1, 1, 1.0), seq_length=64, dtype=torch.float32, head=vocab,
        head_columns=vocab.size + 3,
    )  # fmt: skip
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + most and (tokens == prompt or tokens[-1] != end):
            assert model.head_WE is not None
            logits = model.forward(torch.tensor([tokens]))[0, -1] @ model.head_WE.t()
            tokens.append(int(logits[: vocab.size].argmax()))
        found.append(tokens[len(prompt) :])
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen", "pythia"])
def test_greedy_tokens_are_the_likeliest_of_whole_forward_passes(
    kind: str, dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """Alone an empty prompt begins with the end of a document."""
    if kind != "llama":
        config = make_config(dataset, tmp_path / "run", model=KINDS[kind], train__steps=3)
        run_ranks(1, lambda *args: run_to_end(*args) and None, config, make_deepspeed(tmp_path))
        teacher = tmp_path / "run"
    tokenizer = load_tokenizer(resolve(str(teacher), what="") / "tokenizer")
    prompts = [ids or [tokenizer.eod] for ids in tokenizer.encode_batch(PROMPTS)]
    ((found,),) = run_ranks(1, texts_of, str(teacher), asked(greedy=True, precision="fp32"))
    (expected,) = run_ranks(1, likeliest, str(teacher), prompts, 6, tokenizer.eod)
    assert [record["tokens"] for record in found] == expected


@pytest.fixture(scope="module")
def gpt(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a table of 16 positions."""
    folder = tmp_path_factory.mktemp("gpt")
    config = make_config(dataset, folder / "run", model=GPT, train__steps=1)
    run_ranks(1, lambda *args: run_to_end(*args) and None, config, make_deepspeed(folder))
    return folder / "run"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_prompt_has_the_text_that_it_has_alone(teacher: Path, precision: str) -> None:
    """Drawn and greedy; an empty prompt begins behind the end of a document."""
    kinds: list[dict[str, Any]] = [
        {"precision": precision},
        {"precision": precision, "greedy": True},
    ]
    requests = [asked(**kind, prompts=prompts) for kind in kinds
                for prompts in (PROMPTS, *([prompt] for prompt in PROMPTS))]  # fmt: skip
    requests.append(asked(precision=precision, seed=2))
    (found,) = run_ranks(1, texts_of, str(teacher), *requests)
    for together, *alone in (found[:5], found[5:10]):
        assert together == [record for records in alone for record in records]
        assert [record["prompt"] for record in together] == PROMPTS
        assert together[0] == together[3]
    assert found[0] != found[5] and found[0] != found[10]
    tokenizer = load_tokenizer(resolve(str(teacher), what="") / "tokenizer")
    for record in found[0]:
        ids = tokenizer.encode_batch([record["prompt"]])[0] + record["tokens"]
        ids = [token for token in ids if token != tokenizer.eod]
        assert tokenizer.decode(ids) == record["prompt"] + record["text"]
        assert (record["step"], record["checkpoint"]) == (8, str(teacher))
        assert all(token < tokenizer.vocab_size for token in record["tokens"])


def test_learned_positions_end_and_say_so(gpt: Path) -> None:
    """16 rows: of one token and 16 new ones the last is not read."""
    fits, beyond = (asked(prompts=[""], max_new_tokens=new, greedy=True) for new in (16, 17))
    ((found,),) = run_ranks(1, texts_of, str(gpt), fits)
    assert len(found[0]["tokens"]) == 16 or found[0]["ended"]
    said: list[str] = []
    message = (
        "prompt of 1 tokens with --max-new-tokens 17 takes 17 positions, its table has 16: sho"
    )
    with pytest.raises(ValueError, match=message):
        continuer(str(gpt), beyond, said.append)
    assert not said


def test_beyond_the_trained_length_rotary_positions_go_on(teacher: Path) -> None:
    said: list[str] = []
    long = asked(prompts=[""], max_new_tokens=17)
    continuer(str(teacher), long, said.append)
    assert said == [
        f"{teacher}: a prompt of 1 tokens with --max-new-tokens 17 takes 17 positions; beyond the "
        "16 of its training it writes poorly"
    ]
    ((found,),) = run_ranks(1, texts_of, str(teacher), long)
    assert len(found[0]["tokens"]) == 17 or found[0]["ended"]


def test_what_the_tokenizer_changes_is_said(teacher: Path) -> None:
    said: list[str] = []
    continuer(str(teacher), asked(prompts=["a▁b", "a b"]), said.append)
    assert said == [f"{teacher} cannot read prompt 'a▁b': its tokenizer makes 'a b' of it"]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No weights are read and `new` are the tokens: what was asked of the loader is noted here."""
    seen: dict[str, Any] = {}
    place = "megatron_salt.generation.continuation."
    monkeypatch.setattr(place + "load_frozen", lambda *_, **options: seen.update(options))
    monkeypatch.setattr(place + "decode_tokens", lambda *_: seen["new"].pop(0))
    return seen


def test_broken_characters_are_replaced(teacher: Path, stubbed: dict[str, Any]) -> None:
    """And the model is read in the precision asked for, of its whole vocabulary."""
    pieces = load_tokenizer(resolve(str(teacher), what="") / "tokenizer").tokens()
    whole = [pieces.index(f"<0x{byte:02X}>") for byte in "é".encode()]
    stubbed["new"] = [[*whole, whole[0]]]
    request, groups = asked(prompts=["caf"], precision="fp16"), None
    (found,) = continuer(str(teacher), request, lambda line: None)(groups)  # type: ignore[arg-type]
    assert found["text"] == "é\ufffd"
    assert (stubbed["dtype"], stubbed["head_columns"]) == (torch.float16, len(pieces))


class Stripping:
    """A tokenizer that shows the end of a document and drops a space before a text."""

    eod, vocab_size = 0, 3
    pieces = ("<end>", " a", " b")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[self.pieces.index(" " + word) for word in text.split()] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[each] for each in ids).lstrip()


def test_a_text_is_what_stands_behind_the_prompt(
    teacher: Path, stubbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its space, without the end of the document."""
    monkeypatch.setattr(
        "megatron_salt.generation.continuation.load_tokenizer", lambda _: Stripping()
    )
    stubbed["new"] = [[1, 2, 0], [2, 1], [0]]
    request, groups = asked(prompts=["a", "", "b"]), None
    found = continuer(str(teacher), request, lambda line: None)(groups)  # type: ignore[arg-type]
    texts = [(each["text"], each["tokens"], each["ended"]) for each in found]
    assert texts == [(" a b", [1, 2, 0], True), (" b a", [2, 1], False), ("", [0], True)]


def test_checkpoints_stand_under_one_another() -> None:
    def made(checkpoint: str, prompt: str, text: str, ended: bool) -> dict[str, Any]:
        return {"checkpoint": checkpoint, "prompt": prompt, "text": text, "ended": ended,
                "step": 3, "tokens": [1, 2]}  # fmt: skip

    shown = side_by_side(
        [
            [made("a", "x\ny", " z\n", False), made("a", "", "\x1b[2Jé", True)],
            [made("b", "x\ny", "", True), made("b", "", "w", False)],
        ]
    )
    assert shown.splitlines() == [
        "prompt 1", "  > x", "  > y",
        "a, step 3: 2 tokens", "  |  z", "  | ",
        "b, step 3: 2 tokens, the last ends the document", "  | ",
        "prompt 2", "  > ",
        "a, step 3: 2 tokens, the last ends the document", r"  | \x1b[2Jé",
        "b, step 3: 2 tokens", "  | w",
    ]  # fmt: skip


def test_prompt_files(tmp_path: Path) -> None:
    lines, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_bytes("eins\r\n\n  zwei é\n".encode())
    assert read_prompts(lines) == ["eins", "", "  zwei é"]
    records.write_text('{"prompt": "a\\nb"}\n{"prompt": "", "more": 1}\n', encoding="utf-8")
    assert read_prompts(records) == ["a\nb", ""]
    lines.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"a\.txt: 'utf-8' codec can't decode byte 0xff"):
        read_prompts(lines)
    records.write_text('{"prompt": "a"}\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no key 'prompt'; prompts are read from"):
        read_prompts(records)


def test_a_checkpoint_that_is_none_is_named(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(
        ValueError, match=f"--checkpoint = {tmp_path}: holds no complete checkpoint"
    ):
        continuer(str(tmp_path), asked(), lambda line: None)
