"""Start of torch.distributed and the process groups, as one frozen value that is passed around."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_salt.parallel.layout import Layout, layout_for_world


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's place: its layout coordinates, its process groups, its device."""

    layout: Layout
    rank: int
    tp_rank: int
    dp_rank: int
    pp_rank: int
    tp: ProcessGroup
    dp: ProcessGroup
    pp: ProcessGroup
    hidden: ProcessGroup
    """The ranks of `pp`, for the teacher's hidden states alone: they travel beside the student's
    activations."""
    alone: ProcessGroup
    """This rank only: the teacher's tensor-parallel group."""
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp_size - 1

    @property
    def student(self) -> ProcessGroupCollection:
        """Groups of the student's layers in megatron-core's form (no context parallelism)."""
        return ProcessGroupCollection(tp=self.tp, cp=self.alone, pp=self.alone)

    @property
    def teacher(self) -> ProcessGroupCollection:
        return ProcessGroupCollection(tp=self.alone, cp=self.alone, pp=self.alone)


def _fill_environment() -> None:
    """Set RANK, WORLD_SIZE, … from SLURM where `srun` started the ranks; one rank if nobody did."""
    env = os.environ
    if "RANK" in env:
        env.setdefault("LOCAL_RANK", "0")
        return
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        env.update(
            RANK=env["SLURM_PROCID"],
            WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"],
            LOCAL_RANK=env["SLURM_LOCALID"],
        )
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _address_of_first_node(env["SLURM_STEP_NODELIST"])
        # Jobs that share a node must not share a port; below 32768 nothing is handed out.
        env.setdefault("MASTER_PORT", str(15000 + int(env["SLURM_JOB_ID"]) % 15000))
        return
    env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    env.setdefault("MASTER_ADDR", "localhost")
    env.setdefault("MASTER_PORT", "0")  # any free one: runs on one machine must not meet


def _address_of_first_node(nodes: str) -> str:
    """Address by which SLURM reaches the first of `nodes`: host names need not resolve."""
    names = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
    first = names.split()[0]
    record = subprocess.check_output(["scontrol", "show", "node", first], text=True)
    address = re.search(r"NodeAddr=(\S+)", record)
    return address.group(1) if address else first


def planned_world_size() -> int | None:
    """World size that the launcher set, before anything is started; None outside a launcher."""
    value = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS")
    return int(value) if value else None


def make_deterministic() -> None:
    """Ask PyTorch, cuBLAS and NCCL for the same bits in every run; before CUDA is first used.

    megatron-core's layers are told by `transformer_config`. What has no deterministic form raises.
    """
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # By itself NCCL may choose another algorithm, and so another order of sums, from run to run.
    os.environ.setdefault("NCCL_ALGO", "Ring")


def initialize(tp_size: int, pp_size: int, timeout_minutes: float) -> Groups:
    """Join the world (torchrun, deepspeed, srun or a single process) and build all groups.

    Raises: ValueError if the world size does not fit the parallel sizes.
    """
    _fill_environment()
    layout = layout_for_world(int(os.environ["WORLD_SIZE"]), tp_size, pp_size)
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        # Modulo, because `srun --gpus-per-task=1` shows each rank one GPU, its number 0.
        index = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed's pipeline places its layers by it
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    # DeepSpeed makes groups without a timeout of their own: they get these defaults.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    if not dist.is_initialized():
        import deepspeed  # takes seconds to import; a wrong world size should not wait for it

        backend = "nccl" if cuda else "gloo"
        # DeepSpeed would compile a shared-memory all-reduce for CPU inference here, which nothing
        # in training calls, and whose build lock hangs every later run if one is killed in it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Before DeepSpeed, which would bind the device: with that every new group, of whomever, is
        # a split of the world that all ranks wait for. Without it a communicator is made by its
        # members when they first use it; docs/bubbles.md says what follows from that.
        dist.init_process_group(backend, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp_size,
            pipeline_model_parallel_size=pp_size,
            # Said to be whole minutes; they go into a timedelta, which takes any.
            distributed_timeout_minutes=timeout_minutes,  # type: ignore[arg-type]
            create_gloo_process_groups=False,  # a second set of them, which nothing here uses
        )
    rank = dist.get_rank()
    alone = dist.new_group([rank], use_local_synchronization=True, timeout=timeout)
    tp_rank, dp_rank, pp_rank = layout.coordinates(rank)
    columns = [
        [layout.rank(tp, dp, stage) for stage in range(pp_size)]
        for dp in range(layout.dp_size)
        for tp in range(tp_size)
    ]
    hidden, _ = dist.new_subgroups_by_enumeration(columns, timeout=timeout)
    return Groups(
        layout=layout, rank=rank, tp_rank=tp_rank, dp_rank=dp_rank, pp_rank=pp_rank,
        tp=parallel_state.get_tensor_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        hidden=hidden, alone=alone, device=device,
    )  # fmt: skip


def leave() -> None:
    """Wait for all ranks and end the process groups; at the end of a command.

    Their threads, left to the interpreter's end, can abort a rank that is done.
    """
    dist.barrier()
    dist.destroy_process_group()


class FailedElsewhere(RuntimeError):
    """Another rank failed and has reported why; this one only stops."""


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank: for what must be decided once, such as what a folder holds.

    Collectives: one broadcast of a pickled object over all ranks.
    """
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def same_error_everywhere(what: str, group: ProcessGroup | None = None) -> Iterator[None]:
    """Run a block that may fail on some ranks only, and raise on all of them if any did.

    Without this the ranks that succeeded wait in their next collective until it times out, and the
    reason is lost in the noise. The block itself must not contain collectives.

    Collectives: one all-gather of a short string over the group, or else all ranks, at the end.
    Raises: the exception itself on the first rank that met it; FailedElsewhere with the first
        failing rank and its message on the others.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # re-raised below, after the other ranks know
        failure = error
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, None if failure is None else str(failure), group=group)
    if failure is not None and messages.index(str(failure)) == dist.get_rank(group):
        raise failure  # once, not once per rank that met the same error
    for rank, message in enumerate(messages):
        if message is not None:
            raise FailedElsewhere(f"{what} failed on rank {rank}: {message}")
