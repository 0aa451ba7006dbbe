"""What rank 0 tells people while a run goes on: lines, a progress bar, memory of all ranks."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_salt.config.fields import TrainConfig
from megatron_salt.parallel.groups import Groups
from megatron_salt.parallel.timers import allocated_bytes


class Console:
    """Rank 0's stderr; on the other ranks it is silent."""

    def __init__(self, train: TrainConfig, groups: Groups) -> None:
        self.train, self.groups = train, groups
        self._first_step, self._started = 0, time.perf_counter()
        self._seconds: dict[str, list[float]] = {"evaluation": [], "checkpoint": []}

    def say(self, text: str) -> None:
        if self.groups.rank == 0:
            # Goes above the progress bar where there is one.
            tqdm.write(text, file=sys.stderr)

    def warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            self.say(f"WARNING {warning}")

    def progress(self, first_step: int) -> Iterable[int]:
        """The steps, with a bar on rank 0's terminal; log files get the console lines alone."""
        visible = self.groups.rank == 0 and sys.stderr.isatty()
        steps, name = self.train.steps, Path(self.train.output_dir).name
        return tqdm(
            range(first_step, steps), desc=name, initial=first_step, total=steps, unit="step",
            disable=not visible, dynamic_ncols=True,
        )  # fmt: skip

    def start_clock(self, first_step: int) -> None:
        """The time that is left is reckoned from here."""
        self._first_step, self._started = first_step, time.perf_counter()
        self._before = {what: len(found) for what, found in self._seconds.items()}

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """An evaluation or a checkpoint: those to come are taken to last as long."""
        started = time.perf_counter()
        yield
        self._seconds[what].append(time.perf_counter() - started)

    def left_s(self, step: int) -> float:
        """Seconds from the end of a step to the end of the run, by what was measured so far."""
        train, left = self.train, 0.0
        stepping = time.perf_counter() - self._started
        for what, interval in (
            ("evaluation", train.eval_interval), ("checkpoint", train.checkpoint_interval)
        ):  # fmt: skip
            seconds = self._seconds[what]
            stepping -= sum(seconds[self._before[what] :])
            left += times_due(step, train.steps, interval) * mean(seconds or [0.0])
        return left + stepping / (step - self._first_step) * (train.steps - step)

    def step_line(self, record: Mapping[str, Any]) -> None:
        """Collective: one line for a step's metrics: where the run is, how it does, how long it
        will take, with the memory of all ranks."""
        step, total, norm = record["step"], self.train.steps, record["grad_norm"]
        parts = [f"step {step}/{total}", record["phase"], f"ce {record['ce_nats']:.4f}"]
        if record["kl_nats"] is not None:
            parts.append(f"kl {record['kl_nats']:.4f} w {record['kd_weight']:.3f}")
        if "valid_ce_nats" in record:
            parts.append(f"valid {record['valid_ce_nats']:.4f}")
        parts += [
            f"lr {record['lr']:.3g}",
            "norm -" if norm is None else f"norm {norm:.3f}",
            f"{record['tokens_per_s']:.0f} tokens/s",
            f"time left {duration(self.left_s(step))}",
            self.memory_of_ranks(),
        ]
        self.say(" | ".join(parts))

    def memory_of_ranks(self) -> str:
        """Collective: every rank's allocated memory, as a short text."""
        device = self.groups.device
        mine = torch.tensor([allocated_bytes(device) / 2**30], dtype=torch.float64).to(device)
        every = [torch.zeros_like(mine) for _ in range(self.groups.layout.world_size)]
        dist.all_gather(every, mine)
        sizes = [value.item() for value in every]
        if len(sizes) == 1:
            return f"memory {sizes[0]:.2f} GiB"
        return f"memory {min(sizes):.2f} to {max(sizes):.2f} GiB per rank"


def times_due(step: int, total: int, interval: int) -> int:
    """How often something is due after `step`, every `interval` steps (0: not) and at the end."""
    if step >= total:
        return 0
    due = total // interval - step // interval if interval else 0
    return due + (not interval or total % interval != 0)


def duration(seconds: float) -> str:
    """1h02m, 3m07s or 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
