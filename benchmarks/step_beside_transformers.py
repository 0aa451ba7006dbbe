"""How long does a training step take beside a plain PyTorch loop with transformers' Llama?

    pip install -e ".[hf]"
    python benchmarks/step_beside_transformers.py [--label after]

fp32, one process on a CPU. Student: 8 layers, 512 wide; teacher: 6 layers, 384 wide; a
vocabulary of 16384; 2048 tokens a step.

- ours: `Run.step`, that is reading, teacher, micro-batches, DeepSpeed's engine, metrics.
- theirs: `LlamaForCausalLM` for student and teacher, the teacher's forward without gradients, the
  loss that everyone writes (log_softmax, kl_div and cross_entropy of whole logits), a backward per
  micro-batch, clip_grad_norm_, optimizer step.

Both get the same weights, batches and optimizer (PyTorch's AdamW with the same arguments). Before
anything is timed, both losses must agree over the first steps, so through their gradients too; so
they must in every timed step. Then rounds: each runs a KD and an LM step of ours and of theirs, in
an order that turns from round to round, so that other load on the machine meets all alike. The
ratios are medians over rounds of ratios within a round, by the clock on the wall and by the
process's time on the cores, which other load disturbs less, least with `--threads 1`: two threads
wait for each other where one of them has lost its core. Adds an entry, under the label, to
benchmarks/results/step_beside_transformers.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# On a machine that others use too, threads that spin take the core which they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from real_text import make_data
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_salt.config.fields import ModelConfig, RunConfig
from megatron_salt.data.dataset import Batch
from megatron_salt.model.layers import canonical_parameters
from megatron_salt.model.weights import EMBEDDING, OUTPUT_LAYER
from megatron_salt.report.markdown import describe_machine
from megatron_salt.training.run import Run, prepare, train

RESULT = Path(__file__).parent / "results/step_beside_transformers.json"
VOCAB_SIZE, SEQ_LENGTH, ROWS = 16384, 512, 4
STUDENT = {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 1408}
TEACHER = {"num_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "ffn_hidden_size": 1024}
KD_WEIGHT = 0.5
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
WARM_UP = 2
LARGEST_DIFFERENCE = 1e-4
"""Of the losses, relative."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label", default="after", help="of the entry in the result file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fused", action="store_true", help="AdamW's fused code, on both sides")
    parser.add_argument("--data", type=Path, help="a folder that keeps the data for the next time")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        rounds = arguments.rounds
        data = arguments.data or Path(name)
        data.mkdir(parents=True, exist_ok=True)
        prefix = data / "data_text_document"
        if not prefix.with_suffix(".bin").is_file():
            make_data(data, VOCAB_SIZE)
        runs = make_runs(
            Path(name), prefix, rounds, arguments.micro_batches, arguments.fused, stack
        )
        plain = {kind: PlainLoop(run, arguments.fused) for kind, run in runs.items()}
        found = race(runs, plain, rounds)
    version = importlib.metadata.version("transformers")
    found = {
        "machine": f"{describe_machine()}, transformers {version}",
        "threads": arguments.threads, "student": STUDENT, "teacher": TEACHER,
        "vocab_size": VOCAB_SIZE, "seq_length": SEQ_LENGTH, "rows": ROWS,
        "micro_batches": arguments.micro_batches, "fused_adamw": arguments.fused, "rounds": rounds,
        **found,
    }  # fmt: skip
    output: Path = arguments.output
    every = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    every[arguments.label] = found
    output.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


# --- ours ----------------------------------------------------------------------------------------


