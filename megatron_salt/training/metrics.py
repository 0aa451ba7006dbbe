"""What happened: a line of metrics.jsonl per step, TensorBoard, console lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path, up_to_step: int) -> list[str]:
    """Complete lines of a metrics file for steps <= up_to_step; a torn last line is left out.

    Raises: ValueError naming file and line for a broken line before the last.
    """
    kept = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number}: not a step's metrics; move the file away"
            ) from error
        if step <= up_to_step and line.endswith("\n"):
            kept.append(line)
    return kept


class MetricsLog:
    """Writes the metrics of rank 0. Lines of steps that a resumed run repeats are dropped first.

    Args:
        resumed_step: steps done by the checkpoint that the run starts from; 0 for a new run.
    """

    def __init__(self, output_dir: Path, *, resumed_step: int, tensorboard: bool) -> None:
        self.path = output_dir / METRICS_FILE
        kept = read_metrics(self.path, resumed_step) if self.path.exists() else []
        rewritten = self.path.with_suffix(".partial")
        rewritten.write_text("".join(kept), encoding="utf-8")
        os.replace(rewritten, self.path)
        self._stream = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; optional

            self._board = SummaryWriter(
                str(output_dir / "tensorboard"), purge_step=resumed_step + 1, max_queue=100
            )

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one step. Infinite and missing numbers become null: the file stays JSON."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._stream.write(json.dumps(clean, allow_nan=False) + "\n")
        self._stream.flush()
        if self._board is not None:
            for key, value in clean.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, record["step"])

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine; before a checkpoint."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self.sync()
        self._stream.close()
        if self._board is not None:
            self._board.close()


def duration(seconds: float) -> str:
    """1h02m, 3m07s or 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def console_line(record: Mapping[str, Any], total_steps: int, seconds_left: float) -> str:
    """One line for people: where the run is, how it does, how long it will take."""
    parts = [
        f"step {record['step']}/{total_steps}",
        str(record["phase"]),
        f"ce {record['ce_nats']:.4f}",
    ]
    if record["kl_nats"] is not None:
        parts.append(f"kl {record['kl_nats']:.4f} w {record['kd_weight']:.3f}")
    if "valid_ce_nats" in record:
        parts.append(f"valid {record['valid_ce_nats']:.4f}")
    norm = record["grad_norm"]
    parts += [
        f"lr {record['lr']:.3g}",
        "norm -" if norm is None else f"norm {norm:.3f}",
        f"{record['tokens_per_s']:.0f} tokens/s",
        f"left {duration(seconds_left)}",
    ]
    return " | ".join(parts)
