"""The quick start's commands and their order, without running them: that takes minutes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_salt.commands.table import make_parser
from megatron_salt.config.command_line import parse_command_line

REPO = Path(__file__).parents[2]


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = REPO / "examples/quickstart/run.py"
    spec = importlib.util.spec_from_file_location("quickstart_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHARED_IMPORTS", ())
    monkeypatch.chdir(REPO)
    return module


@pytest.mark.parametrize("teacher", ["weak", "strong"])
@pytest.mark.parametrize("text", [None, Path("mine.jsonl")])
def test_commands_exist_and_parse(
    quickstart: ModuleType, teacher: str, text: Path | None, tmp_path: Path
) -> None:
    tasks = quickstart.data_tasks(tmp_path, text) + quickstart.model_tasks(tmp_path, teacher, 2)
    tasks.append(quickstart.report_task(tmp_path, teacher, 2, tasks))
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names) == 3 - (text is not None) + 3 + 4 * 2 + 1
    for place, task in enumerate(tasks):
        assert set(task.needs) <= set(names[:place]), task.name
        module, package, command, *words = task.command
        assert (module, package) == ("-m", "megatron_salt")
        if command == "pretrain":
            config = parse_command_line(words).config
            assert Path(config.train.output_dir) == tmp_path / task.name
            # A teacher to the end is one for all of the run's steps.
            if config.salt.transition == "constant":
                assert config.salt.kd_steps == config.train.steps
        else:
            make_parser(command).parse_args(words)


def test_only_an_earlier_quick_start_is_replaced(quickstart: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    for _ in range(2):
        quickstart.make_folder(output)
        assert not (output / "data" / "old").exists()
        (output / "data" / "old").touch()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for path in (mine, mine / "thesis.txt"):
        with pytest.raises(SystemExit, match=f"--output {path} is there and was not made by"):
            quickstart.make_folder(path)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_tasks_wait_for_what_they_need(quickstart: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "append.py"
    script.write_text(f"import sys\nopen({str(tmp_path / 'order')!r}, 'a').write(sys.argv[1])\n")

    def task(name: str, *needs: str) -> object:
        return quickstart.Task(name=name, title=name, command=[str(script), name], needs=needs)

    quickstart.run_all([task("c", "b"), task("b", "a"), task("a")], tmp_path, 2)
    assert (tmp_path / "order").read_text() == "abc"


def test_a_task_that_fails_ends_everything_and_is_shown(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fail.py"
    script.write_text("raise ValueError('no such thing')\n")
    tasks = [
        quickstart.Task(name="a", title="first", command=[str(script)], needs=()),
        quickstart.Task(name="b", title="second", command=[str(script)], needs=("a",)),
    ]
    with pytest.raises(SystemExit, match="first: ended with status 1"):
        quickstart.run_all(tasks, tmp_path, 1)
    assert "no such thing" in capsys.readouterr().err
    assert not (tmp_path / "b.log").exists()
