"""`token_scores` against fp64 from whole logits: loss, rank, entropy and guess of every token."""

from __future__ import annotations

import pytest
import torch
from loss_backends import BACKENDS, chosen
from torch import Tensor

from megatron_salt.kernels import Chunking, VocabShard, token_scores

T, E, V = 96, 12, 251


def make_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, E, generator=rng) * 2
    weight = torch.randn(V, E, generator=rng)
    labels = torch.randint(V, (T,), generator=rng)
    labels[:3] = torch.tensor([0, V - 1, 128])
    labels[3::4] = (hidden.double() @ weight.double().T).argmax(dim=1)[3::4]  # a few right ones
    return hidden.to(dtype), weight.to(dtype), labels


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64, the rank by sorting."""
    logits = hidden.double() @ weight.double().T
    log_p = logits.log_softmax(dim=1)
    order = logits.argsort(dim=1, descending=True)
    rank = (order == labels[:, None]).int().argmax(dim=1)
    return -log_p.gather(1, labels[:, None])[:, 0], rank, -(log_p.exp() * log_p).sum(dim=1)


@pytest.mark.parametrize(
    ("dtype", "chunk_bytes"), [(torch.float32, 1 << 30), (torch.bfloat16, 40_000)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_equal_fp64(backend: str, dtype: torch.dtype, chunk_bytes: int) -> None:
    hidden, weight, labels = make_case(dtype)
    # 5 columns of padding, larger than any logit
    padded = torch.cat([weight, torch.full((5, E), 50.0, dtype=dtype)])
    with chosen(backend):
        scores = token_scores(
            hidden, padded, labels, vocab=VocabShard(size=V, start=0, stop=V),
            chunking=Chunking(chunk_bytes=chunk_bytes),
            want=("ce", "likelier", "entropy", "confidence", "correct"),
        )  # fmt: skip
    ce, rank, entropy = oracle(hidden, weight, labels)
    assert scores.ce_T is not None and scores.entropy_T is not None
    torch.testing.assert_close(scores.ce_T.double(), ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy_T.double(), entropy, rtol=1e-5, atol=1e-5)
    assert scores.likelier_T is not None
    assert scores.likelier_T.tolist() == rank.tolist()
    best = (hidden.double() @ weight.double().T).softmax(dim=1).max(dim=1)
    assert scores.confidence_T is not None and scores.correct_T is not None
    torch.testing.assert_close(scores.confidence_T.double(), best.values, rtol=1e-5, atol=1e-5)
    assert scores.correct_T.tolist() == (best.indices == labels).tolist()


def test_equal_logits_count_for_the_label() -> None:
    """A token is among the k likeliest if fewer than k are likelier; equals are not."""
    hidden = torch.ones(3, 1)
    weight = torch.tensor([[2.0], [1.0], [1.0], [0.0]])
    scores = token_scores(
        hidden, weight, torch.tensor([0, 2, 3]), vocab=VocabShard(size=4, start=0, stop=4),
        want=("likelier",),
    )  # fmt: skip
    assert scores.likelier_T is not None and scores.ce_T is None
    assert scores.likelier_T.tolist() == [0, 1, 3]


def test_logits_that_are_nan_are_no_other_error() -> None:
    """A diverged model has a loss of nan, which the trainer reports; it is no wrong label."""
    scores = token_scores(
        torch.full((2, 1), torch.nan), torch.ones(4, 1), torch.tensor([0, 3]),
        vocab=VocabShard(size=4, start=0, stop=4), want=("ce", "confidence", "correct"),
    )  # fmt: skip
    assert scores.ce_T is not None and scores.ce_T.isnan().all()


def test_entropy_at_its_ends() -> None:
    weight = torch.eye(8) * 40.0
    hidden = torch.stack([torch.zeros(8), torch.eye(8)[2]])
    scores = token_scores(
        hidden, weight, torch.tensor([0, 2]), vocab=VocabShard(size=8, start=0, stop=8),
        want=("entropy",),
    )  # fmt: skip
    assert scores.entropy_T is not None
    assert scores.entropy_T.tolist() == pytest.approx([2.0794415, 0.0], abs=1e-6)
