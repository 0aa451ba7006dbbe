"""Every setting of a run: six frozen dataclasses, with the texts that `--help` prints.

A leaf of the import graph: standard library, yaml and jsonargparse only, so `--help` and a misspelt
key answer in a second. The DeepSpeed JSON, which alone owns batch sizes, precision, optimiser, ZeRO
and clipping, is read in `deepspeed.py`. `--help` prints each field's docstring by itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import register_type

from megatron_salt.config.records import record_of

Transition = Literal["constant", "step", "linear_decay", "linear_ratio_decay",
                     "knowledge_inheritance", "wsd"]  # fmt: skip


class TextOrNumber(str):
    """Text, or a number that YAML has already read as one: the weights between data prefixes."""


register_type(TextOrNumber)


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
    """Positions in the table of learned_absolute; null: data.seq_length. Unused with rope."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """Position embeddings: rotary (rope), or a learned table as in GPT-2 (learned_absolute)."""
    rotary_base: float = 10000.0
    """Base period of the rotary embeddings."""
    rotary_percent: float = 1.0
    """Share of a head's channels that rotary embeddings turn; the others stay (Pythia: 0.25)."""
    rope_scaling: dict[str, float] | None = None
    """Slower rotation for longer sequences. {factor: F}: all angles divided by F; with
    low_freq_factor, high_freq_factor and original_max_position_embeddings: the rule of Llama 3."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of normalisation before attention, MLP and output head."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the normalisation."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """MLP activation: gated SwiGLU (Llama), GELU (Pythia), or its tanh approximation (GPT-2)."""
    add_bias_linear: bool = False
    """Biases in the linear layers (GPT style)."""
    add_qkv_bias: bool = False
    """Biases of queries, keys and values alone (Qwen2)."""
    qk_layernorm: bool = False
    """Normalise each head's query and key before they are turned (Qwen3)."""
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input, each through a norm of its own (Pythia)."""
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
    def is_gated(self) -> bool:
        """Whether the MLP's first matrix is a gate above what it gates."""
        return self.activation == "swiglu"

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    def sizes(self) -> dict[str, Any]:
        """All settings, with the sizes that null stands for."""
        return dataclasses.asdict(self) | {
            "num_query_groups": self.query_groups, "kv_channels": self.head_size,
            "ffn_hidden_size": self.ffn_size,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the student is cut over ranks. The data-parallel size is what is left of the world."""

    tensor_model_parallel_size: int = 1
    """Tensor-parallel size: how many ranks share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages. More than one needs ZeRO stage <= 1 (DeepSpeed's limit)."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel regions along the sequence (Megatron's)."""
    recompute_granularity: Literal["none", "full"] = "none"
    """Activation checkpointing: full keeps only each layer's input and recomputes the rest."""
    gradient_accumulation_fusion: bool = False
    """Add the linear layers' weight gradients up in fp32 within the matrix product (Megatron's),
    with apex or without. For bf16 with ZeRO 1 and fp32 sums. Not tried on a GPU yet."""
    timeout_minutes: float = 30.0
    """A collective that waits longer than this ends the run on every rank. May be a fraction."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read. Prefixes are Megatron's: the path without .bin/.idx."""

    train_data_path: list[TextOrNumber] = field(default_factory=list)
    """Training datasets: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX … to blend several."""
    valid_data_path: list[TextOrNumber] = field(default_factory=list)
    """Held-out datasets, PREFIX …, scored in equal parts; empty: split off by data.split."""
    split: str = "99,1"
    """TRAIN,HELD_OUT: shares of the documents; only where data.valid_data_path is empty."""
    tokenizer: str | None = None
    """Tokenizer file or directory; null: the copy that `preprocess` put beside the data."""
    tags: list[str] = field(default_factory=list)
    """Token tags: the --output-prefix of `tag` for each training dataset, in order."""
    seq_length: int = 2048
    """Tokens per sequence (S), training and held-out."""
    windows: bool = False
    """Training samples are windows of seq_length tokens, laid over the dataset as it is on disk and
    shuffled as wholes. false: documents are shuffled and laid end to end (megatron-core's)."""
    eod_mask_loss: bool = False
    """Give no loss to positions whose input is the end-of-document token."""
    objective: list[TextOrNumber] = field(default_factory=lambda: [TextOrNumber("causal")])
    """Training objective of a sequence: causal, prefix or span_corruption; or WEIGHT NAME WEIGHT
    NAME … to mix them (UL2). Held-out sequences are always causal."""
    span_corruption_rate: float = 0.15
    """Objective span_corruption: share of a sequence's tokens that sentinels replace."""
    span_mean_length: float = 3.0
    """Objective span_corruption: mean length of a replaced span, in tokens."""
    cache_path: str | None = None
    """Folder for megatron-core's index files; null: train.output_dir/index_cache."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The small language model that teaches."""

    checkpoint: str | None = None
    """The teacher: a megatron_salt checkpoint, or a run's output_dir (its last one). null: none."""
    hf: str | None = None
    """A Hugging Face folder: any causal language model of transformers teaches as it is, read at
    the run's precision. Needs the extra hf. In place of checkpoint."""
    logits: list[str] = field(default_factory=list)
    """Stored logits in place of a teacher: the --output-prefix of `cache-logits` for each training
    dataset, in order. No model is loaded; see docs/logits.md."""
    max_valid_ce_gap_nats: float = 0.05
    """Refuse a teacher whose held-out CE (nats per token) is further than this from the one stored
    in its checkpoint. Where the held-out samples differ both are printed instead."""
    placement: Literal["auto", "bubble", "before_step"] = "auto"
    """When the teacher runs. before_step: on this batch, before its step. bubble: on the next one,
    while pipeline stages would wait. Same results. auto: bubble with several stages."""
    tensor_parallel: bool = False
    """Spread each stage's teacher over the stage's tensor-parallel ranks, if it does not fit whole
    beside the student. They add up the results of every layer. Same losses but for rounding."""
    forward_chunks: int | None = None
    """Placement bubble: into how many chunks of layers a forward pass of the teacher is cut; null:
    as many as fit well, at least 4. A teacher.hf is always one."""

    @property
    def path(self) -> str | None:
        """Where the teacher's weights are, of either kind; None: there is no model that teaches."""
        return self.checkpoint or self.hf

    @property
    def kind(self) -> Literal["checkpoint", "hf", "logits"] | None:
        """The setting that says who teaches; None: nobody."""
        if self.path:
            return "checkpoint" if self.checkpoint else "hf"
        return "logits" if self.logits else None


@dataclass(frozen=True, kw_only=True)
class SaltConfig:
    """The method: a KD phase of kd_steps, then plain training. See docs/method.md."""

    kd_steps: int = 0
    """Length n_KD of the KD phase in optimiser steps; with switch adaptive at most. 0: none."""
    switch: Literal["fixed", "adaptive"] = "fixed"
    """When the KD phase ends. fixed: after kd_steps. adaptive: once evaluations show that the
    teacher no longer helps, after kd_steps at the latest."""
    min_kd_steps: int = 0
    """Adaptive switch: least length of the KD phase, in optimiser steps."""
    switch_margin_nats: float = 0.0
    """Adaptive switch: student's held-out CE less the teacher's, in nats per token, at or below
    which the teacher counts as no longer helping."""
    switch_better_share: float = 0.0
    """Adaptive switch: share of held-out tokens on which the teacher's loss is lower than the
    student's. At or below it the teacher counts as no longer helping. 0: the CEs alone decide."""
    switch_patience: int = 2
    """Adaptive switch: how many evaluations in a row must find that the teacher no longer helps."""
    kd_weight: float = 0.5
    """Greatest weight w of the KL in the loss (1 - w) CE + w KL of the KD phase."""
    transition: Transition = "step"
    """How w changes within the KD phase. constant, step: not at all; the others make it fall. The
    formulas are in megatron_salt/method/salt.py."""
    transition_steps: int = 0
    """Over how many of the KD phase's last steps w falls: linear_decay, linear_ratio_decay, wsd."""
    warmup_steps: int = 0
    """Transition wsd: over how many of the first steps w rises from 0 to kd_weight."""
    inheritance_slope: float = 1.0
    """Transition knowledge_inheritance: w = max(kd_weight - slope * step / kd_steps, 0)."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits in the KL. No tau^2 factor is applied."""
    student_temperature: float = 1.0
    """Divides the student's logits in the KL (never in the CE). No tau^2 factor is applied."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse",
                        "mse_probabilities"] = "forward_kl"  # fmt: skip
    """Divergence of student from teacher. forward_kl is KL(teacher || student), in compiled code;
    the slower reference computes the others. mse is of logits."""
    truncate_k: int | None = None
    """Teach only the teacher's k likeliest tokens of each position; null: all, or all that are
    stored."""
    truncate_p: float | None = None
    """Teach only the likeliest tokens that have this probability together at temperature 1, of them
    truncate_k at most; null: no such limit."""
    lost_mass: Literal["renormalise", "raw", "to_label", "ghost"] = "renormalise"
    """The probability of the tokens that are cut off: shared by the kept ones (renormalise), gone
    (raw), the label's, or in one bucket of all others on both sides (ghost)."""
    logits_dtype: Literal["fp32", "model"] = "fp32"
    """Precision of the logits: fp32, or that of the model (the DeepSpeed JSON's). The latter is
    faster, and rounds away small differences between student and teacher."""
    selection: list[str] = field(default_factory=list)
    """Selections made by `tag` or `select`, one per training dataset. The
    KD phase reads only the selected sequences, the LM phase all."""
    kd_tokens: Literal["all", "tagged", "untagged", "low_entropy", "high_entropy",
                       "teacher_better"] = "all"  # fmt: skip
    """Tokens that get a KL. tagged, untagged: by the mask of data.tags. low_entropy, high_entropy:
    by the teacher's entropy. teacher_better: where the teacher's loss is below the student's."""
    kd_token_share: float = 1.0
    """kd_tokens low_entropy or high_entropy: share of each sequence's tokens that get a KL."""
    untaught_ce: Literal["full", "mixed"] = "full"
    """Weight of the CE of tokens that kd_tokens gives no KL: 1 (full), or 1 - w (mixed)."""
    ce_tokens: Literal["all", "tagged", "untagged", "excess_loss"] = "all"
    """Tokens whose CE counts in the KD phase. tagged, untagged: by the mask of data.tags.
    excess_loss: largest student loss less reference loss (the teacher's, or that in data.tags)."""
    ce_token_share: float = 1.0
    """ce_tokens excess_loss: share of each sequence's tokens whose CE counts."""
    loss_chunk_mib: int = 1024
    """Memory of the loss in MiB: logits of one chunk of tokens, their gradient, and more. It sets
    how many tokens are scored at a time."""
    loss_impl: Literal["auto", "reference", "native", "cuda"] = "auto"
    """Backend (code) of the loss: native is for CPUs, reference is plain PyTorch. auto: native or
    cuda by device. `megatron-salt kernels` says which are there."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: length, learning-rate shape, evaluation, checkpoints, output."""

    steps: int
    """Optimiser steps of the whole run, KD and LM phase together."""
    output_dir: str
    """Metrics, TensorBoard files and checkpoints go here."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape of the learning rate; its peak is the optimizer's lr in the DeepSpeed JSON."""
    lr_warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from 0 to its peak."""
    lr_decay_steps: int | None = None
    """Steps of the learning rate's decay; null: until train.steps (cosine), 10 % of them (wsd)."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of its peak."""
    allow_lr_jump: bool = False
    """Resume although another length or schedule makes the learning rate jump at that step."""
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
    async_save: bool = True
    """Write checkpoints behind the next steps, from a copy in host memory: 12 bytes per parameter
    over all ranks, and one copy of the weights. false: training waits for the disk."""
    init_from: str | None = None
    """Start from the weights of this checkpoint or run (a converted one too), at any layout, with a
    fresh optimizer; null: from random weights. A resumed run has its own."""
    export_hf: str | None = None
    """Folder for a Hugging Face model of the last checkpoint, made at the end of the run; null:
    none. `megatron-salt convert` makes it of any checkpoint."""
    cache_logits: list[str] = field(default_factory=list)
    """Write what the student says of the rows that it is about to train on: a prefix for each
    training dataset, for teacher.logits of a later run. Needs data.windows. One more product with
    the output head a step."""
    cache_logits_top_k: int = 50
    """How many of each position's likeliest tokens train.cache_logits writes."""
    resume: str = "auto"
    """Where to go on. auto: at the newest complete checkpoint in output_dir, if any; none: from the
    start; or the path of a checkpoint."""
    tensorboard: bool = True
    """Write TensorBoard files under output_dir/tensorboard."""
    deterministic: bool = False
    """The same bits in every run on CUDA, at some cost in speed: PyTorch's deterministic
    algorithms, one algorithm of NCCL's. On a CPU runs are so by themselves."""
    check_gradients: bool = True
    """Check in a process's first step that every weight's gradient is finite and not all zero; if
    not, stop and name the weight."""


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
    def num_positions(self) -> int:
        """Rows of a learned position table: as stated, else the length of a sequence."""
        return self.model.max_position_embeddings or self.data.seq_length

    @property
    def teacher_tp_size(self) -> int:
        """Over how many ranks each of the teacher's layers is spread."""
        return self.parallel.tensor_model_parallel_size if self.teacher.tensor_parallel else 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> RunConfig:
        """Rebuild a config that `to_dict` wrote.

        A section that is not there has its defaults.
        Raises: ValueError naming `source`, as `record_of`.
        """
        if isinstance(values, dict):
            values = {**{section: {} for section in SECTIONS}, **values}
        return record_of(cls, values, source)


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
