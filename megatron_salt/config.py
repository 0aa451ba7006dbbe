"""Every setting of a run: six frozen dataclasses, how they are read, what they must satisfy.

A leaf of the import graph: standard library, yaml and jsonargparse only, so `--help` and a misspelt
key answer in a second. The DeepSpeed JSON, which alone owns batch sizes, precision, optimiser, ZeRO
and clipping, is read in `deepspeed_config.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

Transition = Literal["constant", "step", "linear_decay", "linear_ratio_decay",
                     "knowledge_inheritance", "wsd"]  # fmt: skip


class Word(str):
    """Text, or a number that YAML has already read as one: the weights between data prefixes."""


register_type(Word)

# Settings of the rule that salt.switch = adaptive goes by.
ADAPTIVE_ONLY = ("min_kd_steps", "switch_margin_nats", "switch_better_share", "switch_patience")

ABOVE_0 = ("model.rotary_base", "model.layernorm_epsilon", "model.init_method_std",
           "salt.teacher_temperature", "salt.student_temperature")  # fmt: skip
LONGEST_WAIT_MINUTES = 365 * 24 * 60  # clocks overflow at 292 years, in 64 bits of nanoseconds

# In this order whatever the order in data.objective, which then changes nothing.
OBJECTIVES = ("causal", "prefix", "span_corruption")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer. Names are Megatron's; the vocabulary size comes from the tokenizer."""

    num_layers: int
    """Number of transformer layers."""
    hidden_size: int
    """Width D of the residual stream."""
    num_attention_heads: int
    """Number of query heads H."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); null: one per query head."""
    kv_channels: int | None = None
    """Size of one attention head; null: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; null: 4 * hidden_size."""
    max_position_embeddings: int | None = None
    """Rows of the learned position table; null: data.seq_length. Unused with rope."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """How positions enter: rotary embeddings, or a learned table as in GPT-2."""
    rotary_base: int = 10000
    """Base period of the rotary embeddings."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of normalisation before attention, MLP and output head."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the normalisation."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """MLP activation: gated SwiGLU (Llama) or GELU (GPT)."""
    add_bias_linear: bool = False
    """Biases in the linear layers (GPT style)."""
    untie_embeddings_and_output_weights: bool = True
    """Give the output head a weight of its own instead of the embedding's."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output projections are divided by sqrt(2 L)."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary of each tensor-parallel shard to a multiple of this."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the student is cut over ranks. The data-parallel size is what is left of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages. More than one needs ZeRO stage <= 1 (DeepSpeed's limit)."""
    sequence_parallel: bool = False
    """Shard activations between the tensor-parallel regions along the sequence."""
    recompute_granularity: Literal["none", "full"] = "none"
    """Activation checkpointing: full keeps only each layer's input and recomputes the rest."""
    gradient_accumulation_fusion: bool = False
    """Add the linears' weight gradients up in fp32 within the matrix product (Megatron's), with
    apex or without. For bf16 with ZeRO 1 and fp32 sums. Not tried on a GPU yet."""
    timeout_minutes: float = 30.0
    """A collective that waits longer than this ends the run on every rank; fractions count."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read. Prefixes are Megatron's: the path without .bin/.idx."""

    train_data_path: list[Word] = field(default_factory=list)
    """Training datasets: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX … to blend several."""
    valid_data_path: list[Word] = field(default_factory=list)
    """Held-out datasets, PREFIX …, scored in equal parts; empty: the second part of data.split."""
    split: str = "99,1"
    """Shares of documents for training and held-out when valid_data_path is empty."""
    tokenizer: str | None = None
    """Tokenizer file or directory; null: the copy that preprocess_data.py put beside the data."""
    tags: list[str] = field(default_factory=list)
    """Tags of tools/tag_data.py, one --output-prefix per training dataset, in their order."""
    seq_length: int = 2048
    """Tokens per training sequence (S)."""
    eod_mask_loss: bool = False
    """Give no loss to positions whose input is the end-of-document token."""
    objective: list[Word] = field(default_factory=lambda: [Word("causal")])
    """What rows ask of the model: causal, prefix or span_corruption, or WEIGHT NAME WEIGHT NAME …
    to mix them (UL2). Held-out samples are always causal."""
    span_corruption_rate: float = 0.15
    """Share of a row's tokens that span_corruption replaces by sentinels."""
    span_mean_length: float = 3.0
    """Mean length in tokens of the spans of span_corruption."""
    cache_path: str | None = None
    """Folder for megatron-core's index files; null: train.output_dir/index_cache."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The small language model that teaches."""

    checkpoint: str | None = None
    """A megatron_salt checkpoint (or a run's output_dir: its last one); null: no teacher."""
    max_valid_ce_gap_nats: float = 0.05
    """Refuse a teacher whose held-out CE is further than this from the one stored with it. Checked
    when the held-out samples are the same ones; otherwise both are printed."""
    placement: Literal["auto", "bubble", "before_step"] = "auto"
    """When the teacher works: bubble, on the next batch, where this one's pipeline would wait;
    before_step, on this batch. The numbers are the same. auto: bubble with several stages."""
    forward_chunks: int | None = None
    """Parts, by layers, into which bubble cuts a forward pass of the teacher; null: as many as fit
    well, at least 4."""


