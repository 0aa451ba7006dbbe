"""A frozen model scores a dataset: every token once, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_salt.checkpoint.weights import load_frozen
from megatron_salt.data.manifest import bin_path
from megatron_salt.data.sequences import ScoringBatch, Sequences, batches_of, windows_of
from megatron_salt.data.tags import open_indexed, read_stream
from megatron_salt.kernels import Chunking, VocabShard, padded_vocab_size, token_scores
from megatron_salt.kernels.chunks import DEFAULT_CHUNK_BYTES
from megatron_salt.kernels.token_scores import WantedScores
from megatron_salt.model.weights import DTYPES
from megatron_salt.parallel.groups import Groups
from megatron_salt.scoring.request import ScoringJob, ScoringRequest, TagRequest

# Logits of a chunk on a CPU: few enough to be read again from its caches, enough for its products.
CPU_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class ShardScores:
    """What the model says about the T tokens of a shard, in their order. fp32, bool, fp32."""

    loss_T: NDArray[np.float32]
    kept_T: NDArray[np.bool_]
    entropy_T: NDArray[np.float32] | None


class DatasetScorer:
    """The frozen model of this rank, and how it reads a dataset.

    The model is whole on each rank, or spread over all that the groups say share one.
    """

    model: Any
    """A `teacher.TeacherModel`."""

    def __init__(
        self, request: ScoringRequest, job: ScoringJob, groups: Groups,
        load: Callable[..., Any] = load_frozen,
    ) -> None:  # fmt: skip
        self.data, self.data_prefix = open_indexed(request.data), request.data
        self.settings, self.eod, self.groups = job.origin.settings, job.eod, groups
        self.num_rows = request.micro_batch_size
        tp_size, size = groups.layout.tp_size, job.vocab_size
        self.chunking = Chunking(
            chunk_bytes=CPU_CHUNK_BYTES if groups.device.type == "cpu" else DEFAULT_CHUNK_BYTES,
            tp_group=groups.tp,
        )
        padded = padded_vocab_size(size, 1, tp_size)
        self.vocab = VocabShard.of_rank(
            size=size, padded_size=padded, tp_rank=groups.tp_rank, tp_size=tp_size
        )
        spread = {"tensor_parallel": True} if tp_size > 1 else {}
        self.model = load(
            job.folder, job.manifest, groups, seq_length=self.settings.max_length,
            dtype=DTYPES[self.settings.precision], head=self.vocab, head_columns=padded // tp_size,
            **spread,
        )  # fmt: skip

    def batches(
        self, sequences: Sequences, first: int, last: int, on_tokens: Callable[[int], Any]
    ) -> Iterator[tuple[ScoringBatch, torch.Tensor, torch.Tensor]]:
        """All rows of sequences `[first, last)`, with the last hidden states that predict their
        labels [T, E] and the labels [T], both of the filling too."""
        rows = windows_of(sequences, first, last, self.settings.max_length)
        start, stop = int(sequences.bounds[first]), int(sequences.bounds[last])
        offset = max(start - 1, 0)
        stream = read_stream(self.data, offset, stop)
        beyond = np.flatnonzero((stream < 0) | (stream >= self.vocab.size))
        if len(beyond):
            raise ValueError(
                f"{bin_path(self.data_prefix)}: token {offset + beyond[0]} is id "
                f"{stream[beyond[0]]}, the teacher's vocabulary has {self.vocab.size}: they are of "
                "different tokenizers, or the file is damaged"
            )
        device = self.groups.device
        for batch in batches_of(
            stream, offset, rows, max_length=self.settings.max_length, num_rows=self.num_rows,
            eod=self.eod,
        ):  # fmt: skip
            inputs_BS = torch.from_numpy(batch.inputs_BS).to(device, non_blocking=True)
            labels_T = torch.from_numpy(batch.labels_BS).to(device, non_blocking=True).flatten()
            yield batch, self.hidden_states(inputs_BS).flatten(0, 1), labels_T
            on_tokens(len(batch.places))

    @torch.no_grad()
    def hidden_states(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, S, E], the same on all ranks that share the model."""
        hidden = tokens_BS
        for layer in self.model.chunk(0, 1):
            hidden = layer(hidden)
        return hidden.transpose(0, 1)


class Scorer(DatasetScorer):
    """What tags are made of."""

    def __init__(self, request: TagRequest, job: ScoringJob, groups: Groups) -> None:
        super().__init__(request, job, groups)
        self.impl = request.loss_impl

    def shard(
        self, sequences: Sequences, first: int, last: int, on_tokens: Callable[[int], Any]
    ) -> ShardScores:
        """Scores of every token of sequences `[first, last)`.

        Host sync: one, at the end.
        """
        start, stop = int(sequences.bounds[first]), int(sequences.bounds[last])
        parts = [
            (batch, self.scores(hidden_TE, labels_T))
            for batch, hidden_TE, labels_T in self.batches(sequences, first, last, on_tokens)
        ]
        columns = np.empty((2 + self.with_entropy, stop - start), dtype=np.float32)
        for batch, values in parts:
            columns[:, batch.places] = values.cpu().numpy()[:, batch.predicts_BS.ravel()]
        entropy = columns[2] if self.with_entropy else None
        return ShardScores(loss_T=columns[0], kept_T=columns[1] > 0, entropy_T=entropy)

    @property
    def with_entropy(self) -> bool:
        return "entropy" in self.settings.store

    def scores(self, hidden_TE: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """Loss, 1 where kept, and entropy if it is asked for: [2 or 3, T].

        Kept means that fewer than top_k tokens have a larger logit than the label.
        """
        assert self.model.head_WE is not None  # asked for above
        want: list[WantedScores] = ["ce", "likelier"]
        scores = token_scores(
            hidden_TE, self.model.head_WE, labels_T, vocab=self.vocab, impl=self.impl,
            chunking=self.chunking,
            want=[*want, "entropy"] if self.with_entropy else want,
        )  # fmt: skip
        assert scores.ce_T is not None and scores.likelier_T is not None
        values = [scores.ce_T, (scores.likelier_T < self.settings.top_k).float()]
        return torch.stack(values if scores.entropy_T is None else [*values, scores.entropy_T])
