"""How settings are read: YAML files and options into frozen dataclasses."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_salt.config.fields import KEYS, SECTIONS, RunConfig
from megatron_salt.config.problems import check_config
from megatron_salt.config.values import nearest

OPTIONS = [*SECTIONS, "config", "deepspeed_config", "dry_run", "local_rank", "local-rank", "help",
           "print_config"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What the command line gave: the run's config and where the DeepSpeed JSON lies."""

    config: RunConfig
    deepspeed_config: str
    dry_run: bool


class _Parser(ArgumentParser):
    """jsonargparse, with the error alone instead of the error after two screens of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Every rank reads the same settings; a thousand copies of the line help nobody.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def build_parser(prog: str) -> ArgumentParser:
    """The parser of `megatron_salt.pretrain`: sections as `--section.field`, YAML by `--config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=prog,
        description="Pre-train a language model, with or without a small teacher.",
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times.")
    parser.add_argument(
        "--deepspeed_config", type=str, help="DeepSpeed JSON: batch, precision, optimizer, ZeRO."
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Build and check everything, print the layout and the memory, train nothing.",
    )
    # Launchers add these; the environment is what counts.
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="Set by `deepspeed`; unused."
    )
    for name, kind in SECTIONS.items():
        parser.add_class_arguments(kind, name)
    return parser


def check_yaml_keys(path: str) -> None:
    """Raise ValueError for a key of the YAML file that is not a setting, naming file and key."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected sections {list(SECTIONS)}, found {values!r}")
    known = [*SECTIONS, "deepspeed_config", "dry_run"]
    for section, body in values.items():
        if section not in known:
            raise ValueError(f"{path}: unknown section {section!r}.{nearest(section, known)}")
        if section not in SECTIONS:
            continue
        if not isinstance(body, dict):
            raise ValueError(
                f"{path}: section {section!r} holds {body!r}: give its settings or remove it"
            )
        for key in (f"{section}.{key}" for key in body):
            if key not in KEYS:
                raise ValueError(f"{path}: unknown key '{key}'.{nearest(key, KEYS)}")


def parse_command_line(argv: Sequence[str] | None = None, prog: str = "pretrain") -> CommandLine:
    """Read YAML files and overrides, check them, return frozen values.

    Raises: SystemExit(2) after printing the problem, the way argparse does; SystemExit(0) after
    `--help` or `--print_config`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(prog)
    try:
        for position, word in enumerate(argv):
            if word == "--config" and position + 1 < len(argv):
                check_yaml_keys(argv[position + 1])
            elif word.startswith("--config="):
                check_yaml_keys(word.split("=", 1)[1])
        for word in argv:
            key = word.lstrip("-").split("=")[0].rstrip("+")  # `+` appends to a list
            if word.startswith("--") and key not in (*KEYS, *OPTIONS):
                raise ValueError(f"unknown option --{key}.{nearest(key, [*KEYS, *OPTIONS])}")
        namespace = parser.parse_args(argv)
        sections = {name: kind(**vars(namespace[name])) for name, kind in SECTIONS.items()}
        config = RunConfig(**sections)
        check_config(config)
        if not namespace.deepspeed_config:
            raise ValueError("--deepspeed_config is missing: give the DeepSpeed JSON of this run")
    except ValueError as error:
        parser.error(str(error))
    return CommandLine(
        config=config, deepspeed_config=namespace.deepspeed_config, dry_run=bool(namespace.dry_run)
    )


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as JSON, which `--config` reads too (YAML is a superset)."""
    path.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
