"""Whether a teacher that brings no score of its own has loaded: what its first score should be."""

from __future__ import annotations

import math

ODD_GAP_NATS = 1.5


def expected_ce_nats(num_parameters: int) -> float:
    """What a well trained model of this size scores on text of all kinds, per token.

    Math: 1.69 + 406.4 / N^0.34, the loss with as much data as can be.
    Source: Hoffmann et al., arXiv 2203.15556, equation 10. Their tokenizer has 32,000 tokens.
    """
    return 1.69 + 406.4 / num_parameters**0.34


def check_first_score(
    source: str, ce_nats: float, vocab_size: int, num_parameters: int
) -> list[str]:
    """A warning if the score is far above what the model's size should give.

    Args:
        source: names the teacher.
    Raises: ValueError for a score that no teacher has that has loaded: worse than guessing.
    """
    line, guessing = f"teacher {source}: held-out CE {ce_nats:.4f} nats/token", math.log(vocab_size)
    if not ce_nats <= guessing:  # nan too
        raise ValueError(
            f"{line}, worse than guessing among {vocab_size} tokens ({guessing:.4f}): its weights "
            "did not load as they were saved, or it was trained on something else; name another "
            "teacher"
        )
    expected = expected_ce_nats(num_parameters)
    if ce_nats <= expected + ODD_GAP_NATS:
        return []
    return [
        f"{line}, where models of {num_parameters:,} parameters reach about {expected:.2f}: it may "
        "have a wrong rotary base or permuted weights, be used to another kind of text, or have "
        "had little training"
    ]
