"""The commands as users start them: launcher, YAML, overrides, evaluation, dry run."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
from commands import run_command, run_forked
from tiny import LLAMA, make_deepspeed, metrics_of

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest


@pytest.fixture
def yaml_file(dataset: Path, tmp_path: Path) -> Path:
    values = {
        "model": LLAMA,
        "data": {"train_data_path": [str(dataset)], "split": "90,10", "seq_length": 16},
        "train": {"steps": 3, "output_dir": str(tmp_path / "run"), "eval_samples": 6},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_torchrun_then_evaluate(yaml_file: Path, teacher: Path, tmp_path: Path) -> None:
    """2 ranks under torchrun with a teacher; `evaluate` finds the loss that training reported."""
    deepspeed_config = make_deepspeed(tmp_path)
    done = run_command(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "megatron_salt.pretrain", "--config", str(yaml_file),
        "--deepspeed_config", deepspeed_config,
        "--parallel.pipeline_model_parallel_size", "2", "--train.eval_interval", "1",
        "--teacher.checkpoint", str(teacher), "--salt.kd_steps", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out CE" in done.stderr and "teacher released" in done.stderr
    records = metrics_of(tmp_path / "run")
    assert [record["phase"] for record in records[1:]] == ["kd", "kd", "lm"]
    assert (tmp_path / "run" / "tensorboard").is_dir()
    result = tmp_path / "result.json"
    scored = run_forked(
        "-m", "megatron_salt.evaluate", "--checkpoint", str(tmp_path / "run"), str(teacher),
        "--samples", "6", "--output", str(result), folder=tmp_path,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr[-3000:]
    student, slm = json.loads(result.read_text())
    assert student["valid_ce_nats"] == pytest.approx(records[-1]["valid_ce_nats"], rel=1e-5)
    assert student["valid_accuracy"] == pytest.approx(records[-1]["valid_accuracy"], abs=1e-9)
    assert slm["valid_ce_nats"] == pytest.approx(records[0]["teacher_valid_ce_nats"], rel=1e-5)
    manifest = read_checkpoint_manifest(list_checkpoints(tmp_path / "run")[-1])
    assert manifest.model.pp_size == 2 and manifest.model.step == 3 and manifest.run.phase == "lm"
    assert manifest.model.evaluation is not None
    assert manifest.model.evaluation.ce_nats == records[-1]["valid_ce_nats"]


def test_dry_run_describes_and_trains_nothing(
    yaml_file: Path, teacher: Path, tmp_path: Path
) -> None:
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_command(
        "-m", "megatron_salt.pretrain", "--config", str(yaml_file), "--dry_run",
        "--deepspeed_config", make_deepspeed(tmp_path, gradient_accumulation_steps=1),
        "--parallel.tensor_model_parallel_size", "2",
        "--parallel.pipeline_model_parallel_size", "2",
        "--teacher.checkpoint", str(teacher), "--salt.kd_steps", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ranks: 16 = tensor 2 x pipeline 2 x data 4" in done.stdout
    assert "tokens: 128 a step x 3 steps = 384 (256 of them in the KD phase)" in done.stdout
    assert re.search(r"stage 1: layers \[1, 2\)", done.stdout)
    assert not (tmp_path / "run").exists()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of the processor, nearly all of them imports: a busy machine does not count.
    assert ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime < 30


def test_print_config_resolves_files_and_overrides(yaml_file: Path) -> None:
    done = run_forked(
        "-m", "megatron_salt.pretrain", "--config", str(yaml_file), "--train.steps", "77",
        "--print_config", folder=yaml_file.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "steps: 77" in done.stdout and "num_layers: 2" in done.stdout


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--train.setps", "5"], "train.steps"),
        (["--salt.kd_steps", "2"], "teacher.checkpoint"),
        (["--teacher.checkpoint", "nowhere", "--salt.kd_steps", "2", "--dry_run"], "nowhere"),
    ],
)
def test_errors_are_one_line(
    yaml_file: Path, tmp_path: Path, extra: list[str], expected: str
) -> None:
    done = run_forked(
        "-m", "megatron_salt.pretrain", "--config", str(yaml_file),
        "--deepspeed_config", make_deepspeed(tmp_path), *extra, folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_every_evaluation_is_printed_and_what_comes_before_the_first_step(
    yaml_file: Path, tmp_path: Path
) -> None:
    """Though no step is a multiple of the interval at which steps are printed."""
    done = run_forked(
        "-m", "megatron_salt", "pretrain", "--config", str(yaml_file),
        "--deepspeed_config", make_deepspeed(tmp_path), "--train.steps", "7",
        "--train.eval_interval", "3", "--train.log_interval", "100", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(
        r"^(building|step \d+/7)(?:.* valid (\d\.\d{4}))?", done.stderr, re.MULTILINE
    )
    valid = {
        f"step {record['step']}/7": f"{record['valid_ce_nats']:.4f}"
        for record in metrics_of(tmp_path / "run")[1:] if "valid_ce_nats" in record
    }  # fmt: skip
    assert list(valid) == ["step 3/7", "step 6/7", "step 7/7"]
    assert lines == [("building", ""), ("step 1/7", ""), *valid.items()]
