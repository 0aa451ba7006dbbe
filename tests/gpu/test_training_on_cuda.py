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


def test_teacher_beside_the_optimizer_gives_the_same_bits(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """On one stage the next batch is taught on a stream of its own: a race would show here."""
    yaml_file = write_yaml(tmp_path, dataset, teacher, LLAMA, objective=[1, "causal", 1, "prefix"])
    deepspeed_config = make_deepspeed(tmp_path, zero_optimization={"stage": 1})
    found = {}
    for placement in ("bubble", "before_step"):
        folder = tmp_path / placement
        folder.mkdir()
        option = f"--teacher.placement={placement}"
        log = train_on(folder, yaml_file, deepspeed_config, option, cuda=True)
        assert ("the teacher reads this batch before the step" in log) == (placement == "bubble")
        found[placement] = without_times(metrics_of(folder / "cuda"))
    assert found["bubble"] == found["before_step"]
    assert found["bubble"][6]["kl_nats"] is not None and found["bubble"][7]["kl_nats"] is None


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
