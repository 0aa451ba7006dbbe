"""The program `megatron-salt`: a command and its arguments. Also `python -m megatron_salt`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_salt import __version__
from megatron_salt.commands.table import (
    COMMANDS,
    ELSEWHERE,
    LIGHT,
    load_command,
    make_parser,
    program_help,
)
from megatron_salt.config.command_line import OPTIONS, hint
from megatron_salt.config.fields import KEYS
from megatron_salt.config.values import nearest
from megatron_salt.noise import silence_known_warnings
from megatron_salt.parallel import endings


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Whatever is wrong with words or files ends with one line and status 2."""
    if argv is None:
        endings.interrupt_on_sigterm()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(program_help())
        return 0 if words else endings.REFUSED
    name, *rest = words
    if name in ("-V", "--version"):
        print(f"megatron-salt {__version__}")
        return 0
    if name not in COMMANDS:
        meant = nearest(name, list(COMMANDS))
        message = f"there is no command {name!r}.{meant} `megatron-salt --help` lists them"
        endings.refuse("megatron-salt", message)
    if name not in ELSEWHERE:
        return run_command(name, rest)
    place = "kernels.__main__" if name == "kernels" else name
    try:
        status: int | None = importlib.import_module(f"megatron_salt.{place}").main(rest)
    except KeyboardInterrupt:
        endings.end_interrupted(f"megatron-salt {name}", lambda: "before it had begun")
    return status or 0


def run_command(name: str, words: Sequence[str]) -> int:
    """One of the commands that are files of `commands/`."""
    program = f"megatron-salt {name}"
    command = load_command(name)
    try:
        parser = make_parser(name)
        takes_settings = getattr(command, "TAKES_SETTINGS", False)
        known = [option for action in parser._actions for option in action.option_strings]
        if takes_settings:
            known += [f"--{key}" for key in (*KEYS, *OPTIONS)]
        for word in (word.split("=")[0] for word in words if word.startswith("--")):
            if word.rstrip("+") not in known:  # argparse would miss what it was to be
                meant = hint(word, known) if takes_settings else nearest(word, known)
                raise ValueError(f"unknown argument {word}.{meant}")
        args, others = parser.parse_known_args(words)
        settings = [others] if takes_settings else []
        if others and not settings:
            raise ValueError(f"unknown argument {others[0]}")
        if hasattr(command, "check"):  # before anything slow is imported
            command.check(args)
        if name not in LIGHT:
            silence_known_warnings()
        status: int = command.run(args, *settings)
        return status
    except KeyboardInterrupt:
        kept = getattr(command, "AFTER_INTERRUPT", "nothing was written")
        endings.end_interrupted(program, lambda: kept)
    except (ValueError, OSError, RuntimeError) as error:
        refuse_here(program, error)


def refuse_here(program: str, error: Exception) -> NoReturn:
    """`endings.refuse` on the rank that met the error; on the first, before the ranks have met."""
    here = None
    if "megatron_salt.parallel.groups" in sys.modules:  # else torch need not be imported for this
        import torch.distributed as dist

        from megatron_salt.parallel.groups import FailedElsewhere

        here = not isinstance(error, FailedElsewhere) if dist.is_initialized() else None
    endings.refuse(program, error, here=here)


if __name__ == "__main__":
    sys.exit(main())
