"""The formulas of memory.py against the tensors of runs: model states and teacher byte for byte,
the most that a step ever holds within 10 %. On a CPU, where `Sizes.on_cuda` is false."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from storages import alive, most_allocated, num_bytes, storages
from tiny import ADAM, GPT, LLAMA, make_config, make_deepspeed, run_to_end

from megatron_salt.config.deepspeed import DeepSpeedSettings
from megatron_salt.config.fields import RunConfig
from megatron_salt.model.layers import DecoderLayer, ModelParts
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import initialize
from megatron_salt.planner.dry_run import teaching_plan
from megatron_salt.planner.memory import StageMemory, layer_bytes, stage_memory
from megatron_salt.planner.sizes import Sizes, TeacherSize
from megatron_salt.training.run import Run, prepare

WIDER: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "ffn_hidden_size": 160,
}
MODELS = {"llama": {**LLAMA, **WIDER, "num_query_groups": 4}, "gpt": {**GPT, **WIDER}}
KD_STEPS, LENGTH, VOCAB_SIZE = 4, 64, 509
TOLERANCE = 0.10


class Count(NamedTuple):
    """Bytes on a rank, but for the number of parameters."""

    parameters: int
    weights: int
    optimizer: int
    teacher: int
    total: int


@pytest.fixture(scope="module")
def teachers(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small ones of both kinds, trained for a step on sequences as long as the students'."""
    found = {}
    for kind, whole in (("llama", LLAMA), ("gpt", GPT)):
        folder = tmp_path_factory.mktemp(kind)
        model = {**whole, "hidden_size": 40, "num_attention_heads": 4,
                 "num_query_groups": 2, "ffn_hidden_size": 48}  # fmt: skip
        config = make_config(
            dataset, folder / "run", model=model, data__seq_length=LENGTH, train__steps=1
        )
        run_ranks(1, _train, config, make_deepspeed(folder))
        found[kind] = folder / "run"
    return found


def _train(config: RunConfig, deepspeed: str) -> None:
    run_to_end(config, deepspeed)


def _count(run: Run, first_step: int, inherited: int) -> Count:
    """Of two steps the smaller peak: what garbage waits for its collection is not the run's."""
    before, peaks = 0, []
    for step in (first_step, first_step + 1):
        before = alive()
        peaks.append(before + most_allocated(lambda: run.step(step)))  # noqa: B023
    engine = run.student.engine
    parameters = list(run.student.module.parameters())
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [value for state in inner.state.values() for value in state.values()]
    masters = [each for group in inner.param_groups for each in group["params"]]
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    masters = [each for each in masters if each.untyped_storage().data_ptr() not in own]
    return Count(
        parameters=sum(getattr(each, "ds_numel", each.numel()) for each in parameters),
        weights=num_bytes(parameters),
        optimizer=num_bytes([*(each for each in states if each.dim()), *masters]),
        teacher=0 if run.teacher is None else run.teacher.num_bytes(),
        total=min(peaks) - inherited,
    )


def _measure(config: RunConfig, deepspeed: str) -> dict[str, tuple[Count, StageMemory]]:
    inherited = alive()  # from tests before this one, in the process that forked this rank
    run = prepare(config, deepspeed)
    sizes = Sizes(
        config=config,
        settings=run.settings,
        layout=run.groups.layout,
        vocab_size=run.student.parts.vocab_size,
        on_cuda=False,
    )
    found, step = {}, 0
    run.step(step)  # DeepSpeed and Adam allocate at their first step
    stage = run.groups.pp_rank
    if run.teacher is not None:
        with_teacher = replace(sizes, teacher=TeacherSize.of(run.teacher.record))
        counted = _count(run, 1, inherited)
        found["KD"] = counted, stage_memory(with_teacher, teaching_plan(with_teacher))[stage]
        step = KD_STEPS - 1
        run.step(step)
        run.step(step + 1)
    found["LM"] = _count(run, step + 2 if step else 1, inherited), stage_memory(sizes)[stage]
    return found


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}}


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
UNFUSED = {"optimizer": {**ADAM, "params": {**ADAM["params"], "fused": False}}}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "one": ("llama", 1, {}, {}),
    "dp2-zero2": ("gpt", 2, zero(2), {}),
    "dp2-bf16-zero3": ("llama", 2, {**BF16, **zero(3)}, {}),
    "pp2-bf16": ("llama", 2, {**BF16, **zero(1)}, {"pp": 2}),
    "pp2-before-full": (
        "gpt", 2, {}, {"pp": 2, "recompute": "full", "placement": "before_step"},
    ),
    "pp2-prefix-zero1-unfused": (
        "llama", 2, {**zero(1), **UNFUSED}, {"pp": 2, "objective": ["prefix"]},
    ),
    "tp2-bf16-sp": ("llama", 2, {**BF16, **zero(1)}, {"tp": 2, "sp": True}),
    "tp2-pp2-bf16-full": ("gpt", 4, {**BF16, **zero(1)}, {"tp": 2, "pp": 2, "recompute": "full"}),
    "tp2-sp-spread": ("llama", 2, {}, {"tp": 2, "sp": True, "spread": True}),
    "tp2-pp2-bf16-spread": (
        "gpt", 4, {**BF16, **zero(1)}, {"tp": 2, "pp": 2, "spread": True},
    ),
}  # fmt: skip
SETTINGS = {
    "tp": "parallel__tensor_model_parallel_size",
    "pp": "parallel__pipeline_model_parallel_size",
    "sp": "parallel__sequence_parallel",
    "recompute": "parallel__recompute_granularity",
    "placement": "teacher__placement",
    "spread": "teacher__tensor_parallel",
    "objective": "data__objective",
}


