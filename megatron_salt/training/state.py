"""What of the student's engine a checkpoint holds, and how it comes back at another layout.

DeepSpeed keeps master weights and the optimizer's state in flat tensors whose order and padding are
its own; on each parameter it keeps where in them the parameter lies. That is read here, and nothing
of it is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_salt.checkpoint.manifest import CheckpointManifest
from megatron_salt.checkpoint.optimizer import (
    MASTER,
    OptimizerPart,
    StoredOptimizer,
    optimizer_file,
)
from megatron_salt.checkpoint.shards import Cut
from megatron_salt.checkpoint.weights import WeightFiles, weights_file
from megatron_salt.model import student as student_module
from megatron_salt.model.layers import canonical_parameters
from megatron_salt.parallel.groups import same_error_everywhere
from megatron_salt.parallel.layout import split_evenly
from megatron_salt.training.engine import StudentEngine

# What DeepSpeed's dynamic loss scale remembers.
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class HostCopies:
    """Copies of tensors in host memory, in buffers that are kept from one save to the next.

    On CUDA they are pinned and filled on a stream of their own, behind what the current stream has
    been given so far; `wait` holds back what would change the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Any = None

    def begin(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, key: str, tensor: Tensor, *, passing: bool = False) -> Tensor:
        """Start to copy; the copy is good after `finish`.

        Args: passing: the tensor's memory will be another's soon, in the order of the current
            stream.
        """
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = self._stream is not None
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[key] = buffer
        if self._stream is None or not tensor.is_cuda:
            return buffer.copy_(tensor)
        if passing:
            return buffer.copy_(tensor)  # waits for it
        with torch.cuda.stream(self._stream):
            return buffer.copy_(tensor, non_blocking=True)

    def end(self) -> None:
        if self._stream is not None:
            self._copied = self._stream.record_event()

    def wait(self) -> None:
        """What the current stream is given from here on runs after the copies. No host sync."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def free(self) -> None:
        self._buffers.clear()

    def finish(self) -> None:
        """The host waits for the copies."""
        if self._copied is not None:
            self._copied.synchronize()


class Share(NamedTuple):
    """A parameter's part in what the optimizer of this rank updates."""

    owner: Tensor
    """The tensor that is updated, in fp32: DeepSpeed's flat one, or the parameter itself."""
    at: int
    """First element in `owner`, flattened."""
    part: range
    """Which elements of the parameter, flattened: of its tensor-parallel shard."""


class OptimizerState:
    """DeepSpeed's optimizer of a student, seen by parameters."""

    def __init__(self, student: StudentEngine) -> None:
        self.wrapper = student.engine.optimizer
        self.base = getattr(self.wrapper, "optimizer", self.wrapper)
        self.dp_rank = student.groups.dp_rank

    def owners(self) -> list[Tensor]:
        """All tensors that it updates on this rank; some may hold nothing but padding."""
        if hasattr(self.wrapper, "fp32_partitioned_groups_flat"):  # ZeRO 3, by sub-groups
            return list(self.wrapper.fp32_partitioned_groups_flat)
        return [tensor for group in self.base.param_groups for tensor in group["params"]]

    def share(self, parameter: nn.Parameter) -> Share | None:
        """None: all of the parameter is other ranks'."""
        if hasattr(parameter, "ds_id"):  # ZeRO 3
            group, at, size = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
            start = self.dp_rank * size  # the last part is padded
            owner = self.wrapper.fp32_partitioned_groups_flat[group]
            part = range(start, max(start, min(start + size, parameter.ds_numel)))  # type: ignore[attr-defined]
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2, BF16_Optimizer
            mapping: Any = parameter._hp_mapping
            if mapping is None:
                return None
            owner = self.base.param_groups[mapping.param_group_index]["params"][0]
            at, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
            part = range(start, start + mapping.lp_fragment_address.numel)
        else:
            owner, at, part = parameter, 0, range(parameter.numel())
        return Share(owner, at, part) if part else None

    def tensors(self, owner: Tensor) -> dict[str, Tensor]:
        """The master weights and what the optimizer keeps of their shape, flattened."""
        state = self.base.state.get(owner, {})
        kept = {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == owner.shape}
        return {k: v.detach().flatten() for k, v in {MASTER: owner, **kept}.items()}

    def scalars(self, owner: Tensor) -> dict[str, float]:
        """What else it keeps: the step. Host sync: one, where PyTorch keeps it on the device."""
        state = self.base.state.get(owner, {})
        found = {k: v for k, v in state.items() if v is not None and k not in self.tensors(owner)}
        return {k: float(v) for k, v in found.items()}

    def fill(self, owner: Tensor, states: list[str], scalars: dict[str, float]) -> None:
        """Give an owner the state that the optimizer itself would make in its first step."""
        state = self.base.state[owner]
        group = next(
            (g for g in self.base.param_groups if any(p is owner for p in g["params"])),
            self.base.param_groups[0],
        )
        of_torch = type(self.base).__module__.startswith("torch.optim")
        on_device = group.get("fused") or group.get("capturable")
        for name in states:
            if name != MASTER and name not in state:
                state[name] = torch.zeros_like(owner)
        for name, value in scalars.items():
            if of_torch:
                device = owner.device if on_device else "cpu"
                state[name] = torch.tensor(value, dtype=torch.float32, device=device)
            else:
                state[name] = int(value)


