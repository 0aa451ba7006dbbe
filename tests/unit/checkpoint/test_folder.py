"""Checkpoints are written beside; what is planted there is neither followed nor in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_salt.checkpoint.folder import partial_dir, start_partial


@pytest.mark.parametrize("step", [3, 4])
def test_a_planted_link_is_not_followed(tmp_path: Path, step: int) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    planted = partial_dir(tmp_path / "run", step)
    planted.parent.mkdir(parents=True)
    planted.symlink_to(kept)
    start_partial(tmp_path / "run", 4)
    made = partial_dir(tmp_path / "run", 4)
    assert made.is_dir() and not made.is_symlink()
    assert not planted.is_symlink() and (kept / "file").read_text() == "mine"
