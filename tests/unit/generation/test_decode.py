"""Tokens with a cache: their logits are those of whole forward passes, one chosen after another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from tiny import GPT, LLAMA
from torch import Tensor

from megatron_salt.config.fields import ModelConfig
from megatron_salt.generation.decode import decode_tokens
from megatron_salt.kernels import VocabShard
from megatron_salt.model.frozen import FrozenModel
from megatron_salt.model.weights import initial_weight, weight_table

VOCAB, POSITIONS, END = 61, 24, 60
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class OneRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def keep_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which megatron-core drops where no processes have been started."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)


def frozen(model: dict[str, Any], dtype: torch.dtype) -> FrozenModel:
    """A model without processes; its weights are large, so that attention and positions matter."""
    config = ModelConfig(**model)
    table = weight_table(config, VOCAB, POSITIONS)
    weights = ((name, 8 * initial_weight(spec, config, 3)) for name, spec in table.items())
    one = ProcessGroupCollection(tp=OneRank(), cp=OneRank(), pp=OneRank())
    groups: Any = SimpleNamespace(teacher=one, device=torch.device("cpu"))
    return FrozenModel(
        config, weights, groups, source="test", vocab_size=VOCAB, num_positions=POSITIONS,
        seq_length=POSITIONS, dtype=dtype, head=VocabShard(size=VOCAB, start=0, stop=VOCAB),
        head_columns=VOCAB,
    )  # fmt: skip


def whole_logits(model: FrozenModel, tokens: list[int]) -> Tensor:
    """[S, V] of a forward pass over all tokens at once, as evaluations make them."""
    assert model.parts.cache is None and model.head_WE is not None
    return model.forward(torch.tensor([tokens]))[0].float() @ model.head_WE.float().t()


def greedily(model: FrozenModel, prompt: list[int], most: int) -> tuple[list[int], Tensor]:
    """New tokens, and the logits that each was chosen from."""
    seen: list[Tensor] = []

    def choose(logits_V: Tensor) -> int:
        seen.append(logits_V)
        return int(logits_V.argmax())

    return decode_tokens(model, prompt, choose, most, END), torch.stack(seen)


@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["rope, groups", "learned"])
def test_logits_are_those_of_the_whole_sequence(model: dict[str, Any]) -> None:
    """fp32: at every place, up to the last position, for prompts of different lengths."""
    plain = frozen(model, torch.float32)
    for prompt in ([7], [3, 1, 4, 1, 5, 9, 2], list(range(20, 20 + POSITIONS))):
        most = POSITIONS + 1 - len(prompt)
        new, logits = greedily(plain, prompt, most)
        assert logits.shape == (len(new), VOCAB) and logits.dtype == torch.float32
        expected = whole_logits(plain, (prompt + new)[:-1])[len(prompt) - 1 :]
        largest = float(expected.abs().max())
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * largest)
        assert new == expected.argmax(dim=1).tolist()
        assert len(new) == (new.index(END) + 1 if END in new else most)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["rope, groups", "learned"])
def test_in_16_bits_the_error_is_that_of_the_whole_sequence(
    model: dict[str, Any], dtype: torch.dtype
) -> None:
    """The 16-bit weights in fp32 say what is right."""
    half = frozen(model, dtype)
    right = frozen(model, torch.float32)
    for mine, theirs in zip(right.layers.parameters(), half.layers.parameters(), strict=True):
        mine.data.copy_(theirs)
    right.head_WE = half.head_WE = frozen(model, torch.float32).head_WE
    prompt = [3, 1, 4, 1, 5]
    new, logits = greedily(half, prompt, 12)
    tokens = (prompt + new)[:-1]
    expected = whole_logits(right, tokens)[len(prompt) - 1 :]
    plain = whole_logits(half, tokens)[len(prompt) - 1 :]
    error, of_plain = (float((each - expected).abs().max()) for each in (logits, plain))
    assert error <= 2 * of_plain + torch.finfo(dtype).eps * float(expected.abs().max())
    assert of_plain > 0


def test_a_text_does_not_depend_on_what_was_read_before() -> None:
    """Nor is a cache left behind: evaluations with the same model are as they were."""
    model = frozen(LLAMA, torch.bfloat16)
    before = whole_logits(model, [5, 6, 7])
    alone = greedily(model, [9, 8, 7], 9)
    greedily(model, [1, 2, 3, 4, 5, 6], 5)
    again = greedily(model, [9, 8, 7], 9)
    assert alone[0] == again[0] and torch.equal(alone[1], again[1])
    assert torch.equal(whole_logits(model, [5, 6, 7]), before)


def test_it_ends_with_the_document_or_the_last_token_asked_for() -> None:
    model = frozen(LLAMA, torch.float32)
    left = iter([4, END, 5, END])
    assert decode_tokens(model, [END, 2], lambda _: next(left), 9, END) == [4, END]
    assert decode_tokens(model, [2], lambda _: next(left), 1, END) == [5]
    assert next(left) == END


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = frozen(LLAMA, torch.float32)
    assert model.head_WE is not None
    model.head_WE[7] = torch.inf
    with pytest.raises(ValueError, match="new token 0 are not finite: try --precision fp32"):
        decode_tokens(model, [1, 2], lambda logits_V: int(logits_V.argmax()), 3, END)
