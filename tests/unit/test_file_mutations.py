"""A short run of `tests/file_mutations.py`: every file that is read, damaged or a pickle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from file_mutations import make_kinds, run_mutations, run_pickles, table

from megatron_salt.parallel import endings

pytestmark = pytest.mark.processes


def test_damaged_files_are_refused_by_name_and_pickles_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "refuse", endings.refuse)  # which is exchanged here
    here = Path.cwd()
    try:
        kinds = make_kinds(tmp_path)
        totals = run_mutations(kinds, count=10 * len(kinds), seed=1)
        assert sum(counts["finding"] for counts in totals.values()) == 0, table(totals)
        for kind in kinds:
            counts = totals[kind.name]
            assert counts["refused"] >= 1, kind.name
            assert counts["read as other"] == 0 or not kind.hashed
        assert run_pickles(kinds, tmp_path) == []
    finally:
        os.chdir(here)
