"""Starting the project's commands as a user does, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_command(
    *words: str, seconds: float = 180.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python WORDS…` in the repository's root, outside any launcher; output captured."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds
    )
