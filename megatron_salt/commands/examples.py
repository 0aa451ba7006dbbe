"""Copies the example configs, DeepSpeed JSONs, batch scripts and the quick start into a folder.

megatron-salt examples work/examples
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a new or an empty one")


def run(args: argparse.Namespace) -> int:
    folder: Path = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: name a folder that is new, or empty")
    shutil.copytree(
        examples_folder(), folder, dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__", "__init__.py"),
    )  # fmt: skip
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(path)
    return 0


def examples_folder() -> Path:
    """Where the examples lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "examples"
    return inside if inside.is_dir() else package.parent / "examples"
