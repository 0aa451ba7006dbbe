"""How settings are read: YAML files and options into frozen dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_salt.config.deepspeed import KNOWN_KEYS, read_json
from megatron_salt.config.fields import KEYS, SECTIONS, RunConfig
from megatron_salt.config.problems import check_config
from megatron_salt.config.records import type_text
from megatron_salt.config.values import is_number, nearest
from megatron_salt.files.disk import atomic_path
from megatron_salt.parallel import endings

OPTIONS = [*SECTIONS, "config", "deepspeed_config", "dry_run", "local_rank", "local-rank", "help",
           "print_config"]  # fmt: skip

REQUIRED = [f"{name}.{item.name}" for name, kind in SECTIONS.items()
            for item in dataclasses.fields(kind)
            if item.default is item.default_factory is dataclasses.MISSING]  # fmt: skip
LISTS = [f"{name}.{item.name}" for name, kind in SECTIONS.items()
         for item in dataclasses.fields(kind) if item.type.startswith("list")]  # fmt: skip

# What people look for here and DeepSpeed's JSON owns; and Megatron's words for what is called
# otherwise here.
JSON_KEYS = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr"), "optimizer.params.lr"),
    **dict.fromkeys(("batch_size", "global_batch_size", "train_batch_size"), "train_batch_size"),
    **dict.fromkeys(("micro_batch_size", "train_micro_batch_size_per_gpu"),
                    "train_micro_batch_size_per_gpu"),
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    **dict.fromkeys(("bf16", "precision", "dtype"), "bf16.enabled"),
    "fp16": "fp16.enabled",
    "weight_decay": "optimizer.params.weight_decay",
    **dict.fromkeys(("betas", "adam_beta1", "adam_beta2"), "optimizer.params.betas"),
    "adam_eps": "optimizer.params.eps",
    "optimizer": "optimizer.type",
    **dict.fromkeys(("clip_grad", "gradient_clipping", "max_grad_norm"), "gradient_clipping"),
    **dict.fromkeys(("zero", "zero_stage", "zero_optimization"), "zero_optimization.stage"),
}  # fmt: skip
MEGATRON_NAMES = {
    "train_iters": "train.steps", "save": "train.output_dir", "load": "train.resume",
    "save_interval": "train.checkpoint_interval", "eval_iters": "train.eval_samples",
    "lr_decay_style": "train.lr_schedule", "lr_warmup_iters": "train.lr_warmup_steps",
    "lr_decay_iters": "train.lr_decay_steps", "data_path": "data.train_data_path",
    "tokenizer_model": "data.tokenizer", "group_query_attention": "model.num_query_groups",
    "tp": "parallel.tensor_model_parallel_size", "pp": "parallel.pipeline_model_parallel_size",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What the command line gave: the run's config and where the DeepSpeed JSON lies."""

    config: RunConfig
    deepspeed_config: str
    dry_run: bool


