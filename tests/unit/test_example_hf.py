"""The example of examples/huggingface: a GGUF file read exactly, and its commands, unrun."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hf_folders import SIZES, logits_of

from megatron_salt.commands.table import make_parser
from megatron_salt.config.command_line import parse_command_line
from megatron_salt.huggingface.families import family_of

REPO = Path(__file__).parents[2]
TEXT = "def f(x):\n    return x + 2024  # three  spaces, 12 digits: 123456789012\n" * 4


def load(name: str) -> ModuleType:
    path = REPO / f"examples/huggingface/{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_hf_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(REPO)
    return load("run")


@pytest.fixture(scope="module")
def from_gguf() -> ModuleType:
    return load("from_gguf")


# --- the GGUF file -------------------------------------------------------------------------------


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of queries and keys."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("heads", "channels"), [(1, 2), (4, 16), (9, 64)])
def test_unpermuted_is_the_inverse(from_gguf: ModuleType, heads: int, channels: int) -> None:
    weight = np.arange(heads * channels * 3, dtype=np.float32).reshape(-1, 3)
    stored = permuted(weight, heads)
    assert np.array_equal(from_gguf.unpermuted(stored, heads), weight)
    assert channels == 2 or not np.array_equal(stored, weight)


def tiny_values(tokenizer: Any, config: Any) -> dict[str, Any]:
    """Metadata of a GGUF file, by name."""
    state = json.loads(tokenizer.to_str())
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    return {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(config.rms_norm_eps)),
        "llama.rope.freq_base": 77777.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = before  # so that it learns numbers, into which no text is then cut
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), before])
    return made


def write_gguf(path: Path, values: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, values["general.architecture"])
    for name, value in values.items():
        if name == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_folder_of_a_file_is_the_model_that_the_file_was_made_of(
    from_gguf: ModuleType, tied: bool, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 77777.0}
    fields = {**SIZES, "vocab_size": tokenizer.get_vocab_size(), "rms_norm_eps": 1e-5}
    fields |= {"tie_word_embeddings": tied, "rope_parameters": rope}
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    for parameter in model.parameters():  # matrices of 0.02 would hide a wrong one in rounding
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    weights = {}
    heads = {"attn_q": SIZES["num_attention_heads"], "attn_k": SIZES["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        theirs, weight = names.get_name(name, try_suffixes=(".weight",)), tensor.numpy()
        if (kind := theirs.split(".")[-2]) in heads:
            weight = permuted(weight, heads[kind])
        weights[theirs] = weight
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_values(tokenizer, model.config), weights)

    folder = from_gguf.write_folder(path, tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (back.dtype, back.config.rms_norm_eps) == (torch.float32, 1e-5)
    assert back.config.tie_word_embeddings == tied
    tokens_BS = torch.randint(0, fields["vocab_size"], (2, 100))
    assert torch.equal(logits_of(back, tokens_BS), logits_of(model, tokens_BS))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, " a  b\t\n 12 3", "é 日本 😀"):
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded("<|im_end|>")["input_ids"] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, "gemma: not a plain Llama"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: not a plain Llama"),
    ],
)
def test_another_model_is_refused(
    from_gguf: ModuleType, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        from_gguf.make_config({"general.architecture": "llama", **changes}, tied=True)


def test_another_tensor_or_tokenizer_is_refused(from_gguf: ModuleType) -> None:
    assert from_gguf.their_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight"):
        with pytest.raises(SystemExit, match=f"no place for the tensor {name}"):
            from_gguf.their_name(name)
    for way in (("llama", "smollm"), ("gpt2", "llama-bpe")):
        values = dict(zip(("tokenizer.ggml.model", "tokenizer.ggml.pre"), way, strict=True))
        with pytest.raises(SystemExit, match="only SmolLM2's"):
            from_gguf.make_tokenizer(values)


# --- the steps -----------------------------------------------------------------------------------


def test_commands_exist_and_parse(example: ModuleType, tmp_path: Path) -> None:
    commands = dict(example.data_commands(tmp_path, tmp_path / "hf"))
    commands |= dict(example.model_commands(tmp_path))
    for name, (module, package, command, *words) in commands.items():
        assert (module, package) == ("-m", "megatron_salt"), name
        if command != "pretrain":
            make_parser(command).parse_args(words)
            continue
        config = parse_command_line(words).config
        # The row that transformers scores; a class that can be exported; both phases.
        assert config.data.seq_length == example.SEQ_LENGTH
        assert family_of(config.model)[0] == "llama"
        assert 0 < config.salt.kd_steps < config.train.steps
        assert config.train.steps % config.train.eval_interval == 0
        assert config.train.export_hf == str(tmp_path / "student-hf")
        # Settings of the file name the folders of `make example-hf`.
        own = yaml.safe_load((REPO / example.CONFIG).read_text(encoding="utf-8"))
        (default,) = dict(example.data_commands(Path("runs/example-hf"), Path("x")))["convert"][-1:]
        assert own["teacher"]["checkpoint"] == default


def test_rows_are_those_of_training(example: ModuleType) -> None:
    """Each begins with the last token of the row before; what fills no row is left out."""
    for number in range(1, 30):
        rows = example.rows_of(list(range(number)), 4)
        labels = [label for row in rows for label in row[1:]]
        assert labels == list(range(1, len(labels) + 1))
        assert all(len(row) == 5 for row in rows)
        assert number - 1 - len(labels) in range(4)


def test_held_out_text_is_not_trained_on(example: ModuleType, tmp_path: Path) -> None:
    long = "x" * (example.HELD_OUT_CHARACTERS + 5)
    texts = ["a", long, "b", "y" + long, "c"]
    corpus = "".join(json.dumps({"text": text, "source": "s"}) + "\n" for text in texts)
    (tmp_path / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    example.hold_out(tmp_path)
    train, held_out = (
        [json.loads(line)["text"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert train == ["a", long, "b", "c"]
    assert held_out == [("y" + long)[: example.HELD_OUT_CHARACTERS]]


def test_only_an_earlier_example_is_replaced_and_its_download_stays(
    example: ModuleType, tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    example.make_folder(output)
    for name in ("data/old", "evaluate.json", "download/kept.gguf"):
        (output / name).touch()
    example.make_folder(output)
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == {example.MARK, "download/kept.gguf"}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="was not made by this example"):
        example.make_folder(mine)


def test_a_folder_of_ones_own_is_used(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[list[str]] = []
    monkeypatch.setattr(example, "run", lambda name, command, output: done.append(command))
    with pytest.raises(SystemExit, match="neither config.json nor one .gguf"):
        example.model_folder(tmp_path, tmp_path / "out")
    (tmp_path / "a.gguf").touch()
    assert example.model_folder(tmp_path, tmp_path / "out") == tmp_path / "out/teacher-hf"
    assert done[-1][1:] == [str(tmp_path / "a.gguf"), str(tmp_path / "out/teacher-hf")]
    assert Path(done[-1][0]).is_file()
    (tmp_path / "config.json").touch()
    assert example.model_folder(tmp_path, tmp_path / "out") == tmp_path
    assert len(done) == 1


def test_a_step_that_fails_ends_the_example(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.make_folder(tmp_path / "out")
    (tmp_path / "say.py").write_text("print('first'); print('last')")
    example.run("say", [str(tmp_path / "say.py")], tmp_path / "out")
    assert capsys.readouterr().out.endswith("s: last\n")
    (tmp_path / "fail.py").write_text("raise ValueError('no such thing')")
    with pytest.raises(SystemExit, match="fail ended with status 1"):
        example.run("fail", [str(tmp_path / "fail.py")], tmp_path / "out")
    assert "no such thing" in capsys.readouterr().err


def test_report_compares_like_with_like(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    records = [{"step": 0, "valid_ce_nats": 9.0, "teacher_valid_ce_nats": 2.0}, {"step": 1},
               {"step": 2, "valid_ce_nats": 4.0}]  # fmt: skip
    (tmp_path / "student/metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "evaluate.json").write_text(json.dumps([{"valid_ce_nats": 4.0}]))
    text = example.report(tmp_path, {"teacher": (2.002, "a b"), "student": (4.0, "c")})
    rows = [line.split() for line in text.splitlines()]
    assert ["teacher", "2.000000", "2.002000", "1.0e-03"] in rows
    assert ["student", "4.000000", "4.000000", "0.0e+00"] in rows
    assert ["after", "step", "2", "4.000000"] in rows
    assert "teacher: 'a b'" in text


def test_missing_packages_are_named(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        example.parse_arguments()
    assert "gguf is missing: pip install 'megatron_salt[example-hf]'" in capsys.readouterr().err
