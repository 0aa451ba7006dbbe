"""Runs over two and four GPUs, through NCCL, against one GPU or against another way to run.

SALT_GPU_TESTS_ON_CPU=1 runs the same programs over gloo instead, to try the tests themselves.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, run_command
from ranks import free_port
from tiny import (
    GPT,
    LLAMA,
    SGD,
    gradient_of_step,
    make_config,
    make_deepspeed,
    metrics_of,
    without_times,
)

from megatron_salt.config.command_line import write_config
from megatron_salt.config.fields import RunConfig
from megatron_salt.parallel.machine import CONNECTIONS

ON_CPU = os.environ.get("SALT_GPU_TESTS_ON_CPU") == "1"
NUM_GPUS = torch.cuda.device_count()
VOCAB_SIZE = 509
MODELS = {"llama": LLAMA, "gpt": GPT}
KD = {"salt__kd_steps": 6, "salt__kd_weight": 0.6, "train__steps": 12}
BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
}
TP, PP, SP = (
    "parallel__tensor_model_parallel_size",
    "parallel__pipeline_model_parallel_size",
    "parallel__sequence_parallel",
)
EXAMPLES = sorted((ROOT / "examples" / "deepspeed").glob("*.json"))

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def needs(gpus: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        gpus > NUM_GPUS and not ON_CPU,
        reason=f"needs {gpus} CUDA devices, this machine has {NUM_GPUS}",
    )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONNECTIONS, raising=False)
    if ON_CPU:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def launch(
    config: RunConfig, deepspeed_config: str, ranks: int, *program: str, connections: str | None
) -> str:
    """Train under torchrun; returns what the ranks said."""
    output_dir = Path(config.train.output_dir)
    output_dir.mkdir(parents=True)
    write_config(config, output_dir / "given.json")
    done = run_command(
        "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr",
        "127.0.0.1", "--master-port", str(free_port()), *program, "--config",
        str(output_dir / "given.json"), "--deepspeed_config", deepspeed_config, seconds=900,
        **({} if connections is None else {CONNECTIONS: connections}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def train(
    config: RunConfig, deepspeed_config: str, ranks: int = 1, connections: str | None = None
) -> list[dict[str, Any]]:
    """Metrics of `megatron_salt.pretrain`, but for times."""
    program = ("-m", "megatron_salt.pretrain")
    launch(config, deepspeed_config, ranks, *program, connections=connections)
    return without_times(metrics_of(config.train.output_dir))


def assert_same_losses(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    pairs = list(zip(found, expected, strict=True))[1:]
    assert len(pairs) == KD["train__steps"]
    for mine, theirs in pairs:
        for key in ("loss", "ce_nats", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (key, mine["step"])


@pytest.fixture(scope="module")
def on_one(
    dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The run of one GPU that the others must equal: Llama, in fp32."""
    folder = tmp_path_factory.mktemp("one")
    config = make_config(dataset, folder / "run", teacher__checkpoint=str(teacher), **KD)
    return train(config, make_deepspeed(folder))


@needs(2)
@pytest.mark.parametrize("connections", [None, "1"])
def test_bubbles_give_the_bits_of_before_step(
    dataset: Path, teacher: Path, tmp_path: Path, connections: str | None
) -> None:
    """With one hardware queue, which makes streams wait for one another, as without."""
    found = {}
    for placement in ("bubble", "before_step"):
        config = make_config(
            dataset, tmp_path / placement, teacher__checkpoint=str(teacher),
            teacher__placement=placement, data__objective=[1, "causal", 1, "prefix"],
            train__deterministic=True, **KD, **{PP: 2},
        )  # fmt: skip
        found[placement] = train(config, make_deepspeed(tmp_path), 2, connections)
    assert found["bubble"] == found["before_step"]
    assert found["bubble"][6]["kl_nats"] is not None and found["bubble"][7]["kl_nats"] is None


@needs(2)
@pytest.mark.parametrize("connections", [None, "8"])
def test_sequence_parallel_run_equals_one_gpu(
    on_one: list[dict[str, Any]], dataset: Path, teacher: Path, tmp_path: Path,
    connections: str | None,
) -> None:  # fmt: skip
    """None: the run sets one queue itself."""
    config = make_config(
        dataset, tmp_path / "run", teacher__checkpoint=str(teacher), **KD, **{TP: 2, SP: True}
    )
    assert_same_losses(train(config, make_deepspeed(tmp_path), 2, connections), on_one)


