"""The program's commands and options: misspelt, repeated, explained, completed by a shell."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest
from commands import call

from megatron_salt import __version__
from megatron_salt.commands.table import COMMANDS, ELSEWHERE, make_parser
from megatron_salt.config.command_line import OPTIONS, build_parser
from megatron_salt.config.fields import KEYS, SECTIONS

TOOLS = [name for name in COMMANDS if name not in ELSEWHERE]


def options_of(name: str) -> list[argparse.Action]:
    return [action for action in make_parser(name)._actions if action.option_strings]


def misspelt(word: str) -> str:
    """The last letter twice."""
    return word + word[-1]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    _, message = printed.err.split(": error: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", COMMANDS)
def test_misspelt_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(misspelt(name)) == 2
    message = one_error(capsys)
    assert f"{misspelt(name)!r}" in message and f"Did you mean {name!r}?" in message


@pytest.mark.parametrize("name", TOOLS)
def test_every_misspelt_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = {word for action in options_of(name) for word in action.option_strings}
    for word in sorted(word for word in known if word.startswith("--")):
        wrong = misspelt(word)
        assert wrong not in known
        assert call(name, wrong, "1") == 2
        message = one_error(capsys)
        # Of `plan`, what is required is missed first; what it does not know is a setting of a run.
        if name != "plan":
            assert f"unknown argument {wrong}. Did you mean {word!r}?" in message


@pytest.mark.parametrize("word", [*KEYS, "config", "deepspeed_config", "dry_run", "print_config"])
def test_every_misspelt_setting(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = misspelt(word)
    assert wrong not in (*KEYS, *OPTIONS)
    assert call("pretrain", f"--{wrong}", "1") == 2
    message = one_error(capsys)
    assert f"unknown option --{wrong}." in message
    assert f"Did you mean {word!r}?" in message


def test_lists_are_continued_by_a_second_option_never_replaced() -> None:
    """Of all commands; settings of a run refuse the second (test_slips), kernels has one list."""
    lists = 0
    for name in TOOLS:
        for action in options_of(name):
            if action.nargs in ("+", "*"):
                lists += 1
                assert type(action).__name__ == "_ExtendAction", (name, action.option_strings)
            elif action.nargs is None and isinstance(action.default, list):
                pytest.fail(f"{name} {action.option_strings}: a list that is replaced")
    assert lists >= 12
    twice = ["--tags", "a", "--tags", "b", "c", "--top-fraction", "0.5"]
    args = make_parser("select").parse_args(
        [*twice, "--top-fraction", "0.2", "0.1", "--output-prefix", "o"]
    )
    assert args.tags == ["a", "b", "c"] and args.top_fraction == [0.5, 0.2, 0.1]


@pytest.mark.parametrize("name", TOOLS)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    printed = capsys.readouterr()
    assert f"usage: megatron-salt {name}" in printed.out and printed.err == ""
    for action in options_of(name):
        assert action.option_strings[-1] in printed.out


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--version", "-V"):
        assert call(word) == 0
        assert capsys.readouterr().out == f"megatron-salt {__version__}\n"
    assert call("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_help_of_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("pretrain", "--help") == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 25, "one screen"
    assert all(f"\n  {section} " in text for section in SECTIONS)
    for section in SECTIONS:
        assert call("pretrain", "--help", section) == 0
        text = capsys.readouterr().out
        for key in KEYS:
            assert (f"--{key} (" in text) == key.startswith(f"{section}."), key
    assert call("pretrain", "--help", "kd_weight") == 0
    text = capsys.readouterr().out
    assert "--salt.kd_weight (number; default: 0.5)" in text and "kd_steps" not in text
    assert call("pretrain", "--help", "kd_wieght") == 2
    assert "Did you mean 'salt.kd_weight'?" in one_error(capsys)


def test_printed_config_is_one_that_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all that YAML takes for something else, and with what `--dry_run` must not leave."""
    asked = [
        "--model.num_layers", "2", "--model.hidden_size", "32", "--model.num_attention_heads", "4",
        "--data.train_data_path", '["0.3", "a: b", "1", "no"]', "--data.seq_length", "16",
        "--data.split", "90,10", "--train.steps", "5", "--train.output_dir", "2026-01-01",
        "--model.layernorm_epsilon", "1e-6", "--deepspeed_config", "ds.json", "--dry_run",
    ]  # fmt: skip
    assert call("pretrain", *asked, "--print_config") == 0
    first = capsys.readouterr().out
    assert "dry_run" not in first and "local_rank" not in first
    file = tmp_path / "printed.yaml"
    file.write_text(first)
    assert call("pretrain", "--config", file, "--print_config") == 0
    assert capsys.readouterr().out == first
    assert call("pretrain", "--config", file, "--train.steps", "6", "--print_config") == 0
    assert capsys.readouterr().out == first.replace("\n  steps: 5\n", "\n  steps: 6\n") != first


def test_completion_is_a_script_of_bash_that_knows_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("completion", "bash") == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stderr == ""
    ask = (
        f"source {script}; COMP_WORDS=(megatron-salt pretrain --salt.kd_w); COMP_CWORD=2; "
        "_shtab_megatron_salt; echo ${COMPREPLY[@]}"
    )
    found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert found.stdout == "--salt.kd_weight\n", found.stderr


def test_settings_of_the_parser_are_those_of_the_table() -> None:
    actions = {action.dest for action in build_parser("pretrain")._actions}
    assert set(KEYS) <= actions
