"""Runs that are ended before their time: Ctrl-C, SIGTERM, a failing rank. One line says what is
kept, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, Forked, run_command, wait_for
from tiny import make_config, make_deepspeed

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.config.command_line import write_config
from megatron_salt.config.fields import RunConfig
from megatron_salt.data.dataset import DataSource, find_tokenizer
from megatron_salt.training.resume import lock_output_dir

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEPS, BAD_STEP = 1000, 60


def long_run(dataset: Path, folder: Path) -> tuple[RunConfig, list[str]]:
    """A run that does not end by itself in a test's time, and its command."""
    config = make_config(
        dataset, folder / "run", train__steps=STEPS, train__checkpoint_interval=5,
    )  # fmt: skip
    write_config(config, folder / "run.json")
    return config, [
        "-m", "megatron_salt", "pretrain", "--config", str(folder / "run.json"),
        "--deepspeed_config", make_deepspeed(folder),
    ]  # fmt: skip


def interrupted(text: str, output_dir: Path) -> None:
    """One line of one rank says where the run is, what it has kept and how it goes on."""
    (line,) = [line for line in text.splitlines() if " interrupted: " in line]
    newest = list_checkpoints(output_dir)[-1]
    assert line.startswith("megatron-salt pretrain: interrupted: after step ")
    assert line.endswith(f"; the newest checkpoint is {newest}: the same command goes on there")
    done = int(line.split("after step ")[1].split(";")[0])
    assert int(newest.name.removeprefix("step_")) <= done < STEPS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_rank_in_its_start_and_in_training(
    dataset: Path, tmp_path: Path, number: signal.Signals
) -> None:
    _, command = long_run(dataset, tmp_path)

    def until(text: str) -> subprocess.CompletedProcess[str]:
        run = Forked(*command, folder=tmp_path)
        try:
            wait_for(run.says, text)
            assert run.process.pid is not None
            os.kill(run.process.pid, number)
        except BaseException:
            run.process.kill()
            raise
        done = run.ended()
        assert done.returncode == 130 and "Traceback" not in done.stderr
        return done

    with lock_output_dir(str(tmp_path / "run"), print):
        # It says at once that it waits for the run that has the folder.
        start = until(f"another run holds {tmp_path / 'run'}: waiting up to 120 s for its end")
    told = "interrupted: before the first step; the same command starts again\n"
    assert start.stderr.endswith(told) and list_checkpoints(tmp_path / "run") == []
    training = until("saved ")
    # What it does before its first step, which may take a while, is said before it.
    building = training.stderr.index("building student and optimizer; the first step follows")
    assert building < training.stderr.index("step 1/1000 ")
    interrupted(training.stderr, tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run")[-1]
    step = int(newest.name.removeprefix("step_"))
    again = until(f"step {step + 1}/1000 ")
    assert f"resumed from {newest} at step {step}\n" in again.stderr
    interrupted(again.stderr, tmp_path / "run")


def last_reason(text: str) -> str:
    """What torchrun prints last: the reason of the rank that it takes for the cause."""
    *_, row, frame = text.rstrip().splitlines()
    assert set(frame) == {"="} and row.startswith("  traceback : "), text[-3000:]
    return row.removeprefix("  traceback : ")


def test_torchrun_interrupted_goes_on_until_a_rank_fails(dataset: Path, tmp_path: Path) -> None:
    """Ctrl-C, which the terminal gives to the ranks and to torchrun, who passes it on to them. Then
    a damaged row for the second rank: the first one only loses the connection."""
    data = tmp_path / "damaged"
    for end in ("bin", "idx"):
        shutil.copy(f"{dataset}.{end}", f"{data}.{end}")
    shutil.copytree(f"{dataset}.tokenizer", f"{data}.tokenizer")
    config, command = long_run(data, tmp_path)
    source = DataSource(config.data, find_tokenizer(config.data), num_samples=STEPS * 8,
                        seed=config.train.seed, cache_path=tmp_path / "cache")  # fmt: skip
    row = BAD_STEP * 8 + 7
    wanted = source.read([row]).tokens_RS[0].numpy()
    ids = np.fromfile(f"{data}.bin", dtype=np.uint16)
    start = next(at for at in range(len(ids)) if (ids[at : at + 16] == wanted).all())
    ids[start + 5] = 509
    ids.tofile(f"{data}.bin")
    log = tmp_path / "log"
    with log.open("w") as stream:
        agent = subprocess.Popen(
            [sys.executable, *TORCHRUN, *command], cwd=ROOT, stdout=stream, stderr=stream,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        wait_for(log.read_text, "saved ")
        os.killpg(agent.pid, signal.SIGINT)
        assert agent.wait(60) != 0
    finally:
        agent.kill()
    interrupted(log.read_text(), tmp_path / "run")
    assert "[rank" not in log.read_text(), "a traceback of a rank"
    newest = list_checkpoints(tmp_path / "run")[-1]
    failed = run_command(*TORCHRUN, *command)
    assert f"resumed from {newest}" in failed.stderr and failed.returncode != 0
    reason = f"ValueError: {data}.bin: training row {row} holds id 509 at position 5, "
    assert last_reason(failed.stderr).startswith(reason)


def test_torchrun_prints_what_is_wrong_last(dataset: Path, tmp_path: Path) -> None:
    """A setting, which is refused before anything slow is imported; a failing rank is above."""
    _, command = long_run(dataset, tmp_path)
    failed = run_command(*TORCHRUN, *command, "--train.steps", "many")
    assert failed.returncode != 0
    reason = last_reason(failed.stderr)
    assert reason == "train.steps = many: expected whole number"
    assert failed.stderr.count(f"megatron-salt pretrain: error: {reason}\n") == 1
    assert "[rank" not in failed.stderr, "a traceback of a rank"