@needs(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_over_two_gpus_equals_one_gpu(
    on_one: list[dict[str, Any]], dataset: Path, teacher: Path, tmp_path: Path, stage: int
) -> None:
    config = make_config(dataset, tmp_path / "run", teacher__checkpoint=str(teacher), **KD)
    deepspeed_config = make_deepspeed(tmp_path, zero_optimization={"stage": stage})
    assert_same_losses(train(config, deepspeed_config, 2), on_one)


def first_gradient(
    folder: Path, dataset: Path, teacher: Path, model: str, precision: dict[str, Any], **layout: Any
) -> dict[str, np.ndarray]:
    """Whole gradient of the first KD step, by weight, read off the fp32 weights after SGD."""
    folder.mkdir()
    config = make_config(
        dataset, folder / "run", model=MODELS[model], teacher__checkpoint=str(teacher),
        **{**KD, "salt__kd_steps": 1, "train__steps": 1}, **layout,
    )  # fmt: skip
    ranks = layout.get(TP, 1) * layout.get(PP, 1)
    program = ("tests/rank_program.py", str(folder))
    deepspeed_config = make_deepspeed(folder, optimizer=SGD, **precision)
    launch(config, deepspeed_config, ranks, *program, connections=None)
    per_rank = []
    for rank in range(ranks):
        with np.load(folder / f"rank_{rank}.npz") as weights:
            per_rank.append(dict(weights))
    return gradient_of_step(per_rank, config, VOCAB_SIZE)


@pytest.fixture(scope="module")
def gradients_on_one(
    dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """By model: in fp32 and in bf16."""
    folder = tmp_path_factory.mktemp("gradients")
    return {
        model: (
            first_gradient(folder / f"{model}_fp32", dataset, teacher, model, {}),
            first_gradient(folder / f"{model}_bf16", dataset, teacher, model, BF16),
        )
        for model in MODELS
    }


@needs(2)
@pytest.mark.parametrize(
    ("model", "layout"),
    [("llama", {PP: 2}), ("gpt", {PP: 2}), ("llama", {TP: 2, SP: True}), ("gpt", {TP: 2})],
    ids=["pp2", "pp2-tied", "tp2-sp", "tp2-tied"],
)
def test_bf16_gradients_are_as_right_as_those_of_one_gpu(
    gradients_on_one: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]],
    dataset: Path, teacher: Path, tmp_path: Path, model: str, layout: dict[str, Any],
) -> None:  # fmt: skip
    """Weight by weight: no further from fp32 than twice what one process in bf16 is."""
    in_fp32, in_bf16 = gradients_on_one[model]
    found = first_gradient(tmp_path / "run", dataset, teacher, model, BF16, **layout)
    assert found.keys() == in_fp32.keys()
    for name, right in in_fp32.items():
        size = np.linalg.norm(right)
        assert size > 0, name
        error = np.linalg.norm(found[name] - right)
        allowed = 2 * np.linalg.norm(in_bf16[name] - right) + 2**-8 * size
        assert error <= allowed, f"{name}: {error / size:.3g} of {allowed / size:.3g} allowed"


@pytest.mark.parametrize(
    ("gpus", "layout"),
    [
        pytest.param(1, {}, marks=needs(1), id="1"),
        pytest.param(2, {PP: 2}, marks=needs(2), id="pp2"),
        pytest.param(4, {TP: 2, PP: 2, SP: True}, marks=needs(4), id="tp2-pp2-sp"),
    ],
)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_json_trains_as_it_is(
    dataset: Path, teacher: Path, tmp_path: Path, path: Path, gpus: int, layout: dict[str, Any]
) -> None:
    """But for batch sizes."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    deepspeed_config = tmp_path / path.name
    deepspeed_config.write_text(json.dumps(values), encoding="utf-8")
    config = make_config(
        dataset, tmp_path / "run", teacher__checkpoint=str(teacher), **layout,
        salt__kd_steps=10, train__steps=30,
    )  # fmt: skip
    losses = [record["ce_nats"] for record in train(config, str(deepspeed_config), gpus)[1:]]
    assert len(losses) == 30 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
