"""Runs resumed at another layout: what was restored, and what they then compute.

    python tests/elastic.py --precision bf16 --model llama

resumes at each of eight layouts what each of them has saved, in both phases, and prints a table.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from ranks import run_ranks
from tiny import (
    GPT,
    LLAMA,
    allow_fp16_on_cpu,
    cut_back,
    local_weights,
    make_config,
    make_deepspeed,
    metrics_of,
    without_times,
)

from megatron_salt.config.fields import RunConfig
from megatron_salt.model.layers import canonical_parameters
from megatron_salt.model.weights import merge, weight_table
from megatron_salt.training.run import Run, prepare, train

STATES = ("fp32", "exp_avg", "exp_avg_sq")
SAVED, SWITCH, STEPS = 3, 4, 8
# Four layers, so that each of four stages has one.
MODELS = {"llama": {**LLAMA, "num_layers": 4}, "gpt": {**GPT, "num_layers": 4}}
# Of the losses that the uninterrupted run would have had, relatively.
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-4, "fp16": 1e-4}


class At(NamedTuple):
    """A layout and its ZeRO stage."""

    tp: int
    pp: int
    dp: int
    zero: int
    micro: int = 2
    """Sequences of a micro-batch."""

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def settings(self, precision: str) -> dict[str, Any]:
        """The DeepSpeed JSON's; 16 bits need ZeRO."""
        stage = max(1, self.zero) if precision != "fp32" else self.zero
        values: dict[str, Any] = {
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": self.micro,
        }
        if precision == "bf16":
            values |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        if precision == "fp16":
            values |= {"fp16": {"enabled": True, "initial_scale_power": 8}}
        return values

    def __str__(self) -> str:
        return f"tp {self.tp} pp {self.pp} dp {self.dp} ZeRO {self.zero}"


LAYOUTS = (
    At(2, 2, 1, 1), At(1, 1, 2, 2), At(1, 2, 2, 1), At(2, 1, 1, 3),
    At(1, 1, 1, 0, 4), At(1, 4, 1, 0), At(2, 1, 2, 3, 1), At(1, 1, 2, 3),
)  # fmt: skip


def config_at(
    at: At, dataset: Path, teacher: Path, output_dir: Path, model: str, **settings: Any
) -> RunConfig:
    values: dict[str, Any] = {
        "parallel__tensor_model_parallel_size": at.tp,
        "parallel__pipeline_model_parallel_size": at.pp,
        "parallel__sequence_parallel": at.tp > 1,
        "teacher__checkpoint": str(teacher),
        "salt__kd_steps": SWITCH,
        "train__steps": STEPS,
        "train__checkpoint_interval": SAVED,
        "train__keep_checkpoints": 0,
    }
    return make_config(dataset, output_dir, model=MODELS[model], **{**values, **settings})