@dataclass(frozen=True)
class RankState:
    """What one rank writes."""

    files: dict[str, dict[str, Tensor]]
    """Path in the checkpoint -> tensors by name."""
    part: OptimizerPart
    states: list[str]
    scalars: dict[str, float]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether tensor-parallel ranks have different parts of it."""
    return bool(parameter.tensor_model_parallel)  # type: ignore[attr-defined]


@torch.no_grad()
def capture(student: StudentEngine, copies: HostCopies) -> RankState:
    """Copy weights and optimizer state of this rank; see `HostCopies` for when they are there.

    Collectives: under ZeRO 3 an all-gather of each weight over dp.
    """
    groups, optimizer = student.groups, OptimizerState(student)
    weights: dict[str, Tensor] = {}
    optimizers: dict[str, Tensor] = {}
    fragments: dict[str, tuple[int, int]] = {}
    copies.begin()
    for name, parameter in canonical_parameters(student.module).items():
        # A tied embedding lives on the first and the last stage; the first one writes it.
        if getattr(parameter, "ds_pipe_replicated", False):
            continue
        with student_module.gathered(parameter):  # under ZeRO 3 on every rank
            if groups.dp_rank == 0:
                passing = hasattr(parameter, "ds_id")
                weights[name] = copies.copy(name, parameter.detach(), passing=passing)
        share = optimizer.share(parameter)
        if share is None or (groups.tp_rank > 0 and not is_cut(parameter)):
            continue
        owner, at, part = share
        if owner is parameter:  # without ZeRO all of dp have all of it, and write a part each
            at, end = split_evenly(len(part), groups.layout.dp_size)[groups.dp_rank]
            part = part[at:end]
        if part:
            fragments[name] = part.start, len(part)
        for state, tensor in optimizer.tensors(owner).items():
            if part:
                key = f"{name}/{state}"
                optimizers[key] = copies.copy(key, tensor[at : at + len(part)])
    copies.end()
    files = {optimizer_file(groups.rank): optimizers}
    if groups.dp_rank == 0:
        files[weights_file(groups.pp_rank, groups.tp_rank)] = weights
    first = optimizer.owners()[0]
    return RankState(
        files={name: tensors for name, tensors in files.items() if tensors},
        part=OptimizerPart(
            file=optimizer_file(groups.rank), tp_rank=groups.tp_rank, fragments=fragments
        ),
        states=list(optimizer.tensors(first)), scalars=optimizer.scalars(first),
    )  # fmt: skip


@torch.no_grad()
def restore(student: StudentEngine, folder: Path, manifest: CheckpointManifest) -> None:
    """Weights, optimizer state and loss scale of a checkpoint of any layout.

    The hashes of its files have been verified.
    Collectives: a broadcast of each weight over dp.
    Raises: ValueError on all ranks, naming the file, if something is missing or damaged.
    """
    groups, parts, optimizer = student.groups, student.parts, OptimizerState(student)
    with same_error_everywhere(f"reading {folder}"):
        weights, stored = WeightFiles(folder, manifest), StoredOptimizer(folder, manifest)
    states, cut = stored.index.states, Cut(parts.tp_rank, parts.tp_size, parts.padded_vocab)
    for owner in optimizer.owners():
        optimizer.fill(owner, states, stored.index.scalars)
    for name, parameter in canonical_parameters(student.module).items():
        with student_module.gathered(parameter, write=True):
            if groups.dp_rank == 0:
                read = weights.read(name, cut, range(parameter.numel()))
                parameter.copy_(read.view(parameter.shape))
        if not hasattr(parameter, "ds_id"):
            dist.broadcast(parameter.data, dist.get_global_rank(groups.dp, 0), group=groups.dp)
        share = optimizer.share(parameter)
        if share is not None:
            flat = optimizer.tensors(share.owner)
            for state in states:
                place = flat[state][share.at : share.at + len(share.part)]
                place.copy_(stored.read(name, state, cut, share.part))
    engine, run = student.engine, manifest.run
    engine.global_steps, engine.skipped_steps = run.step, run.skipped_steps
    engine.global_samples = run.data_rows
    for name, value in run.loss_scaler.items():
        setattr(engine.optimizer.loss_scaler, name, value)


def loss_scaler(student: StudentEngine) -> dict[str, float]:
    """What a dynamic loss scale remembers; nothing without one."""
    scaler = getattr(student.engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in LOSS_SCALER}
