"""Runs small enough for a test: a config, a DeepSpeed JSON, and what to look at afterwards."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state

from megatron_salt.checkpoint.folder import list_checkpoints
from megatron_salt.config.fields import RunConfig
from megatron_salt.config.problems import check_config
from megatron_salt.model.layers import canonical_parameters
from megatron_salt.model.student import gathered
from megatron_salt.model.weights import initial_weight, merge, weight_table
from megatron_salt.training.run import Run, prepare, train

# Two layers: tests of what depends on their number or their places have four or six.
LLAMA: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "make_vocab_size_divisible_by": 4,
}
GPT: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "make_vocab_size_divisible_by": 4,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "activation": "gelu",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
}
# Of the fixture `teacher`. 20 wide, as no tensor of the student is: hidden states that outlive the
# switch are recognised.
TEACHER_MODEL: dict[str, Any] = {
    **LLAMA,
    "hidden_size": 20,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "ffn_hidden_size": 40,
}
# As in examples/deepspeed: nothing is compiled for it.
ADAM: dict[str, Any] = {
    "type": "AdamW",
    "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True, "fused": True},
}
# One step of SGD moves a weight by lr * gradient; so large an lr makes the gradient readable from
# the difference of two fp32 weights to about 1e-9.
SGD_LR = 1000.0
SGD = {"type": "SGD", "params": {"lr": SGD_LR}}


def make_config(
    data_prefix: str | Path,
    output_dir: str | Path,
    *,
    model: dict[str, Any] = LLAMA,
    **settings: Any,
) -> RunConfig:
    """A run of 5 steps; `settings` are `section__field=value`."""
    values: dict[str, Any] = {
        "model": dict(model),
        "data": {"train_data_path": [str(data_prefix)], "split": "90,10", "seq_length": 16},
        "train": {
            "steps": 5,
            "output_dir": str(output_dir),
            "lr_schedule": "constant",
            "eval_samples": 2,
            "tensorboard": False,
            "log_interval": 1000,
        },
    }
    for name, value in settings.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    config = RunConfig.from_dict(values, source="test")
    check_config(config)
    return config


def make_deepspeed(folder: Path, **values: Any) -> str:
    """A DeepSpeed JSON file of 8 sequences a step; returns its path."""
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": copy.deepcopy(ADAM),
        "gradient_clipping": 1.0,
        **values,
    }
    if content["optimizer"]["type"] == "SGD":
        content["gradient_clipping"] = 0.0  # DeepSpeed's default is 1.0
        content["zero_allow_untested_optimizer"] = True
    path = folder / f"ds_{abs(hash(json.dumps(content, sort_keys=True)))}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def run_to_end(config: RunConfig, deepspeed_config: str) -> Run:
    """What `megatron_salt.pretrain` does after parsing; for a rank."""
    run = prepare(config, deepspeed_config)
    train(run)
    return run


def run_and_kill(config: RunConfig, deepspeed_config: str, kill_after: int) -> None:
    """Train until `kill_after` steps are done, then this rank kills itself with SIGKILL."""
    run = prepare(config, deepspeed_config)
    for step in range(run.first_step, kill_after):
        run.step(step)
    os.kill(os.getpid(), signal.SIGKILL)


def cut_back(whole: Path, folder: Path, step: int) -> None:
    """Make `folder` what the finished run in `whole` was when it was killed after the checkpoint of
    this step: a copy without the later checkpoints, with metrics that the checkpoint does not know.

    The run must keep all checkpoints.
    """
    shutil.copytree(whole, folder)
    for path in list_checkpoints(folder):
        if path.name > f"step_{step:08d}":
            shutil.rmtree(path)
    assert list_checkpoints(folder)[-1].name == f"step_{step:08d}"


def metrics_of(output_dir: str | Path) -> list[dict[str, Any]]:
    text = (Path(output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything of the metrics that must be reproducible."""
    timed = ("step_time_s", "tokens_per_s", "teacher_time_s")
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def local_weights(run: Run) -> dict[str, np.ndarray]:
    """This rank's tensor-parallel parts of the student's weights, by canonical name."""
    weights = {}
    for name, parameter in canonical_parameters(run.student.module).items():
        with gathered(parameter):
            weights[name] = parameter.detach().float().cpu().numpy().copy()
    return weights


