"""Logits of a model that trains, in the order of its steps, and what becomes of them at its end.

Every data-parallel rank appends to a folder of its own: the files of `logits.py`, and an index. At
the end they are laid end to end. A window that was read several times keeps its last step's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_salt.data import logits
from megatron_salt.data.tags import FileRecord
from megatron_salt.files.disk import atomic_path, fsync_path
from megatron_salt.files.json_files import read_object

# What the index says of a window.
STEP, WINDOW, ENTRIES = range(3)


class LogitsLog:
    """The open files of one rank and dataset.

    Args:
        run: who writes, for instance its output_dir.
        first_step: what was written at this step or later is dropped: it is written again.
    Raises: ValueError where another run has written, or with other settings.
    """

    def __init__(
        self, folder: Path, settings: logits.LogitsSettings, run: str, first_step: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        path, about = folder / "index.bin", folder / "about.json"
        identity = {"run": run, **asdict(settings)}
        if about.is_file() and read_object(about) != identity:
            raise ValueError(
                f"{folder} holds logits of another run, or of other settings (train.cache_logits, "
                "train.cache_logits_top_k): name another prefix, or delete the folder"
            )
        with atomic_path(about) as temporary:
            temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        index = _read_index(folder)
        index = index[: int((index[:, STEP] < first_step).sum())]
        entries = int(index[:, ENTRIES].sum())
        sizes = {name: x.itemsize * entries for name, x in settings.entry_dtypes.items()}
        tokens = len(index) * settings.max_length
        sizes |= {name: x.itemsize * tokens for name, x in settings.token_dtypes.items()}
        self._files = {name: _open_at(folder / f"log{name}", size) for name, size in sizes.items()}
        self._index = _open_at(path, index.nbytes)

    def write(self, step: int, windows_R: NDArray[np.int64], of_files: dict[str, Any]) -> None:
        """Append what the model said about whole windows, `encode_logits` of all their tokens."""
        counts = of_files["_count.bin"].reshape(len(windows_R), -1).sum(axis=1, dtype=np.int64)
        for suffix, file in self._files.items():
            file.write(of_files[suffix].tobytes())
            file.flush()
        # Last: what it does not name is cut off when the files are opened again.
        steps = np.full(len(windows_R), step)
        self._index.write(np.stack([steps, windows_R, counts], axis=1).astype("<i8").tobytes())
        self._index.flush()

    def close(self) -> None:
        for file in (*self._files.values(), self._index):
            file.close()


def _open_at(path: Path, size: int) -> Any:
    """For appending, after so many bytes."""
    file = path.open("ab")
    if file.tell() < size:
        raise ValueError(
            f"{path} has {file.tell()} bytes, its index says {size}: it is damaged; begin the run "
            "anew, or leave train.cache_logits out"
        )
    file.truncate(size)
    return file


def _read_index(folder: Path) -> NDArray[np.int64]:
    """[windows, 3], without a last line that is not whole."""
    path = folder / "index.bin"
    words = np.fromfile(path, "<i8") if path.is_file() else np.zeros(0, "<i8")
    # No count is near 2^40: sums and sizes that are made of them stay whole numbers.
    if ((words < 0) | (words >= 1 << 40)).any():
        raise ValueError(f"{path} is damaged; begin the run anew, or leave train.cache_logits out")
    return words[: len(words) // 3 * 3].reshape(-1, 3)


def join_logs(
    prefix: str, folders: Sequence[Path], origin: logits.LogitsOrigin, versions: dict[str, str]
) -> logits.LogitsManifest:
    """Lay the logs of all ranks end to end as stored logits; the manifest comes last.

    Raises: ValueError if there are none.
    """
    settings, window = origin.settings, origin.settings.max_length
    indices = [_read_index(folder) for folder in folders]
    whole = np.concatenate([np.zeros((0, 3), np.int64), *indices])
    if not len(whole):
        raise ValueError(f"{prefix}: no step has written logits")
    # The last one of each window, its steps ascending.
    by_step = np.lexsort([whole[:, STEP], whole[:, WINDOW]])
    is_last = np.append(np.diff(whole[by_step, WINDOW]) != 0, True)
    keeps = np.zeros(len(whole), bool)
    keeps[by_step[is_last]] = True
    paths = {name: Path(f"{prefix}{name}") for name in
             (*settings.entry_dtypes, *settings.token_dtypes)}  # fmt: skip
    for suffix, path in paths.items():
        dtype = {**settings.entry_dtypes, **settings.token_dtypes}[suffix]
        with path.open("wb") as target:
            start = 0
            for folder, index in zip(folders, indices, strict=True):
                kept = keeps[start : start + len(index)]
                sizes = index[:, ENTRIES] if suffix in settings.entry_dtypes else window
                _copy(folder / f"log{suffix}", target, kept, sizes * dtype.itemsize)
                start += len(index)
    counts = np.fromfile(paths["_count.bin"], settings.token_dtypes["_count.bin"])
    kept_index = whole[keeps]
    for suffix, values in {
        "_offsets.bin": logits.block_offsets(counts),
        "_windows.bin": kept_index[:, WINDOW].astype("<i8"),
        "_steps.bin": kept_index[:, STEP].astype("<i4"),
    }.items():
        paths[suffix] = Path(f"{prefix}{suffix}")
        values.tofile(paths[suffix])
    for path in paths.values():
        fsync_path(path)
    manifest = logits.LogitsManifest(
        origin=origin, entries=int(kept_index[:, ENTRIES].sum()), held_out=None, versions=versions,
        windows=len(kept_index), files={name: FileRecord.of(path) for name, path in paths.items()},
    )  # fmt: skip
    with atomic_path(logits.logits_manifest_path(prefix)) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
    for folder in folders:
        shutil.rmtree(folder)
    return manifest


def _copy(source: Path, target: Any, keeps: NDArray[np.bool_], sizes: Any) -> None:
    """The kept windows' bytes, run by run."""
    ends = np.cumsum(np.broadcast_to(sizes, keeps.shape))
    starts = np.concatenate([[0], ends])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keeps.astype(np.int8), [0]])))
    with source.open("rb") as file:
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            file.seek(int(starts[first]))
            left = int(starts[last] - starts[first])
            while left:
                part = file.read(min(left, 1 << 26))
                if not part:
                    raise ValueError(f"{source}: ends before its index does; it is damaged")
                target.write(part)
                left -= len(part)
