"""Prints a script that lets a shell complete commands, options and their values.

    eval "$(megatron-salt completion bash)"

is a line for ~/.bashrc; for zsh: megatron-salt completion zsh > a folder of $fpath/_megatron-salt.
"""

from __future__ import annotations

import argparse

import shtab

from megatron_salt.commands.table import whole_parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def run(args: argparse.Namespace) -> int:
    print(shtab.complete(whole_parser(), args.shell))
    return 0