def allow_fp16_on_cpu() -> None:
    """DeepSpeed refuses fp16 on processors that have no instructions for it; PyTorch emulates."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def first_moments(run: Run) -> dict[str, np.ndarray]:
    """Adam's exp_avg of this rank's tensor-parallel parts, whole over dp, by canonical name.

    Collectives: one all-reduce per weight over dp.
    """
    optimizer = run.student.engine.optimizer
    moments = {}
    for name, parameter in canonical_parameters(run.student.module).items():
        if hasattr(parameter, "ds_id"):  # ZeRO 3
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        elif hasattr(parameter, "_hp_mapping"):
            moment = torch.zeros(parameter.numel())
            mapping = parameter._hp_mapping
            if mapping is not None:  # a fragment of it is this rank's
                group = optimizer.optimizer.param_groups[mapping.param_group_index]
                flat = optimizer.optimizer.state[group["params"][0]]["exp_avg"]
                theirs, ours = mapping.hp_fragment_address, mapping.lp_fragment_address
                fragment = flat[theirs.start : theirs.start + theirs.numel]
                moment[ours.start : ours.start + ours.numel] = fragment
            dist.all_reduce(moment, group=run.groups.dp)
            moment = moment.view(parameter.shape)
        else:  # without ZeRO the optimizer is PyTorch's own
            moment = optimizer.state[parameter]["exp_avg"]
        moments[name] = moment.float().cpu().numpy().copy()
    return moments


def adam_gradient(moments: dict[int, dict[str, np.ndarray]], step: int) -> dict[str, np.ndarray]:
    """The gradient, as clipped, that Adam was given in a step, from `first_moments` after it and
    after the one before (counted from 1), at the default beta of 0.9."""
    before = moments.get(step - 1, {})
    return {
        name: (after - 0.9 * before.get(name, 0.0)) / 0.1 for name, after in moments[step].items()
    }


def whole_weights(
    per_rank: list[dict[str, np.ndarray]], config: RunConfig, vocab_size: int
) -> dict[str, np.ndarray]:
    """Merge `local_weights` of all ranks of the first data-parallel replica.

    Replicas of a weight (over tp, or a tied embedding over stages) must be equal: asserted.
    """
    tp_size = config.parallel.tensor_model_parallel_size
    pp_size = config.parallel.pipeline_model_parallel_size
    dp_size = len(per_rank) // (tp_size * pp_size)
    table = weight_table(config.model, vocab_size, config.data.seq_length)
    whole = {}
    for name, spec in table.items():
        for stage in range(pp_size):
            ranks = [(stage * dp_size) * tp_size + tp_rank for tp_rank in range(tp_size)]
            if name not in per_rank[ranks[0]]:
                continue
            parts = [per_rank[rank][name] for rank in ranks]
            if spec.sharding == "replicated":
                for part in parts[1:]:
                    np.testing.assert_array_equal(part, parts[0], err_msg=f"{name} over tp")
            merged = merge([torch.from_numpy(part) for part in parts], spec).numpy()
            if name in whole:
                np.testing.assert_array_equal(merged, whole[name], err_msg=f"{name}, tied")
            whole[name] = merged
        for rank, weights in enumerate(per_rank):
            # Data-parallel replicas hold the same weights.
            twin = rank // (tp_size * dp_size) * tp_size * dp_size + rank % tp_size
            if name in weights:
                np.testing.assert_array_equal(weights[name], per_rank[twin][name], err_msg=name)
    assert set(whole) == set(table)
    return whole


def gradient_of_step(
    per_rank: list[dict[str, np.ndarray]], config: RunConfig, vocab_size: int
) -> dict[str, np.ndarray]:
    """The whole gradient of a run's only step, read off `local_weights` after SGD at SGD_LR."""
    after = whole_weights(per_rank, config, vocab_size)
    table = weight_table(config.model, vocab_size, config.data.seq_length)
    return {
        name: (initial_weight(spec, config.model, config.train.seed).numpy() - after[name]) / SGD_LR
        for name, spec in table.items()
    }
