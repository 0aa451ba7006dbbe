"""Logits of tiny random models against transformers', and weights there and back, to the last bit.

transformers' classes are the specification: a map that is wrong in one weight, one field or one
order of channels shows in the logits at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hf_folders import MODELS, ROWS, logits_of, make_model, save_model
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_salt.checkpoint.manifest import ModelRecord, read_checkpoint_manifest
from megatron_salt.checkpoint.weights import load_frozen, read_weights
from megatron_salt.config.fields import ModelConfig
from megatron_salt.corpus.train_tokenizer import train_tokenizer
from megatron_salt.huggingface import convert
from megatron_salt.huggingface.convert import export_checkpoint, import_folder
from megatron_salt.huggingface.families import FAMILIES, family_of, read_config
from megatron_salt.kernels import VocabShard
from megatron_salt.parallel.groups import Groups, initialize

transformers = pytest.importorskip("transformers")
# Where the same sums are made in another order: attention and MLP side by side, and a formula of
# the tanh GELU that PyTorch's own function rounds otherwise.
ROUNDED = {"pythia": 1e-6, "gpt2": 1e-6}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = Path(transformers.__file__).read_text(encoding="utf-8")[:60_000]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([text], path, vocab_size=509)
    return path


def _logits(asked: list[tuple[Path, np.ndarray]]) -> list[list[np.ndarray]]:
    """For each checkpoint and its tokens: of all rows, by its frozen model whole on this rank, and
    of two ranks that share it this one's columns."""
    size = int(os.environ["WORLD_SIZE"])
    groups = initialize(size, 1, timeout_minutes=5.0)
    return [_logits_of_one(*each, groups, size) for each in asked]


def _logits_of_one(
    checkpoint: Path, tokens: np.ndarray, groups: Groups, size: int
) -> list[np.ndarray]:
    manifest = read_checkpoint_manifest(checkpoint)
    rows = manifest.model.vocab_size
    half = VocabShard.of_rank(
        size=rows, padded_size=rows + rows % 2, tp_rank=groups.tp_rank, tp_size=2
    )
    found = []
    for head in [VocabShard(size=rows, start=0, stop=rows), half][:size]:
        model = load_frozen(
            checkpoint, manifest, groups, seq_length=tokens.shape[1], dtype=torch.float32,
            head=head, head_columns=head.num_columns, tensor_parallel=head is half,
        )  # fmt: skip
        assert model.head_WE is not None
        found.append((model.forward(torch.from_numpy(tokens)) @ model.head_WE.T).numpy())
    return found


def ours(checkpoint: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits of a checkpoint's frozen model, on one rank."""
    (((found,),),) = run_ranks(1, _logits, [(checkpoint, tokens_BS.numpy())])
    return torch.from_numpy(found)


def tokens_for(longest: int) -> torch.Tensor:
    return torch.randint(0, ROWS, (2, longest), generator=torch.manual_seed(5))


@pytest.fixture(scope="module")
def imported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Imported]:
    """Every model of MODELS as a checkpoint, and what that computes: one start of ranks for all."""
    folder, records = tmp_path_factory.mktemp("imported"), {}
    for name in MODELS:
        source = save_model(make_model(name), tokenizer, folder / name / "hf")
        records[name] = import_folder(source, folder / name / "checkpoint")
    asked = [
        (folder / name / "checkpoint", tokens_for(record.seq_length).numpy())
        for name, record in records.items()
    ]
    found = {}
    for name, halves in zip(records, zip(*run_ranks(2, _logits, asked), strict=True), strict=True):
        whole, spread = halves[0][0], np.concatenate([half for _, half in halves], axis=-1)
        logits = torch.from_numpy(whole), torch.from_numpy(spread)
        found[name] = Imported(folder / name, records[name], *logits)
    return found