@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_run(
    name: str, dataset: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    model, world_size, deepspeed, layout = CASES[name]
    config = make_config(
        dataset, tmp_path / "run", model=MODELS[model], data__seq_length=LENGTH, train__steps=9,
        teacher__checkpoint=str(teachers[model]), salt__kd_steps=KD_STEPS,
        **{SETTINGS[key]: value for key, value in layout.items()},
    )  # fmt: skip
    path = make_deepspeed(tmp_path, **deepspeed)
    for rank, phases in enumerate(run_ranks(world_size, _measure, config, path)):
        assert list(phases) == ["KD", "LM"]
        for phase, (found, said) in phases.items():
            where = f"{name}, rank {rank}, {phase}: {found}, {said}"
            print(f"{where.split(':')[0]}: {said.total / found.total - 1:+.1%}")
            assert found.parameters == said.parameters, where
            assert found.teacher == said.teacher + said.teacher_head + said.hidden_states, where
            if "zero3" not in name:  # its parts lie in buffers of its own
                assert found.weights == said.weights, where
                # Parts of data-parallel ranks are padded to a few elements.
                assert found.optimizer == pytest.approx(said.optimizer, abs=64), where
            assert said.total == pytest.approx(found.total, rel=TOLERANCE), where


def _layer_saves(
    models: list[dict[str, Any]], tp_size: int, sequence_parallel: bool
) -> list[tuple[int, int]]:
    """Counted and predicted bytes of a layer in both precisions, with and without prefixes."""
    groups = initialize(tp_size, 1, 5.0)
    found = []
    for model, precision, objective in itertools.product(
        models, ("fp32", "bf16"), ("causal", "prefix")
    ):
        config = make_config(
            "data", "run", model=model, data__seq_length=LENGTH, data__objective=[objective],
            parallel__tensor_model_parallel_size=tp_size,
            parallel__sequence_parallel=sequence_parallel,
        )  # fmt: skip
        settings = DeepSpeedSettings(
            path="", values={}, micro_batch_size=2, num_micro_batches=1, global_batch_size=2,
            precision=precision, zero_stage=0, learning_rate=1.0,
        )  # fmt: skip
        sizes = Sizes(
            config=config, settings=settings, layout=groups.layout, vocab_size=VOCAB_SIZE,
            on_cuda=False,
        )  # fmt: skip
        parts = ModelParts(
            config.model, vocab_size=VOCAB_SIZE, seq_length=LENGTH, num_positions=LENGTH,
            groups=groups.student, sequence_parallel=sequence_parallel, dtype=DTYPES[precision],
        )  # fmt: skip
        layer = DecoderLayer(parts, 0).to(DTYPES[precision])
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        prefix = torch.tensor([5, 60]) if objective == "prefix" else None
        parts.prefix_masks.use(prefix, torch.device("cpu"))
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)  # noqa: B023
            return tensor

        local = LENGTH // (tp_size if sequence_parallel else 1)
        hidden = torch.randn(local, 2, config.model.hidden_size, dtype=DTYPES[precision])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(hidden.requires_grad_())
        of_others = storages([*layer.parameters(), parts.prefix_masks.mask_B1SS])
        counted = {k: v for k, v in storages(saved).items() if k not in of_others}
        found.append((sum(counted.values()), layer_bytes(sizes)))
    return found


@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_a_layer_keeps_what_is_said(tp_size: int, sequence_parallel: bool) -> None:
    """Byte for byte: RMSNorm and LayerNorm, SwiGLU and GELU, with and without groups."""
    models = [*MODELS.values(), {**MODELS["llama"], "num_query_groups": None}]
    for found in run_ranks(tp_size, _layer_saves, models, tp_size, sequence_parallel):
        for counted, said in found:
            assert said == counted, found