def state_of(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """State by weight of this rank's tensor-parallel shards, as DeepSpeed itself finds it.

    Collectives: an all-reduce of each state of each weight over dp.
    """
    optimizer = run.student.engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links all groups after the first one's first step, when others have no state.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in canonical_parameters(run.student.module).items():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            read = {"fp32": safe_get_full_fp32_param(parameter)}
            for state in STATES[1:]:
                read[state] = safe_get_full_optimizer_state(parameter, state)
        else:
            read = {"fp32": parameter, **optimizer.state[parameter]}
        shape = getattr(parameter, "ds_shape", parameter.shape)
        read = {state: read[state].detach().view(shape) for state in STATES}
        found[name] = {state: value.float().numpy().copy() for state, value in read.items()}
    return found


def whole_state(
    per_rank: list[dict[str, dict[str, np.ndarray]]], config: RunConfig, vocab_size: int
) -> dict[tuple[str, str], np.ndarray]:
    """The whole state by weight, from `state_of` of all ranks; a tied weight's copies are equal."""
    tp = config.parallel.tensor_model_parallel_size
    whole: dict[tuple[str, str], np.ndarray] = {}
    for name, spec in weight_table(config.model, vocab_size, config.num_positions).items():
        for first in range(0, len(per_rank), tp):  # the ranks of a shard lie together
            if name not in per_rank[first]:
                continue
            for state in STATES:
                shards = [per_rank[first + rank][name][state] for rank in range(tp)]
                if spec.sharding == "replicated":
                    assert all(np.array_equal(shard, shards[0]) for shard in shards), name
                merged = merge([torch.from_numpy(shard) for shard in shards], spec).numpy()
                if (name, state) in whole:
                    np.testing.assert_array_equal(merged, whole[name, state], err_msg=name)
                whole[name, state] = merged
    return whole


def save_run(config: RunConfig, deepspeed_config: str, at: int) -> tuple[Any, Any]:
    """Train to the end; the state after step `at`, and the last weights, of this rank."""
    allow_fp16_on_cpu()
    run = prepare(config, deepspeed_config)
    state = None
    for step in range(run.first_step, config.train.steps):
        run.step(step)
        if step + 1 == at:
            state = state_of(run)
    run.finish()
    return state, local_weights(run)


def resume_runs(configs: list[RunConfig], deepspeed_config: str) -> list[tuple[Any, Any]]:
    """Of each: the state that was restored, and the last weights, of this rank."""
    allow_fp16_on_cpu()
    results = []
    for config in configs:
        run = prepare(config, deepspeed_config)
        assert run.first_step > 0
        state = state_of(run)
        train(run)
        results.append((state, local_weights(run)))
        dist.barrier()
    return results


def losses(output_dir: Path, after: int) -> np.ndarray:
    return np.array([r["loss"] for r in metrics_of(output_dir) if r["step"] > after])


class Saved(NamedTuple):
    """An uninterrupted run at a layout."""

    at: At
    folder: Path
    state: dict[tuple[str, str], np.ndarray]
    weights: list[dict[str, np.ndarray]]
    """The last ones, of every rank."""


class Pair(NamedTuple):
    """What became of a run that went on at another layout, against the uninterrupted one."""

    same_state: bool
    worst_loss: float
    """Largest relative difference of a loss."""
    same_end: bool
    """Last weights and all metrics, bit by bit; False at another layout."""


class Pairs:
    """Runs at several layouts in a folder, each saved, then resumed at others."""

    def __init__(
        self, folder: Path, dataset: Path, teacher: Path, precision: str, model: str,
        vocab_size: int, step: int = SAVED, **settings: Any,
    ) -> None:  # fmt: skip
        self.folder, self.dataset, self.teacher = folder, dataset, teacher
        self.precision, self.model, self.vocab_size = precision, model, vocab_size
        self.step, self.settings = step, settings

    def save(self, at: At) -> Saved:
        output_dir = self.folder / str(at).replace(" ", "_")
        config = config_at(
            at, self.dataset, self.teacher, output_dir, self.model, **self.settings
        )  # fmt: skip
        results = run_ranks(at.ranks, save_run, config, self._deepspeed(at), self.step)
        state = whole_state([state for state, _ in results], config, self.vocab_size)
        return Saved(at, output_dir, state, [weights for _, weights in results])

    def resume(self, at: At, sources: list[Saved]) -> list[Pair]:
        folders = [self.folder / f"{at} from {saved.at}".replace(" ", "_") for saved in sources]
        configs = []
        for folder, saved in zip(folders, sources, strict=True):
            cut_back(saved.folder, folder, self.step)
            configs.append(
                config_at(at, self.dataset, self.teacher, folder, self.model, **self.settings)
            )
        per_rank = run_ranks(at.ranks, resume_runs, configs, self._deepspeed(at))
        pairs = []
        for number, (saved, folder) in enumerate(zip(sources, folders, strict=True)):
            states = [results[number][0] for results in per_rank]
            state = whole_state(states, configs[number], self.vocab_size)
            expected = losses(saved.folder, self.step)
            difference = np.abs(losses(folder, self.step) / expected - 1).max()
            mine = [results[number][1] for results in per_rank]
            same = at == saved.at and all(
                np.array_equal(a[name], b[name])
                for a, b in zip(mine, saved.weights, strict=True)
                for name in b
            )
            metrics = [without_times(metrics_of(each)) for each in (folder, saved.folder)]
            same = same and metrics[0] == metrics[1]
            pairs.append(
                Pair(
                    all(np.array_equal(state[key], saved.state[key]) for key in saved.state),
                    float(difference), same,
                )
            )  # fmt: skip
            shutil.rmtree(folder)
        return pairs

    def _deepspeed(self, at: At) -> str:
        return make_deepspeed(self.folder, **at.settings(self.precision))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def make_data_and_teacher(folder: Path) -> tuple[Path, Path]:
    """What the tests' fixtures `dataset` and `teacher` are, for a script."""
    from conftest import dataset, train_teacher

    class Factory:
        @staticmethod
        def mktemp(of: str) -> Path:
            return made(folder / of)

    data = dataset.__wrapped__(Factory)
    return data, train_teacher(data, made(folder / "teacher"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=TOLERANCE, default="fp32")
    parser.add_argument("--model", choices=MODELS, default="llama")
    arguments = parser.parse_args()
    from conftest import VOCAB_SIZE

    with tempfile.TemporaryDirectory() as name:
        data, teacher = make_data_and_teacher(Path(name))
        for step in (SAVED, 2 * SAVED):
            pairs = Pairs(
                made(Path(name) / f"step_{step}"), data, teacher, arguments.precision,
                arguments.model, VOCAB_SIZE, step,
            )  # fmt: skip
            if not try_all(pairs):
                sys.exit(1)


def try_all(pairs: Pairs) -> bool:
    """Print what became of each pair of layouts; whether all were good."""
    sources = [pairs.save(at) for at in LAYOUTS]
    bad, worst, tolerance = 0, 0.0, TOLERANCE[pairs.precision]
    for at in LAYOUTS:
        for saved, pair in zip(sources, pairs.resume(at, sources), strict=True):
            exact = pair.same_end and pair.worst_loss == 0.0
            bad += not (
                pair.same_state and pair.worst_loss <= tolerance and (at != saved.at or exact)
            )
            worst = max(worst, pair.worst_loss)
            print(f"step {pairs.step}: {saved.at} -> {at}: {pair}", flush=True)
    total = len(LAYOUTS) ** 2
    print(
        f"{pairs.precision} {pairs.model} after step {pairs.step}: {total - bad} of {total} pairs "
        f"good, worst loss {worst:.1e}"
    )
    return not bad


if __name__ == "__main__":
    main()
