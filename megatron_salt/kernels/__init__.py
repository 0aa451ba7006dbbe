"""The distillation loss over vocabulary shards: public functions, interchangeable backends."""

from megatron_salt.kernels.backend import LossBackend
from megatron_salt.kernels.choose import choose_backend
from megatron_salt.kernels.chunks import Chunking, Heads
from megatron_salt.kernels.distributions import Distributions, distributions
from megatron_salt.kernels.kd_loss import KdLoss, kd_loss
from megatron_salt.kernels.linear_kd_loss import linear_kd_loss
from megatron_salt.kernels.reference import vocab_parallel_argmax
from megatron_salt.kernels.sparse import (
    KeptLogprobs,
    LostMass,
    SparseTeacher,
    Truncation,
    top_logprobs,
)
from megatron_salt.kernels.token_scores import TokenScores, token_scores
from megatron_salt.kernels.vocab import VocabShard, padded_vocab_size

__all__ = [
    "Chunking",
    "Distributions",
    "Heads",
    "KdLoss",
    "KeptLogprobs",
    "LossBackend",
    "LostMass",
    "SparseTeacher",
    "TokenScores",
    "Truncation",
    "VocabShard",
    "choose_backend",
    "distributions",
    "kd_loss",
    "linear_kd_loss",
    "padded_vocab_size",
    "token_scores",
    "top_logprobs",
    "vocab_parallel_argmax",
]
