"""Makes the parts of docs/architecture.md that follow from the sources.

    python docs/make_architecture.py [--write]

The file tree has the first sentence of every module; the rooms and what they may import come from
the table that tests/unit/test_imports.py enforces; reading paths are counted in lines.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_salt"
DOCUMENT = Path(__file__).with_name("architecture.md")
PLAIN_STEP = [
    "pretrain.py",
    "training/run.py",
    "training/start.py",
    "training/engine.py",
    "model/student.py",
    "model/layers.py",
    "model/loss.py",
    "kernels/linear_kd_loss.py",
]
KD_STEP = [
    "training/teaching.py",
    "teacher/teacher.py",
    "teacher/passes.py",
    "model/frozen.py",
    "teacher/plan.py",
    "teacher/pieces.py",
    "teacher/schedule.py",
    "training/instructions.py",
    "kernels/chunks.py",
    "kernels/head.py",
    "kernels/backend.py",
    "kernels/compiled.py",
]
MOST_FILES, MOST_LINES = 8, 2500


ROUND_TO = 50  # so that the document does not change with every line


def lines_of(files: list[str]) -> int:
    return sum(len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in files)


def first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def allowed_imports() -> dict[str, str]:
    path = ROOT / "tests/unit/test_imports.py"
    sys.path.insert(0, str(ROOT / "tests"))
    spec = importlib.util.spec_from_file_location("test_imports", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.ALLOWED)


def file_tree() -> str:
    lines = ["```", "megatron_salt/"]
    entries = [path for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    lines += [f"  {path.name:<20} {first_sentence(path)}" for path in entries]
    for room in (room for room in allowed_imports() if room != "entry"):
        lines.append(f"  {room + '/':<20} {first_sentence(PACKAGE / room / '__init__.py')}")
        files = [path for path in sorted((PACKAGE / room).glob("*.py")) if path.name[0] != "_"]
        lines += [f"    {path.name:<18} {first_sentence(path)}" for path in files]
    return "\n".join([*lines, "```"])


def rooms() -> str:
    lines = ["| room | may import |", "| --- | --- |"]
    for room, allowed in allowed_imports().items():
        lines.append(f"| `{room}` | {', '.join(f'`{name}`' for name in allowed.split()) or '-'} |")
    return "\n".join(lines)


def reading_paths() -> str:
    lines = ["| path | files | lines |", "| --- | ---: | ---: |"]
    for name, files in (("a plain step", PLAIN_STEP), ("besides, a KD step with pp > 1", KD_STEP)):
        most = -(-lines_of(files) // ROUND_TO) * ROUND_TO
        lines.append(f"| {name} | {len(files)} | at most {most:,} |")
    return "\n".join(lines)


PARTS = {"file tree": file_tree, "rooms": rooms, "reading paths": reading_paths}


def filled(document: str) -> str:
    """The document with its made parts made anew."""
    for name, make in PARTS.items():
        begin = f"<!-- {name}: begin (docs/make_architecture.py --write) -->\n"
        before, _, rest = document.partition(begin)
        end = f"\n<!-- {name}: end -->"
        if not rest or end not in rest:
            raise SystemExit(f"{DOCUMENT}: no part {name!r} between {begin!r} and {end!r}")
        document = before + begin + make() + end + rest.partition(end)[2]
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write them into the document")
    document = filled(DOCUMENT.read_text(encoding="utf-8"))
    if parser.parse_args().write:
        DOCUMENT.write_text(document, encoding="utf-8")
    else:
        print(document)


if __name__ == "__main__":
    main()
