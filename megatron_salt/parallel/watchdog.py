"""Where a rank is in its step, so that one that waits in vain can say so."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from megatron_salt.parallel.groups import Groups


class StepWatchdog:
    """This rank's step and instruction, for messages; cheap enough to note at every instruction.

    On CUDA the host is ahead of the device: what is noted is what the host has asked for last.

    Args:
        timeout_minutes: after which a collective gives up. A rank that has not moved for nine
            tenths of it says on stderr where it is, before the backend ends the process.
    """

    def __init__(self, groups: Groups, timeout_minutes: float) -> None:
        self._who = (
            f"rank {groups.rank} (tp {groups.tp_rank}, dp {groups.dp_rank}, stage {groups.pp_rank})"
        )
        self._patience_s = 0.9 * 60.0 * timeout_minutes
        self._step: int | None = None
        self._what = "between steps"
        self._since = time.monotonic()
        self._stop = threading.Event()

    def enter(self, what: str) -> None:
        self._what, self._since = what, time.monotonic()

    def __str__(self) -> str:
        step = "before its first step" if self._step is None else f"in step {self._step}"
        return (
            f"{self._who} was {step}, at {self._what}, for {time.monotonic() - self._since:.1f} s"
        )

    @contextlib.contextmanager
    def in_step(self, step: int) -> Iterator[None]:
        """Within it an error carries, as a note, where this rank was."""
        self._step = step
        self.enter("its start")
        try:
            yield
        except Exception as error:
            error.add_note(str(self))
            raise
        self.enter("its end")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it a thread looks whether this rank still moves."""
        watcher = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        watcher.start()
        try:
            yield
        finally:
            self._stop.set()
            watcher.join()

    def _watch(self) -> None:
        said: float | None = None
        while not self._stop.wait(min(5.0, self._patience_s / 4)):
            since = self._since
            if time.monotonic() - since > self._patience_s and since != said:
                print(f"WARNING {self}, and has not moved since", file=sys.stderr, flush=True)
                said = since
