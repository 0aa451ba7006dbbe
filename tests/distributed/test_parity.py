"""Every layout computes what one process computes, in the precisions that users train in.

A right loss proves nothing about a gradient, and a right fp32 gradient nothing about bf16: so the
gradients that reach the optimizer are compared, whole, weight by weight, of a step of either phase.
They are read off Adam's first moment, behind everything that DeepSpeed does to them on the way.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT
from ranks import RankError, run_ranks
from tiny import (
    GPT,
    LLAMA,
    adam_gradient,
    allow_fp16_on_cpu,
    first_moments,
    make_config,
    make_deepspeed,
    metrics_of,
    run_to_end,
    whole_weights,
)

from megatron_salt.config.fields import RunConfig
from megatron_salt.model import layers, student
from megatron_salt.model.weights import DTYPES
from megatron_salt.training import engine, gradients, instructions
from megatron_salt.training.gradients import accumulated
from megatron_salt.training.run import prepare

# The package has a function of the module's name.
linear_kd_loss = importlib.import_module("megatron_salt.kernels.linear_kd_loss")
VOCAB_SIZE = 509
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip
# Between them every setting of a layer. The first is untied, the second tied.
MODELS = {
    "qwen": {**LLAMA, "num_layers": 4, "add_qkv_bias": True, "qk_layernorm": True,
             "rotary_percent": 0.5, "rope_scaling": LLAMA3_ROPE},
    "gpt": {**GPT, "num_layers": 4, "activation": "gelu_tanh", "parallel_residual": True},
}  # fmt: skip
STEPS, KD_STEPS = 5, 4
KD = {
    "salt__kd_steps": KD_STEPS,
    "salt__kd_weight": 0.6,
    "salt__teacher_temperature": 2.0,
    "salt__student_temperature": 1.5,
}
# Whose gradients are compared: the first step, and the first one without a teacher.
COMPARED = (1, KD_STEPS + 1)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of a run, and what else decides how DeepSpeed treats its gradients."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    zero: int = 0
    recompute: bool = False
    precision: str = "fp32"
    accumulate: str = "fp32"
    """Dtype in which micro-batches are added up."""
    fused: bool = False
    immediate: bool | None = None
    """bf16.immediate_grad_update of the JSON; None: not said."""

    def __str__(self) -> str:
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        return "-".join(f"{k}{v if isinstance(v, str) else int(v)}" for k, v in changed.items())


@dataclass(frozen=True, kw_only=True)
class Measured:
    records: list[dict[str, Any]]
    """Metrics of the steps, from the first on."""
    gradients: dict[int, dict[str, np.ndarray]]
    """Step -> whole gradient after clipping, by weight."""


def _moments(
    config: RunConfig, deepspeed_config: str, prepare_rank: Callable[[], None] | None
) -> dict[int, dict[str, np.ndarray]]:
    allow_fp16_on_cpu()
    if prepare_rank is not None:
        prepare_rank()
    run = prepare(config, deepspeed_config)
    moments = {}
    for step in range(STEPS):
        run.step(step)
        if {step + 1, step + 2} & set(COMPARED):
            moments[step + 1] = first_moments(run)
    run.finish()
    return moments


def measure(
    folder: Path,
    dataset: Path,
    teacher: Path,
    model: str,
    layout: Layout,
    prepare_rank: Callable[[], None] | None = None,
    check: bool = True,
) -> Measured:
    """A run of both phases; `prepare_rank` is called on every rank before.

    Args:
        check: train.check_gradients.
    """
    config = make_config(
        dataset, folder, model=MODELS[model], teacher__checkpoint=str(teacher), **KD,
        train__steps=STEPS + 1,  # the last one, with its evaluation and checkpoint, is not run
        train__check_gradients=check,
        parallel__tensor_model_parallel_size=layout.tp,
        parallel__pipeline_model_parallel_size=layout.pp,
        parallel__sequence_parallel=layout.sp,
        parallel__recompute_granularity="full" if layout.recompute else "none",
        parallel__gradient_accumulation_fusion=layout.fused,
    )  # fmt: skip
    # The norms of gpt's steps lie below 1, and its tied embedding should be clipped as well.
    sections: dict[str, Any] = {
        "zero_optimization": {"stage": layout.zero},
        "gradient_clipping": 0.3 if model == "gpt" else 1.0,
    }
    if layout.precision != "fp32":
        sections[layout.precision] = {"enabled": True}
        sections["data_types"] = {"grad_accum_dtype": layout.accumulate}
    if layout.precision == "fp16":  # a scale that does not overflow, so that no step is skipped
        sections["fp16"]["initial_scale_power"] = 8
    if layout.immediate is not None:
        sections["bf16"]["immediate_grad_update"] = layout.immediate
    folder.mkdir(exist_ok=True)
    world_size = layout.tp * layout.pp * layout.dp
    deepspeed_config = make_deepspeed(folder, **sections)
    per_rank = run_ranks(world_size, _moments, config, deepspeed_config, prepare_rank)
    gradients = {}
    for step in COMPARED:
        of_step = [adam_gradient(moments, step) for moments in per_rank]
        gradients[step] = whole_weights(of_step, config, VOCAB_SIZE)
    return Measured(records=metrics_of(folder)[1:], gradients=gradients)


def errors(found: Measured, expected: Measured) -> dict[tuple[int, str], float]:
    """Relative error of the gradient of every weight, by step."""
    return {
        (step, name): float(np.linalg.norm(found.gradients[step][name] - value))
        / float(np.linalg.norm(value))
        for step in COMPARED
        for name, value in expected.gradients[step].items()
    }


def _round_initial_weights(precision: str) -> None:
    """Start an fp32 run from the weights that a 16-bit run starts from."""
    make, dtype = student.initial_weight, DTYPES[precision]
    student.initial_weight = lambda *arguments: make(*arguments).to(dtype).float()


@pytest.fixture(scope="module")
def reference(
    dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Measured]:
    """reference(model, precision, rounded_to): one process, made when first asked for."""

    @functools.cache
    def make(model: str, precision: str, rounded_to: str | None = None) -> Measured:
        folder = tmp_path_factory.mktemp("reference")
        # fp16 and bf16 need ZeRO 1, which on one process divides nothing.
        layout = Layout(precision=precision, zero=int(precision != "fp32"))
        rounded = functools.partial(_round_initial_weights, rounded_to) if rounded_to else None
        return measure(folder, dataset, teacher, model, layout, rounded)

    return make


# Without ZeRO gradients go another way than with it. With it, 16 bits say what fp32 would say.
FP32_LAYOUTS = [
    ("qwen", Layout(tp=2)),
    ("qwen", Layout(tp=2, sp=True, zero=1)),
    ("qwen", Layout(pp=2, zero=1, recompute=True)),
    ("qwen", Layout(tp=2, pp=2)),
    ("qwen", Layout(dp=2)),
    ("qwen", Layout(dp=2, zero=2)),
    ("qwen", Layout(tp=2, dp=2, zero=3)),
    ("gpt", Layout(tp=2, pp=2, sp=True)),
    ("gpt", Layout(dp=2, zero=3, recompute=True)),
    ("gpt", Layout(pp=2, dp=2, zero=1)),
]


@pytest.mark.parametrize(("model", "layout"), FP32_LAYOUTS, ids=str)
def test_fp32_computes_what_one_process_computes(
    reference: Callable[..., Measured],
    dataset: Path,
    teacher: Path,
    tmp_path: Path,
    model: str,
    layout: Layout,
) -> None:
    found = measure(tmp_path / "run", dataset, teacher, model, layout)
    expected = reference(model, "fp32")
    for record, wanted in zip(found.records, expected.records, strict=True):
        for key in ("phase", "tokens", "lr", "kd_weight"):
            assert record[key] == wanted[key]
        for key in ("loss", "ce_nats", *(["kl_nats"] if wanted["phase"] == "kd" else [])):
            assert record[key] == pytest.approx(wanted[key], rel=1e-5), (record["step"], key)
        assert record["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    # The first step's norm is of the same weights: no drift excuses a difference.
    assert found.records[0]["grad_norm"] == pytest.approx(
        expected.records[0]["grad_norm"], rel=1e-5
    )
    for (step, name), error in errors(found, expected).items():
        assert error < (1e-5 if step == 1 else 1e-3), f"{name}, step {step}: {error:.2e}"


# By optimizer (one for each precision and ZeRO stage) every way in which a rank has a part of the
# model. A tied embedding is another case where it lies on two stages, and under ZeRO 3.
LAYOUTS_16BIT = [
    (name.split()[0], dataclasses.replace(layout, precision=name.split()[1]))
    for layout, names in (
        (Layout(tp=2, sp=True, zero=1), ["qwen bf16", "qwen fp16"]),
        (Layout(tp=2, zero=1), ["qwen bf16"]),
        (Layout(pp=2, zero=1), ["qwen bf16", "gpt bf16", "gpt fp16"]),
        (Layout(dp=2, zero=1), ["qwen bf16"]),
        (Layout(dp=2, zero=2), ["qwen bf16", "qwen fp16"]),
        (Layout(dp=2, zero=3), ["gpt bf16", "qwen fp16"]),
        (Layout(tp=2, pp=2, sp=True, zero=1), ["qwen bf16", "gpt bf16", "gpt fp16"]),
        (Layout(tp=2, dp=2, zero=2), ["qwen bf16"]),
        (Layout(tp=2, dp=2, sp=True, zero=3), ["gpt bf16"]),
        (Layout(pp=2, dp=2, zero=1, recompute=True), ["qwen bf16"]),
        (Layout(tp=2, pp=2, dp=2, zero=1), ["gpt bf16"]),
        (Layout(pp=4, zero=1), ["qwen bf16", "gpt fp16"]),
    )
    for name in names
]
LAYOUTS_16BIT += [
    ("gpt", Layout(tp=2, pp=2, zero=1, precision="bf16", immediate=False)),
    ("gpt", Layout(pp=2, zero=1, precision="fp16", accumulate="fp16")),
    ("gpt", Layout(dp=2, zero=1, precision="bf16", fused=True)),
    ("qwen", Layout(tp=2, pp=2, sp=True, zero=1, precision="bf16", fused=True, recompute=True)),
]
# Beyond twice the error of one process: another order of rounding in sums of few terms, and after
# some steps of Adam other signs of gradients that are next to nothing.
TOLERANCE = {("bf16", 1): 0.01, ("fp16", 1): 0.002, ("bf16", 5): 0.05, ("fp16", 5): 0.02}


def assert_as_right_as_one_process(
    found: Measured, alone: Measured, exact: Measured, precision: str
) -> None:
    """Errors against fp32 from the same weights, at most twice those of one process in 16 bits."""
    own, allowed = errors(found, exact), errors(alone, exact)
    for (step, name), error in own.items():
        limit = 2.0 * allowed[step, name] + TOLERANCE[precision, step]
        assert error <= limit, f"{name}, step {step}: {error:.2e} > {limit:.2e}"
    for records in zip(found.records, alone.records, exact.records, strict=True):
        loss, of_one, wanted = (record["loss"] for record in records)
        assert abs(loss - wanted) <= 2.0 * abs(of_one - wanted) + 1e-3 * wanted, records[0]["step"]
        norm, of_one, wanted = (record["grad_norm"] for record in records)
        drift = 0.02 if records[0]["step"] <= max(COMPARED) else 0.1
        assert abs(norm - wanted) <= 2.0 * abs(of_one - wanted) + drift * wanted, records[0]["step"]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS_16BIT, ids=str)
def test_16_bits_are_as_right_as_one_process(
    reference: Callable[..., Measured],
    dataset: Path,
    teacher: Path,
    tmp_path: Path,
    model: str,
    layout: Layout,
) -> None:
    found = measure(tmp_path / "run", dataset, teacher, model, layout)
    alone = reference(model, layout.precision)
    exact = reference(model, "fp32", layout.precision)
    assert_as_right_as_one_process(found, alone, exact, layout.precision)


# The comparison, broken on purpose. Each is a mistake that leaves the first loss as it was.


def _drop_the_heads_gradient() -> None:
    function = linear_kd_loss._LinearKdLossFunction
    backward = function.backward
    function.backward = staticmethod(  # type: ignore[method-assign]
        lambda ctx, *upstream: (backward(ctx, *upstream)[0], *([None] * 9))
    )


def _double_the_first_stages_gradients() -> None:
    update = engine.StudentEngine._take_model_step

    def doubled(self: engine.StudentEngine, lr_kwargs: Any) -> None:
        for parameter in self.module.parameters():
            gradient = accumulated(parameter, self.engine.optimizer)
            if self.groups.pp_rank == 0 and gradient is not None:
                gradient.mul_(2.0)
        update(self, lr_kwargs)

    engine.StudentEngine._take_model_step = doubled  # type: ignore[method-assign]


def _skip_the_tied_sum() -> None:
    instructions.reduce_tied = lambda engine: None


def _leave_the_head_norms_alone() -> None:
    layers.HeadNorm.__new__ = layers.Norm.__new__  # type: ignore[method-assign]


def _average_over_tp() -> None:
    add_up = gradients.sum_partial

    def average(module: Any, optimizer: Any, group: Any) -> None:
        add_up(module, optimizer, group)
        for parameter in module.parameters():
            if getattr(parameter, "sequence_parallel", False):
                accumulated(parameter, optimizer).div_(group.size())

    gradients.sum_partial = average


@pytest.mark.parametrize(
    ("break_it", "model", "layout", "caught"),
    [
        (_drop_the_heads_gradient, "qwen", Layout(pp=2), "output_layer.weight"),
        (_double_the_first_stages_gradients, "qwen", Layout(pp=2), "embedding.word_embeddings"),
        (_skip_the_tied_sum, "gpt", Layout(pp=2), "embedding.word_embeddings.weight, tied"),
        (_average_over_tp, "qwen", Layout(tp=2, sp=True), "layernorm.weight"),
        (_leave_the_head_norms_alone, "qwen", Layout(tp=2), "q_layernorm.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_gradient_is_caught(
    reference: Callable[..., Measured],
    dataset: Path,
    teacher: Path,
    tmp_path: Path,
    break_it: Callable[[], None],
    model: str,
    layout: Layout,
    caught: str,
) -> None:
    layout = dataclasses.replace(layout, precision="bf16", zero=1)
    alone, exact = reference(model, "bf16"), reference(model, "fp32", "bf16")
    with pytest.raises(AssertionError, match=caught) as error:
        found = measure(tmp_path / "run", dataset, teacher, model, layout, break_it, check=False)
        assert found.records[0]["loss"] == pytest.approx(alone.records[0]["loss"], rel=1e-3)
        assert_as_right_as_one_process(found, alone, exact, "bf16")
    assert not isinstance(error.value, RankError)  # the run itself has not noticed


def _train(config: RunConfig, deepspeed_config: str) -> None:
    run_to_end(config, deepspeed_config)


def test_fifty_steps_of_the_papers_settings_end_where_one_process_does(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    """examples/deepspeed/paper_zero1_bf16.json on a tiny model, tp 2 x pp 2, through the switch."""
    values = json.loads((ROOT / "examples/deepspeed/paper_zero1_bf16.json").read_text())
    values |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    losses = []
    for size in (1, 2):
        config = make_config(
            dataset, tmp_path / f"run{size}", train__steps=50,
            salt__kd_steps=25, teacher__checkpoint=str(teacher),
            parallel__sequence_parallel=size > 1,
            parallel__tensor_model_parallel_size=size, parallel__pipeline_model_parallel_size=size,
        )  # fmt: skip
        run_ranks(size * size, _train, config, make_deepspeed(tmp_path, **values))
        losses.append(metrics_of(tmp_path / f"run{size}")[-1]["loss"])
    print(f"loss after 50 steps {losses}, ratio {losses[1] / losses[0]:.6f}")
    assert losses[1] == pytest.approx(losses[0], rel=3e-3)
    assert losses[0] < 6.1  # it has learnt something: chance is ln 509 = 6.23