@dataclass(frozen=True, kw_only=True)
class SaltConfig:
    """The method: a KD phase of kd_steps, then plain training. See docs/method.md."""

    kd_steps: int = 0
    """Length n_KD of the KD phase in optimiser steps, with the adaptive switch its longest; 0: no
    KD phase."""
    switch: Literal["fixed", "adaptive"] = "fixed"
    """When the KD phase ends: after kd_steps, or once the teacher does not help any more by the
    rule of docs/method.md, then at kd_steps at the latest."""
    min_kd_steps: int = 0
    """Shortest KD phase of the adaptive switch, in optimiser steps."""
    switch_margin_nats: float = 0.0
    """The adaptive switch: the teacher does not help where the student's held-out CE exceeds its
    own by this at most, in nats per token."""
    switch_better_share: float = 0.0
    """The adaptive switch: nor does it where its loss is the smaller one on this share of the
    held-out tokens at most. 0: the CEs alone decide."""
    switch_patience: int = 2
    """The adaptive switch: evaluations in a row that must find so."""
    kd_weight: float = 0.5
    """w in (1-w) CE + w KL at its highest."""
    transition: Transition = "step"
    """How w goes to 0: see megatron_salt/salt.py for the formulas."""
    transition_steps: int = 0
    """Window of linear_decay, linear_ratio_decay and the decay of wsd, inside the KD phase."""
    warmup_steps: int = 0
    """Rise of w from 0, for the wsd transition."""
    inheritance_slope: float = 1.0
    """Slope of knowledge_inheritance: w = max(kd_weight - slope * step / kd_steps, 0)."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits in the KL."""
    student_temperature: float = 1.0
    """Divides the student's logits in the KL (never in the CE). No tau^2 factor is applied."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse"] = "forward_kl"
    """What stands in place of KL(teacher || student). Compiled code computes forward_kl; the others
    are computed by the slower reference."""
    logits_dtype: Literal["fp32", "model"] = "fp32"
    """Precision of the logits: fp32, or the model's (the DeepSpeed JSON's), which is faster and
    rounds away small differences between student and teacher."""
    selection: list[str] = field(default_factory=list)
    """Tables of tools/tag_data.py or select_data.py, one per training dataset: the KD phase reads
    their selected sequences only, the LM phase everything."""
    kd_tokens: Literal["all", "tagged", "untagged", "low_entropy", "high_entropy",
                       "teacher_better"] = "all"  # fmt: skip
    """Tokens that are taught: by the mask of data.tags, by the teacher's entropy (kd_token_share of
    each sequence), or where the teacher's loss is below the student's."""
    kd_token_share: float = 1.0
    """Share of a sequence's tokens taken by low_entropy or high_entropy."""
    untaught_ce: Literal["full", "mixed"] = "full"
    """CE weight of tokens that kd_tokens leaves out: full, 1; mixed, 1 - w as the taught ones."""
    ce_tokens: Literal["all", "tagged", "untagged", "excess_loss"] = "all"
    """Tokens whose CE counts in the KD phase: by the mask, or the ce_token_share of each sequence
    with the largest student loss - reference loss (the teacher's, or that of data.tags)."""
    ce_token_share: float = 1.0
    """Share of a sequence's tokens taken by excess_loss."""
    loss_chunk_mib: int = 1024
    """MiB for what is made for one chunk of tokens, logits and their gradient above all. It decides
    how many tokens are scored at a time."""
    loss_impl: Literal["auto", "reference", "native", "cuda"] = "auto"
    """Code of the loss: auto takes the compiled one of the device. See python -m
    megatron_salt.kernels."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: length, learning-rate shape, evaluation, checkpoints, output."""

    steps: int
    """Optimiser steps of the whole run, both phases."""
    output_dir: str
    """Metrics, TensorBoard files and checkpoints go here."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape of the learning rate; its peak is the optimizer's lr in the DeepSpeed JSON."""
    lr_warmup_steps: int = 0
    """Linear warm-up from 0 to the peak."""
    lr_decay_steps: int | None = None
    """Length of the decay: for cosine null means to train.steps, for wsd 10 % of train.steps."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    log_interval: int = 10
    """Steps between console lines; metrics.jsonl has every step."""
    eval_interval: int = 0
    """Steps between evaluations on held-out data; 0: only after the last step."""
    eval_samples: int = 256
    """Held-out sequences per evaluation (at most what the held-out data has)."""
    checkpoint_interval: int = 0
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep; 0: all."""
    resume: str = "auto"
    """auto: the newest complete checkpoint in output_dir, if any; none: start; or a path."""
    tensorboard: bool = True
    """Write TensorBoard files under output_dir/tensorboard."""
    deterministic: bool = False
    """The same bits in every run on CUDA as well, at some cost in speed: PyTorch's deterministic
    algorithms, one algorithm of NCCL's. On a CPU runs are so by themselves."""
    check_gradients: bool = True
    """In the first step of a process see that every weight gets a gradient, not all zero and
    finite; if not, stop and name the weight."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of it, as resolved from the YAML files and the command line."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    teacher: TeacherConfig
    salt: SaltConfig
    train: TrainConfig

    @property
    def position_rows(self) -> int:
        """Rows of a learned position table: as stated, else the length of a sequence."""
        return self.model.max_position_embeddings or self.data.seq_length

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> RunConfig:
        """Rebuild a config that `to_dict` wrote.

        Raises: ValueError naming `source`, for a section or field that this version lacks.
        """
        if not set(values) <= set(SECTIONS):
            raise ValueError(f"{source}: unknown sections {sorted(set(values) - set(SECTIONS))}")
        sections = {}
        for section, kind in SECTIONS.items():
            given = values.get(section, {})
            unknown = set(given) - {item.name for item in dataclasses.fields(kind)}
            if unknown:
                raise ValueError(f"{source}: unknown fields {sorted(unknown)} in {section}")
            try:
                sections[section] = kind(**given)
            except TypeError as error:  # a field without default is missing
                raise ValueError(f"{source}: section {section}: {error}") from error
        return cls(**sections)


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "teacher": TeacherConfig,
    "salt": SaltConfig,
    "train": TrainConfig,
}
KEYS = [
    f"{name}.{item.name}" for name, kind in SECTIONS.items() for item in dataclasses.fields(kind)
]

OPTIONS = [*SECTIONS, "config", "deepspeed_config", "dry_run", "local_rank", "local-rank", "help",
           "print_config"]  # fmt: skip


def nearest(name: str, known: Sequence[str]) -> str:
    """A suggestion to append to an error, or nothing: the known name nearest to `name`."""
    tail = name.rsplit(".", 1)[-1]
    tails = {key.rsplit(".", 1)[-1]: key for key in known}
    for candidates, lookup in ((known, {}), (list(tails), tails)):
        match = difflib.get_close_matches(tail if lookup else name, candidates, n=1, cutoff=0.6)
        if match:
            return f" Did you mean {lookup.get(match[0], match[0])!r}?"
    return ""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What the command line gave: the run's config and where the DeepSpeed JSON lies."""

    config: RunConfig
    deepspeed_config: str
    dry_run: bool


