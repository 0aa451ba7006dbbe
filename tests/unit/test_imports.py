"""Who imports whom, read from the sources: rooms, names and sizes."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from commands import ROOT

PACKAGE = ROOT / "megatron_salt"
# Each room (folder) and the rooms that its files may import; "entry" are the files above the rooms.
# The picture of docs/architecture.md is made from it.
ALLOWED = {
    "entry": "commands config data parallel planner training",
    "commands": "checkpoint config corpus data evaluation files generation huggingface parallel "
    "planner report scoring",
    "generation": "checkpoint corpus data kernels model parallel",
    "planner": "checkpoint config data files huggingface method model parallel teacher training",
    "report": "data files teacher",
    "training": "checkpoint config data evaluation files huggingface kernels method model parallel "
    "teacher",
    "evaluation": "checkpoint config data files kernels model parallel teacher",
    "huggingface": "checkpoint config data files kernels model parallel teacher",
    "scoring": "checkpoint config data evaluation files huggingface kernels model parallel",
    "teacher": "checkpoint config data model parallel",
    "checkpoint": "config files kernels method model parallel",
    "corpus": "data files",
    "data": "config files method",
    "model": "config kernels method parallel",
    "method": "config",
    "parallel": "",
    "kernels": "",
    "config": "files parallel",
    "files": "",
}
# Names that every module may have.
COMMON = {"main", "logger", "_logger", "add_arguments", "check", "run", "AFTER_INTERRUPT"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 70


def module_name(path: Path) -> str:
    parts = ("megatron_salt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imported(tree: ast.Module) -> set[str]:
    """Modules that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in SOURCES else node.module)
    return found


GRAPH = {name: imported(tree) for name, tree in TREES.items()}


def is_own(name: str) -> bool:
    return name.split(".")[0] == "megatron_salt"


def room_of(name: str) -> str:
    parts = name.split(".")
    is_room = len(parts) > 1 and (PACKAGE / parts[1]).is_dir()
    return parts[1] if is_room else "entry"


def wrong_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports of another room that the table does not allow."""
    return [
        f"{name} imports {target}: {room_of(name)} may import {ALLOWED[room_of(name)] or 'no room'}"
        for name, targets in sorted(graph.items())
        for target in sorted(filter(is_own, targets))
        if room_of(target) not in (*ALLOWED[room_of(name)].split(), room_of(name))
    ]


def reachable(name: str) -> set[str]:
    """Modules of the package that importing `name` brings in."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for target in set(filter(is_own, GRAPH[waiting.pop()])) - {"megatron_salt"} - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def foreign(name: str) -> set[str]:
    """What of other packages importing `name` brings in."""
    modules = {name, *reachable(name)}
    return {target.split(".")[0] for m in modules for target in GRAPH[m] if not is_own(target)}


def test_rooms_import_what_the_table_allows() -> None:
    assert wrong_imports(GRAPH) == []
    assert {room_of(name) for name in SOURCES} == set(ALLOWED)


def test_an_allowed_import_that_nobody_uses_leaves_the_table() -> None:
    used = defaultdict(set)
    for name, targets in GRAPH.items():
        used[room_of(name)] |= {room_of(target) for target in targets if is_own(target)}
    unused = {room: set(allowed.split()) - used[room] for room, allowed in ALLOWED.items()}
    assert {room: rooms for room, rooms in unused.items() if rooms} == {}


@pytest.mark.parametrize("name", ["training.run", "teacher.plan", "kernels.build", "data.tags"])
def test_one_import_turned_round_is_seen(name: str) -> None:
    """Of everything that imports `name` from another room, the reverse is not allowed."""
    name = f"megatron_salt.{name}"
    for user in (user for user in GRAPH if name in GRAPH[user] and room_of(user) != room_of(name)):
        (line,) = wrong_imports({**GRAPH, name: {*GRAPH[name], user}})
        assert line.startswith(f"{name} imports {user}")


def test_no_two_rooms_need_each_other() -> None:
    for room, allowed in ALLOWED.items():
        assert [other for other in allowed.split() if room in ALLOWED[other].split()] == []


def test_nothing_imports_in_a_circle() -> None:
    assert [name for name in SOURCES if name in reachable(name)] == []


def test_modules_exist() -> None:
    targets = {target for targets in GRAPH.values() for target in targets if is_own(target)}
    assert targets <= set(SOURCES)


@pytest.mark.parametrize(
    ("names", "heavy"),
    [
        ("config.fields config.values config.problems config.command_line config.deepspeed noise "
         "parallel.endings",
         "torch numpy deepspeed megatron"),
        ("kernels.kd_loss kernels.linear_kd_loss kernels.token_scores", "deepspeed megatron numpy"),
        ("parallel.layout model.costs teacher.pieces teacher.simulator teacher.placement "
         "data.order method.salt method.switch training.learning_rate",
         "torch deepspeed megatron"),
    ],
)  # fmt: skip
def test_what_must_be_light_is(names: str, heavy: str) -> None:
    """`--help` answers in a second, kernels need torch only, arithmetic needs no processes."""
    for name in names.split():
        own = {"torch"} if name == "noise" else set()  # inside its function, when called
        assert foreign(f"megatron_salt.{name}") & set(heavy.split()) == own, name


def test_one_name_means_one_thing() -> None:
    places = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                places[node.name].append(module)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in (each for each in targets if isinstance(each, ast.Name)):
                    places[target.id].append(module)
    twice = {
        name: modules
        for name, modules in places.items()
        if len(modules) > 1 and not name.startswith("_") and name not in COMMON
    }
    assert twice == {}


def test_files_and_functions_are_short() -> None:
    long = []
    for module, path in SOURCES.items():
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MOST_LINES:
            long.append(f"{module}: {count} lines")
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.FunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{module}.{node.name}: {count} lines")
    assert long == []