class Imported(NamedTuple):
    folder: Path
    record: ModelRecord
    alone: torch.Tensor
    spread: torch.Tensor
    """Over two ranks."""


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_and_out_and_weights_there_and_back(
    name: str, imported: dict[str, Imported], tmp_path: Path
) -> None:
    place, made, alone, spread = imported[name]
    tokens_BS = tokens_for(made.seq_length)
    wanted = logits_of(make_model(name), tokens_BS)
    assert wanted.std() > 0.1
    assert (alone - wanted).abs().max() <= ROUNDED.get(name, 0.0)
    assert (spread - wanted).abs().max() <= 1e-6

    kind = export_checkpoint(str(place / "checkpoint"), tmp_path / "back")
    again = import_folder(tmp_path / "back", tmp_path / "again")
    assert (again.config.sizes(), again.vocab_size, again.seq_length, again.num_positions) == (
        made.config.sizes(), made.vocab_size, made.seq_length, made.num_positions
    )  # fmt: skip
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert type(back).__name__ == kind
    # The tanh GELU goes out under the name of the function that computes it here.
    assert (logits_of(back, tokens_BS) - wanted).abs().max() <= (1e-6 if name == "gpt2" else 0.0)
    before, after = (
        load_file(each / "model.safetensors") for each in (place / "hf", tmp_path / "back")
    )
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_keep_their_precision(dtype: torch.dtype, tokenizer: Path, tmp_path: Path) -> None:
    folder = save_model(make_model("qwen2", dtype), tokenizer, tmp_path / "hf")
    made = import_folder(folder, tmp_path / "checkpoint")
    assert made.precision == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "back")
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "back"))
    assert all(after[key].dtype == dtype and torch.equal(before[key], after[key]) for key in before)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == dtype


