"""The training path on tensors that say "cuda" and hold nothing: where is a `.to(device)` missing?

A program of its own, run by test_fake_cuda.py, because it pretends that there is CUDA before the
project is imported. `FakeTensor`s know shape, dtype and device only; an operation on tensors of two
devices is an error, as it would be on a GPU. What runs is the project's own code. In its place are
what needs a device (streams, events, the CUDA library), other ranks (a process group that does
nothing), and DeepSpeed's engine: autograd cannot run without a device, so backward passes end at
the loss.

Usage: fake_cuda.py GUARD CASES FOLDER, with CASES as JSON; prints a line of JSON per case.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TORCH_COMPILE_DISABLE"] = "1"
ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

DEVICE = torch.device("cuda", 0)
RANK, WORLD_SIZE = 1, 2  # rank 0 would read the teacher's files
VOCAB_SIZE = 509
TEACHER = {"num_layers": 1, "hidden_size": 20, "num_attention_heads": 2}


class Handle:
    """Stands for streams, events and the device that is current."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...
    def record(self) -> None: ...
    def wait_stream(self, _: Handle) -> None: ...


class Library:
    """Stands for the compiled CUDA code; what it would read and write has been looked at."""

    def __init__(self, path: str) -> None:
        for name in ("salt_error", "salt_probe", "salt_local_sums", "salt_rescale", "salt_finish",
                     "salt_gradient", "salt_values_and_gradient"):  # fmt: skip
            setattr(self, name, lambda *_: 0)


class PlainEngine:
    """Stands for DeepSpeed's: forward passes, and the backward of the loss function alone."""

    def __init__(self, module: nn.Module, values: dict[str, Any]) -> None:
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        self.module, self.optimizer = module, SimpleNamespace(param_groups=[])
        if "bf16" in values:
            self.optimizer = object.__new__(BF16_Optimizer)
            self.optimizer.optimizer = SimpleNamespace(param_groups=[])  # DeepSpeed passes on
            for weight in module.parameters():  # what backward passes would have added up
                weight._hp_grad = torch.zeros_like(weight, dtype=torch.float32)
                weight.get_full_hp_grad = partial(getattr, weight, "_hp_grad")

    def __call__(self, *inputs: Any) -> Tensor:
        return self.module(*inputs)

    def train(self) -> None: ...
    def eval(self) -> None: ...

    def _take_model_step(self, lr_kwargs: None) -> None: ...

    def step(self) -> None:  # the student's engine puts its own in the place of the one above
        self._take_model_step(None)

    def backward(self, loss: Tensor) -> None:
        expect_device(loss)
        of_hidden, of_head, *_ = loss.grad_fn.apply(torch.ones((), device=DEVICE), None, None)
        expect_device(of_hidden, of_head)


