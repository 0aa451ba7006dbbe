"""Files have the mode of the umask, and links that somebody planted are not followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_salt.files.disk import atomic_path, lock_file, save_tensors


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_tensors_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.arange(3)}, {"samples": "some"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert load_file(path)["x"].tolist() == [0, 1, 2]


def test_a_lock_does_not_touch_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "kept")
    with lock_file(tmp_path / ".lock", busy="busy"):
        assert not (tmp_path / ".lock").is_symlink()
        with pytest.raises(ValueError, match="busy"):
            lock_file(tmp_path / ".lock", busy="busy")
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("planted", ["a.json", ".a.json.PID.partial.json"])
def test_a_file_takes_the_place_of_a_link(tmp_path: Path, planted: str) -> None:
    (tmp_path / "kept").write_text("mine")
    planted = planted.replace("PID", str(os.getpid()))
    (tmp_path / planted).symlink_to(tmp_path / "kept")
    with atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "kept").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new" and not (tmp_path / "a.json").is_symlink()