def test_parts_of_a_large_model(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files in, several parts here, several files out, and the same bits."""
    model = make_model("qwen3")
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    (tmp_path / "hf/tokenizer.json").write_bytes(tokenizer.read_bytes())
    monkeypatch.setattr(convert, "PART_BYTES", 100_000)
    made = import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert made.pp_size > 3
    export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "back")
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    sizes = sum(parameter.nbytes for parameter in model.parameters())
    assert index["metadata"]["total_size"] == sizes
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    theirs = dict(back.named_parameters())
    assert all(torch.equal(theirs[name], each) for name, each in model.named_parameters())


def test_fields_as_transformers_4_wrote_them(tokenizer: Path, tmp_path: Path) -> None:
    rope = {key: value for key, value in MODELS["llama3"][1]["rope_parameters"].items()
            if key != "rope_theta"}  # fmt: skip
    model = make_model("llama3")
    folder = save_model(
        model, tokenizer, tmp_path / "hf", rope_parameters="left out", rope_theta=500000.0,
        rope_scaling=rope, head_dim="left out", torch_dtype="float32", pretraining_tp=1,
    )  # fmt: skip
    import_folder(folder, tmp_path / "checkpoint")
    tokens_BS = torch.randint(0, ROWS, (1, 64))
    assert torch.equal(ours(tmp_path / "checkpoint", tokens_BS), logits_of(model, tokens_BS))
    values = json.loads((folder / "config.json").read_text())
    values["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert read_config(values, "x")[1].rope_scaling == {"factor": 2.0}
    del values["rope_scaling"], values["rope_theta"]
    values |= {"model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": 0.5,
               "rotary_emb_base": 777, "layer_norm_eps": 1e-4}  # fmt: skip
    for name in ("num_key_value_heads", "rms_norm_eps", "mlp_bias"):
        values.pop(name, None)
    neox = read_config({**values, "attention_bias": True}, "x")[1]
    assert (neox.rotary_percent, neox.rotary_base) == (0.5, 777.0)


def test_published_gpt2_has_no_prefix_and_stores_its_masks(tokenizer: Path, tmp_path: Path) -> None:
    model = make_model("gpt2-tanh")
    folder = save_model(model, tokenizer, tmp_path / "hf")
    stored = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(bare, folder / "model.safetensors")
    import_folder(folder, tmp_path / "checkpoint")
    tokens_BS = torch.randint(0, ROWS, (1, 64))
    assert torch.equal(ours(tmp_path / "checkpoint", tokens_BS), logits_of(model, tokens_BS))


def test_tokenizer_that_has_no_equal_goes_as_it_is_where_asked(tmp_path: Path) -> None:
    text = Path(transformers.__file__).read_text(encoding="utf-8")
    made = tmp_path / "tokenizer.model"
    train_tokenizer([text], made, vocab_size=400, model_type="unigram")
    import_folder(save_model(make_model("llama"), made, tmp_path / "hf"), tmp_path / "checkpoint")
    source, target = str(tmp_path / "checkpoint"), tmp_path / "out"
    with pytest.raises(ValueError, match="not a BPE model.*--tokenizer-as-is"):
        export_checkpoint(source, target)
    assert not target.exists()
    export_checkpoint(source, target, tokenizer_as_is=True)
    assert (target / "tokenizer.model").read_bytes() == made.read_bytes()
    assert not (target / "tokenizer.json").exists() and (target / "model.safetensors").exists()


# What would change the logits without a word: refused, by name.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "attention_bias = True: only False"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.*not known here"),
    ("llama3", {"rope_scaling": {"factor": 4.0}}, "rope_parameters.factor = 8.0: elsewhere .* 4.0"),
    ("llama", {"partial_rotary_factor": 0.5}, "model.rotary_percent = 0.5, not 1.0"),
    ("llama", {"logit_scale": 0.5}, "what logit_scale = 0.5 would change .*--ignore-field"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config .*quantised weights"),
    ("llama", {"model_type": "olmo2"}, "model_type = 'olmo2': only llama.*teacher.hf"),
    ("llama", {"hidden_size": "left out"}, "hidden_size is missing"),
    ("llama", {"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
    ("llama", {"num_hidden_layers": 2}, "no place for model.layers.2"),
    ("llama", {"intermediate_size": 95}, "config.json says .190, 64"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ("llama", {"vocab_size": 500}, "the tokenizer has 509 tokens, the model 500 rows"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu': known are gelu"),
    ("pythia", {"attention_bias": False}, "attention_bias = False: only True"),
    ("pythia", {"rotary_emb_base": 5, "rope_theta": 6}, "rotary_emb_base = 5: rope_theta is 6"),
    ("pythia", {"rotary_pct": 0.5}, "partial_rotary_factor = 0.25: elsewhere it is 0.5"),
]


@pytest.fixture(scope="module")
def saved(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = {name for name, _, _ in REFUSED}
    return {
        name: save_model(make_model(name), tokenizer, tmp_path_factory.mktemp(name) / "hf")
        for name in sorted(names)
    }


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_by_name(
    name: str, changes: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in saved[name].iterdir():
        (folder / path.name).symlink_to(path)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    kept = {key: value for key, value in values.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=message):
        import_folder(folder, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == [folder]  # nothing half made


def test_ignored_field_and_wrong_folders(saved: dict[str, Path], tmp_path: Path) -> None:
    values = json.loads((saved["llama"] / "config.json").read_text()) | {"logit_scale": 1.0}
    assert read_config(values, "x", ["logit_scale"])[2] == ROWS
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text(json.dumps(values))
    (tmp_path / "pickled/tokenizer.json").symlink_to(saved["llama"] / "tokenizer.json")
    (tmp_path / "pickled/pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="has pytorch_model.bin, a pickle.*safetensors"):
        import_folder(tmp_path / "pickled", tmp_path / "new", ["logit_scale"])
    with pytest.raises(ValueError, match="there already: name another folder"):
        import_folder(saved["llama"], tmp_path / "pickled")


def test_window_of_attention_is_the_longest_sequence() -> None:
    fields = {**MODELS["mistral"][1], "model_type": "mistral", "rms_norm_eps": 1e-6}
    assert read_config(fields, "x")[3] == 96
    assert read_config({**fields, "sliding_window": None}, "x")[3] == 128
    del fields["sliding_window"]  # its class has 4096
    assert read_config({**fields, "max_position_embeddings": 9999}, "x")[3] == 4096


GELU = {"normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True}
NOT_EXPORTED: list[tuple[dict[str, Any], str]] = [
    ({"activation": "gelu"}, "nearest is LlamaForCausalLM, but model.activation = 'gelu'"),
    ({"normalization": "LayerNorm"}, "model.normalization = 'LayerNorm', not 'RMSNorm'"),
    ({"add_qkv_bias": True, "qk_layernorm": True}, "model.add_qkv_bias|model.qk_layernorm"),
    ({**GELU, "num_query_groups": 2}, "model.num_query_groups = 2, not one per head"),
    ({**GELU, "kv_channels": 8}, "model.kv_channels = 8"),
    ({**GELU, "rope_scaling": {"factor": 2.0}}, "model.rope_scaling"),
    ({"rotary_percent": 0.5}, "model.rotary_percent = 0.5"),
]


@pytest.mark.parametrize(("changes", "message"), NOT_EXPORTED, ids=str)
def test_style_that_no_class_computes(changes: dict[str, Any], message: str) -> None:
    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    assert family_of(model)[0] == "llama"
    with pytest.raises(ValueError, match=f"no class of transformers computes .*({message})"):
        family_of(dataclasses.replace(model, **changes))


def test_every_weight_of_every_family_has_one_place(saved: dict[str, Path], tmp_path: Path) -> None:
    """And `model.yaml` has the settings with which a student of this shape is built."""
    import yaml

    import_folder(saved["qwen3"], tmp_path / "checkpoint")
    manifest = read_checkpoint_manifest(tmp_path / "checkpoint")
    section = yaml.safe_load((tmp_path / "checkpoint/model.yaml").read_text())["model"]
    assert ModelConfig(**section) == manifest.model.config
    names = [each for ours in read_weights(tmp_path / "checkpoint", manifest)
             for each in FAMILIES["qwen3"].theirs(ours)[1]]  # fmt: skip
    assert len(names) == len(set(names))
