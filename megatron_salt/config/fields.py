"""Every setting of a run: six frozen dataclasses, with the texts that `--help` prints.

A leaf of the import graph: standard library, yaml and jsonargparse only, so `--help` and a misspelt
key answer in a second. The DeepSpeed JSON, which alone owns batch sizes, precision, optimiser, ZeRO
and clipping, is read in `config/deepspeed.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import register_type

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

    train_data_path: list[TextOrNumber] = field(default_factory=list)
    """Training datasets: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX … to blend several."""
    valid_data_path: list[TextOrNumber] = field(default_factory=list)
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
    objective: list[TextOrNumber] = field(default_factory=lambda: [TextOrNumber("causal")])
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
    def num_positions(self) -> int:
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
