"""What settings must satisfy among each other: every contradiction at once, before torch loads.

Each function yields a line per problem. One that later conditions would stumble over (a size of 0
that something is divided by, NaN that compares with nothing) ends its function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from megatron_salt.config.fields import SECTIONS, ModelConfig, ParallelConfig, RunConfig, SaltConfig
from megatron_salt.config.values import (
    check_split,
    effective_split,
    is_number,
    parse_blend,
    parse_objective,
)

# Settings of the rule that salt.switch = adaptive goes by.
ADAPTIVE_ONLY = ("min_kd_steps", "switch_margin_nats", "switch_better_share", "switch_patience")
ABOVE_0 = ("model.rotary_base", "model.layernorm_epsilon", "model.init_method_std",
           "salt.teacher_temperature", "salt.student_temperature")  # fmt: skip
ROPE_FACTORS = ("factor", "low_freq_factor", "high_freq_factor",
                "original_max_position_embeddings")  # fmt: skip
LONGEST_WAIT_MINUTES = 365 * 24 * 60  # clocks overflow at 292 years, in 64 bits of nanoseconds


def check_config(config: RunConfig) -> None:
    """Raise ValueError if settings contradict each other: a line for each, with the remedy."""
    _refuse(list(problems(config)))


def check_model(model: ModelConfig, seq_length: int) -> None:
    """As `check_config`, of a model by itself."""
    numbers = list(_number_problems("model", model))
    _refuse(numbers or list(model_problems(model, seq_length, ParallelConfig())))


def _refuse(found: list[str]) -> None:
    if len(found) == 1:
        raise ValueError(found[0])
    if found:
        raise ValueError("\n  ".join([f"{len(found)} settings are wrong:", *found]))


def problems(config: RunConfig) -> Iterator[str]:
    """Everything that is wrong with a run's settings; the texts of data are read first."""
    numbers = list(number_problems(config))
    data = numbers or list(data_problems(config))
    yield from data
    if data:
        return
    yield from model_problems(config.model, config.data.seq_length, config.parallel)
    yield from train_problems(config)
    yield from method_problems(config)
    yield from teacher_problems(config)
    yield from truncation_problems(config)
    yield from switch_problems(config)
    yield from tag_problems(config)


def number_problems(config: RunConfig) -> Iterator[str]:
    """What concerns each number by itself."""
    for name in SECTIONS:
        yield from _number_problems(name, getattr(config, name))


def _number_problems(name: str, section: Any) -> Iterator[str]:
    for item in dataclasses.fields(section):
        key, value = f"{name}.{item.name}", getattr(section, item.name)
        numeric = item.type.startswith(("int", "float"))  # annotations are text here
        if numeric and value is not None and not is_number(value):
            yield f"{key} = {value}: must be a finite number"
        elif key in ABOVE_0 and value <= 0:
            yield f"{key} = {value}: must be above 0"
        elif item.name == "timeout_minutes" and not 0.01 <= value <= LONGEST_WAIT_MINUTES:
            yield f"{key} = {value}: must lie between 0.01 and {LONGEST_WAIT_MINUTES}"


def _below(least: Literal[0, 1], config: RunConfig, section: str, *names: str) -> Iterator[str]:
    """The numbers of a section that are below the least that they may be."""
    must = "not be negative" if least == 0 else "be at least 1"
    for name in names:
        value = getattr(getattr(config, section), name)
        if value < least:
            yield f"{section}.{name} = {value}: must {must}"


def data_problems(config: RunConfig) -> Iterator[str]:
    """What concerns the data by itself: prefixes, split, objectives and their spans."""
    data = config.data
    yield from _below(1, config, "data", "seq_length")
    if not data.train_data_path:
        yield "data.train_data_path is empty: give at least one prefix"
    else:
        yield from _error_of(parse_blend, data.train_data_path, "data.train_data_path")
    yield from _error_of(check_split, effective_split(data))
    yield from _error_of(parse_objective, data.objective)
    if not 0.0 < data.span_corruption_rate < 1.0:
        yield f"data.span_corruption_rate = {data.span_corruption_rate}: must lie between 0 and 1"
    yield from _below(1, config, "data", "span_mean_length")
    # A token that stays, one that goes, and three sentinels.
    if "span_corruption" in data.objective and 0 < data.seq_length < 4:
        yield f"data.seq_length = {data.seq_length} has no room for span_corruption: use at least 4"


def _error_of(read: Callable[..., object], *arguments: object) -> Iterator[str]:
    """The message with which a reader refuses its arguments, if it does."""
    try:
        read(*arguments)
    except ValueError as error:
        yield str(error)