def expect_device(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device != DEVICE:
            raise AssertionError(f"a tensor of shape {tuple(tensor.shape)} is on {tensor.device}")


def address(tensor: Tensor) -> int:
    """What the compiled code is given must be on the device."""
    expect_device(tensor)
    return 0


def moved(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module.to` and the like; PyTorch's own cannot exchange parameters without content."""
    for child in module.children():
        child._apply(fn)
    for name, old in module._parameters.items():
        if old is not None:
            new = nn.Parameter(fn(old.detach()), requires_grad=old.requires_grad)
            marks = {key: mark for key, mark in vars(old).items() if key not in vars(new)}
            vars(new).update(marks)
            module._parameters[name] = new
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def pretend_cuda() -> None:
    """For megatron-core and the project alone: PyTorch would look for the device."""

    def is_available() -> bool:
        return str(sys._getframe(1).f_globals.get("__name__")).startswith("megatron")

    torch.cuda.is_available = is_available
    torch.cuda.current_device = lambda: DEVICE
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.Event = torch.cuda.Stream = torch.cuda.stream = torch.cuda.device = Handle
    torch.cuda.current_stream = Handle
    FakeTensor.data_ptr = address
    nn.Module._apply = moved
    # So that prefixes have values: they decide, on the CPU, whether there is a mask.
    fake_tensor.CONSTANT_NUMEL_LIMIT = 64


def groups_of(tp_size: int) -> Any:
    from megatron_salt.parallel.groups import Groups
    from megatron_salt.parallel.layout import Layout

    world, alone = dist.group.WORLD, dist.new_group([RANK])
    both = {"tp": world, "dp": alone} if tp_size == WORLD_SIZE else {"tp": alone, "dp": world}
    layout = Layout(tp_size=tp_size, pp_size=1, dp_size=WORLD_SIZE // tp_size)
    tp_rank, dp_rank, pp_rank = layout.coordinates(RANK)
    return Groups(
        layout=layout, rank=RANK, tp_rank=tp_rank, dp_rank=dp_rank, pp_rank=pp_rank,
        pp=alone, hidden=alone, alone=alone, device=DEVICE, **both,
    )  # fmt: skip


def batch_of(num_rows: int, length: int) -> Any:
    """As a dataset hands it out, on the CPU; some rows with a prefix, the last two without."""
    from megatron_salt.data.dataset import Batch

    tokens_RS = torch.zeros(num_rows, length, dtype=torch.int64)
    ones_RS = torch.ones(num_rows, length)
    prefix_R = torch.tensor([3] * (num_rows - 2) + [0] * 2)
    return Batch(
        tokens_RS=tokens_RS, labels_RS=tokens_RS.clone(), mask_RS=ones_RS, tag_RS=ones_RS.clone(),
        reference_loss_RS=ones_RS.clone(), prefix_R=prefix_R,
    )  # fmt: skip


def with_logits(batch: Any) -> Any:
    """Of 12 tokens, as they are stored."""
    shape = batch.tokens_RS.shape
    return dataclasses.replace(
        batch, logits_ids_RSK=torch.zeros(*shape, 12, dtype=torch.uint16),
        logits_logp_RSK=torch.zeros(*shape, 12, dtype=torch.float16),
        logits_rest_RS=torch.zeros(shape), logits_entropy_RS=torch.zeros(shape),
    )  # fmt: skip


def make_run(case: dict[str, Any], folder: Path) -> tuple[Any, Any, Any, Any, Any]:
    """Config, DeepSpeed's settings, groups, student and teacher, as a run makes them."""
    import tiny

    from megatron_salt.checkpoint.weights import load_frozen
    from megatron_salt.config.deepspeed import load_deepspeed_config
    from megatron_salt.config.fields import ModelConfig
    from megatron_salt.model.weights import DTYPES
    from megatron_salt.parallel.watchdog import StepWatchdog
    from megatron_salt.teacher.plan import StepShape, multiply_adds, plan_teacher
    from megatron_salt.teacher.teacher import Teacher
    from megatron_salt.training.engine import StudentEngine

    config = tiny.make_config(
        "data", folder, model={**getattr(tiny, case["model"]), "num_layers": 1},
        parallel__tensor_model_parallel_size=case["tp"],
        parallel__sequence_parallel=case["sequence_parallel"],
        parallel__recompute_granularity="full" if case["recompute"] else "none",
    )  # fmt: skip
    values: dict[str, Any] = {
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if case["precision"] != "fp32":
        values[case["precision"]] = {"enabled": True}
    groups = groups_of(case["tp"])
    # Two micro-batches of two rows.
    values["train_batch_size"] = 4 * groups.layout.dp_size
    settings = load_deepspeed_config(tiny.make_deepspeed(folder, **values), groups.layout.dp_size)
    student = StudentEngine(
        config, settings, groups, vocab_size=VOCAB_SIZE, watchdog=StepWatchdog(groups, 30.0)
    )
    parts = student.parts
    teacher_config = dataclasses.replace(config, model=ModelConfig(**TEACHER))
    record = SimpleNamespace(
        config=teacher_config.model, vocab_size=VOCAB_SIZE, evaluation=None,
        num_positions=teacher_config.num_positions,
    )  # fmt: skip
    manifest = SimpleNamespace(model=record)
    dtype = DTYPES[settings.precision]
    model = load_frozen(
        folder, manifest, groups, seq_length=config.data.seq_length, dtype=dtype,
        head=parts.vocab, head_columns=parts.padded_vocab // parts.tp_size,
    )  # fmt: skip
    teacher = Teacher(
        model, record, groups, source="a teacher", dtype=dtype,
        micro_batch_size=settings.micro_batch_size,
    )  # fmt: skip
    student.loss_function.teacher_head_WE = teacher.head_WE
    shape = StepShape.of_run(config, settings, groups.layout, VOCAB_SIZE, teacher_config.model)
    plan = plan_teacher(shape, multiply_adds(shape), in_bubbles=False)
    teacher.prepare(plan, ahead=True)
    return config, settings, groups, student, teacher


def train(config: Any, settings: Any, student: Any, teacher: Any, route: dict[str, Any]) -> None:
    """Two steps of the KD phase, the second with a route; one without a teacher; one taught by
    stored logits, with the route."""
    from megatron_salt.kernels import Truncation

    loss_function = student.loss_function
    num_rows = settings.micro_batch_size * settings.num_micro_batches
    expect_device(*student.module.parameters(), *student.module.buffers())
    batch = batch_of(num_rows, config.data.seq_length).to(DEVICE)
    teacher_pass = teacher.begin_pass(batch.tokens_RS, batch.prefix_R)
    teacher_pass.run_all()
    student.train_step(student.micro_batches(batch, 0.5, teacher_pass.finish()), 0.1)
    again = teacher.begin_pass(batch.tokens_RS, batch.prefix_R)
    again.run_all()
    loss_function.salt = dataclasses.replace(loss_function.salt, **route)
    student.train_step(student.micro_batches(batch, 0.5, again.finish()), 0.1)
    student.train_step(student.micro_batches(batch, 0.0, None, "lm")[-1:], 0.1)
    loss_function.truncation = Truncation(lost_mass="ghost")
    stored = with_logits(batch_of(num_rows, config.data.seq_length)).to(DEVICE)
    student.train_step(student.micro_batches(stored, 0.5, None), 0.1)
    expect_device(loss_function.take_sums())


def evaluate(config: Any, settings: Any, groups: Any, student: Any, teacher: Any) -> None:
    """The teacher, and then the student beside it, on three held-out rows.

    What is done with the sums on the host is left out.
    """
    from megatron_salt.data.order import evaluation_rows
    from megatron_salt.evaluation.held_out import HeldOut
    from megatron_salt.evaluation.score_sums import ThirdCuts

    held_out = object.__new__(HeldOut)
    size, layout = settings.micro_batch_size, groups.layout
    rounds = evaluation_rows(3, size, groups.dp_rank, layout.dp_size)

    parts = SimpleNamespace(names=["code", "text"])

    def read(rows: list[int]) -> Any:
        batch = batch_of(len(rows), config.data.seq_length)
        return dataclasses.replace(batch, part_RS=torch.ones_like(batch.tokens_RS))

    vars(held_out).update(
        groups=groups, student=student, rounds=rounds,
        data=SimpleNamespace(read_held_out=read, valid_parts=parts, data=config.data),
        batches_per_forward=settings.num_micro_batches, num_samples=3,
        seq_length=config.data.seq_length, teacher=None,
    )  # fmt: skip
    # Of a teacher without a stored score the samples are read once more, behind another token.
    held_out._without_stored = lambda teacher, _: held_out._teacher_losses(teacher, 0)  # type: ignore[method-assign]
    held_out.score_teacher(teacher)
    vars(held_out.teacher)["cuts"] = ThirdCuts(first=0.1, second=0.2)
    held_out.score_student()


def run_case(case: dict[str, Any], folder: Path) -> None:
    config, settings, groups, student, teacher = make_run(case, folder)
    train(config, settings, student, teacher, case["route"])
    evaluate(config, settings, groups, student, teacher)


def main(guard: str, cases: str, folder: str) -> None:
    ctypes.CDLL(guard, mode=ctypes.RTLD_GLOBAL)
    pretend_cuda()
    import deepspeed
    from megatron.core import parallel_state

    from megatron_salt.evaluation.score_sums import ScoreSums
    from megatron_salt.kernels import build, compiled
    from megatron_salt.model import frozen as frozen_module
    from megatron_salt.training import engine as engine_module

    dist.init_process_group("fake", rank=RANK, world_size=WORLD_SIZE, store=FakeStore())
    parallel_state._set_global_memory_buffer()
    with mock.patch.object(ctypes, "CDLL", Library), \
            mock.patch.object(build, "find_or_build", lambda *_: Path("none")):  # fmt: skip
        assert not isinstance(compiled.load("cuda", 90), str)  # the one that the loss will find
    deepspeed.initialize = lambda model, config, **_: [PlainEngine(model, config)]
    deepspeed.zero.Init = lambda **_: contextlib.nullcontext()  # it is for ZeRO 3
    engine_module.DeepSpeedConfig = lambda *_, **__: None  # it asks DeepSpeed's own groups
    # These ask other ranks, or bring numbers to the host.
    frozen_module.same_error_everywhere = lambda what: contextlib.nullcontext()
    sums = ScoreSums(
        ce_nats=1.0, tokens=1.0, correct=1.0, teacher_better=1.0, third_tokens=(), bin_tokens=(),
        third_ce_nats=(), bin_confidence=(), bin_correct=(),
    )  # fmt: skip
    ScoreSums.unpack = lambda packed: sums
    for name, case in json.loads(cases).items():
        error = None
        try:
            with FakeTensorMode(allow_non_fake_inputs=False):
                run_case(case, Path(folder))
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"case": name, "error": error}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
