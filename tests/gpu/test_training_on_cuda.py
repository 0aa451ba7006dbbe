"""A SALT run on one GPU does what it does on the CPU, and gives the teacher's memory back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import run_command
from tiny import GPT, LLAMA, make_deepspeed, metrics_of, without_times

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
}


def write_yaml(
    folder: Path, dataset: Path, teacher: Path, model: dict[str, object], **data: object
) -> Path:
    values = {
        "model": model,
        "data": {"train_data_path": [str(dataset)], "split": "90,10", "seq_length": 16, **data},
        "teacher": {"checkpoint": str(teacher)},
        "salt": {"kd_steps": 6},
        "train": {"steps": 12, "output_dir": str(folder / "run"), "eval_samples": 6},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def train_on(
    folder: Path, yaml_file: Path, deepspeed_config: str, *options: str, cuda: bool
) -> str:
    output = folder / ("cuda" if cuda else "cpu")
    environment = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
    done = run_command(
        "-m", "megatron_salt.pretrain", "--config", str(yaml_file), "--train.output_dir",
        str(output), "--deepspeed_config", deepspeed_config, *options, seconds=600, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


# With a prefix attention has a mask, which other kernels take; Llama's here has groups of heads.
@pytest.mark.parametrize("objective", [["causal"], [1, "causal", 1, "prefix"]], ids=str)
@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["llama", "gpt"])
def test_losses_of_cuda_equal_those_of_the_cpu(
    dataset: Path,
    teacher: Path,
    tmp_path: Path,
    model: dict[str, object],
    objective: list[object],
) -> None:
    yaml_file = write_yaml(tmp_path, dataset, teacher, model, objective=objective)
    deepspeed_config = make_deepspeed(tmp_path)
    for cuda in (False, True):
        train_on(tmp_path, yaml_file, deepspeed_config, cuda=cuda)
    pairs = zip(metrics_of(tmp_path / "cuda"), metrics_of(tmp_path / "cpu"), strict=True)
    for on_gpu, on_cpu in list(pairs)[1:]:
        for key in ("loss", "ce_nats"):
            assert on_gpu[key] == pytest.approx(on_cpu[key], rel=1e-4), on_gpu["step"]


def test_bf16_trains_and_the_switch_frees_memory(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    yaml_file = write_yaml(tmp_path, dataset, teacher, LLAMA)
    deepspeed_config = make_deepspeed(tmp_path, **BF16)
    log = train_on(tmp_path, yaml_file, deepspeed_config, cuda=True)
    assert "teacher released" in log
    records = metrics_of(tmp_path / "cuda")[1:]
    assert records[-1]["loss"] < records[0]["ce_nats"]
    assert re.search(r"memory [\d.]+ to [\d.]+ GiB per rank", log)


def test_deterministic_runs_have_the_same_bits(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """At a length where flash attention's backward adds up with atomics otherwise."""
    yaml_file = write_yaml(tmp_path, dataset, teacher, LLAMA)
    # Its teacher has read 16 tokens at most.
    alone = "--teacher.checkpoint=null", "--salt.kd_steps=0", "--data.seq_length=128"
    deepspeed_config = make_deepspeed(tmp_path, **BF16)
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        options = (*alone, "--train.deterministic=true")
        train_on(folder, yaml_file, deepspeed_config, *options, cuda=True)
        found.append(without_times(metrics_of(folder / "cuda")))
    assert found[0] == found[1]


def test_products_that_add_up_in_fp32_train_as_without(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """apex's extension where it is installed, else PyTorch's product into an fp32 sum."""
    yaml_file = write_yaml(tmp_path, dataset, teacher, LLAMA)
    deepspeed_config = make_deepspeed(tmp_path, **BF16)
    found = []
    for fused in ("false", "true"):
        folder = tmp_path / fused
        folder.mkdir()
        option = f"--parallel.gradient_accumulation_fusion={fused}"
        train_on(folder, yaml_file, deepspeed_config, option, cuda=True)
        found.append(metrics_of(folder / "cuda")[1:])
    for plain, with_product in zip(*found, strict=True):
        assert with_product["loss"] == pytest.approx(plain["loss"], rel=2e-3), plain["step"]
    assert found[1][0]["grad_norm"] == pytest.approx(found[0][0]["grad_norm"], rel=1e-2)
