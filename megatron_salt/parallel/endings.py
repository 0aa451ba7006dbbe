"""How a process ends before its work is done: one line that says why, from one rank, printed last.

Standard library only: a misspelt option does not wait for torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

REFUSED = 2
"""Exit status: what was asked, or a file, is wrong. 1 is left to what nobody foresaw."""
INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM."""


def is_first_rank() -> bool:
    """Whether the launcher's environment calls this process the first, or there is no launcher."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def refuse(program: str, message: object, *, here: bool | None = None) -> NoReturn:
    """End with one line on stderr.

    Args:
        here: whether this rank says it; None: the first one does, for what all ranks see alike.
    Raises: SystemExit(REFUSED).
    """
    says = is_first_rank() if here is None else here
    if says:
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    # Of every rank: a launcher ends the one that says it when another is gone before.
    tell_launcher(str(message), delay_s=0 if says else 1)
    raise SystemExit(REFUSED)


def tell_launcher(message: str, *, delay_s: int = 0) -> None:
    """Leave the reason where torchrun looks for it: it prints that at its very end.

    Source: the form that torch.distributed.elastic.multiprocessing.errors reads.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        stamp = str(int(time.time()) + delay_s)  # the earliest is taken for the cause
        record = {"message": {"message": message, "extraInfo": {"timestamp": stamp}}}
        with suppress(OSError):  # the line itself has been printed
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(record), encoding="utf-8")


def tell_failure(error: Exception) -> None:
    """`tell_launcher` of what nobody foresaw; a connection is lost because another rank failed."""
    text = f"{type(error).__name__}: {error}"
    lost = "gloo/transport" in text or type(error).__name__.startswith("Dist")
    tell_launcher(text, delay_s=5 if lost else 0)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM, with which launchers and SLURM end a job, be the same as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def end_interrupted(program: str, where: Callable[[], str]) -> NoReturn:
    """End after Ctrl-C or SIGTERM with one line of the first rank, and at once.

    `where` says what is done and how to go on; it is asked when no second signal can disturb it.
    The interpreter's own end would wait for threads of process groups whose peers have gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # launchers send both
        signal.signal(number, signal.SIG_IGN)
    what = where()
    if is_first_rank():
        print(f"\n{program}: interrupted: {what}", file=sys.stderr)
    tell_launcher(f"interrupted: {what}", delay_s=60)  # by the launcher, if another rank failed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
