"""Checkpoints that somebody has edited, and whose manifests agree with that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_salt.files.disk import sha256_of
from megatron_salt.files.json_files import OWN_HASH, with_own_hash


def edit_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Change the manifest and make it true of itself and of the files that are there."""
    path = checkpoint / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values[OWN_HASH]
    values["files"] = {
        str(file.relative_to(checkpoint)): {
            "bytes": file.stat().st_size, "sha256": sha256_of(file),
        }
        for file in sorted(checkpoint.rglob("*")) if file.is_file() and file != path
    }  # fmt: skip
    if change is not None:
        change(values)
    path.write_text(json.dumps(with_own_hash(values), indent=1), encoding="utf-8")