def make_runs(
    folder: Path,
    prefix: Path,
    rounds: int,
    micro_batches: int,
    fused: bool,
    stack: contextlib.ExitStack,
) -> dict[str, Run]:
    """A run in its KD phase and one that never had a teacher; the teacher is trained for a step."""
    optimizer = {**ADAMW, "torch_adam": True, **({"fused": True} if fused else {})}
    deepspeed = {
        "train_batch_size": ROWS, "train_micro_batch_size_per_gpu": ROWS // micro_batches,
        "optimizer": {"type": "AdamW", "params": optimizer}, "gradient_clipping": CLIP,
    }  # fmt: skip
    deepspeed_config = folder / "deepspeed.json"
    deepspeed_config.write_text(json.dumps(deepspeed), encoding="utf-8")

    def config(name: str, model: dict[str, int], steps: int, **sections: Any) -> RunConfig:
        values = {
            "model": model,
            "data": {"train_data_path": [str(prefix)], "seq_length": SEQ_LENGTH},
            "train": {
                "steps": steps, "output_dir": str(folder / name), "lr_schedule": "constant",
                "eval_samples": ROWS, "tensorboard": False, "log_interval": 1000,
                "checkpoint_interval": 0,
            },
            **sections,
        }  # fmt: skip
        return RunConfig.from_dict(values, source=name)

    small = prepare(config("teacher", TEACHER, 1), str(deepspeed_config))
    train(small)
    steps = WARM_UP + rounds + 1  # the last step would be followed by a checkpoint
    taught = {
        "teacher": {"checkpoint": str(folder / "teacher")},
        "salt": {"kd_steps": steps, "kd_weight": KD_WEIGHT},
    }
    runs = {
        "kd": Run(config("kd", STUDENT, steps, **taught), small.settings, small.groups),
        "lm": Run(config("lm", STUDENT, steps), small.settings, small.groups),
    }
    for run in runs.values():
        stack.enter_context(run.student.watchdog.watched())
        stack.callback(run.finish)
    return runs


def our_step(run: Run, step: int) -> float:
    """Returns the loss."""
    run.step(step)
    lines = (run.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[-1])
    assert record["step"] == step + 1
    return float(record["loss"])


# --- theirs --------------------------------------------------------------------------------------


def llama(model: ModelConfig, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """transformers' model with our weights: a copy."""
    groups, size = model.query_groups, model.head_size
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=model.hidden_size,
            intermediate_size=model.ffn_size, num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads, num_key_value_heads=groups,
            head_dim=size, max_position_embeddings=SEQ_LENGTH,
            rms_norm_eps=model.layernorm_epsilon, use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
            attn_implementation="sdpa",
        )
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": weights[EMBEDDING],
        "lm_head.weight": weights[OUTPUT_LAYER],
        "model.norm.weight": weights["final_layernorm.weight"],
    }
    for index in range(model.num_layers):
        prefix, name = f"model.layers.{index}.", f"layers.{index}."
        # Of each query group its queries, its key, its value.
        qkv = weights[name + "self_attention.linear_qkv.weight"].unflatten(0, (groups, -1))
        of_group = model.num_attention_heads // groups * size
        query, key, value = (x.flatten(0, 1) for x in qkv.split([of_group, size, size], dim=1))
        gate, up = weights[name + "mlp.linear_fc1.weight"].chunk(2)
        state |= {
            prefix + "self_attn.q_proj.weight": query,
            prefix + "self_attn.k_proj.weight": key,
            prefix + "self_attn.v_proj.weight": value,
            prefix + "self_attn.o_proj.weight": weights[name + "self_attention.linear_proj.weight"],
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": weights[name + "mlp.linear_fc2.weight"],
            prefix + "input_layernorm.weight": weights[name + "input_layernorm.weight"],
            prefix + "post_attention_layernorm.weight": weights[name + "pre_mlp_layernorm.weight"],
        }
    theirs.load_state_dict(state)
    return theirs


def weights_of(module: nn.Module, head: Tensor | None = None) -> dict[str, Tensor]:
    weights = {name: weight.detach() for name, weight in canonical_parameters(module).items()}
    return weights if head is None else {**weights, OUTPUT_LAYER: head}


