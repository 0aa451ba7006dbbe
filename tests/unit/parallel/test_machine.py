"""What a machine must have for code that is compiled at run time; no GPU is needed to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import ROOT

from megatron_salt.parallel import machine
from megatron_salt.parallel.machine import (
    CONNECTIONS,
    check_fused_adam,
    fused_adam_facts,
    set_cuda_connections,
    wants_fused_adam,
    why_not_compiled,
)

EXAMPLES = sorted((ROOT / "examples" / "deepspeed").glob("*.json"))
FUSED = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
GOOD = {
    "prebuilt": False, "nvcc": "12.8", "torch_cuda": "12.8", "ninja": True, "skips_check": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tp_size", "chosen", "after", "warned"),
    [
        (1, None, None, None),
        (2, None, "1", None),
        (2, "1", "1", None),
        (1, "8", "8", None),
        (2, "8", "8", "tp = 2: tensor-parallel communication may start too late"),
        (1, "1", "1", "tp = 1: one queue serves tensor parallelism only"),
    ],
)
def test_one_queue_for_tensor_parallelism_alone(
    tp_size: int, chosen: str | None, after: str | None, warned: str | None
) -> None:
    environment = {} if chosen is None else {CONNECTIONS: chosen}
    warning = set_cuda_connections(tp_size, environment)
    assert environment.get(CONNECTIONS) == after
    assert warning is None if warned is None else warning and warned in warning


@pytest.mark.processes
def test_training_chooses_queues_before_torch_is_imported(tmp_path: Path) -> None:
    """When `silence_known_warnings`, the first to import torch, is called."""
    program = (
        "import os, sys\n"
        "from megatron_salt import pretrain\n"
        "def imports_torch():\n"
        "    print(os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS'), 'torch' in sys.modules)\n"
        "    raise SystemExit\n"
        "pretrain.silence_known_warnings = imports_torch\n"
        "pretrain.main(sys.argv[1:])\n"
    )
    run = {
        "data": {"train_data_path": [str(tmp_path / "some")]},
        "model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2},
        "train": {"steps": 1, "output_dir": str(tmp_path / "run")},
    }
    for name in ("some.bin", "some.idx"):  # which are looked for before
        (tmp_path / name).touch()
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    command = [sys.executable, "-c", program, "--config", str(tmp_path / "run.json"),
               "--deepspeed_config", str(EXAMPLES[0])]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != CONNECTIONS}
    for tp_size, expected in (("1", "None False"), ("2", "1 False")):
        option = ["--parallel.tensor_model_parallel_size", tp_size]
        done = subprocess.run(
            [*command, *option], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (FUSED, True),
        ({"optimizer": {"type": "adam", "params": {}}}, True),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, False),
        ({"optimizer": {"type": "Lion", "params": {}}}, False),
        ({**FUSED, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, False),
        ({**FUSED, "zero_optimization": {"offload_optimizer": {"device": "none"}}}, True),
        ({**FUSED, "zero_optimization": {"stage": 1}}, True),
    ],
)
def test_who_gets_fused_adam(values: dict[str, Any], expected: bool) -> None:
    assert wants_fused_adam(values) == expected


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_compile_nothing_for_their_optimizer(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["optimizer"]["params"]["fused"] is True
    assert not wants_fused_adam(values)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, ()),
        ({"ninja": False}, ("ninja is not on the PATH",)),
        ({"nvcc": None, "ninja": False}, ("no nvcc", "ninja is not on the PATH")),
        ({"nvcc": None, "prebuilt": True}, ()),
        # Of one major version DeepSpeed takes the minor ones that it lists, and 12.7 never was.
        ({"nvcc": "12.4"}, ()),
        ({"nvcc": "12.7"}, ("CUDA 12.7 and torch of 12.8",)),
        ({"nvcc": "13.0"}, ("CUDA 13.0 and torch of 12.8",)),
        ({"nvcc": "13.0", "torch_cuda": "13.0"}, ()),
        ({"nvcc": "13.1", "torch_cuda": "13.0"}, ("CUDA 13.1 and torch of 13.0", "DS_SKIP_CUDA")),
        ({"nvcc": "13.1", "torch_cuda": "13.0", "skips_check": True}, ()),
    ],
)
def test_what_fused_adam_lacks_is_named(found: dict[str, Any], words: tuple[str, ...]) -> None:
    if not words:
        check_fused_adam(FUSED, "ds.json", {**GOOD, **found})
        return
    with pytest.raises(ValueError) as caught:
        check_fused_adam(FUSED, "ds.json", {**GOOD, **found})
    for part in ("ds.json: optimizer.type 'AdamW'", '"torch_adam": true, "fused": true', *words):
        assert part in str(caught.value)
    torch_adam = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    check_fused_adam(torch_adam, "ds.json", {**GOOD, **found})


def test_deepspeed_refuses_what_is_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is DeepSpeed's: its own check is asked about the same pairs."""
    from deepspeed.ops.op_builder import builder

    versions = ["11.8", "12.4", "12.7", "12.8", "13.0", "13.1"]
    for nvcc in versions:
        major_minor = tuple(map(int, nvcc.split(".")))
        monkeypatch.setattr(builder, "installed_cuda_version", lambda name="", v=major_minor: v)
        for torch_cuda in versions:
            monkeypatch.setattr(torch.version, "cuda", torch_cuda)
            refused = []
            for check in (
                builder.assert_no_cuda_mismatch,
                lambda: check_fused_adam(FUSED, "", GOOD | {"nvcc": nvcc, "torch_cuda": torch_cuda}),  # noqa: B023, E501
            ):  # fmt: skip
                try:
                    check()
                    refused.append(False)
                except (builder.CUDAMismatchException, ValueError):
                    refused.append(True)
            assert refused[0] == refused[1], (nvcc, torch_cuda)


