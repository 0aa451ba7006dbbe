"""What happened: a line of metrics.jsonl per step, TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_salt.files.disk import atomic_path

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path, up_to_step: int) -> list[str]:
    """Complete lines of a metrics file for steps <= up_to_step; a torn last line is left out.

    Raises: ValueError naming file and line for a broken line before the last.
    """
    kept = []
    # A byte that is not UTF-8 makes its line no JSON, instead of ending this without a name.
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line.encode())["step"]
            if type(step) is not int:
                raise TypeError(step)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number}: not a step's metrics; move the file away"
            ) from error
        if step <= up_to_step and line.endswith("\n"):
            kept.append(line)
    return kept


def board_tag(key: str) -> str:
    """A metric's name on TensorBoard, which groups by what stands before the first slash."""
    for start, group in (("teacher_valid_", "teacher/"), ("teacher_", "teacher/"),
                         ("valid_", "valid/")):  # fmt: skip
        if key.startswith(start):
            return group + key.removeprefix(start)
    return f"train/{key}"


class MetricsLog:
    """Writes the metrics of rank 0. Lines of steps that a resumed run repeats are dropped first.

    Args:
        resumed_step: steps done by the checkpoint that the run starts from; 0 for a new run.
        settings: what TensorBoard shows of the run beside its curves.
    """

    def __init__(
        self, output_dir: Path, *, resumed_step: int, tensorboard: bool,
        settings: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.path = output_dir / METRICS_FILE
        # A new run keeps nothing: not the step 0 of one that ended before its first checkpoint.
        kept = read_metrics(self.path, resumed_step) if resumed_step and self.path.exists() else []
        with atomic_path(self.path) as rewritten:
            rewritten.write_text("".join(kept), encoding="utf-8")
        self._stream = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; optional
            from torch.utils.tensorboard.summary import hparams

            self._board = SummaryWriter(
                str(output_dir / "tensorboard"), purge_step=resumed_step + 1, max_queue=100
            )
            for summary in hparams(settings, {}):
                self._board.file_writer.add_summary(summary)

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
                    self._board.add_scalar(board_tag(key), value, record["step"])

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine; before a checkpoint."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self.sync()
        self._stream.close()
        if self._board is not None:
            self._board.close()
