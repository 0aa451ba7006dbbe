"""A SALT run on one GPU does what it does on the CPU, and gives the teacher's memory back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import run_command
from tiny import GPT, LLAMA, make_deepspeed, metrics_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


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
    deepspeed_config = make_deepspeed(
        tmp_path,
        bf16={"enabled": True},
        data_types={"grad_accum_dtype": "fp32"},
        zero_optimization={"stage": 1},
    )
    log = train_on(tmp_path, yaml_file, deepspeed_config, cuda=True)
    assert "teacher released" in log
    records = metrics_of(tmp_path / "cuda")[1:]
    assert records[-1]["loss"] < records[0]["ce_nats"]
    assert re.search(r"memory [\d.]+ to [\d.]+ GiB per rank", log)
