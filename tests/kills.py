"""Runs that are killed while they save, and go on: as if nobody had.

    python tests/kills.py --count 60 --seed 0

kills at random: one rank or all, while state is copied, while files are written behind the next
steps, between the last durable file and the rename, between the rename and the removal of older
checkpoints, or at any time.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from elastic import At, config_at, made, make_data_and_teacher
from ranks import RankError, run_ranks
from tiny import local_weights, make_deepspeed, metrics_of, run_to_end, without_times

from megatron_salt.checkpoint import folder
from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.checkpoint.manifest import read_checkpoint_manifest, verify_hashes
from megatron_salt.config.fields import RunConfig
from megatron_salt.training import saving, state

SETTINGS = {"train__checkpoint_interval": 2, "train__keep_checkpoints": 2}
# In turn; two ranks each.
RUNS = ((At(1, 1, 2, 1), "fp32"), (At(1, 2, 1, 1), "bf16"), (At(2, 1, 1, 3), "bf16"))
POINTS = ("copy", "write", "hash", "durable", "renamed", "removal", "time")


class Kill(NamedTuple):
    """When a run dies."""

    point: str
    occurrence: int
    """Which call of the function at that point, from 0."""
    rank: int
    """Which rank dies; -1: all at that point."""
    delay_s: float
    """How much longer each file takes to write; at point `time` when the rank dies."""


def draw(draws: random.Random, point: str) -> Kill:
    many = {"copy": 40, "write": 6, "hash": 6, "time": 1}.get(point, 3)
    rank = 0 if point in ("durable", "renamed", "removal") else draws.choice([0, 1, -1])
    delay = draws.uniform(0.2, 4.0) if point == "time" else draws.choice([0.0, 0.05, 0.3])
    return Kill(point, draws.randrange(many), rank, delay)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(function: Callable[..., Any], occurrence: int, after: bool) -> Callable[..., Any]:
    calls = iter(range(1_000_000))

    def wrapped(*arguments: Any, **named: Any) -> Any:
        now = next(calls) == occurrence
        if now and not after:
            _die()
        result = function(*arguments, **named)
        if now:
            _die()
        return result

    return wrapped


def slow_writer(delay_s: float) -> None:
    """Every file takes so much longer to be written."""
    write = saving.save_tensors

    def slowly(*arguments: Any) -> None:
        time.sleep(delay_s)
        write(*arguments)

    saving.save_tensors = slowly


def run_until_killed(config: RunConfig, deepspeed_config: str, kill: Kill) -> None:
    if kill.point != "time":
        slow_writer(kill.delay_s)
    if kill.rank in (-1, int(os.environ["RANK"])):
        module, name, after = {
            "copy": (state.HostCopies, "copy", True),
            "write": (saving, "save_tensors", True),
            "hash": (folder, "hash_files", False),
            "durable": (folder, "publish", False),
            "renamed": (folder, "publish", True),
            "removal": (folder.shutil, "rmtree", False),
            "time": (None, "", False),
        }[kill.point]
        if module is None:
            threading.Timer(kill.delay_s, _die).start()
        else:
            setattr(module, name, _dying(getattr(module, name), kill.occurrence, after))
    run_to_end(config, deepspeed_config)


def weights_at_the_end(config: RunConfig, deepspeed_config: str) -> dict[str, np.ndarray]:
    return local_weights(run_to_end(config, deepspeed_config))


class Killing:
    """One kind of run in a folder, uninterrupted, to be compared with."""

    def __init__(
        self, folder: Path, dataset: Path, teacher: Path, at: At, precision: str
    ) -> None:  # fmt: skip
        self.folder, self.at = folder, at
        self.make = lambda name: config_at(at, dataset, teacher, folder / name, "gpt", **SETTINGS)
        self.deepspeed = make_deepspeed(folder, **at.settings(precision))
        self.weights = run_ranks(
            at.ranks, weights_at_the_end, self.make("whole"), self.deepspeed
        )  # fmt: skip
        self.metrics = without_times(metrics_of(folder / "whole"))

    def check(self, kill: Kill) -> str:
        """Run, kill, go on; what was left when it died.

        Raises: AssertionError if the end is not the uninterrupted run's, bit by bit.
        """
        config = self.make("killed")
        died = False
        try:
            run_ranks(self.at.ranks, run_until_killed, config, self.deepspeed, kill)
        except RankError as error:
            assert "exit code -9" in str(error), error
            died = True
        left = list_checkpoints(self.folder / "killed")
        for path in left:  # a final name means: complete
            manifest = read_checkpoint_manifest(path)
            verify_hashes(path, manifest, list(manifest.files))
        finished = left and left[-1].name == "step_00000008"
        if finished:  # nothing is left to do; the weights are the last checkpoint's
            config = self.make("killed")
            shutil.rmtree(left.pop())
        weights = run_ranks(self.at.ranks, weights_at_the_end, config, self.deepspeed)
        for rank, (mine, theirs) in enumerate(zip(weights, self.weights, strict=True)):
            for name, weight in theirs.items():
                np.testing.assert_array_equal(mine[name], weight, err_msg=f"{rank}: {name}")
        assert without_times(metrics_of(self.folder / "killed")) == self.metrics
        found = sorted(path.name for path in (self.folder / "killed" / "checkpoints").iterdir())
        assert found == ["step_00000006", "step_00000008"], found
        shutil.rmtree(self.folder / "killed")
        return f"{'died' if died else 'lived'}, went on from " + (left[-1].name if left else "0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draws, bad = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as name:
        data, teacher = make_data_and_teacher(Path(name))
        runs = [Killing(made(Path(name) / f"{at.pp}{at.tp}"), data, teacher, at, precision)
                for at, precision in RUNS]  # fmt: skip
        for number in range(arguments.count):
            kill = draw(draws, POINTS[number % len(POINTS)])
            run = runs[number // len(POINTS) % len(runs)]
            try:
                print(f"{number}: {run.at}: {kill}: {run.check(kill)}", flush=True)
            except AssertionError as error:
                bad += 1
                print(f"{number}: {run.at}: {kill}: NOT EQUAL: {error}", flush=True)
                shutil.rmtree(run.folder / "killed", ignore_errors=True)
    print(f"{arguments.count} kills, {bad} bad")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
