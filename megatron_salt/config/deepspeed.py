"""Reading the DeepSpeed JSON: the only owner of batch sizes, precision, optimiser, ZeRO, clipping.

The file stays DeepSpeed's. Here it is checked (unknown keys, features this trainer does not drive,
contradictions with the run's own config) and the few numbers that the trainer needs are read out.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_salt.config.fields import ParallelConfig, RunConfig
from megatron_salt.config.values import is_number, nearest

# Top-level keys of DeepSpeed's documentation that mean here what they mean there.
KNOWN_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "optimizer", "fp16", "bf16", "zero_optimization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "gradient_clipping", "prescale_gradients",
    "gradient_predivide_factor", "communication_data_type", "data_types", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "pipeline", "aio", "timers", "log_level", "disable_allgather",
    "disable_python_gc", "compile",
)  # fmt: skip

# Those of them that are read here and hold keys of their own.
SECTION_KEYS = ("optimizer", "fp16", "bf16", "zero_optimization", "data_types", "pipeline",
                "timers")  # fmt: skip

# The least and the most that a key may be, where DeepSpeed or PyTorch take anything in silence,
# read true as 1, or refuse without naming the file. Whole numbers where the least is an integer.
NUMBERS: dict[str, tuple[float, float]] = {
    "gradient_clipping": (0.0, math.inf),
    "gradient_predivide_factor": (sys.float_info.min, math.inf),
    **{f"optimizer.params.{key}": (0.0, math.inf)
       for key in ("lr", "weight_decay", "eps", "momentum")},
    "fp16.loss_scale": (0.0, math.inf),
    "fp16.initial_scale_power": (0, 127),  # 2^127 is the largest that fp32 holds
    # DeepSpeed counts hysteresis down to 1 before it lowers the scale: from 0 it never does.
    **{f"fp16.{key}": (1, math.inf)
       for key in ("loss_scale_window", "hysteresis", "min_loss_scale")},
    "zero_optimization.stage": (0, 3),
    "zero_optimization.reduce_bucket_size": (1, math.inf),
    "zero_optimization.allgather_bucket_size": (1, math.inf),
    **{f"zero_optimization.{key}": (0, math.inf)
       for key in ("sub_group_size", "stage3_prefetch_bucket_size", "stage3_max_reuse_distance",
                   "stage3_max_live_parameters", "stage3_param_persistence_threshold",
                   "stage3_model_persistence_threshold")},
}  # fmt: skip

# Keys that DeepSpeed knows but that would fight with this trainer, with what to do instead.
REFUSED_KEYS = {
    **dict.fromkeys(
        ("checkpoint", "nebula", "datastates_ckpt"),
        "checkpoints are not DeepSpeed's: see train.checkpoint_interval and train.async_save",
    ),
    "scheduler": "the learning rate is train.lr_schedule of the run's config; remove the section",
    "activation_checkpointing": "use parallel.recompute_granularity of the run's config",
    "curriculum_learning": "the order of the data is a pure function of seed and step",
    "data_efficiency": "the order of the data is a pure function of seed and step",
    "tensor_parallel": "use parallel.tensor_model_parallel_size of the run's config",
    "sequence_parallel_size": "use parallel.sequence_parallel of the run's config",
    "tensorboard": "set train.tensorboard in the run's config",
    "wandb": "metrics are written to metrics.jsonl and TensorBoard",
    "csv_monitor": "metrics are written to metrics.jsonl and TensorBoard",
    "amp": "use the bf16 or fp16 section",
    "torch_autocast": "use the bf16 or fp16 section",
    "elasticity": "not supported: batch sizes would change under the schedule",
    **dict.fromkeys(
        ("sparse_attention", "progressive_layer_drop", "eigenvalue", "compression_training",
         "hybrid_engine"), "not supported by this trainer",
    ),
}  # fmt: skip

# Old words of the zero_optimization section, which DeepSpeed still turns into these.
OLD_ZERO_KEYS = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory in offload_optimizer",
}
PRECISIONS = ("fp32", "bf16", "fp16")
# Element by element: their state can be cut anywhere, and so resumed at another layout.
OPTIMIZERS = ("adam", "adamw", "adagrad", "lion", "sgd")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """What the trainer reads out of the JSON, for a given data-parallel size."""

    path: str
    values: Mapping[str, Any]
    micro_batch_size: int
    """B, sequences in one micro-batch of one data-parallel rank."""
    num_micro_batches: int
    """M, micro-batches per step and data-parallel rank (gradient accumulation steps)."""
    global_batch_size: int
    """Sequences per step over all ranks: B * M * data-parallel size."""
    precision: str
    """fp32, bf16 or fp16."""
    zero_stage: int
    learning_rate: float
    """Peak of the learning-rate schedule."""

    @property
    def data_parallel_size(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.num_micro_batches)

    @property
    def lets_deepspeed_speak(self) -> bool:
        """Whether a key asks for lines of DeepSpeed's log, which else shows warnings alone."""
        keys = ("steps_per_print", "memory_breakdown", "dump_state")
        sections = (self.values.get(key) or {} for key in ("comms_logger", "flops_profiler"))
        asked = [*map(self.values.get, keys), *(section.get("enabled") for section in sections)]
        return any(asked) or logging.getLogger().isEnabledFor(logging.DEBUG)

    @property
    def accumulation(self) -> str:
        """Dtype in which gradients of micro-batches are added up: fp32, bf16 or fp16."""
        return str(self.values.get("data_types", {}).get("grad_accum_dtype") or self.precision)

    @property
    def offloads_optimizer(self) -> bool:
        offload = self.values.get("zero_optimization", {}).get("offload_optimizer") or {}
        return self.zero_stage > 0 and offload.get("device", "none") != "none"

    @property
    def uses_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed takes `BF16_Optimizer`.

        Source: `DeepSpeedEngine._do_optimizer_sanity_check`.
        """
        fp32_sums = self.precision == "bf16" and self.accumulation == "fp32"
        return fp32_sums and self.zero_stage == 1 and not self.offloads_optimizer

    @property
    def keeps_whole_sums(self) -> bool:
        """Whether each rank has its whole sum over micro-batches until the update. ZeRO 2 and 3
        give parts away, and DeepSpeed's other ZeRO 1 may reduce them during the backward."""
        return self.uses_bf16_optimizer or (self.precision == "fp32" and self.zero_stage == 0)