class _Parser(ArgumentParser):
    """jsonargparse, with the error alone instead of the error after two screens of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse says a type as Python does, and over several lines.
        form = r'Parser key "(\w+)\.(\w+)":\s.*(?:Got|Given) value: ([^\n]*)'
        found = re.search(form, message, re.DOTALL)
        if found and found[1] in SECTIONS:
            kind = get_type_hints(SECTIONS[found[1]])[found[2]]
            message = f"{found[1]}.{found[2]} = {found[3]}: expected {type_text(kind)}"
            if f"{found[1]}.{found[2]}" in LISTS:
                message += f', as "[{found[3]}]"'
        before, required, names = message.partition("the following arguments are required:")
        if required and not before:
            message = f"--config FILE.yaml is not given, or lacks settings:{names}"
        endings.refuse(self.prog, message)


def hint(name: str, known: Sequence[str]) -> str:
    """What to append to an error about an unknown setting: where its number belongs, or the
    nearest name."""
    tail = name.rsplit(".", 1)[-1].replace("-", "_")
    if tail in JSON_KEYS:
        return f" That is {JSON_KEYS[tail]} in the DeepSpeed JSON (--deepspeed_config)"
    if tail in MEGATRON_NAMES:
        return f" Here it is called {MEGATRON_NAMES[tail]}"
    return nearest(name, known)


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
        # Half a pair of characters is no text, and jsonargparse names no file for it.
        json.dumps(values, ensure_ascii=False, skipkeys=True, default=str).encode()
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        what = getattr(error, "problem", None) or error
        raise ValueError(f"--config {place}: not valid YAML: {what}") from error
    # Not UTF-8, a date that there is not, thousands of digits; or as many brackets.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected sections {list(SECTIONS)}, found {values!r}")
    known = [*SECTIONS, "deepspeed_config", "dry_run"]
    for section, body in values.items():
        if section not in known:
            if section in KNOWN_KEYS:
                raise ValueError(
                    f"--config {path}: {section!r} is a key of DeepSpeed's JSON: give that file as "
                    "--deepspeed_config, and the run's YAML as --config"
                )
            raise ValueError(f"{path}: unknown section {section!r}.{hint(str(section), known)}")
        if section not in SECTIONS:
            continue
        if not isinstance(body, dict):
            raise ValueError(
                f"{path}: section {section!r} holds {body!r}: give its settings or remove it"
            )
        for name, value in body.items():
            key = f"{section}.{name}"
            if key not in KEYS:
                raise ValueError(f"{path}: unknown key '{key}'.{hint(key, KEYS)}")
            if type(value) is int and not is_number(value):  # jsonargparse fails without a name
                raise ValueError(f"{path}: {key}: the number has too many digits")


def check_words(argv: Sequence[str]) -> None:
    """Raise ValueError for an option that is not known, or a list that is given twice."""
    seen: set[str] = set()
    for word in argv:
        if not word.startswith("--"):
            continue
        key = word.lstrip("-").split("=")[0]
        if key.rstrip("+") not in (*KEYS, *OPTIONS):  # `+` appends to a list
            raise ValueError(f"unknown option --{key}.{hint(key, [*KEYS, *OPTIONS])}")
        if key in seen and key in LISTS:
            raise ValueError(
                f"--{key} is given twice, and the second would replace the first: write one list, "
                f'as --{key} "[a, b]", or --{key}+ to append'
            )
        seen.add(key)


def print_help(parser: ArgumentParser, topic: str | None) -> None:
    """Without a topic what there is; with one, the settings of that section or a single one.

    Raises: ValueError for a topic that is neither.
    """
    if topic is None:
        lines = [f"  {name:<10}{kind.__doc__.splitlines()[0]}" for name, kind in SECTIONS.items()]
        print(
            f"usage: {parser.prog} --config FILE.yaml --deepspeed_config FILE.json "
            "[--SECTION.SETTING VALUE …]\n\nPre-train a language model, with or without a small "
            "teacher.\n\n--help SECTION explains the settings of a section, --help SETTING one "
            "of them:\n\n" + "\n".join(lines) + "\n\n"
            "  --config FILE            settings as YAML; of several the last one wins\n"
            "  --deepspeed_config FILE  DeepSpeed's JSON: batch, precision, optimizer, ZeRO\n"
            "  --dry_run                check everything, print layout and memory, train nothing\n"
            "  --print_config           print the resolved settings as YAML for --config"
        )
        return
    wanted = [key for key in KEYS if topic in (key, key.split(".")[0], key.split(".")[1])]
    if not wanted:
        raise ValueError(f"--help {topic}: no such setting.{hint(topic, [*SECTIONS, *KEYS])}")
    actions = {action.dest: action for action in parser._actions}
    formatter = argparse.HelpFormatter(parser.prog, max_help_position=6)
    for key in wanted:
        action, (section, field) = actions[key], key.split(".")
        kind = get_type_hints(SECTIONS[section])[field]
        default = "required" if key in REQUIRED else f"default: {json.dumps(action.default)}"
        formatter.start_section(f"--{key} ({type_text(kind)}; {default})")
        formatter.add_text(action.help)
        formatter.end_section()
    print(formatter.format_help())


def parse_command_line(argv: Sequence[str] | None = None, prog: str = "pretrain") -> CommandLine:
    """Read YAML files and overrides, check them, return frozen values.

    Raises: SystemExit(2) after printing the problem, the way argparse does; SystemExit(0) after
    `--help` or `--print_config`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(prog)
    try:
        if asked := {"--help", "-h"} & set(argv):
            after = argv[argv.index(asked.pop()) + 1 :]
            print_help(parser, after[0] if after and after[0][0] != "-" else None)
            raise SystemExit(0)
        print_it = "--print_config" in argv
        argv = [word for word in argv if word != "--print_config"]
        for position, word in enumerate(argv):
            if word == "--config" and position + 1 < len(argv):
                check_yaml_keys(argv[position + 1])
            elif word.startswith("--config="):
                check_yaml_keys(word.split("=", 1)[1])
        check_words(argv)
        namespace = parser.parse_args(argv)
        sections = {name: vars(namespace[name]) for name in SECTIONS}
        config = RunConfig.from_dict(sections, "--config and options")
        check_config(config)
        if print_it:
            values = {**config.to_dict(), "deepspeed_config": namespace.deepspeed_config}
            plain = json.loads(json.dumps(values))  # YAML knows no subclasses of text
            print(yaml.safe_dump(plain, sort_keys=False), end="")
            raise SystemExit(0)
        if not namespace.deepspeed_config:
            raise ValueError("--deepspeed_config is missing: give the DeepSpeed JSON of this run")
        read_json(namespace.deepspeed_config)  # its numbers are checked where the world is known
    except ValueError as error:
        parser.error(str(error))
    return CommandLine(
        config=config, deepspeed_config=namespace.deepspeed_config, dry_run=bool(namespace.dry_run)
    )


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as JSON, which `--config` reads too (YAML is a superset)."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
