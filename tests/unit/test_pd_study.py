"""benchmarks/pd_study.py: its commands parse, and its report counts what it says it counts."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_salt.config.command_line import parse_command_line

REPO = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(REPO)
    path = REPO / "benchmarks/pd_study.py"
    spec = importlib.util.spec_from_file_location("pd_study", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def made_up(study: ModuleType, nats: dict[Any, float]) -> dict[str, Any]:
    """Results of all settings: these nats, else 4; the second seed is 0.25 above the first."""
    runs = {
        s.name: {"nats": [nats.get(s, 4.0), nats.get(s, 4.0) + 0.25], "ece": [0.1, 0.3]}
        for s in study.all_settings(False)
    }
    return {
        "machine": "a machine", "size": study.dataclasses.asdict(study.FULL), "runs": runs,
        "margin_nats": 0.01, "seed_spread_nats": study.seed_spread(runs), "held_out_tokens": 9,
        "teacher": {"nats": 3.0, "ece": 0.02}, "angle": [],
    }  # fmt: skip


def test_every_run_parses_and_differs(study: ModuleType, tmp_path: Path) -> None:
    study.write_inputs(tmp_path, study.FULL)
    tasks = [task for task, _ in study.all_tasks(tmp_path, study.FULL, quick=False)]
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names)
    runs = [task for task in tasks if "pretrain" in task.command]
    parsed = [parse_command_line(task.command[3:]).config for task in runs]
    assert len({str(config.to_dict()) for config in parsed}) == len(runs)
    for task, config in zip(runs, parsed, strict=True):
        assert config.data.windows and Path(config.train.output_dir).name == task.name
        # A taught run is taught throughout, and waits for what it reads.
        assert config.salt.kd_steps == (config.train.steps if config.teacher.logits else 0)
        for prefix in config.teacher.logits:
            assert Path(prefix).name in task.needs and Path(prefix).name in names
    # Baseline, seeds alike.
    assert {f"{study.NONE.name}-{seed}" for seed in study.SEEDS} <= set(names)


def test_a_task_that_has_ended_is_left_out(study: ModuleType, tmp_path: Path) -> None:
    done = tmp_path / "w0-1" / "checkpoints"
    assert not study.has_ended(done)
    (done / ".step_8.partial").mkdir(parents=True)
    assert not study.has_ended(done)
    (done / "step_00000008").mkdir()
    assert study.has_ended(done)


def test_agreement_counts_pairs(study: ModuleType) -> None:
    ours = {"a": 4.0, "b": 3.9, "c": 3.995, "d": 1.0}
    published = {"a": 0.0, "b": 2.0, "c": -1.0}
    found = study.agreement(ours, published, 0.05)
    # b before a and c in both; c before a by 0.005 nats, which the paper has the other way.
    assert (found["same"], found["pairs"]) == (2, 3)
    assert (found["clear_same"], found["clear_pairs"]) == (2, 2)
    assert found["same_best"]
    assert not study.agreement({"a": 1.0, "b": 2.0}, published, 0.05)["same_best"]
    # What the paper does not tell apart is no pair.
    assert study.agreement({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, 0.0)["pairs"] == 0


def test_the_spread_leaves_out_what_all_settings_share(study: ModuleType) -> None:
    runs = {name: {"nats": [1.0, 1.0 + 0.5 + change]} for name, change in (("a", 0.1), ("b", -0.1))}
    assert study.seed_spread(runs) == pytest.approx(0.1 / math.sqrt(2))


def test_the_report_states_what_was_found(study: ModuleType, tmp_path: Path) -> None:
    best = study.Setting(weight=0.5)
    results = made_up(study, {study.NONE: 4.5, best: 3.5})
    text = study.report(results)
    weights = text.split("## Weight")[1].split("##")[0]
    row = next(line for line in weights.splitlines() if line.startswith("| 0.5 "))
    assert [cell.strip() for cell in row.split("|")[2:7]] == [
        "3.6250", "3.5000, 3.7500", "-1.0000", "0.2000", "1.5",
    ]  # fmt: skip
    assert "The best one is another" in weights
    for question in study.QUESTIONS:
        assert f"## {question.title}\n" in text
        assert set(question.published) <= set(question.settings)
    study.plots(results, tmp_path)
    assert len(list(tmp_path.glob("pd_study_*.png"))) == 3


def test_degrees(study: ModuleType) -> None:
    import torch

    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert study.degrees(x, y) == pytest.approx(45.0)
    assert study.degrees(x, 3 * x) == pytest.approx(0.0, abs=1e-5)