def read_json(path: str) -> dict[str, Any]:
    """Parse the JSON file.

    Raises: ValueError naming the file, for a missing or broken file and for unknown keys.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--deepspeed_config {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8; thousands of digits, or of brackets
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    for key in values:
        if key in REFUSED_KEYS:
            raise ValueError(f"{path}: key {key!r} is not used here: {REFUSED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            raise ValueError(f"{path}: unknown key {key!r}.{nearest(key, KNOWN_KEYS)}")
        if key in SECTION_KEYS and not isinstance(values[key], Mapping):
            raise ValueError(f"{path}: {key} = {values[key]!r}: expected an object, as {{…}}")
    for key, value in _dotted(values):
        if value == "auto":
            raise ValueError(f"{path}: '{key}' is \"auto\", which only Hugging Face's "
                             "Trainer fills in: write the number")  # fmt: skip
    return values


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value, by its dotted key; what an object holds after the object."""
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _dotted(value, prefix=f"{prefix}{key}.")


def _expected(key: str, value: Any) -> str | None:
    """What the key must be instead of `value`; None where it may be that."""
    if key in NUMBERS:
        least, most = NUMBERS[key]
        whole = isinstance(least, int)
        if is_number(value) and least <= value <= most and (value % 1 == 0 or not whole):
            return None
        kind = "a whole number" if whole else "a finite number"
        return f"{kind} of at least {least:g}" + (f" and at most {most}" if most < math.inf else "")
    items = value if isinstance(value, list) else [value]
    if key == "optimizer.params.betas":
        fits = len(items) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in items)
        return None if fits else "two numbers, each at least 0 and below 1"
    if key in ("fp16.enabled", "bf16.enabled"):
        return None if isinstance(value, bool) else "true or false"
    # Python reads Infinity, NaN and 1e999, which are not JSON's.
    fits = all(is_number(item) for item in items if type(item) in (int, float))
    return None if fits else "finite"


