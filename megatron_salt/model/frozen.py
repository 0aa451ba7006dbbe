"""A frozen language model, from a stream of weights: teaches, tags, is evaluated.

Letters: B micro-batch, S sequence, E width, V vocabulary, W columns of the head kept on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_salt.config.fields import ModelConfig
from megatron_salt.kernels import VocabShard
from megatron_salt.model import layers
from megatron_salt.model.weights import WeightSpec, output_weight_name, shard, weight_table
from megatron_salt.parallel.groups import Groups, same_error_everywhere
from megatron_salt.parallel.layout import split_evenly


class FrozenModel:
    """A language model without gradient, optimizer or wrapper: whole on this rank, or spread over
    the student's tensor-parallel ranks, which then run it together.

    Args:
        weights: (canonical name, whole weight) of every weight of `weight_table`, once.
        source: names the model in errors.
        head: vocabulary columns of the output head to keep on this rank; None: no head.
        head_columns: W, the width of that shard with padding.
        tensor_parallel: spread it. The head's columns stay those that are asked for.
    Collectives: spread, an all-reduce over tp of [S, B, E] for the embedding, two for each layer.
    Raises: RuntimeError naming a parameter that `weights` does not have.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Iterable[tuple[str, Tensor]],
        groups: Groups,
        *,
        source: str,
        vocab_size: int,
        num_positions: int,
        seq_length: int,
        dtype: torch.dtype,
        head: VocabShard | None,
        head_columns: int,
        tensor_parallel: bool = False,
    ) -> None:
        self.parts = layers.ModelParts(
            model,
            vocab_size=vocab_size,
            seq_length=seq_length,
            num_positions=num_positions,
            groups=groups.student if tensor_parallel else groups.teacher,
            sequence_parallel=False,
            dtype=dtype,
        )
        self.hidden_size, self.seq_length = model.hidden_size, seq_length
        self.tp_size = self.parts.tp_size
        self.prefix_masks = self.parts.prefix_masks
        inner = [kind(*arguments) for kind, arguments in layers.transformer_layers(self.parts)]
        whole = nn.ModuleList([layers.Embedding(self.parts), *inner]).to(dtype).to(groups.device)
        self.layers = whole.requires_grad_(False).eval()
        self.head_WE: Tensor | None = None
        table = weight_table(model, vocab_size, num_positions)
        parameters = layers.canonical_parameters(self.layers)
        for name, weight in weights:
            if name in parameters:
                part = shard(
                    weight, table[name], self.parts.tp_rank, self.tp_size, self.parts.padded_vocab
                )
                with torch.no_grad():
                    parameters.pop(name).copy_(part)
            if name == output_weight_name(model) and head is not None:
                self.head_WE = weight.new_zeros((head_columns, weight.shape[1]))
                self.head_WE[: head.num_columns] = weight[head.start : head.stop]
        if parameters:
            raise RuntimeError(f"{source}: no weight for {sorted(parameters)}")

    def chunk(self, number: int, num_chunks: int) -> list[nn.Module]:
        """The layers of one part of a forward pass; embedding and last norm go with the ends."""
        num_layers = self.parts.model.num_layers
        before = len(self.layers) - num_layers - 1  # embedding and, if any, the position table
        start, stop = split_evenly(num_layers, num_chunks)[number]
        first = 0 if number == 0 else before + start
        last = len(self.layers) if number == num_chunks - 1 else before + stop
        return list(self.layers)[first:last]

    @torch.no_grad()
    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Last hidden states [B, S, E] of these rows, the same on all ranks that share the model;
        S at most seq_length."""
        self.prefix_masks.advance(tokens_BS.device)
        hidden = tokens_BS
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.transpose(0, 1)

    def num_bytes(self) -> int:
        """Bytes of the weights and the head shard on this rank."""
        tensors = [*self.layers.parameters(), *([] if self.head_WE is None else [self.head_WE])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def release(self) -> None:
        """Let go of every tensor; the object is of no use afterwards."""
        self.layers = nn.ModuleList()
        self.head_WE = None
        self.parts.rotary = None


def broadcast_weights(
    table: Mapping[str, WeightSpec],
    read: Callable[[], dict[str, Tensor]],
    groups: Groups,
    dtype: torch.dtype,
    source: str,
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a table on this rank's device, one at a time; only rank 0 calls `read`.

    Collectives: one broadcast per weight over all ranks.
    Raises: ValueError on all ranks naming a weight that is all zeros or not finite, or what `read`
        raises.
    """
    full: dict[str, Tensor] = {}
    with same_error_everywhere(f"loading {source}"):
        if groups.rank == 0:
            full = read()
            for name, weight in full.items():
                if table[name].init != "zeros" and not weight.any():
                    raise ValueError(
                        f"{source}: weight {name} is all zeros; this is not a trained model"
                    )
                if not weight.isfinite().all():
                    raise ValueError(f"{source}: {name} has inf or nan")
    for name, spec in table.items():
        weight = torch.empty(spec.shape, dtype=dtype, device=groups.device)
        if groups.rank == 0:
            weight.copy_(full.pop(name))
        dist.broadcast(weight, src=0)
        yield name, weight
