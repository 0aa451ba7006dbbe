"""The commands of the program: what each is for, and its parser."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_salt.config.fields import SECTIONS
from megatron_salt.parallel import endings

# In the order in which one needs them. All but pretrain and kernels are files beside this one.
COMMANDS = {
    "examples": "copy the example configs and batch scripts into a folder",
    "corpus": "a small JSONL corpus out of this Python's source files",
    "tokenizer": "train a small tokenizer on JSONL text",
    "preprocess": "JSONL text to a Megatron dataset",
    "merge": "several datasets to one",
    "subset": "some documents of a dataset: of a source, a share, a number",
    "inspect": "look at a dataset and its tags, or verify every byte",
    "inspect-checkpoint": "what a checkpoint is; verify it, compare two, change its layout",
    "pretrain": "train a model, with or without a teacher",
    "tag": "a small model's losses and masks of all tokens of a dataset",
    "cache-logits": "a teacher's distributions over a dataset, for many students",
    "select": "the sequences for the KD phase, by the tags",
    "evaluate": "held-out nats per token of checkpoints",
    "convert": "Hugging Face models to checkpoints, and checkpoints to Hugging Face models",
    "generate": "text from checkpoints, side by side",
    "compare": "report and plots of several runs",
    "plan": "memory, hours and the fastest layout, before any data exists",
    "kernels": "which code computes the loss here, and why",
    "completion": "completion of all this for bash, zsh or tcsh",
}
ELSEWHERE = ("pretrain", "kernels")
# These need neither megatron-core's layers nor DeepSpeed, and start in a second.
LIGHT = ("examples", "corpus", "tokenizer", "preprocess", "merge", "subset", "compare",
         "completion")  # fmt: skip


def program_help() -> str:
    """What the program does and its commands, a line each."""
    return "\n".join([
        "usage: megatron-salt COMMAND [arguments]", "",
        "Pre-train a large language model with help from a small one (SALT).", "",
        *(f"  {name:<20}{text}" for name, text in COMMANDS.items()), "",
        "`megatron-salt COMMAND --help` explains a command.",
        "`megatron-salt --version` says which this is. On several devices:",
        "torchrun --nproc-per-node 8 -m megatron_salt COMMAND …; deepspeed and srun likewise.",
    ])  # fmt: skip


class CommandParser(argparse.ArgumentParser):
    """argparse, with the error alone instead of the error after a screen of usage."""

    def error(self, message: str) -> Any:
        endings.refuse(self.prog, f"{message}; see {self.prog} --help")


def load_command(name: str) -> ModuleType:
    """The file of a command, which is called as the command is, with an underscore for a dash."""
    return importlib.import_module(f"megatron_salt.commands.{name.replace('-', '_')}")


def make_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command that is a file of this folder, made without importing torch."""
    command = load_command(name)
    parser = CommandParser(
        prog=f"megatron-salt {name}", description=command.__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_arguments(parser)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """All commands and options in one parser, for shells; settings with their values."""
    whole = argparse.ArgumentParser(prog="megatron-salt")
    commands = whole.add_subparsers()
    for name, text in COMMANDS.items():
        if name not in ELSEWHERE:
            commands.add_parser(name, parents=[make_parser(name)], add_help=False, help=text)
            continue
        parser = commands.add_parser(name, help=text)
        if name == "pretrain":
            for option in ("--config", "--deepspeed_config", "--dry_run", "--print_config"):
                parser.add_argument(option, help="see megatron-salt pretrain --help")
            for section, kind in SECTIONS.items():
                for field, hint in get_type_hints(kind).items():
                    values = get_args(hint) if get_origin(hint) is Literal else None
                    parser.add_argument(f"--{section}.{field}", choices=values, help=section)
    return whole
