"""Sources: which document of a dataset comes from which part of the text, by name.

`<prefix>.sources.parquet` has a row for each run of documents `[start, stop)` of one source. Its
rows cover all documents in order. The settings in the dataset's manifest hold its hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_salt.config.values import nearest
from megatron_salt.data import manifest


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Where each document of a dataset comes from."""

    names: list[str]
    of_documents: NDArray[np.int32]
    """For each document the place of its source in `names`."""

    def documents_of(self, wanted: Sequence[str]) -> NDArray[np.int64]:
        """The numbers of the documents of these sources, ascending; ValueError for others."""
        for name in set(wanted) - set(self.names):
            hint, shown = nearest(name, self.names), ", ".join(self.names[:20])
            raise ValueError(f"no source {name!r}.{hint} Of {len(self.names)} sources: {shown}")
        places = [self.names.index(name) for name in wanted]
        return np.flatnonzero(np.isin(self.of_documents, places))


def write_sources(prefix: str | Path, sources: Sources) -> None:
    """Writes the file beside a dataset that is not published yet."""
    import pyarrow.parquet  # not needed by runs

    starts = np.flatnonzero(np.diff(sources.of_documents, prepend=-1))
    stops = np.append(starts[1:], len(sources.of_documents))
    names = pyarrow.array(sources.names).take(pyarrow.array(sources.of_documents[starts]))
    columns = {"start": starts, "stop": stops, "source": names}
    pyarrow.parquet.write_table(
        pyarrow.table(columns), manifest.sources_path(prefix), compression="zstd"
    )


def load_sources(prefix: str | Path) -> Sources | None:
    """The sources of a dataset's documents, or None if it was made without.

    Raises: FileNotFoundError or ValueError naming the file, if it is not the one of the manifest or
    does not cover exactly the documents.
    """
    import pyarrow.parquet

    made, path = manifest.read_dataset_manifest(prefix), manifest.sources_path(prefix)
    if made is None or ("sources_sha256" not in made.settings and not path.exists()):
        return None
    manifest.check_hash(path, made.settings.get("sources_sha256"))
    table = pyarrow.parquet.read_table(str(path), use_threads=False, read_dictionary=["source"])
    start, stop = table["start"].to_numpy(), table["stop"].to_numpy()
    if [0, *stop] != [*start, made.documents] or (start >= stop).any():
        what = f"does not cover exactly the {made.documents} documents of {prefix}"
        raise ValueError(f"{path} {what}; {manifest.PREPROCESS_AGAIN}")
    source = table["source"].unify_dictionaries().combine_chunks()
    of_documents = np.repeat(source.indices.to_numpy(), stop - start)
    return Sources(names=source.dictionary.to_pylist(), of_documents=of_documents)