def positive_int(values: Mapping[str, Any], key: str, path: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {key} = {value!r}: must be a whole number of at least 1")
    return value


def resolve_batch_sizes(
    values: Mapping[str, Any], data_parallel_size: int, path: str
) -> tuple[int, int, int]:
    """Micro-batch size B, micro-batches M and global batch size, from any two of the three keys.

    Raises: ValueError naming the file, the three keys and their values if they do not fit.
    """
    total = positive_int(values, "train_batch_size", path)
    micro = positive_int(values, "train_micro_batch_size_per_gpu", path)
    steps = positive_int(values, "gradient_accumulation_steps", path)
    dp = data_parallel_size
    if micro is None and total is None:
        raise ValueError(f"{path}: give train_batch_size or train_micro_batch_size_per_gpu")
    if micro is None:
        assert total is not None
        steps = steps or 1
        micro = total // (dp * steps)
    elif steps is None:
        steps = 1 if total is None else total // (micro * dp)
    product = micro * steps * dp
    if product < 1 or (total is not None and product != total):
        keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        given = [f"{key} = {values[key]} * " for key in keys if values.get(key) is not None]
        product_of = "" if len(given) == 2 else "a multiple of "
        raise ValueError(
            f"{path}: train_batch_size = {total} is not {product_of}{''.join(given)}data-parallel "
            f"size {dp}; change one of them or the number of ranks"
        )
    return micro, steps, product


def load_deepspeed_config(path: str, data_parallel_size: int) -> DeepSpeedSettings:
    """Read and check the JSON on its own.

    Raises: ValueError naming the file and the key.
    """
    values = read_json(path)
    for key, value in _dotted(values):
        if (expected := _expected(key, value)) is not None:
            raise ValueError(f"{path}: {key} = {json.dumps(value)[:40]}: must be {expected}")
    micro, steps, total = resolve_batch_sizes(values, data_parallel_size, path)
    enabled = [name for name in ("bf16", "fp16") if values.get(name, {}).get("enabled")]
    if len(enabled) == 2:
        raise ValueError(f"{path}: bf16 and fp16 are both enabled; disable one")
    precision = enabled[0] if enabled else "fp32"
    for section in ("fp16", "bf16"):
        if values.get(section, {}).get("auto_cast"):
            raise ValueError(f"{path}: {section}.auto_cast would round the loss weights; remove it")
    optimizer = values.get("optimizer", {})
    params = optimizer.get("params")
    for old, new in OLD_ZERO_KEYS.items():
        if old in values.get("zero_optimization", {}):
            raise ValueError(f"{path}: zero_optimization.{old} is now called {new}")
    sums = values.get("data_types", {}).get("grad_accum_dtype", precision)
    if sums not in PRECISIONS:
        raise ValueError(f"{path}: data_types.grad_accum_dtype = {sums!r}: use one of {PRECISIONS}")
    named = isinstance(optimizer.get("type"), str) and isinstance(params, Mapping)
    if not named or "lr" not in params:
        raise ValueError(f'{path}: needs "optimizer": {{"type": "AdamW", "params": {{"lr": …}}}}')
    return DeepSpeedSettings(
        path=path, values=values, micro_batch_size=micro, num_micro_batches=steps,
        global_batch_size=total, precision=precision, learning_rate=float(params["lr"]),
        zero_stage=int(values.get("zero_optimization", {}).get("stage", 0)),
    )  # fmt: skip


def check_against_run(settings: DeepSpeedSettings, config: RunConfig) -> None:
    """Raise ValueError, naming the settings, where the JSON contradicts the run's config."""
    parallel = config.parallel
    path, values, pp = settings.path, settings.values, parallel.pipeline_model_parallel_size
    if pp > 1 and settings.zero_stage > 1:
        raise ValueError(
            f"{path}: zero_optimization.stage = {settings.zero_stage} does not work with "
            f"parallel.pipeline_model_parallel_size = {pp}; use stage 0 or 1, or one stage"
        )
    if settings.precision == "bf16":
        _check_bf16(settings, pp)
    if parallel.gradient_accumulation_fusion and not settings.uses_bf16_optimizer:
        raise ValueError(
            f'{path}: parallel.gradient_accumulation_fusion needs bf16, "zero_optimization": '
            '{"stage": 1} without offload and "data_types": {"grad_accum_dtype": "fp32"}'
        )
    if settings.precision == "fp16" and settings.zero_stage == 0:
        raise ValueError(
            f"{path}: fp16 with ZeRO 0: DeepSpeed would divide the gradients by a loss scale, and "
            'not multiply the loss by it; use "zero_optimization": {"stage": 1}'
        )
    if pp > 1 and values.get("flops_profiler", {}).get("enabled"):
        raise ValueError(
            f"{path}: flops_profiler.enabled: DeepSpeed's profiler does not work with "
            f"parallel.pipeline_model_parallel_size = {pp} (its timers are started twice); profile "
            "with one stage, or see megatron-salt plan and wall_clock_breakdown"
        )
    zero = values.get("zero_optimization", {})
    if zero.get("compute_grad_norm") is False:
        raise ValueError(
            f"{path}: zero_optimization.compute_grad_norm: the run stops by the norm if a gradient "
            "is not finite; remove the key"
        )
    if zero.get("round_robin_gradients") and config.train.check_gradients:
        raise ValueError(
            f"{path}: zero_optimization.round_robin_gradients: DeepSpeed then finds no gradient of "
            "a weight, which train.check_gradients asks for; switch one of them off"
        )
    kind = str(values["optimizer"]["type"])
    if kind.lower() not in OPTIMIZERS:
        raise ValueError(
            f"{path}: optimizer.type = {kind!r}: checkpoints hold optimizers that treat every "
            f"number by itself, at any layout: use one of {', '.join(OPTIMIZERS)}"
        )
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") == "nvme":
            raise ValueError(
                f'{path}: zero_optimization.{section}.device = "nvme": checkpoints hold what is in '
                'memory; use "cpu" or "none"'
            )
    pipeline = values.get("pipeline", {})
    for key in ("pipe_partitioned", "grad_partitioned"):
        if parallel.sequence_parallel and pipeline.get(key):
            raise ValueError(
                f"{path}: pipeline.{key} contradicts parallel.sequence_parallel, which already "
                "shards what stages exchange; remove the key"
            )
    if pipeline.get("activation_checkpoint_interval"):
        raise ValueError(
            f"{path}: pipeline.activation_checkpoint_interval: use parallel.recompute_granularity"
        )


def _check_bf16(settings: DeepSpeedSettings, pp: int) -> None:
    """bf16 only where DeepSpeed can add up the gradients of micro-batches in fp32."""
    if settings.zero_stage == 0:
        raise ValueError(
            f"{settings.path}: bf16 with ZeRO 0 adds up gradients in bf16; "
            'use "zero_optimization": {"stage": 1} and '
            '"data_types": {"grad_accum_dtype": "fp32"}'
        )
    accumulate = settings.values.get("data_types", {}).get("grad_accum_dtype")
    if accumulate == "fp32" or (accumulate is not None and pp == 1):
        return
    if pp > 1 or settings.num_micro_batches > 1:
        raise ValueError(
            f'{settings.path}: bf16 over several micro-batches needs "data_types": '
            '{"grad_accum_dtype": "fp32"}: small gradients are lost when added up in bf16'
            + ("" if pp > 1 else ' (say "bf16" there if that is meant)')
        )


def engine_config(settings: DeepSpeedSettings, parallel: ParallelConfig) -> dict[str, Any]:
    """The dictionary given to `deepspeed.initialize`: the JSON plus what the trainer must fix."""
    values = json.loads(json.dumps(dict(settings.values)))
    values["train_batch_size"] = settings.global_batch_size
    values["train_micro_batch_size_per_gpu"] = settings.micro_batch_size
    values["gradient_accumulation_steps"] = settings.num_micro_batches
    # The trainer prints its own lines; DeepSpeed's are one number and a host sync.
    values.setdefault("steps_per_print", 2**31)
    # Stated, because DeepSpeed's default is not "no clipping" but 1.0.
    clipping = values.setdefault("gradient_clipping", 1.0)
    if settings.precision == "fp32" and settings.zero_stage == 0 and clipping == 0:
        # DeepSpeed computes the gradient norm of this mode only to clip; never reached.
        values["gradient_clipping"] = 1e30
    # DeepSpeed's throughput timer waits for the GPU before and after every micro-batch.
    values.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if settings.uses_bf16_optimizer:
        # Each 16-bit gradient goes as soon as it has been added to its fp32 sum: the same bits, a
        # third less memory for gradients.
        values["bf16"].setdefault("immediate_grad_update", True)
    if parallel.pipeline_model_parallel_size > 1:
        # DeepSpeed's own timers are started twice in a pipeline and die of it; ours are printed.
        values["wall_clock_breakdown"] = False
    if parallel.sequence_parallel:
        # DeepSpeed would send 1/tp of each activation, taking the tp ranks' copies for equal;
        # under sequence parallelism they are different shards already.
        values.setdefault("pipeline", {}).update(pipe_partitioned=False, grad_partitioned=False)
    return values
