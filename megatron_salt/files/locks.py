"""Locks that go with their process: the operating system drops them however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO


def lock_file(path: Path, *, busy: str, wait_s: float = 0.0) -> IO[str]:
    """Claim the lock of a file, which is made; it lasts as long as the returned file stays open.

    A network file system may keep the lock of a node that has died for its lease's time: `wait_s`.
    File systems without locks only cost the protection.
    Raises: ValueError with the message `busy` if another process holds it for that long.
    """
    deadline = time.monotonic() + wait_s
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            if time.monotonic() >= deadline:
                raise ValueError(busy) from error
            time.sleep(2.0)
            continue
        except OSError as error:
            logging.getLogger(__name__).warning("%s cannot be locked: %s", path, error)
            return stream
        # Whoever held it may have removed its folder in between: then this locks nothing.
        if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            return stream
        stream.close()
