"""Draws against distributions worked out by hand, and what a request refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_salt.generation.sampling import (
    GenerationRequest,
    choose_token,
    prompt_generator,
    truncated_probabilities,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Exact in 16 bits; equal ones at the edges of k = 2 and 4.
LOGITS = [0.5, -1.0, 2.0, 0.5, -3.0, 0.5, 1.5, -1.0]


def asked(**values: Any) -> GenerationRequest:
    given: dict[str, Any] = {
        "prompts": ["a"], "max_new_tokens": 5, "greedy": False, "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "seed": 1, "precision": None,
    }  # fmt: skip
    return GenerationRequest(**given | values)


def by_hand(logits: list[float], temperature: float, k: int, p: float) -> list[float]:
    """The chances in plain Python, token by token."""
    weights = [math.exp(each / temperature) for each in logits]
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    order = order[: k or len(logits)]
    total, reached, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if reached >= p and kept:
            break
        kept.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chances_are_those_worked_out_by_hand(dtype: torch.dtype) -> None:
    logits = torch.tensor(LOGITS, dtype=dtype)
    for temperature, k, p in itertools.product(
        (0.3, 1.0, 2.5), (0, 1, 2, 4, 8, 99), (1e-6, 0.3, 0.6, 0.9, 0.999, 1.0)
    ):
        chances = truncated_probabilities(logits, temperature, k, p)
        expected = torch.tensor(by_hand(LOGITS, temperature, k, p))
        assert chances.dtype == torch.float32
        torch.testing.assert_close(chances, expected, rtol=2e-6, atol=0)  # 0 is exactly 0


def test_nothing_cut_is_plain_softmax_to_the_bit() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    plain = torch.softmax(logits - logits.max(), dim=0)
    assert torch.equal(truncated_probabilities(logits, 1.0, 0, 1.0), plain)
    assert torch.equal(
        truncated_probabilities(logits, 1.0, 1, 1.0).nonzero()[0], logits.argmax()[None]
    )


def test_of_equals_the_smaller_ids_stay() -> None:
    chances = truncated_probabilities(torch.zeros(5000), 1.0, 7, 1.0)
    assert chances.nonzero()[:, 0].tolist() == list(range(7))


def test_a_low_temperature_does_not_overflow() -> None:
    chances = truncated_probabilities(torch.tensor([60000.0, 60000.0, -60000.0]), 1e-6, 0, 1.0)
    assert chances.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(("k", "p"), [(0, 1.0), (3, 1.0), (0, 0.7), (5, 0.8)])
def test_draws_have_the_exact_chances(k: int, p: float) -> None:
    draws, logits = 20_000, torch.tensor(LOGITS)
    request, generator = asked(top_k=k, top_p=p, temperature=1.5), prompt_generator(1, "a")
    counts = [0] * len(LOGITS)
    for _ in range(draws):
        counts[choose_token(request, generator, logits)] += 1
    for count, chance in zip(counts, by_hand(LOGITS, 1.5, k, p), strict=True):
        # Five deviations; without any where the chance is 0: never drawn.
        assert abs(count - draws * chance) <= 5 * math.sqrt(draws * chance * (1 - chance))


def test_greedy_takes_the_first_of_the_largest_and_draws_nothing() -> None:
    generator = prompt_generator(1, "a")
    before = generator.get_state()
    assert choose_token(asked(greedy=True), generator, torch.tensor([0.0, 3.0, 1.0])) == 1
    assert torch.equal(before, generator.get_state())


def test_random_numbers_are_of_seed_and_prompt() -> None:
    def numbers(seed: int, prompt: str) -> Tensor:
        return torch.rand(4, generator=prompt_generator(seed, prompt))

    assert torch.equal(numbers(1, "a"), numbers(1, "a"))
    for other in (numbers(2, "a"), numbers(1, "b"), numbers(-1, "a")):
        assert not torch.equal(numbers(1, "a"), other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0: must be 1e-6 to 1e6; or use --greedy"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0: "),
        ({"top_p": 1.5}, "--top-p 1.5: "),
        ({"top_k": -1}, "--top-k -1: "),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be at least 1"),
        ({"greedy": True, "top_k": 3}, "--greedy draws nothing: leave out"),
        ({"prompts": []}, "no prompt: give --prompt"),
        ({"prompts": ["a", "\udcff"]}, r"prompt '\\udcff': not UTF-8"),
    ],
)
def test_what_cannot_be_asked_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(**values)
