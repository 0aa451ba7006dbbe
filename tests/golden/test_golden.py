"""The golden losses, computed again: equal to the last bit where they were recorded.

With other versions or another processor (the file names its own) numbers may differ by a little,
and it is said. What this is for: a change that moves all layouts alike passes the parity tests.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from golden_losses import (
    FILE,
    RUNS,
    TOLERANCES,
    differences,
    environment,
    losses_of,
    make_inputs,
    name_of,
    recorded,
)

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))


def tolerance(precision: str) -> float:
    here = environment()
    changed = [
        f"{k} {v} (file: {here[k]})" for k, v in GOLDEN["environment"].items() if v != here[k]
    ]
    if not changed:
        return 0.0
    warnings.warn(f"golden losses compared roughly: {', '.join(changed)}", stacklevel=2)
    return TOLERANCES[precision]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("golden"))


def assert_unmoved(name: str, found: dict[str, list[Any]], precision: str) -> None:
    moved = differences(name, GOLDEN["runs"][name], found, tolerance(precision))
    assert not moved, "\n".join(
        [*moved, "If that is meant: make golden, and say in the commit what moved and why."]
    )


def test_teacher_of_the_golden_runs(inputs: tuple[Path, Path]) -> None:
    assert_unmoved("teacher", recorded(inputs[1]), "fp32")


@pytest.mark.parametrize(("model", "precision", "size"), RUNS, ids=lambda value: str(value))
def test_losses_are_the_golden_ones(
    inputs: tuple[Path, Path], tmp_path: Path, model: str, precision: str, size: int
) -> None:
    found = losses_of(tmp_path, *inputs, model, precision, size)
    assert_unmoved(name_of(model, precision, size), found, precision)


def test_a_difference_in_the_last_bit_is_seen() -> None:
    for name, run in GOLDEN["runs"].items():
        assert differences(name, run, run) == []
        moved = copy.deepcopy(run)
        moved["loss"][-1] *= 1 + 2**-52
        (line,) = differences(name, run, moved)
        assert line.startswith(f"{name}: loss: 1 of ")
        assert differences(name, run, moved, 1e-9) == []
