"""Process groups: how many there are, and how long they wait."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch.distributed as dist
from ranks import run_ranks
from tiny import make_config, make_deepspeed

from megatron_salt.config.fields import RunConfig
from megatron_salt.training.run import prepare


def _groups_of_rank(config: RunConfig, deepspeed_config: str) -> list[tuple[int, ...]]:
    """Ranks of every group of more than one rank that this rank is in; a run's step is done."""
    run = prepare(config, deepspeed_config)
    run.step(0)
    world = dist.distributed_c10d._world
    mine = [ranks for group, ranks in world.pg_group_ranks.items() if group in world.pg_map]
    return [tuple(sorted(ranks)) for ranks in mine if len(ranks) > 1]


def test_number_of_groups_of_a_rank(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    """docs/bubbles.md names it. On NCCL each that is used becomes a communicator."""
    config = make_config(
        dataset, tmp_path / "run", parallel__tensor_model_parallel_size=2,
        parallel__pipeline_model_parallel_size=2, salt__kd_steps=3,
        teacher__checkpoint=str(teacher),
    )  # fmt: skip
    deepspeed_config = make_deepspeed(tmp_path, zero_optimization={"stage": 1})
    for groups in run_ranks(8, _groups_of_rank, config, deepspeed_config):
        sizes = Counter(map(len, groups))
        assert len(groups) <= 22, sizes
        assert sizes[8] <= 3, sizes
