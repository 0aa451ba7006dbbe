"""Models of transformers as teachers: hidden states times a head are the model's own logits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCAB_SIZE, make_hf_model, save_hf_model

from megatron_salt.huggingface import teacher_model
from megatron_salt.huggingface.teacher_model import (
    HfModel,
    check_weights,
    folded_head,
    probe_tokens,
)
from megatron_salt.kernels import VocabShard

pytest.importorskip("transformers")
HERE = Path("folder")
LENGTH = 12


def as_teacher(model: Any, **shard: Any) -> HfModel:
    head_VE = folded_head(HERE, model, VOCAB_SIZE, LENGTH)
    values = {"head": VocabShard(size=VOCAB_SIZE, start=0, stop=VOCAB_SIZE), "head_columns": 512}
    return HfModel(model.base_model, head_VE, LENGTH, **(values | shard))


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, LENGTH), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def states(teacher: HfModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    (layer,) = teacher.chunk(0, 1)
    return layer(tokens_BS).transpose(0, 1)


@pytest.mark.parametrize(
    ("family", "width", "changes"),
    [
        ("llama", 32, {}),
        ("llama", 32, {"tie_word_embeddings": True}),
        ("cohere", 32, {}),
        ("cohere", 32, {"logit_scale": 0.3}),
        ("granite", 32, {}),
        ("phi", 40, {}),
        ("gptj", 40, {}),
        ("gpt2", 32, {}),
        ("opt", 32, {}),
        ("olmo2", 32, {}),
        ("gemma", 32, {}),
        ("mistral", 32, {}),
        ("qwen2", 32, {}),
        ("qwen3", 32, {}),
        ("gpt_neox", 32, {}),
        ("falcon", 32, {}),
        ("bloom", 32, {}),
    ],
)
@torch.no_grad()
def test_head_gives_the_models_own_logits(family: str, width: int, changes: Any) -> None:
    model = make_hf_model(family, **changes)
    expected = model(input_ids=tokens(), use_cache=False).logits
    teacher = as_teacher(model)
    hidden_BSE = states(teacher, tokens())
    assert teacher.head_WE is not None and hidden_BSE.shape[-1] == teacher.hidden_size == width
    logits = hidden_BSE @ teacher.head_WE.T
    assert (logits[..., :VOCAB_SIZE] - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert not logits[..., VOCAB_SIZE:].any()
    assert expected.abs().max() > 0.2  # or rounding alone would pass


@pytest.mark.parametrize("family", ["granite", "phi"])
@torch.no_grad()
def test_head_in_bf16_is_as_right_as_the_models_own(family: str) -> None:
    exact = make_hf_model(family)(input_ids=tokens(), use_cache=False).logits
    model = make_hf_model(family).to(torch.bfloat16)
    own = model(input_ids=tokens(), use_cache=False).logits.float()
    teacher = as_teacher(model)
    assert teacher.head_WE is not None and teacher.head_WE.dtype == torch.bfloat16
    logits = states(teacher, tokens()).float() @ teacher.head_WE.float().T
    error = (logits[..., :VOCAB_SIZE] - exact).abs().mean()
    assert error <= 1.2 * (own - exact).abs().mean()


def test_what_bends_logits_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="final_logit_softcapping = 30"):
        as_teacher(make_hf_model("gemma2"))
    as_teacher(make_hf_model("gemma2", final_logit_softcapping=None))


class _Changed(torch.nn.Module):
    """A model whose logits are made of those of another."""

    def __init__(self, model: Any, change: Any) -> None:
        super().__init__()
        self.base_model, self.config, self.change = model.base_model, model.config, change
        self.inner = model
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: 30.0 * (z / 30.0).tanh(), "nor that times one factor"),
        (lambda z: z + 0.01 * torch.arange(z.shape[-1]), "nor that times one factor"),
        (lambda z: z + torch.inf, "not finite in torch.float32"),
    ],
)
def test_logits_that_no_head_gives_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"folder.*{message}"):
        as_teacher(_Changed(make_hf_model("llama"), change))


def test_a_factor_that_no_config_names_is_found() -> None:
    plain = as_teacher(make_hf_model("phi")).head_WE
    scaled = as_teacher(_Changed(make_hf_model("phi"), lambda z: 0.37 * z)).head_WE
    assert plain is not None and scaled is not None
    torch.testing.assert_close(scaled, 0.37 * plain, rtol=1e-6, atol=0)


def test_no_head_or_too_small_a_one() -> None:
    with pytest.raises(ValueError, match="508 rows, the student's vocabulary 509"):
        as_teacher(make_hf_model("llama", vocab_size=508))
    model = make_hf_model("llama")
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        as_teacher(model.base_model)


@pytest.mark.parametrize(("start", "stop"), [(0, 256), (256, VOCAB_SIZE)])
def test_a_rank_keeps_its_columns(start: int, stop: int) -> None:
    model = make_hf_model("phi", vocab_size=600)  # rows beyond the student's tokens are cut off
    whole = as_teacher(model).head_WE
    shard = VocabShard(size=VOCAB_SIZE, start=start, stop=stop)
    part = as_teacher(model, head=shard, head_columns=256).head_WE
    assert whole is not None and part is not None and part.shape == (256, 40)
    assert torch.equal(part[: stop - start], whole[start:stop])
    assert not part[stop - start :].any()
    assert as_teacher(model, head=None).head_WE is None


def test_bytes_and_release() -> None:
    model = make_hf_model("gptj")
    teacher = as_teacher(model)
    body = [*model.base_model.parameters(), *model.base_model.buffers()]
    assert teacher.num_bytes() == 4 * (sum(each.numel() for each in body) + 512 * 40)
    teacher.release()
    assert teacher.num_bytes() == 0 and teacher.head_WE is None


def test_weights_of_no_trained_model() -> None:
    model = make_hf_model("llama")
    check_weights(HERE, model)
    weight = model.base_model.layers[1].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(ValueError, match=r"folder.*layers.1.mlp.up_proj.weight is all zeros"):
        check_weights(HERE, model)
    with torch.no_grad():
        weight.copy_(before)[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has inf or nan"):
        check_weights(HERE, model)


def test_weight_that_the_files_do_not_have(tmp_path: Path) -> None:
    """transformers would draw it and only say so."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder = save_hf_model(make_hf_model("llama"), tmp_path)
    teacher_model._read(folder, AutoModelForCausalLM, torch.float32)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weight for \['model.layers.0.mlp.up_proj.weight'\]"):
        teacher_model._read(folder, AutoModelForCausalLM, torch.float32)
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(ValueError, match="transformers cannot read it"):
        teacher_model._read(folder, AutoModelForCausalLM, torch.float32)


def test_probe_is_of_the_whole_vocabulary_and_always_the_same() -> None:
    first, again = (probe_tokens(VOCAB_SIZE, 64, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (1, 64)
    assert first.max() > 450 and first.min() < 50
