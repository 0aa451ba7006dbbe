"""Tagging on a CUDA device: the scores of tokens, and a dataset tagged there and on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_command

from megatron_salt.kernels import Chunking, VocabShard, token_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1 << 22])
def test_token_scores_equal_fp64(dtype: torch.dtype, chunk_bytes: int) -> None:
    T, E, V = 1000, 64, 5003
    rng = torch.Generator("cuda").manual_seed(1)
    hidden = (torch.randn(T, E, generator=rng, device="cuda") / 4).to(dtype)
    weight = torch.randn(V + 5, E, generator=rng, device="cuda").to(dtype)
    labels = torch.randint(V, (T,), generator=rng, device="cuda")
    arguments = {
        "vocab": VocabShard(size=V, start=0, stop=V), "chunking": Chunking(chunk_bytes=chunk_bytes),
        "want": ("ce", "likelier", "entropy"),
    }  # fmt: skip
    token_scores(hidden, weight, labels, **arguments)  # loads the library
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ce, likelier, entropy = token_scores(hidden, weight, labels, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logits = hidden.double() @ weight[:V].double().T
    log_p = logits.log_softmax(dim=1)
    assert ce is not None and likelier is not None and entropy is not None
    own = log_p.gather(1, labels[:, None])
    torch.testing.assert_close(ce.double(), -own[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        entropy.double(), -(log_p.exp() * log_p).sum(dim=1), rtol=1e-4, atol=1e-4
    )
    # fp32 logits may order near-equal ones otherwise than fp64.
    rank = (log_p > own).sum(dim=1)
    assert (likelier - rank).abs().max() <= 2
    assert (likelier == rank).double().mean() > 0.98


def test_tags_made_on_cuda_are_those_of_the_cpu(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    tagged = {}
    for name, environment in (("cuda", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        done = run_command(
            "-m", "megatron_salt", "tag", "--data", str(dataset), "--teacher", str(teacher),
            "--store", "loss", "--output-prefix", str(tmp_path / name), PYTHONPATH=".",
            **environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        mask = np.fromfile(tmp_path / f"{name}_mask.bin", dtype=np.uint8)
        loss = np.fromfile(tmp_path / f"{name}_loss.bin", dtype=np.float16).astype(np.float64)
        tagged[name] = mask, loss
    assert (tagged["cuda"][0] == tagged["cpu"][0]).mean() > 0.999
    np.testing.assert_allclose(tagged["cuda"][1], tagged["cpu"][1], rtol=2e-3, atol=2e-3)
