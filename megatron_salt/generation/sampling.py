"""What is to be generated; the next token's distribution, cut as asked, and the draw from it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """The options of `megatron-salt generate`. Raises: ValueError naming the one that is wrong."""

    prompts: list[str]
    max_new_tokens: int
    greedy: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int
    precision: str | None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE")
        if bad := [text for text in self.prompts if text.encode(errors="replace").decode() != text]:
            raise ValueError(f"prompt {bad[0]!r}: not UTF-8")
        for option, value, least, most, must in (
            ("max-new-tokens", self.max_new_tokens, 1, math.inf, "at least 1"),
            ("top-k", self.top_k, 0, math.inf, "positive, or 0 for all tokens"),
            ("top-p", self.top_p, 1e-6, 1, "1e-6 to 1, which is all tokens"),
            ("temperature", self.temperature, 1e-6, 1e6, "1e-6 to 1e6; or use --greedy"),
        ):
            if not least <= value <= most:
                raise ValueError(f"--{option} {value:g}: must be {must}")
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("--greedy draws nothing: leave out --temperature, --top-k and --top-p")


def truncated_probabilities(logits_V: Tensor, temperature: float, k: int, p: float) -> Tensor:
    """Chances [V] in fp32: of the `k` most likely tokens (0: all), and of these, made to sum to 1,
    of the fewest of the most likely that together reach `p`. Of equals the smaller id is first."""
    # The largest becomes 0: at a low temperature nothing overflows.
    chances_V = torch.softmax((logits_V.float() - logits_V.max()) / temperature, dim=0)
    if k == 0 and p == 1.0:
        return chances_V
    ordered, ids = chances_V.sort(descending=True, stable=True)
    ordered[k or len(ids) :] = 0
    if p < 1.0:
        before = ordered.cumsum(dim=0) - ordered
        ordered[before >= p * ordered.sum()] = 0
    return torch.zeros_like(chances_V).scatter_(0, ids, ordered / ordered.sum())


def prompt_generator(seed: int, prompt: str) -> torch.Generator:
    """Random numbers that depend on seed and text, not on the prompts beside it."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def choose_token(asked: GenerationRequest, generator: torch.Generator, logits_V: Tensor) -> int:
    """The next token; drawn on the CPU, since a GPU has other random numbers."""
    if asked.greedy:
        return int(logits_V.argmax())
    chances_V = truncated_probabilities(logits_V, asked.temperature, asked.top_k, asked.top_p)
    return int(torch.multinomial(chances_V.cpu(), 1, generator=generator))
