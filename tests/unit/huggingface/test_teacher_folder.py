"""A Hugging Face folder as a teacher: what is read of it, and what is refused before a run."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import ROOT
from hf_models import VOCAB_SIZE, make_hf_model, save_hf_model

from megatron_salt.checkpoint.manifest import weights_fingerprint
from megatron_salt.corpus.train_tokenizer import train_tokenizer
from megatron_salt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_salt.huggingface.teacher_folder import describe, find_hf_teacher, weight_files
from megatron_salt.model.costs import layer_costs
from megatron_salt.planner.sizes import TeacherSize

pytest.importorskip("transformers")
SIZE = 300  # of the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [f"word {n} and {n * n} is said {n**3 % 101} times by {n % 7}" for n in range(400)]
    train_tokenizer(texts, path, vocab_size=SIZE)
    return path


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Path) -> Path:
    return save_hf_model(make_hf_model("llama", vocab_size=SIZE), tmp_path / "small", tokenizer)


@pytest.fixture
def student(tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tokenizer)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_a_folder_says_of_its_model(folder: Path, student: Tokenizer) -> None:
    found, manifest = find_hf_teacher(str(folder), student, 64, None)
    record = manifest.model
    assert found == folder and record.name == "small" and manifest.training is None
    assert (record.vocab_size, record.seq_length, record.bos) == (300, 64, 1)
    assert record.objective == ["causal"] and record.evaluation is None
    assert record.tokenizer_fingerprint == student.fingerprint
    assert record.num_parameters == sum(p.numel() for p in make_hf_model("llama", vocab_size=SIZE)
                                        .parameters())  # fmt: skip
    (name,) = manifest.files
    assert name == "weights/model.safetensors"
    assert manifest.files[name]["bytes"] == (folder / "model.safetensors").stat().st_size


def test_fingerprint_is_of_the_weights(folder: Path, student: Tokenizer) -> None:
    manifest = find_hf_teacher(str(folder), student, 16, None)[1]
    first = weights_fingerprint(manifest)
    resumed: Any = SimpleNamespace(run=SimpleNamespace(teacher_fingerprint=first))
    change_config(folder, architectures=["Other"])
    assert weights_fingerprint(find_hf_teacher(str(folder), student, 16, resumed)[1]) == first
    model = make_hf_model("llama", vocab_size=SIZE)
    model.base_model.norm.weight.data[3] += 1
    save_hf_model(model, folder)
    assert weights_fingerprint(find_hf_teacher(str(folder), student, 16, None)[1]) != first
    with pytest.raises(ValueError, match="other weights than the teacher that this run was"):
        find_hf_teacher(str(folder), student, 16, resumed)


def test_sharded_weights_are_those_of_the_index(tmp_path: Path) -> None:
    make_hf_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    names = weight_files(tmp_path)
    assert len(names) > 2 and names == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    (tmp_path / "extra.safetensors").write_bytes(b"x")
    assert weight_files(tmp_path) == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=f"{names[1]} is missing"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gptj", {}), ("gpt2", {}),
     ("falcon", {}), ("opt", {})],
)  # fmt: skip
def test_the_stand_in_costs_what_the_layers_do(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = make_hf_model(family, **changes)
    record = describe(save_hf_model(model, tmp_path), 64, VOCAB_SIZE)
    cost = layer_costs(record.config, VOCAB_SIZE, 0)[1:-1]
    weights = {name: p.numel() for name, p in model.base_model.named_parameters()}
    tables = sum(
        n for name, n in weights.items() if re.search("embed_|wte|wpe|word_emb.*s.wei", name)
    )
    width = model.config.hidden_size
    # All but the embeddings; the inner width is whole, so a layer may be half of 2 E off.
    assert abs(sum(cost) - (sum(weights.values()) - tables)) <= 2 * width
    assert len(cost) == 2 and record.config.hidden_size == width
    size = TeacherSize.of(record)
    bias = VOCAB_SIZE if family == "gptj" else 0  # of the head, counted with the body
    assert size.numel(1) == sum(weights.values()) + bias


@pytest.mark.parametrize(
    ("family", "longest"), [("llama", 64), ("gpt2", 64), ("gptj", 64), ("bloom", 99)]
)
def test_longest_sequence(tmp_path: Path, family: str, longest: int) -> None:
    """Bloom knows none, so what the run reads is within it."""
    folder = save_hf_model(make_hf_model(family), tmp_path)
    assert describe(folder, 99, VOCAB_SIZE).seq_length == longest


def test_sequences_longer_than_it_knows(folder: Path, student: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match="trained on sequences of 64 tokens, data.seq_length is 65"
    ):
        find_hf_teacher(str(folder), student, 65, None)


@pytest.mark.parametrize("bos", [None, 299, 300])
def test_a_token_of_no_vocabulary_begins_no_text(folder: Path, bos: int | None) -> None:
    change_config(folder, bos_token_id=bos)
    assert describe(folder, 16, SIZE).bos == (None if bos == 300 else bos)


def test_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    texts = [f"entirely different, number {n}, {n * n} times" for n in range(400)]
    train_tokenizer(texts, tmp_path / "other.model", vocab_size=SIZE)
    with pytest.raises(ValueError, match="ids different tokens"):
        find_hf_teacher(str(folder), load_tokenizer(tmp_path / "other.model"), 16, None)


def test_pickled_weights_are_never_read(folder: Path, student: Tokenizer) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="small: model.safetensors is missing"):
        find_hf_teacher(str(folder), student, 16, None)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(
        ValueError, match="pytorch_model.bin, a pickle.*save_pretrained writes safe"
    ):
        find_hf_teacher(str(folder), student, 16, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"model_type": "unheard_of"}, "transformers cannot read it"),
        ({"model_type": "t5"}, "no causal language model"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "transformers cannot read"),
    ],
)
def test_config_that_cannot_teach(folder: Path, values: dict[str, Any], message: str) -> None:
    (folder / "own.py").write_text("raise SystemExit('code of the folder has run')")
    change_config(folder, **values)
    with pytest.raises(ValueError, match=f"small.*{message}"):
        describe(folder, 16, SIZE)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"small: no config.json there; name a Hugging Face folder"
    ):
        describe(folder, 16, SIZE)
    with pytest.raises(ValueError, match="absent: no config.json"):
        describe(folder / "absent", 16, 300)


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install megatron_salt\[hf\]"):
        describe(folder, 16, SIZE)
    assert "\nhf = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