def model_problems(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> Iterator[str]:
    """What concerns shapes and their division over ranks."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sizes = f"parallel: tensor_model_parallel_size = {tp}, pipeline_model_parallel_size = {pp}"
    too_small = [] if tp >= 1 and pp >= 1 else [f"{sizes}: must be at least 1"]
    settings = {"ffn_hidden_size": "ffn_size", "kv_channels": "head_size"}  # null: of the others
    for name in ("num_layers", "hidden_size", "num_attention_heads", *settings):
        if name != "kv_channels" or not too_small:  # a quotient of the others
            value = getattr(model, settings.get(name, name))
            if value <= 0:
                too_small.append(f"model.{name} = {value}: must be at least 1")
    if too_small:
        yield from too_small
        return
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size = {model.hidden_size} is not a multiple of num_attention_heads = "
            f"{model.num_attention_heads}; set model.kv_channels or change one of them"
        )
    if model.num_attention_heads % model.query_groups:
        yield (
            f"model.num_attention_heads = {model.num_attention_heads} is not a multiple of "
            f"num_query_groups = {model.query_groups}: change one of them"
        )
    for uneven in indivisible_sizes(model, tp):
        yield f"model.{uneven}: change one of them"
    if pp > model.num_layers:
        yield (
            f"parallel.pipeline_model_parallel_size = {pp} exceeds model.num_layers = "
            f"{model.num_layers}: every stage needs a layer"
        )
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1"
    if parallel.sequence_parallel and seq_length % tp:
        yield (
            f"parallel.sequence_parallel: data.seq_length = {seq_length} is not divisible by tp "
            f"{tp}"
        )
    if model.add_qkv_bias and model.add_bias_linear:
        yield "model.add_qkv_bias has no effect with model.add_bias_linear: leave one of them out"
    yield from rotary_problems(model)
    if model.position_embedding_type == "rope":
        return
    if model.max_position_embeddings and model.max_position_embeddings < seq_length:
        yield (
            f"model.max_position_embeddings = {model.max_position_embeddings} is below "
            f"data.seq_length = {seq_length}"
        )


def rotary_problems(model: ModelConfig) -> Iterator[str]:
    """What concerns rotary embeddings: which channels turn, and how fast."""
    scaling = model.rope_scaling
    if model.position_embedding_type != "rope":
        for name, is_set in (
            ("rotary_percent", model.rotary_percent != 1),
            ("rope_scaling", scaling),
        ):
            if is_set:
                yield f"model.{name} has no effect without rope: remove it"
        return
    if not 0.0 < model.rotary_percent <= 1.0:
        yield f"model.rotary_percent = {model.rotary_percent}: must be above 0, at most 1"
    elif (turned := int(model.head_size * model.rotary_percent)) % 2 or not turned:
        yield (
            f"model: rotary embeddings turn pairs of channels, not {turned} (rotary_percent = "
            f"{model.rotary_percent} of a head size of {model.head_size})"
        )
    if scaling is None:
        return
    if set(scaling) not in ({ROPE_FACTORS[0]}, set(ROPE_FACTORS)):
        allowed = ", ".join(ROPE_FACTORS)
        yield f"model.rope_scaling has {', '.join(scaling)}: give factor alone, or {allowed}"
    elif not all(is_number(value) and value > 0 for value in scaling.values()):
        yield f"model.rope_scaling = {scaling}: must be numbers above 0"
    elif len(scaling) > 1 and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        yield f"model.rope_scaling = {scaling}: high_freq_factor must be above low_freq_factor"


def indivisible_sizes(model: ModelConfig, tp_size: int) -> Iterator[str]:
    """What of a layer cannot be shared evenly by tensor-parallel ranks."""
    shared = {"num_attention_heads": model.num_attention_heads, "ffn_hidden_size": model.ffn_size,
              "num_query_groups": model.num_query_groups or 0}  # fmt: skip
    for name, value in shared.items():
        if value % tp_size:
            size = f"parallel.tensor_model_parallel_size = {tp_size}"
            yield f"{name} = {value} is not divisible by {size}"


def spreading_problems(teacher: ModelConfig, tp_size: int) -> Iterator[str]:
    """What keeps a teacher from being spread over ranks; for once it is known."""
    for uneven in indivisible_sizes(teacher, tp_size):
        yield (
            f"the teacher's {uneven}: set teacher.tensor_parallel to false, or choose another "
            "teacher or size"
        )


def train_problems(config: RunConfig) -> Iterator[str]:
    """What concerns the run's length, learning rate and intervals."""
    train = config.train
    yield from _below(1, config, "train", "steps")
    if train.seed >= 2**32:
        yield f"train.seed = {train.seed}: must be below 2**32"
    if train.lr_warmup_steps > train.steps:
        yield f"train.lr_warmup_steps = {train.lr_warmup_steps} exceeds train.steps = {train.steps}"
    yield from _below(0, config, "train", "eval_interval", "checkpoint_interval",
                      "keep_checkpoints", "lr_warmup_steps", "seed")  # fmt: skip
    if train.lr_decay_steps is not None and train.lr_decay_steps <= 0:
        yield f"train.lr_decay_steps = {train.lr_decay_steps}: must be at least 1, or null"
    if not 0.0 <= train.min_lr_ratio <= 1.0:
        yield f"train.min_lr_ratio = {train.min_lr_ratio}: must be in [0, 1]"
    yield from _below(1, config, "train", "eval_samples", "log_interval", "cache_logits_top_k")
    if not train.cache_logits:
        return
    if not config.data.windows or config.salt.selection:
        yield (
            f"train.cache_logits = {train.cache_logits}: logits are stored by window: set "
            "data.windows true, and leave salt.selection out"
        )
    if set(parse_objective(config.data.objective)) != {"causal"}:
        yield (
            f"train.cache_logits = {train.cache_logits}: logits are stored of causal rows only, "
            f"data.objective = {list(config.data.objective)}"
        )


def method_problems(config: RunConfig) -> Iterator[str]:
    """What concerns the KD phase: its length, the weight w and the loss."""
    salt, train = config.salt, config.train
    if not 0 <= salt.kd_steps <= train.steps:
        yield f"salt.kd_steps = {salt.kd_steps}: must lie between 0 and train.steps = {train.steps}"
    if not 0.0 <= salt.kd_weight <= 1.0:
        yield f"salt.kd_weight = {salt.kd_weight}: must be in [0, 1]"
    yield from _below(1, config, "salt", "loss_chunk_mib")
    if salt.divergence != "forward_kl" and salt.loss_impl not in ("auto", "reference"):
        yield (
            f"salt.divergence = {salt.divergence} is computed by the reference only, not by "
            f"salt.loss_impl = {salt.loss_impl}: choose auto"
        )
    yield from _below(0, config, "salt", "transition_steps", "warmup_steps", "inheritance_slope")
    window = salt.transition_steps + (salt.warmup_steps if salt.transition == "wsd" else 0)
    if window > salt.kd_steps:
        yield (
            f"salt.transition_steps and warmup_steps ({window} together) exceed "
            f"salt.kd_steps = {salt.kd_steps}: the window lies inside the KD phase"
        )
    needs_window = salt.transition in ("linear_decay", "linear_ratio_decay")
    if needs_window and salt.kd_steps > 0 and salt.transition_steps <= 0:
        yield f"salt.transition = {salt.transition} needs salt.transition_steps > 0"
    windowed = ("linear_decay", "linear_ratio_decay", "wsd")
    no_effect = f"has no effect with salt.transition = {salt.transition}; remove it or choose"
    if salt.transition_steps != 0 and salt.transition not in windowed:
        yield f"salt.transition_steps = {salt.transition_steps} {no_effect} one of {list(windowed)}"
    if salt.warmup_steps != 0 and salt.transition != "wsd":
        yield f"salt.warmup_steps = {salt.warmup_steps} {no_effect} wsd"
    if salt.transition == "linear_ratio_decay" and salt.kd_weight >= 1.0:
        yield (
            "salt.transition = linear_ratio_decay: the ratio w/(1-w) is infinite at kd_weight 1; "
            "choose a kd_weight below 1 or linear_decay"
        )


def teacher_problems(config: RunConfig) -> Iterator[str]:
    """What concerns the teacher: whether there is one to teach, and its place in a step."""
    salt, teacher = config.salt, config.teacher
    if salt.kd_steps != 0 and teacher.kind is None and salt.kd_weight != 0.0:
        yield (
            f"salt.kd_steps = {salt.kd_steps} but teacher.checkpoint is not set: name the "
            "teacher's checkpoint (or its folder in teacher.hf, or its stored logits in "
            "teacher.logits), set salt.kd_steps to 0 for plain training, or salt.kd_weight to 0 "
            "for a KD phase that only selects data"
        )
    given = {name: getattr(teacher, name) for name in ("checkpoint", "hf", "logits")}
    named = [f"teacher.{name} = {value}" for name, value in given.items() if value]
    if len(named) > 1:
        yield f"{' and '.join(named)}: there is one teacher, leave one out"
    if named and salt.kd_steps <= 0:
        yield (
            f"{named[0]} would never teach, salt.kd_steps is 0: set salt.kd_steps, or leave the "
            "teacher out"
        )
    if teacher.tensor_parallel and teacher.checkpoint is None:
        yield (
            "teacher.tensor_parallel has no effect without teacher.checkpoint (a teacher.hf is "
            "whole on every rank): leave it out, or convert the model"
        )
    if teacher.tensor_parallel and config.parallel.tensor_model_parallel_size == 1:
        yield (
            "teacher.tensor_parallel has no effect with parallel.tensor_model_parallel_size = 1: "
            "raise that size, or leave it out"
        )
    causal = set(parse_objective(config.data.objective)) == {"causal"}
    if not causal and (teacher.hf is not None or teacher.logits):
        which = "a teacher.hf reads" if teacher.hf else "teacher.logits are of"
        yield (
            f"data.objective = {list(config.data.objective)}: {which} causal rows only; "
            "give the model as teacher.checkpoint, or choose causal"
        )
    if teacher.logits and teacher.placement != "auto":
        yield f"teacher.placement = {teacher.placement} has no effect with teacher.logits"
    chunks = teacher.forward_chunks
    if chunks is not None and chunks <= 0:
        yield f"teacher.forward_chunks = {chunks}: must be at least 1, or null"
    if chunks is not None and chunks > 1 and teacher.kind in ("hf", "logits"):
        yield (
            f"teacher.forward_chunks = {chunks} has no effect with teacher.{teacher.kind}, which "
            "is read as a whole: leave it out"
        )
    if chunks is not None and teacher.placement == "before_step":
        yield (
            f"teacher.forward_chunks = {chunks} has no effect with teacher.placement = before_step"
        )
    if teacher.placement == "bubble" and config.parallel.pipeline_model_parallel_size == 1:
        yield (
            "teacher.placement = bubble: one stage has no waits to work in; choose auto or "
            "before_step"
        )


def truncation_problems(config: RunConfig) -> Iterator[str]:
    """What concerns a teacher of whose distribution only some tokens are known."""
    salt, stored = config.salt, config.teacher.kind == "logits"
    cut = {name: getattr(salt, name) for name in ("truncate_k", "truncate_p")}
    for name, value in cut.items():
        if value is not None and config.teacher.kind is None:
            yield f"salt.{name} = {value} has no effect without a teacher: remove it"
    if salt.truncate_k is not None and salt.truncate_k < 1:
        yield f"salt.truncate_k = {salt.truncate_k}: must be at least 1, or null"
    if salt.truncate_p is not None and not 0.0 < salt.truncate_p <= 1.0:
        yield f"salt.truncate_p = {salt.truncate_p}: must be above 0, at most 1, or null"
    if salt.truncate_p is not None and salt.truncate_k is None and not stored:
        yield (
            f"salt.truncate_p = {salt.truncate_p} needs salt.truncate_k, the most tokens that a "
            "position may be left with (the paper's: 0.95 and 50)"
        )
    sparse = stored or salt.truncate_k is not None
    if salt.lost_mass != "renormalise" and not sparse:
        yield f"salt.lost_mass = {salt.lost_mass} has no effect: nothing is cut off; remove it"
    if salt.lost_mass != "renormalise" and salt.teacher_temperature != 1.0:
        yield (
            f"salt.lost_mass = {salt.lost_mass} with salt.teacher_temperature = "
            f"{salt.teacher_temperature}: how probable the tokens that are cut off are at another "
            "temperature is not known; choose renormalise, or temperature 1"
        )
    if sparse and salt.divergence not in ("forward_kl", "mse_probabilities"):
        yield (
            f"salt.divergence = {salt.divergence} asks for the teacher's probability of every "
            "token, and only some are known: choose forward_kl or mse_probabilities, or teach "
            "without truncation"
        )
    if salt.lost_mass == "ghost" and salt.divergence == "mse_probabilities":
        yield "salt.lost_mass = ghost has no bucket with salt.divergence = mse_probabilities"


def switch_problems(config: RunConfig) -> Iterator[str]:
    """What concerns the end of the KD phase."""
    salt, train = config.salt, config.train
    if salt.switch == "fixed":
        for item in dataclasses.fields(SaltConfig):
            value = getattr(salt, item.name)
            if item.name in ADAPTIVE_ONLY and value != item.default:
                yield (
                    f"salt.{item.name} = {value} has no effect with salt.switch = fixed: remove "
                    "it, or choose adaptive"
                )
        return
    adaptive = "salt.switch = adaptive"
    if salt.kd_steps <= 0 or salt.kd_weight <= 0 or config.teacher.kind is None:
        yield (
            f"{adaptive} asks when the teacher stops helping, but there is no teacher that "
            "teaches: set teacher.checkpoint, hf or logits, salt.kd_steps and salt.kd_weight "
            "above 0, or choose fixed"
        )
        return
    if salt.transition == "constant":
        yield (
            f"{adaptive}: salt.transition = constant means a teacher for the whole run; choose "
            "step, which has the same w, or switch fixed"
        )
    if salt.transition == "knowledge_inheritance":
        yield (
            f"{adaptive}: w of salt.transition = knowledge_inheritance is a function of step / "
            "kd_steps, and would jump when the end is decided; choose linear_decay, or switch fixed"
        )
    if not 0.0 <= salt.switch_better_share < 1.0:
        yield (
            f"salt.switch_better_share = {salt.switch_better_share}: must be at least 0 and below "
            "1, where the teacher would never help"
        )
    yield from _below(0, config, "salt", "min_kd_steps")
    yield from _below(1, config, "salt", "switch_patience")
    if salt.switch_patience < 1:
        return
    if train.eval_interval <= 0:
        yield (
            f"{adaptive} decides at evaluations, and train.eval_interval is 0: set it, or choose "
            "fixed"
        )
    else:
        decides = max(salt.switch_patience * train.eval_interval, salt.warmup_steps)
        earliest = max(salt.min_kd_steps, decides + salt.transition_steps)
        if earliest >= salt.kd_steps:
            yield (
                f"{adaptive} could not end the KD phase before step {earliest} "
                "(salt.min_kd_steps; or salt.switch_patience evaluations, train.eval_interval "
                "apart, and salt.transition_steps), and it ends at salt.kd_steps = "
                f"{salt.kd_steps} anyway: lower one of these, raise kd_steps, or choose fixed"
            )


def tag_problems(config: RunConfig) -> Iterator[str]:
    """What concerns tags, selection and the routing of tokens."""
    salt, data = config.salt, config.data
    num_datasets = len(parse_blend(data.train_data_path, "data.train_data_path")[0])
    for name, paths in (
        ("data.tags", data.tags), ("salt.selection", salt.selection),
        ("teacher.logits", config.teacher.logits),
        ("train.cache_logits", config.train.cache_logits),
    ):  # fmt: skip
        if paths and len(paths) != num_datasets:
            yield (
                f"{name} names {len(paths)}, data.train_data_path {num_datasets} datasets: give "
                "one for each, in the same order"
            )
    if data.tags and "span_corruption" in parse_objective(data.objective):
        yield (
            "data.tags: span_corruption in data.objective moves tokens to other positions, where "
            "their tags would be another token's; leave one of the two out (salt.selection works "
            "with both)"
        )
    used = {
        "data.tags": bool(data.tags),
        "salt.selection": bool(salt.selection),
        f"salt.kd_tokens = {salt.kd_tokens}": salt.kd_tokens != "all",
        f"salt.ce_tokens = {salt.ce_tokens}": salt.ce_tokens != "all",
    }
    for name in (name for name, is_used in used.items() if is_used and salt.kd_steps <= 0):
        yield (
            f"{name} has no effect without a KD phase: set salt.kd_steps (with salt.kd_weight 0 "
            "there is selection without a teacher)"
        )
    for name in ("kd_tokens", "ce_tokens"):
        if "tagged" in getattr(salt, name) and not data.tags:
            yield f"salt.{name} = {getattr(salt, name)} needs data.tags"
    if salt.kd_tokens != "all" and salt.kd_weight <= 0:
        yield f"salt.kd_tokens = {salt.kd_tokens} has no effect at salt.kd_weight 0"
    if salt.ce_tokens == "excess_loss" and not data.tags and config.teacher.kind is None:
        yield (
            "salt.ce_tokens = excess_loss compares with a reference loss: set teacher.checkpoint, "
            "or data.tags made with --store loss"
        )
    for share, route, needing in (
        ("kd_token_share", salt.kd_tokens, ("low_entropy", "high_entropy")),
        ("ce_token_share", salt.ce_tokens, ("excess_loss",)),
    ):
        value = getattr(salt, share)
        if not 0.0 < value <= 1.0:
            yield f"salt.{share} = {value}: must be above 0, at most 1"
        elif value != 1.0 and route not in needing:
            yield f"salt.{share} = {value} has no effect; it belongs to {' and '.join(needing)}"
        elif value == 1.0 and route in needing:
            yield f"salt.{share} is 1: {route} would take every token; set it below 1"