class PlainLoop:
    """The loop that one would write with transformers, on the weights that a run starts from."""

    def __init__(self, run: Run, fused: bool) -> None:
        self.student = llama(run.config.model, weights_of(run.student.module)).train()
        self.teacher: LlamaForCausalLM | None = None
        if run.teacher is not None:
            weights = weights_of(run.teacher.model.layers, run.teacher.head_WE)
            self.teacher = llama(run.teacher.manifest.model.config, weights).eval()
        matrices = [weight for weight in self.student.parameters() if weight.dim() >= 2]
        vectors = [weight for weight in self.student.parameters() if weight.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            **ADAMW, fused=fused or None,
        )  # fmt: skip
        self.num_micro_batches = run.settings.num_micro_batches

    def step(self, batch: Batch) -> float:
        """Returns the loss."""
        total = 0.0
        for tokens_BS, labels_BS in zip(
            batch.tokens_RS.chunk(self.num_micro_batches),
            batch.labels_RS.chunk(self.num_micro_batches),
            strict=True,
        ):
            loss = self.loss(tokens_BS, labels_BS) / self.num_micro_batches
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        student_logits_TV = self.student(tokens_BS).logits.flatten(0, 1)
        ce = F.cross_entropy(student_logits_TV, labels_BS.flatten())
        if self.teacher is None:
            return ce
        with torch.no_grad():
            teacher_logits_TV = self.teacher(tokens_BS).logits.flatten(0, 1)
        kl = F.kl_div(
            F.log_softmax(student_logits_TV, dim=-1),
            F.softmax(teacher_logits_TV, dim=-1),
            reduction="batchmean",
        )
        return (1 - KD_WEIGHT) * ce + KD_WEIGHT * kl


# --- the race ------------------------------------------------------------------------------------


def race(runs: dict[str, Run], plain: dict[str, PlainLoop], rounds: int) -> dict[str, Any]:
    largest = 0.0
    names = [f"{kind}_{who}" for kind in runs for who in ("ours", "theirs")]
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    seconds = {clock: {name: list[float]() for name in names} for clock in clocks}
    for step in range(WARM_UP + rounds):
        losses: dict[str, float] = {}
        steps: dict[str, Callable[[], float]] = {}
        for kind, run in runs.items():
            batch = run.batches.peek(step)
            assert bool(batch.mask_RS.all()), "the plain loop counts every token"
            steps[f"{kind}_ours"] = lambda run=run, step=step: our_step(run, step)
            steps[f"{kind}_theirs"] = lambda kind=kind, batch=batch: plain[kind].step(batch)
        for name in names[step % len(names) :] + names[: step % len(names)]:
            started = {clock: now() for clock, now in clocks.items()}
            losses[name] = steps[name]()
            if step >= WARM_UP:
                for clock, now in clocks.items():
                    seconds[clock][name].append(now() - started[clock])
        for kind in runs:
            ours, theirs = losses[f"{kind}_ours"], losses[f"{kind}_theirs"]
            largest = max(largest, abs(ours - theirs) / theirs)
            if largest > LARGEST_DIFFERENCE:
                raise SystemExit(f"step {step}, {kind}: our loss is {ours}, theirs {theirs}")
        print(f"step {step}: losses {losses}", flush=True)
    return {
        "largest_relative_difference_of_losses": largest,
        **{f"by_{clock}_time": summary(seconds[clock], list(runs)) for clock in clocks},
    }


def summary(seconds: dict[str, list[float]], kinds: list[str]) -> dict[str, Any]:
    return {
        "ours_over_theirs": {k: ratio(seconds, f"{k}_ours", f"{k}_theirs") for k in kinds},
        "kd_over_lm": {who: ratio(seconds, f"kd_{who}", f"lm_{who}") for who in ("ours", "theirs")},
        "seconds": {name: quartiles(each) for name, each in seconds.items()},
        "seconds_by_round": {name: [round(x, 3) for x in each] for name, each in seconds.items()},
    }


def ratio(seconds: dict[str, list[float]], of: str, over: str) -> dict[str, float]:
    return quartiles([a / b for a, b in zip(seconds[of], seconds[over], strict=True)])


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = (round(x, 4) for x in statistics.quantiles(values, n=4, method="inclusive"))
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


if __name__ == "__main__":
    main()