def test_facts_are_looked_up_as_deepspeed_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.1, V13.1.7\n")
    program.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DS_SKIP_CUDA_CHECK", "1")
    expected = {"prebuilt": False, "nvcc": "13.1", "torch_cuda": "13.0", "ninja": False}
    assert fused_adam_facts() == expected | {"skips_check": True}
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert fused_adam_facts()["nvcc"] is None


def test_what_torch_compile_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(name: str) -> None:
        (tmp_path / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(headers))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    reason = why_not_compiled()
    assert reason and "no C compiler (gcc, clang) and no Python.h in" in reason
    (headers / "Python.h").touch()
    assert why_not_compiled() == "no C compiler (gcc, clang)"
    program("clang")
    assert why_not_compiled() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert why_not_compiled() == "no C compiler (no-such-compiler)"


def test_fused_operations_go_by_the_rank_that_lacks_most(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gather(found: list[str | None], mine: str | None) -> None:
        found[:] = [mine, theirs]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "why_not_compiled", lambda: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    try:
        for theirs in (None, "n2 has no Python.h"):
            machine._all_ranks_compile.cache_clear()
            assert machine.fuses_operations() == (theirs is None)
            said = capsys.readouterr().err
            assert said.count("\n") == (theirs is not None)
            assert theirs is None or f"fused operations are off, which is slower: {theirs}" in said
    finally:
        machine._all_ranks_compile.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not machine.fuses_operations()


def test_layers_are_fused_as_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import LLAMA

    from megatron_salt.config.fields import ModelConfig
    from megatron_salt.model import layers

    for decided in (True, False):
        monkeypatch.setattr(layers, "fuses_operations", lambda decided=decided: decided)
        config = layers.transformer_config(
            ModelConfig(**LLAMA), tp_size=1, sequence_parallel=False, dtype=torch.float32
        )
        assert config.bias_dropout_fusion == config.bias_activation_fusion == decided
