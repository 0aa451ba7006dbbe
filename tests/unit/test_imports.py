"""Who imports whom, read from the sources: the direction that keeps parts testable on their own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import megatron_salt

PACKAGE = Path(megatron_salt.__file__).parent


def module_name(path: Path) -> str:
    parts = ("megatron_salt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute in this package"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


MODULES = {module_name(path) for path in PACKAGE.rglob("*.py")}
GRAPH = {module_name(path): imported(path) for path in PACKAGE.rglob("*.py")}


def own(name: str) -> set[str]:
    return {target for target in GRAPH[name] if target.split(".")[0] == "megatron_salt"}


def foreign(name: str) -> set[str]:
    return {target for target in GRAPH[name] if target.split(".")[0] != "megatron_salt"}


def reachable(name: str) -> set[str]:
    """Modules of the package that importing `name` brings in."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for target in own(waiting.pop()) & MODULES:
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def under(name: str, *parts: str) -> bool:
    return any(f"{name}.".startswith(f"megatron_salt.{part}.") for part in parts)


def test_graph_is_that_of_the_package() -> None:
    assert {"megatron_salt.config", "megatron_salt.kernels.reference"} <= MODULES
    assert "megatron_salt.config" in own("megatron_salt.salt")
    assert "torch" in foreign("megatron_salt.kernels.reference")
    unknown = {target for name in GRAPH for target in own(name)} - MODULES - {"megatron_salt"}
    assert not unknown, f"imports of modules that do not exist: {unknown}"


def test_config_is_a_leaf() -> None:
    assert own("megatron_salt.config") == set()
    heavy = {"torch", "numpy", "deepspeed", "megatron"}
    assert not {target.split(".")[0] for target in foreign("megatron_salt.config")} & heavy
    assert own("megatron_salt.deepspeed_config") == {"megatron_salt.config"}


def test_kernels_import_only_kernels_and_torch() -> None:
    for name in MODULES:
        if under(name, "kernels"):
            assert all(under(target, "kernels") for target in own(name)), name
            heavy = {target.split(".")[0] for target in foreign(name)}
            assert not heavy & {"deepspeed", "megatron", "numpy"}, name


@pytest.mark.parametrize(
    "name",
    ["parallel.layout", "parallel.simulator", "parallel.placement", "data.order", "salt", "switch"],
)
def test_integer_arithmetic_needs_no_processes(name: str) -> None:
    for module in {f"megatron_salt.{name}"} | reachable(f"megatron_salt.{name}"):
        heavy = {target.split(".")[0] for target in foreign(module)}
        assert not heavy & {"torch", "deepspeed", "megatron"}, module


def test_lower_layers_do_not_know_the_upper_ones() -> None:
    above = {"trainer", "pretrain", "evaluate", "tagging", "dry_run", "held_out", "resume"}
    for name in MODULES:
        short = name.removeprefix("megatron_salt").lstrip(".")
        if under(name, "kernels", "data", "model", "parallel", "salt", "switch", "metrics",
                 "checkpoint"):  # fmt: skip
            targets = {target.removeprefix("megatron_salt.") for target in reachable(name)}
            assert not targets & above, f"{short} reaches {targets & above}"


def test_nothing_imports_in_a_circle() -> None:
    for name in MODULES:
        assert name not in reachable(name), f"{name} is imported by what it imports"
