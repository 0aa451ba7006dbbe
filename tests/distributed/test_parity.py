"""Every layout computes what one process computes: losses of 5 steps, gradients of the first.

A right loss proves nothing about a gradient, so gradients are read off one step of SGD (see
`tiny.SGD_LR`), whole, weight by weight, in both phases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from tiny import (
    GPT,
    LLAMA,
    SGD,
    gradient_of_step,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
)

from megatron_salt.config import RunConfig

VOCAB_SIZE = 509
MODELS = {"llama": LLAMA, "gpt": GPT}
KD = {
    "salt__kd_steps": 5,
    "salt__kd_weight": 0.6,
    "salt__teacher_temperature": 2.0,
    "salt__student_temperature": 1.5,
}


def _losses_and_first_step(
    adam: RunConfig, adam_json: str, sgd: RunConfig, sgd_json: str
) -> dict[str, np.ndarray]:
    run_to_end(adam, adam_json)
    return local_weights(run_to_end(sgd, sgd_json))


def measure(
    folder: Path,
    dataset: Path,
    teacher: Path | None,
    *,
    model: str,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    sp: bool = False,
    zero: int = 0,
    recompute: str = "none",
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Metrics of 5 Adam steps and the gradient of the first step, of one layout."""
    settings: dict[str, Any] = {
        "parallel__tensor_model_parallel_size": tp,
        "parallel__pipeline_model_parallel_size": pp,
        "parallel__sequence_parallel": sp,
        "parallel__recompute_granularity": recompute,
    }
    if teacher is not None:
        settings |= {**KD, "teacher__checkpoint": str(teacher)}
    zero_section = {"zero_optimization": {"stage": zero}}
    adam = make_config(dataset, folder / "adam", model=MODELS[model], **settings)
    settings["train__steps"] = 1
    settings["salt__kd_steps"] = min(1, settings.get("salt__kd_steps", 0))
    sgd = make_config(dataset, folder / "sgd", model=MODELS[model], **settings)
    adam_json = make_deepspeed(folder, **zero_section)
    sgd_json = make_deepspeed(folder, optimizer=SGD, **zero_section)
    per_rank = run_ranks(tp * pp * dp, _losses_and_first_step, adam, adam_json, sgd, sgd_json)
    gradient = gradient_of_step(per_rank, sgd, VOCAB_SIZE)
    records = [record for record in metrics_of(folder / "adam") if record["step"] > 0]
    return records, gradient


@pytest.fixture(scope="module")
def references(
    dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Any]:
    """One process, ZeRO 0, for both models and phases."""
    found = {}
    for model in MODELS:
        for phase, path in (("kd", teacher), ("lm", None)):
            folder = tmp_path_factory.mktemp(f"{model}_{phase}")
            found[model, phase] = measure(folder, dataset, path, model=model)
    return found


LAYOUTS = [
    ("llama", {"tp": 2}),
    ("llama", {"tp": 2, "sp": True, "zero": 1}),
    ("llama", {"pp": 2}),
    ("llama", {"pp": 2, "zero": 1, "recompute": "full"}),
    ("llama", {"tp": 2, "pp": 2}),
    ("llama", {"tp": 2, "pp": 2, "sp": True, "zero": 1}),
    ("llama", {"dp": 2}),
    ("llama", {"dp": 2, "zero": 1}),
    ("llama", {"dp": 2, "zero": 2}),
    ("llama", {"dp": 2, "zero": 3}),
    ("llama", {"tp": 2, "dp": 2, "zero": 2}),
    ("llama", {"tp": 2, "dp": 2, "sp": True, "zero": 3}),
    ("gpt", {"tp": 2, "sp": True}),
    ("gpt", {"tp": 2, "pp": 2, "sp": True}),
    ("gpt", {"pp": 2, "zero": 1}),
    ("gpt", {"dp": 2, "zero": 3, "recompute": "full"}),
    ("gpt", {"tp": 2, "pp": 2, "dp": 2, "zero": 1}),
]


def _name(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(
            f"{key}{int(v) if not isinstance(v, str) else v}" for key, v in value.items()
        )
    return str(value)


@pytest.mark.parametrize("phase", ["kd", "lm"])
@pytest.mark.parametrize(("model", "layout"), LAYOUTS, ids=_name)
def test_layout_computes_what_one_process_computes(
    references: dict[tuple[str, str], Any],
    dataset: Path,
    teacher: Path,
    tmp_path: Path,
    model: str,
    layout: dict[str, Any],
    phase: str,
) -> None:
    records, gradient = measure(
        tmp_path, dataset, teacher if phase == "kd" else None, model=model, **layout
    )
    expected_records, expected_gradient = references[model, phase]
    for record, expected in zip(records, expected_records, strict=True):
        assert (record["phase"], record["tokens"]) == (phase, expected["tokens"])
        assert (record["kl_nats"] is None) == (phase == "lm")
        for key in ("loss", "ce_nats", "lr", "kd_weight", *(["kl_nats"] if phase == "kd" else [])):
            assert record[key] == pytest.approx(expected[key], rel=1e-5), (record["step"], key)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    # The first step's norm is of the same weights: no drift excuses a difference.
    assert records[0]["grad_norm"] == pytest.approx(expected_records[0]["grad_norm"], rel=1e-5)
    assert records[-1]["valid_ce_nats"] == pytest.approx(
        expected_records[-1]["valid_ce_nats"], rel=1e-5
    )
    for name, expected in expected_gradient.items():
        error = np.linalg.norm(gradient[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-5, f"{name}: relative gradient error {error:.2e}"


def test_reference_gradient_is_no_zero(references: dict[tuple[str, str], Any]) -> None:
    """Guards the guard: the gradients compared above are there, and differ between the phases."""
    for model in MODELS:
        kd, lm = references[model, "kd"][1], references[model, "lm"][1]
        for name, gradient in kd.items():
            assert np.linalg.norm(gradient) > 1e-5, name
            assert np.linalg.norm(gradient - lm[name]) > 1e-3 * np.linalg.norm(gradient), name
