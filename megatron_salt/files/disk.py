"""Files on disks that ranks share: whole or not at all, hashed, locked.

A lock goes with its process: the operating system drops it however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def fsync_path(path: str | Path) -> None:
    """Forces a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the body succeeds.

    The body creates and closes the file; it is fsynced before the rename. On failure the
    temporary is removed and what was at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    temporary.unlink(missing_ok=True)  # a link would be followed
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """Raise ValueError where something would be overwritten; an empty folder is none."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already: name another folder, or remove it")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the body succeeds.

    Its files are flushed before. On failure it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        for each in [*temporary.rglob("*"), temporary]:
            fsync_path(each)
        temporary.rename(path)  # an empty folder gives way
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that whoever may read the user's other files may read."""
    from safetensors.torch import save_file  # imports torch

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)  # safetensors makes it the user's alone, whatever the umask


def lock_file(
    path: Path, *, busy: str, wait_s: float = 0.0, on_wait: Callable[[], None] = lambda: None
) -> IO[str]:
    """Claim the lock of a file, which is made; it lasts as long as the returned file stays open.

    A network file system may keep the lock of a node that has died for its lease's time: `wait_s`.
    `on_wait` is called once before waiting.
    File systems without locks only cost the protection.
    Raises: ValueError with the message `busy` if another process holds it for that long.
    """
    deadline, waited = time.monotonic() + wait_s, False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():  # no run makes one; what it leads to is not for us to touch
            path.unlink()
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            if time.monotonic() >= deadline:
                raise ValueError(busy) from error
            if not waited:
                on_wait()
            waited = True
            time.sleep(2.0)
            continue
        except OSError as error:
            logging.getLogger(__name__).warning("%s cannot be locked: %s", path, error)
            return stream
        # Whoever held it may have removed its folder in between: then this locks nothing.
        if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            return stream
        stream.close()
