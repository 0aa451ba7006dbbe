"""The batch script under a real SLURM: two nodes of `local_cluster.sh` on this machine."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT
from tiny import make_config, make_deepspeed, metrics_of

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.config.command_line import write_config

REPO = ROOT
CLUSTER = REPO / "examples" / "slurm" / "local_cluster.sh"
BATCH = REPO / "examples" / "slurm" / "pretrain_salt.sbatch"
TIMEOUT_S = 300
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")

SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
MISSING = [
    program
    for program in ("slurmctld", "slurmd", "munged", "sbatch")
    if not shutil.which(program, path=SEARCH_PATH)
]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{', '.join(MISSING)} not installed: apt-get install slurm-wlm munge",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a shell that sees a running cluster and no GPUs."""
    ours = ("SLURM", "SBATCH", "SRUN", "SALT")  # tests may themselves run in a job
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {
        "SALT_SLURM_DIR": str(tmp_path / "cluster"),
        "SALT_SLURM_PORT": str(three_free_ports()),
        "SLURM_CONF": str(tmp_path / "cluster" / "slurm.conf"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        subprocess.run([CLUSTER, "start"], env=env, check=True)
        yield env
    finally:
        subprocess.run([CLUSTER, "stop"], env=env, check=True)


def test_batch_script_trains_over_two_nodes(
    cluster: dict[str, str], dataset: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "run"
    config = make_config(
        dataset, output_dir, train__steps=3, parallel__pipeline_model_parallel_size=2
    )
    write_config(config, tmp_path / "run.json")
    cluster |= {
        "SALT_REPO": str(REPO),
        "SALT_VENV": sys.prefix,
        "SALT_CONFIG": str(tmp_path / "run.json"),
        "SALT_DEEPSPEED_CONFIG": make_deepspeed(tmp_path),
        "GPUS_PER_NODE": "1",
    }
    log = tmp_path / "job.log"
    options = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]
    # A setting after the script's name must reach the run.
    command = ["sbatch", *options, str(BATCH), "--train.seed", "7"]
    job = subprocess.check_output(command, env=cluster, text=True).strip()
    state = wait_for_job(job, cluster)

    text = log.read_text()
    assert state == "COMPLETED", text
    assert "2 nodes (n[1-2]) with 1 processes each" in text
    records = metrics_of(output_dir)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all(math.isfinite(record["loss"]) for record in records[1:])
    assert [path.name for path in list_checkpoints(output_dir)] == ["step_00000003"]
    resolved = json.loads((output_dir / "config.json").read_text())
    assert resolved["train"]["seed"] == 7


def three_free_ports() -> int:
    """First of three, below the range that is handed out to outgoing connections."""
    for first in range(17000, 20000, 3):
        try:
            for port in range(first, first + 3):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no three free ports in a row")


def wait_for_job(job: str, env: dict[str, str]) -> str:
    """State in which the job ended. `sbatch --wait` would look only every half minute."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    deadline = time.monotonic() + TIMEOUT_S
    state = "unknown"
    while time.monotonic() < deadline:
        state = subprocess.check_output(command, env=env, text=True).strip()
        if state in ENDED:
            return state
        time.sleep(0.5)
    return f"still {state} after {TIMEOUT_S} s"
