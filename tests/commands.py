"""Starting the project's commands as a user does, for tests."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_command(
    *words: str, seconds: float = 180.0, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python WORDS…` in the repository's root, outside any launcher; output captured."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds
    )


def call(command: str, *words: str | Path) -> int:
    """The status of `megatron-salt COMMAND WORDS…` in this process; it may raise what nobody
    foresaw."""
    from megatron_salt.__main__ import main

    try:
        return main([command, *map(str, words)])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def run_forked(
    *words: str, folder: Path, there: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As `run_command`, in a fork of this process: it need not import PyTorch and DeepSpeed anew.

    For all that is not the start of a process itself. `folder` gets what it prints; `there`: it is
    also where the command runs, instead of the repository's root.
    """
    import torch

    if torch.cuda.is_available():  # which a forked process cannot use
        return run_command(*words, cwd=folder if there else ROOT, **environment)
    return Forked(*words, folder=folder, there=there, **environment).ended()


class Forked:
    """A command in a fork of this process, which it need not wait for: it can be sent signals."""

    def __init__(self, *words: str, folder: Path, there: bool = False, **environment: str) -> None:
        self.words, self.outputs = words, [folder / "forked.out", folder / "forked.err"]
        for path in self.outputs:
            path.touch()
        self.process = multiprocessing.get_context("fork").Process(
            target=_run_here,
            args=(words, environment, self.outputs, folder if there else ROOT),
        )
        self.process.start()

    def says(self) -> str:
        """What it has printed to stderr so far."""
        return self.outputs[1].read_text(encoding="utf-8")

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Its end is waited for, and its files are removed."""
        self.process.join(180.0)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode is not None
        printed = [path.read_text(encoding="utf-8") for path in self.outputs]
        for path in self.outputs:
            path.unlink()
        return subprocess.CompletedProcess([*self.words], self.process.exitcode, *printed)


def wait_for(says: Callable[[], str], text: str, seconds: float = 120.0) -> None:
    """Until the text has been said; AssertionError with what was said instead."""
    deadline = time.monotonic() + seconds
    while text not in (said := says()):
        assert time.monotonic() < deadline, f"{text!r} was not said, but {said}"
        time.sleep(0.05)


def _run_here(
    words: tuple[str, ...], environment: dict[str, str], outputs: list[Path], cwd: Path
) -> None:
    code = 1
    try:
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.environ.update(environment)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        os.chdir(cwd)
        if words[0] == "-m":
            sys.argv = [*words[1:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [*words]
            sys.path.insert(0, str((ROOT / words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        else:
            code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
