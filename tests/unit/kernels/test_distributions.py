"""What is stored of a distribution, against PyTorch's own over the whole vocabulary in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_salt.kernels import Chunking, Distributions, VocabShard, distributions
from megatron_salt.scoring.capture import draw_uniforms

T, E, V = 37, 24, 507


def made(
    *, dtype: torch.dtype = torch.float32, sharp: float = 1.0, **settings: Any
) -> tuple[Distributions, torch.Tensor, torch.Tensor]:
    """Of random states, in chunks of a few tokens, the head with rows of padding; and log p in
    fp64, and the labels."""
    generator = torch.Generator().manual_seed(5)
    hidden_TE = torch.randn((T, E), generator=generator).to(dtype)
    head_WE = sharp * torch.randn((V + 5, E), generator=generator).to(dtype)
    labels_T = torch.randint(V, (T,), generator=generator)
    if settings.pop("ties", False):
        hidden_TE, head_WE = hidden_TE.round(), head_WE.round()
    found = distributions(
        hidden_TE, head_WE, labels_T, vocab=VocabShard(size=V, start=0, stop=V),
        chunking=Chunking(chunk_bytes=30_000), **settings,
    )  # fmt: skip
    log_p_TV = (hidden_TE.double() @ head_WE[:V].double().T).log_softmax(dim=1)
    return found, log_p_TV, labels_T


@pytest.mark.parametrize("top_k", [1, 12, V, V + 1])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-5), (torch.bfloat16, 3e-5)]
)
def test_the_likeliest_tokens(top_k: int, dtype: torch.dtype, bound: float) -> None:
    found, log_p_TV, labels_T = made(dtype=dtype, top_k=top_k)
    kept = min(top_k, V)
    close = {"rtol": 0.0, "atol": bound}
    assert found.ids_TK.shape == found.values_TK.shape == (T, kept)
    expected = log_p_TV.sort(dim=1, descending=True)
    of_ids_TK = log_p_TV.gather(1, found.ids_TK.long())
    torch.testing.assert_close(found.values_TK.double(), of_ids_TK, **close)
    torch.testing.assert_close(of_ids_TK, expected.values[:, :kept], **close)
    loss_T = -log_p_TV.gather(1, labels_T[:, None])[:, 0]
    torch.testing.assert_close(found.loss_T.double(), loss_T, **close)
    entropy_T = torch.distributions.Categorical(logits=log_p_TV).entropy()
    torch.testing.assert_close(found.entropy_T.double(), entropy_T, **close)
    rest_T = expected.values[:, kept:].logsumexp(dim=1)
    torch.testing.assert_close(found.rest_T.double(), rest_T, rtol=0.0, atol=10 * bound)


def test_a_rest_far_below_rounding_is_not_lost() -> None:
    found, log_p_TV, _ = made(dtype=torch.float32, sharp=6.0, top_k=100)
    rest_T = log_p_TV.sort(dim=1, descending=True).values[:, 100:].logsumexp(dim=1)
    assert rest_T.median() < -30
    torch.testing.assert_close(found.rest_T.double(), rest_T, rtol=1e-3, atol=0.0)


def test_of_equals_the_smaller_id() -> None:
    found, log_p_TV, _ = made(ties=True, top_k=30)
    expected = log_p_TV.float().sort(dim=1, descending=True, stable=True)
    assert (expected.values[:, 29] == expected.values[:, 30]).float().mean() > 0.2
    assert torch.equal(found.ids_TK.long(), expected.indices[:, :30])


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95])
def test_top_p_comes_before_top_k(top_p: float) -> None:
    found, log_p_TV, _ = made(dtype=torch.float64, top_p=top_p, top_k=20)
    p_TV, ids_TV = log_p_TV.exp().sort(dim=1, descending=True)
    count_T = ((p_TV.cumsum(dim=1) - p_TV < top_p).sum(dim=1)).clamp(max=20)
    present_TK = found.values_TK > -torch.inf
    assert torch.equal(present_TK, torch.arange(20) < count_T[:, None])
    assert torch.equal(found.ids_TK[present_TK].long(), ids_TV[:, :20][present_TK])
    outside_T = torch.where(torch.arange(V) < count_T[:, None], 0.0, p_TV).sum(dim=1)
    torch.testing.assert_close(found.rest_T, outside_T.log(), rtol=1e-10, atol=0.0)


def test_draws_are_those_of_the_inverse_cdf() -> None:
    """Draw for draw, but for those that fp32 puts beside an edge."""
    uniforms_TK = torch.from_numpy(draw_uniforms(3, np.arange(T), 40))
    found, log_p_TV, labels_T = made(dtype=torch.float64, top_k=1, uniforms_TK=uniforms_TK)
    expected = torch.searchsorted(log_p_TV.exp().cumsum(dim=1), uniforms_TK, right=True)
    for token in range(T):
        ids, counts = expected[token].unique(return_counts=True)
        order = counts.sort(descending=True, stable=True).indices
        count = len(ids)
        assert found.ids_TK[token, :count].tolist() == ids[order].tolist()
        assert found.values_TK[token, :count].tolist() == counts[order].tolist()
        assert not found.values_TK[token, count:].any()
    assert torch.isneginf(found.rest_T).all()
    torch.testing.assert_close(found.loss_T, -log_p_TV.gather(1, labels_T[:, None])[:, 0])


def test_the_mean_over_many_seeds_approaches_p() -> None:
    """Each token's share of all draws, in standard deviations of what it should be."""
    seeds, draws, p = 100, 150, torch.zeros(())
    shares = torch.zeros((T, V), dtype=torch.float64)
    for seed in range(seeds):
        uniforms_TK = torch.from_numpy(draw_uniforms(seed, np.arange(T), draws))
        found, log_p_TV, _ = made(sharp=0.4, top_k=1, uniforms_TK=uniforms_TK)
        p = log_p_TV.exp()
        shares.scatter_add_(1, found.ids_TK.long(), found.values_TK.double())
    total = seeds * draws
    z = (shares - total * p) / (total * p * (1 - p)).sqrt()
    often = total * p > 20
    assert often.float().mean() > 0.2
    assert z[often].abs().max() < 5.5 and 0.95 < z[often].std() < 1.05


def test_random_numbers_of_a_place_are_its_own() -> None:
    """Whatever places are asked for together; other seeds and places have others; all of [0, 1)."""
    numbers = draw_uniforms(7, np.arange(2000), 60)
    np.testing.assert_array_equal(
        draw_uniforms(7, np.array([1500, 3]), 20), numbers[[1500, 3], :20]
    )
    others = [draw_uniforms(8, np.arange(2000), 60), draw_uniforms(7, np.arange(2000) + 2000, 60)]
    every = np.stack([numbers, *others]).ravel()
    assert len(np.unique(every)) == len(every)
    assert every.min() >= 0.0 and every.max() < 1.0
    counts = np.histogram(every, 100, (0.0, 1.0))[0] / (len(every) / 100)
    assert np.abs(counts - 1).max() < 5 / np.sqrt(len(every) / 100)
    for lag in (
        (numbers[:, 1:] - 0.5) * (numbers[:, :-1] - 0.5),
        (numbers[1:] - 0.5) * (numbers[:-1] - 0.5),
    ):
        assert abs(lag.mean()) < 5 / 12 / np.sqrt(lag.size)