class _Parser(ArgumentParser):
    """jsonargparse, with the error alone instead of the error after two screens of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Every rank reads the same settings; a thousand copies of the line help nobody.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def build_parser(prog: str) -> ArgumentParser:
    """The parser of `megatron_salt.pretrain`: sections as `--section.field`, YAML by `--config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=prog,
        description="Pre-train a language model, with or without a small teacher.",
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times.")
    parser.add_argument(
        "--deepspeed_config", type=str, help="DeepSpeed JSON: batch, precision, optimizer, ZeRO."
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Build and check everything, print the layout and the memory, train nothing.",
    )
    # Launchers add these; the environment is what counts.
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="Set by `deepspeed`; unused."
    )
    for name, kind in SECTIONS.items():
        parser.add_class_arguments(kind, name)
    return parser


def check_yaml_keys(path: str) -> None:
    """Raise ValueError for a key of the YAML file that is not a setting, naming file and key."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected sections {list(SECTIONS)}, found {values!r}")
    flat_extra = ["deepspeed_config", "dry_run"]
    for section, body in values.items():
        if section in flat_extra:
            continue
        if section not in SECTIONS:
            raise ValueError(
                f"{path}: unknown section {section!r}.{nearest(section, [*SECTIONS, *flat_extra])}"
            )
        if not isinstance(body, dict):
            raise ValueError(
                f"{path}: section {section!r} holds {body!r}: give its settings or remove it"
            )
        for key in body:
            if f"{section}.{key}" not in KEYS:
                raise ValueError(
                    f"{path}: unknown key '{section}.{key}'.{nearest(f'{section}.{key}', KEYS)}"
                )


def parse_command_line(argv: Sequence[str] | None = None, prog: str = "pretrain") -> CommandLine:
    """Read YAML files and overrides, check them, return frozen values.

    Raises: SystemExit(2) after printing the problem, the way argparse does; SystemExit(0) after
    `--help` or `--print_config`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(prog)
    try:
        for position, word in enumerate(argv):
            if word == "--config" and position + 1 < len(argv):
                check_yaml_keys(argv[position + 1])
            elif word.startswith("--config="):
                check_yaml_keys(word.split("=", 1)[1])
        for word in argv:
            key = word.lstrip("-").split("=")[0].rstrip("+")  # `+` appends to a list
            if word.startswith("--") and key not in (*KEYS, *OPTIONS):
                raise ValueError(f"unknown option --{key}.{nearest(key, [*KEYS, *OPTIONS])}")
        namespace = parser.parse_args(argv)
        config = _from_namespace(parser, namespace)
        check_config(config)
        if not namespace.deepspeed_config:
            raise ValueError("--deepspeed_config is missing: give the DeepSpeed JSON of this run")
    except ValueError as error:
        parser.error(str(error))
    return CommandLine(
        config=config,
        deepspeed_config=os.fspath(namespace.deepspeed_config),
        dry_run=bool(namespace.dry_run),
    )


def _from_namespace(parser: ArgumentParser, namespace: Namespace) -> RunConfig:
    built = {}
    for name, kind in SECTIONS.items():
        values = namespace[name]
        built[name] = kind(**{item.name: values[item.name] for item in dataclasses.fields(kind)})
    return RunConfig(**built)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def is_number(value: object) -> bool:
    """Whether `value` is a finite number: not NaN, true or text, no integer beyond the floats."""
    largest = sys.float_info.max
    return type(value) in (int, float) and -largest <= value <= largest  # type: ignore[operator]


def check_numbers(config: RunConfig) -> None:
    """The part of `check_config` that concerns each number by itself."""
    for name, kind in SECTIONS.items():
        for item in dataclasses.fields(kind):
            key, value = f"{name}.{item.name}", getattr(getattr(config, name), item.name)
            numeric = item.type.startswith(("int", "float"))  # annotations are text here
            _require(
                not numeric or value is None or is_number(value),
                f"{key} = {value}: must be a finite number",
            )
            _require(key not in ABOVE_0 or value > 0, f"{key} = {value}: must be above 0")
    minutes = config.parallel.timeout_minutes
    _require(
        0.01 <= minutes <= LONGEST_WAIT_MINUTES,
        f"parallel.timeout_minutes = {minutes}: must lie between 0.01 and {LONGEST_WAIT_MINUTES}",
    )


def check_config(config: RunConfig) -> None:
    """Raise ValueError, naming the settings and the remedy, if they contradict each other."""
    train, data = config.train, config.data
    check_numbers(config)
    check_model(config.model, data.seq_length, config.parallel)
    _require(train.steps > 0, f"train.steps = {train.steps}: must be at least 1")
    _require(data.seq_length > 0, f"data.seq_length = {data.seq_length}: must be at least 1")
    _require(bool(data.train_data_path), "data.train_data_path is empty: give at least one prefix")
    parse_blend(data.train_data_path, "data.train_data_path")
    check_split(effective_split(data))
    check_objective(data)
    check_salt(config)
    check_train(train)
    check_tags(config)


def check_salt(config: RunConfig) -> None:
    """The part of `check_config` that concerns the method: lengths, weights and the teacher."""
    salt, train = config.salt, config.train
    _require(
        0 <= salt.kd_steps <= train.steps,
        f"salt.kd_steps = {salt.kd_steps}: must lie between 0 and train.steps = {train.steps}",
    )
    _require(0.0 <= salt.kd_weight <= 1.0, f"salt.kd_weight = {salt.kd_weight}: must be in [0, 1]")
    _require(
        salt.loss_chunk_mib > 0, f"salt.loss_chunk_mib = {salt.loss_chunk_mib}: must be at least 1"
    )
    _require(
        salt.divergence == "forward_kl" or salt.loss_impl in ("auto", "reference"),
        f"salt.divergence = {salt.divergence} is computed by the reference only, not by "
        f"salt.loss_impl = {salt.loss_impl}: choose auto",
    )
    window = salt.transition_steps + (salt.warmup_steps if salt.transition == "wsd" else 0)
    _require(
        window <= salt.kd_steps,
        f"salt.transition_steps and warmup_steps ({window} together) exceed "
        f"salt.kd_steps = {salt.kd_steps}: the window lies inside the KD phase",
    )
    needs_window = salt.kd_steps > 0 and salt.transition in ("linear_decay", "linear_ratio_decay")
    _require(
        not needs_window or salt.transition_steps > 0,
        f"salt.transition = {salt.transition} needs salt.transition_steps > 0",
    )
    windowed = ("linear_decay", "linear_ratio_decay", "wsd")
    _require(
        salt.transition_steps == 0 or salt.transition in windowed,
        f"salt.transition_steps = {salt.transition_steps} has no effect with salt.transition = "
        f"{salt.transition}; remove it or choose one of {list(windowed)}",
    )
    _require(
        salt.warmup_steps == 0 or salt.transition == "wsd",
        f"salt.warmup_steps = {salt.warmup_steps} has no effect with salt.transition = "
        f"{salt.transition}; remove it or choose wsd",
    )
    _require(
        salt.transition != "linear_ratio_decay" or salt.kd_weight < 1.0,
        "salt.transition = linear_ratio_decay: the ratio w/(1-w) is infinite at kd_weight 1; "
        "choose a kd_weight below 1 or linear_decay",
    )
    _require(
        salt.kd_steps == 0 or config.teacher.checkpoint is not None or salt.kd_weight == 0.0,
        f"salt.kd_steps = {salt.kd_steps} but teacher.checkpoint is not set: name the teacher's "
        "checkpoint, set salt.kd_steps to 0 for plain training, or salt.kd_weight to 0 for a "
        "KD phase that only selects data",
    )
    _require(
        config.teacher.checkpoint is None or salt.kd_steps > 0,
        "teacher.checkpoint is set but salt.kd_steps is 0: it would never teach",
    )
    chunks = config.teacher.forward_chunks
    _require(
        chunks is None or chunks > 0,
        f"teacher.forward_chunks = {chunks}: must be at least 1, or null",
    )
    _require(
        chunks is None or config.teacher.placement != "before_step",
        f"teacher.forward_chunks = {chunks} has no effect with teacher.placement = before_step",
    )
    _require(
        config.teacher.placement != "bubble" or config.parallel.pipeline_model_parallel_size > 1,
        "teacher.placement = bubble: one stage has no waits to work in; choose auto or before_step",
    )
    for name in ("transition_steps", "warmup_steps", "inheritance_slope"):
        value = getattr(salt, name)
        _require(value >= 0, f"salt.{name} = {value}: must not be negative")
    check_switch(config)


def check_switch(config: RunConfig) -> None:
    """The part of `check_config` that concerns the end of the KD phase."""
    salt, train = config.salt, config.train
    if salt.switch == "fixed":
        for item in dataclasses.fields(SaltConfig):
            value = getattr(salt, item.name)
            _require(
                item.name not in ADAPTIVE_ONLY or value == item.default,
                f"salt.{item.name} = {value} has no effect with salt.switch = fixed: remove it, "
                "or choose adaptive",
            )
        return
    adaptive = "salt.switch = adaptive"
    _require(
        salt.kd_steps > 0 and salt.kd_weight > 0 and config.teacher.checkpoint is not None,
        f"{adaptive} asks when the teacher stops helping, but there is no teacher that teaches: "
        "set teacher.checkpoint, salt.kd_steps and salt.kd_weight above 0, or choose fixed",
    )
    _require(
        salt.transition != "constant",
        f"{adaptive}: salt.transition = constant means a teacher for the whole run; choose step, "
        "which has the same w, or switch fixed",
    )
    _require(
        salt.transition != "knowledge_inheritance",
        f"{adaptive}: w of salt.transition = knowledge_inheritance is a function of step / "
        "kd_steps, and would jump when the end is decided; choose linear_decay, or switch fixed",
    )
    _require(
        train.eval_interval > 0,
        f"{adaptive} decides at evaluations, and train.eval_interval is 0: set it, or choose fixed",
    )
    _require(
        salt.switch_patience >= 1,
        f"salt.switch_patience = {salt.switch_patience}: must be at least 1",
    )
    _require(
        0.0 <= salt.switch_better_share < 1.0,
        f"salt.switch_better_share = {salt.switch_better_share}: must be at least 0 and below 1, "
        "where the teacher would never help",
    )
    _require(
        salt.min_kd_steps >= 0, f"salt.min_kd_steps = {salt.min_kd_steps}: must not be negative"
    )
    decides = max(salt.switch_patience * train.eval_interval, salt.warmup_steps)
    earliest = max(salt.min_kd_steps, decides + salt.transition_steps)
    _require(
        earliest < salt.kd_steps,
        f"{adaptive} could not end the KD phase before step {earliest} (salt.min_kd_steps; or "
        "salt.switch_patience evaluations, train.eval_interval apart, and salt.transition_steps), "
        f"and it ends at salt.kd_steps = {salt.kd_steps} anyway: lower one of these, raise "
        "kd_steps, or choose fixed",
    )


def check_train(train: TrainConfig) -> None:
    """The part of `check_config` that concerns the run's length, learning rate and intervals."""
    _require(train.seed < 2**32, f"train.seed = {train.seed}: must be below 2**32")
    _require(
        train.lr_warmup_steps <= train.steps,
        f"train.lr_warmup_steps = {train.lr_warmup_steps} exceeds train.steps = {train.steps}",
    )
    for name in ("eval_interval", "checkpoint_interval", "keep_checkpoints", "lr_warmup_steps",
                 "seed"):  # fmt: skip
        value = getattr(train, name)
        _require(value >= 0, f"train.{name} = {value}: must not be negative")
    _require(
        train.lr_decay_steps is None or train.lr_decay_steps > 0,
        f"train.lr_decay_steps = {train.lr_decay_steps}: must be at least 1, or null",
    )
    _require(
        0.0 <= train.min_lr_ratio <= 1.0,
        f"train.min_lr_ratio = {train.min_lr_ratio}: must be in [0, 1]",
    )
    _require(train.eval_samples > 0 and train.log_interval > 0, "train.eval_samples and "
             "train.log_interval must be at least 1")  # fmt: skip


def check_tags(config: RunConfig) -> None:
    """The part of `check_config` that concerns tags, selection and the routing of tokens."""
    salt, data = config.salt, config.data
    for name, paths in (("data.tags", data.tags), ("salt.selection", salt.selection)):
        if paths:
            num_datasets = len(parse_blend(data.train_data_path, "data.train_data_path")[0])
            _require(
                len(paths) == num_datasets,
                f"{name} names {len(paths)}, data.train_data_path {num_datasets} datasets: give "
                "one for each, in the same order",
            )
    _require(
        not data.tags or "span_corruption" not in parse_objective(data.objective),
        "data.tags: span_corruption in data.objective moves tokens to other positions, where their "
        "tags would be another token's; leave one of the two out (salt.selection works with both)",
    )
    routed = {
        "data.tags": bool(data.tags),
        "salt.selection": bool(salt.selection),
        f"salt.kd_tokens = {salt.kd_tokens}": salt.kd_tokens != "all",
        f"salt.ce_tokens = {salt.ce_tokens}": salt.ce_tokens != "all",
    }
    for name, used in routed.items():
        _require(
            not used or salt.kd_steps > 0,
            f"{name} has no effect without a KD phase: set salt.kd_steps (with salt.kd_weight 0 "
            "there is selection without a teacher)",
        )
    for name in ("kd_tokens", "ce_tokens"):
        _require(
            "tagged" not in getattr(salt, name) or bool(data.tags),
            f"salt.{name} = {getattr(salt, name)} needs data.tags",
        )
    _require(
        salt.kd_tokens == "all" or salt.kd_weight > 0,
        f"salt.kd_tokens = {salt.kd_tokens} has no effect at salt.kd_weight 0",
    )
    _require(
        salt.ce_tokens != "excess_loss" or bool(data.tags) or config.teacher.checkpoint is not None,
        "salt.ce_tokens = excess_loss compares with a reference loss: set teacher.checkpoint, or "
        "data.tags made with --store loss",
    )
    for share, choice, needing in (
        ("kd_token_share", salt.kd_tokens, ("low_entropy", "high_entropy")),
        ("ce_token_share", salt.ce_tokens, ("excess_loss",)),
    ):
        value = getattr(salt, share)
        _require(0.0 < value <= 1.0, f"salt.{share} = {value}: must be above 0, at most 1")
        _require(
            value == 1.0 or choice in needing,
            f"salt.{share} = {value} has no effect; it belongs to {' and '.join(needing)}",
        )
        _require(
            value < 1.0 or choice not in needing,
            f"salt.{share} is 1: {choice} would take every token; set it below 1",
        )


def parse_blend(paths: Sequence[str], option: str) -> tuple[list[str], list[float]]:
    """Prefixes and weights from `PREFIX` or `WEIGHT PREFIX WEIGHT PREFIX …`.

    Raises: ValueError naming the option for any other form.
    """
    if len(paths) == 1:
        return [paths[0]], [1.0]
    try:
        weights = [float(word) for word in paths[0::2]]
    except ValueError as error:
        raise ValueError(
            f"{option} = {list(paths)}: several datasets need a weight before each prefix"
        ) from error
    prefixes = list(paths[1::2])
    if len(prefixes) != len(weights) or not are_weights(weights):
        raise ValueError(
            f"{option} = {list(paths)}: expected WEIGHT PREFIX pairs with weights above 0"
        )
    return prefixes, weights


def are_weights(values: Sequence[float]) -> bool:
    """Whether each is above 0 and shares of their sum are numbers: NaN compares as false."""
    return all(value > 0 for value in values) and sum(values) < math.inf


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is two shares.

    megatron-core takes whatever is no digit or point for a comma: -5 and 1e-3 mean others there.
    """
    share = r"\s*(\d+\.?\d*|\.\d+)\s*"
    found = re.fullmatch(f"{share},{share}", split, re.ASCII)
    _require(
        found is not None and 0 < sum(float(part) for part in found.groups()) < math.inf,
        f"data.split = {split!r}: expected the shares of training and held-out documents, two "
        "plain numbers as in 99,1",
    )


def parse_objective(words: Sequence[str]) -> dict[str, float]:
    """Share of each objective, in the order of `OBJECTIVES`, from `NAME` or `WEIGHT NAME …`.

    Raises: ValueError naming data.objective for any other form, an unknown or a repeated name.
    """
    option = f"data.objective = {list(words)}"
    words = ["1", *words] if len(words) == 1 else words
    names = list(words[1::2])
    for name in names:
        _require(
            name in OBJECTIVES,
            f"{option}: {name!r} is no objective; expected NAME or WEIGHT NAME pairs of "
            f"{list(OBJECTIVES)}.{nearest(name, OBJECTIVES)}",
        )
    _require(len(set(names)) == len(names), f"{option}: an objective is named twice")
    try:
        weights = [float(word) for word in words[0::2]]
    except ValueError as error:
        raise ValueError(f"{option}: several objectives need a weight before each name") from error
    _require(
        0 < len(names) == len(weights) and are_weights(weights),
        f"{option}: expected WEIGHT NAME pairs with weights above 0",
    )
    given = dict(zip(names, weights, strict=True))
    return {name: given[name] / sum(weights) for name in OBJECTIVES if name in given}


def check_objective(data: DataConfig) -> None:
    """The part of `check_config` that concerns data.objective and its spans."""
    shares = parse_objective(data.objective)
    _require(
        0.0 < data.span_corruption_rate < 1.0,
        f"data.span_corruption_rate = {data.span_corruption_rate}: must lie between 0 and 1",
    )
    _require(
        data.span_mean_length >= 1.0,
        f"data.span_mean_length = {data.span_mean_length}: must be at least 1",
    )
    # A token that stays, one that goes, and three sentinels.
    _require(
        "span_corruption" not in shares or data.seq_length >= 4,
        f"data.seq_length = {data.seq_length} has no room for span_corruption: use at least 4",
    )


def effective_split(data: DataConfig) -> str:
    """Which documents of the training datasets train: all, if held-out data is named apart."""
    return "1,0" if data.valid_data_path else data.split


def check_model(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> None:
    """The part of `check_config` that concerns shapes and their division over ranks."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    _require(tp >= 1 and pp >= 1, "parallel sizes must be at least 1")
    for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_size", "head_size"):
        value = getattr(model, name)
        _require(value > 0, f"model: {name} = {value}: must be at least 1")
    _require(
        model.kv_channels is not None or model.hidden_size % model.num_attention_heads == 0,
        f"model.hidden_size = {model.hidden_size} is not a multiple of num_attention_heads = "
        f"{model.num_attention_heads}; set model.kv_channels or change one of them",
    )
    _require(
        model.num_attention_heads % model.query_groups == 0,
        f"model.num_attention_heads = {model.num_attention_heads} is not a multiple of "
        f"num_query_groups = {model.query_groups}",
    )
    for name in ("query_groups", "num_attention_heads", "ffn_size"):
        value = getattr(model, name)
        _require(
            value % tp == 0,
            f"model: {name} = {value} is not divisible by "
            f"parallel.tensor_model_parallel_size = {tp}",
        )
    _require(
        pp <= model.num_layers,
        f"parallel.pipeline_model_parallel_size = {pp} exceeds model.num_layers = "
        f"{model.num_layers}: every stage needs a layer",
    )
    _require(
        not parallel.sequence_parallel or tp > 1,
        "parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1",
    )
    _require(
        not parallel.sequence_parallel or seq_length % tp == 0,
        f"parallel.sequence_parallel: data.seq_length = {seq_length} is not divisible by tp {tp}",
    )
    _require(
        model.position_embedding_type == "rope"
        or (model.max_position_embeddings or seq_length) >= seq_length,
        f"model.max_position_embeddings = {model.max_position_embeddings} is below "
        f"data.seq_length = {seq_length}",
    )
    _require(
        model.position_embedding_type != "rope" or model.head_size % 2 == 0,
        f"model: rotary embeddings need an even head size, not {model.head_size}",
    )


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as JSON, which `--config` reads too (YAML is a superset)."""
    path.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
