"""megatron-core's index files: it runs a pickle that lies among them, so they are checked before.

KEY-*_index.npy and KEY-*_description.txt are its own; KEY.sha256.json holds their hashes. That file
is written last, when the others are on disk: those that it does not name are of a start that was
killed, or of somebody else, and are made again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_salt.files.disk import atomic_path, fsync_path, lock_file, sha256_of
from megatron_salt.files.json_files import read_object

LONGEST_BUILD_S = 1200.0  # less than collectives wait for, see parallel.timeout_minutes

logger = logging.getLogger(__name__)

_Indices = TypeVar("_Indices")


class CheckedDataset(GPTDataset):
    """A `GPTDataset` whose index files are what was written, before they are opened."""

    def _build_document_sample_shuffle_indices(self):  # type: ignore[no-untyped-def]
        build = super()._build_document_sample_shuffle_indices
        return _checked(Path(self.config.path_to_cache), self.unique_description_hash, build)


class CheckedBlend(BlendedDataset):
    """As `CheckedDataset`."""

    def _build_indices(self):  # type: ignore[no-untyped-def]
        build = super()._build_indices
        return _checked(Path(self.config.path_to_cache), self.unique_description_hash, build)


def _checked(folder: Path, key: str, build: Callable[[], _Indices]) -> _Indices:
    """What `build` makes: it opens the files of this key, or, on rank 0, writes them first.

    Rank 0 compares all bytes; the others, which come after it, see to it that no file is a pickle.
    Raises: ValueError naming the file that is damaged.
    """
    hashes = folder / f"{key}.sha256.json"
    if dist.is_initialized() and dist.get_rank() > 0:
        _check_arrays(folder, key)
        return build()
    if not hashes.is_file():
        busy = f"another run has been writing into {folder} for {LONGEST_BUILD_S:.0f} s"
        lock = lock_file(
            folder / "lock", busy=busy, wait_s=LONGEST_BUILD_S,
            on_wait=lambda: logger.warning("another run writes into %s: waiting for it", folder),
        )  # fmt: skip
        with lock:
            if not hashes.is_file():  # nor has another run made them meanwhile
                for path in folder.glob(f"{key}-*"):
                    path.unlink()
                indices = build()
                written = sorted(folder.glob(f"{key}-*"))
                for path in written:
                    fsync_path(path)
                with atomic_path(hashes) as temporary:
                    content = {path.name: sha256_of(path) for path in written}
                    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
                return indices
    expected = read_object(hashes)
    found = {path.name for path in folder.glob(f"{key}-*")}
    for name in sorted(found | set(expected)):
        path = folder / name
        if name not in found or sha256_of(path) != expected.get(name):
            raise ValueError(f"{path}: its content is not what {hashes.name} says: damaged")
    _check_arrays(folder, key)
    return build()


def _check_arrays(folder: Path, key: str) -> None:
    """Raise ValueError for an index file that is anything but an array of numbers."""
    for path in folder.glob(f"{key}-*.npy"):
        try:
            np.lib.format.open_memmap(path, mode="r")  # refuses objects, which are pickles
        except Exception as error:  # whatever its parser of the header comes upon
            raise ValueError(f"{path}: not an array of numbers: {error}") from error
