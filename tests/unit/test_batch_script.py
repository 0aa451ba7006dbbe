"""What ranks find in their environment after examples/slurm/pretrain_salt.sbatch; no SLURM."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "examples" / "slurm"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def environment_of_ranks(folder: Path, **given: str) -> dict[str, str]:
    """Of what the script starts as torchrun, with srun and scontrol that only pass it on."""
    program(folder / "slurm" / "scontrol", "echo n1")
    program(folder / "slurm" / "srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    program(folder / "venv" / "bin" / "torchrun", "env -0")
    program(folder / "venv" / "bin" / "ninja", "true")
    environment = {
        "PATH": f"{folder / 'slurm'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0",
        "SALT_VENV": str(folder / "venv"),
        **{name: str(SLURM / "README.md") for name in ("SALT_CONFIG", "SALT_DEEPSPEED_CONFIG")},
        **given,
    }
    done = subprocess.run(
        ["bash", SLURM / "pretrain_salt.sbatch"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pairs = done.stdout.split("rendezvous at ")[1].split("\n", 1)[1].split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


def test_environment_of_the_batch_script(tmp_path: Path) -> None:
    found = environment_of_ranks(tmp_path)
    assert shutil.which("ninja", path=found["PATH"]) == str(tmp_path / "venv" / "bin" / "ninja")
    # The program's to choose: it knows the tensor-parallel size.
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in found
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and int(found["TORCH_FR_BUFFER_SIZE"]) > 0
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/salt-17.nccl-rank-"
    assert int(found["TORCHINDUCTOR_COMPILE_THREADS"]) <= 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8"),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64"),
        ("TORCH_FR_BUFFER_SIZE", "50"),
        ("TORCH_FR_DUMP_TEMP_FILE", "/elsewhere/rank_"),
        ("TORCHINDUCTOR_COMPILE_THREADS", "1"),
    ],
)
def test_what_was_exported_before_stays(tmp_path: Path, name: str, value: str) -> None:
    assert environment_of_ranks(tmp_path, **{name: value})[name] == value


def test_paths_are_those_of_the_folder_of_submission(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    given = {"SALT_CONFIG": "mine.yaml", "SALT_DEEPSPEED_CONFIG": "mine.yaml"}
    assert environment_of_ranks(tmp_path, **given)["PWD"] == str(tmp_path)
    with pytest.raises(AssertionError, match=f"{tmp_path} has no absent.yaml: submit where it is"):
        environment_of_ranks(tmp_path, SALT_CONFIG="absent.yaml")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", sorted(SLURM.glob("*.s[bh]*")), ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
