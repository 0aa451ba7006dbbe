"""Checkpoints that continue prompts: what is read, what is said of it, and how it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import GPT, make_config, make_deepspeed, run_to_end

from megatron_salt.checkpoint.folder import resolve
from megatron_salt.data.tokenizer import load_tokenizer
from megatron_salt.generation.continuation import continuer, read_prompts, side_by_side
from megatron_salt.generation.sampling import GenerationRequest
from megatron_salt.parallel.groups import initialize

PROMPTS = ["def ", "import os\n\nclass A", "", "def "]


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


def test_the_end_of_the_document_and_broken_characters(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is no text; bytes that are no character are replacement characters."""
    tokenizer = load_tokenizer(resolve(str(teacher), what="") / "tokenizer")
    pieces = tokenizer.tokens()
    whole = [pieces.index(f"<0x{byte:02X}>") for byte in "é".encode()]
    new = iter([[*whole, whole[0]], [whole[0], tokenizer.eod]])
    place = "megatron_salt.generation.continuation."
    monkeypatch.setattr(place + "load_frozen", lambda *_, **__: None)
    monkeypatch.setattr(place + "decode_tokens", lambda *_: next(new))
    groups: Any = None
    found = continuer(str(teacher), asked(prompts=["caf", "x"]), lambda line: None)(groups)
    assert [(each["text"], each["ended"]) for each in found] == [
        ("é\ufffd", False),
        ("\ufffd", True),
    ]


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
