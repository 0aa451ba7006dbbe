"""The student: one list of layers, run as DeepSpeed pipeline stages or as a single stage.

Also trains the small language model itself: an SLM is a student without a teacher.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_salt.model import layers
from megatron_salt.model.loss import LossFunction, Targets
from megatron_salt.model.weights import WeightSpec, initial_weight, shard, weight_table
from megatron_salt.parallel.layout import Layout


class OutputLayer(nn.Module):
    """The output head's weight [W, D], and where a single stage computes its loss.

    The loss is computed inside this module's forward when targets are given, so that ZeRO 3 has the
    weight gathered when it is used. As a pipeline layer it passes the hidden state on, and
    `PipelineStudent.forward` computes the loss.
    """

    canonical_name = "output_layer"

    def __init__(self, parts: layers.ModelParts, tied: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = None
        if not tied:
            shape = (parts.padded_vocab // parts.tp_size, parts.model.hidden_size)
            self.weight = nn.Parameter(torch.empty(shape, dtype=parts.config.params_dtype))

    def forward(
        self,
        hidden_SBD: Tensor,
        targets: Targets | None = None,
        loss_function: LossFunction | None = None,
        tied_weight: Tensor | None = None,
    ) -> Tensor:
        if targets is None or loss_function is None:
            return hidden_SBD
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        return loss_function(hidden_SBD, weight, targets)


class SingleStageStudent(nn.Module):
    """The whole student on each tensor-parallel group: pp = 1, any ZeRO stage."""

    def __init__(self, parts: layers.ModelParts, loss_function: LossFunction) -> None:
        super().__init__()
        tied = not parts.model.untie_embeddings_and_output_weights
        self.embedding = layers.Embedding(parts)
        self.body = nn.ModuleList([kind(*args) for kind, args in layers.transformer_layers(parts)])
        self.output_layer = OutputLayer(parts, tied=tied)
        self.tied = tied
        self.loss_function = loss_function
        self.prefix_masks = parts.prefix_masks
        if tied and hasattr(self.embedding.word_embeddings.weight, "ds_id"):
            deepspeed.zero.register_external_parameter(
                self.output_layer, self.embedding.word_embeddings.weight
            )

    def forward(self, tokens_BS: Tensor, targets: Targets) -> Tensor:
        """Scalar loss of one micro-batch (see `LossFunction`)."""
        self.prefix_masks.advance(tokens_BS.device)
        hidden_SBD = self.embedding(tokens_BS)
        for layer in self.body:
            hidden_SBD = layer(hidden_SBD)
        tied_weight = self.embedding.word_embeddings.weight if self.tied else None
        return self.output_layer(hidden_SBD, targets, self.loss_function, tied_weight)


class PipelineStudent(PipelineModule):
    """The student as DeepSpeed pipeline stages: pp > 1, ZeRO <= 1.

    The loss is the last stage's output, not DeepSpeed's `loss_fn`: that is called after the
    module's forward, where the output head must not be used. When the gradient reaches a module's
    output, DeepSpeed clears the 16-bit gradients of the micro-batch before, and what the head had
    got by then went with them.

    Args:
        stage_bounds: over the transformer layers, from `costs.balanced_stages`.
    """

    def __init__(
        self,
        parts: layers.ModelParts,
        loss_function: LossFunction,
        layout: Layout,
        stage_bounds: Sequence[int],
    ) -> None:
        self.tied = not parts.model.untie_embeddings_and_output_weights
        self.student_loss = loss_function
        self.prefix_masks = parts.prefix_masks
        self._targets: deque[Targets] = deque()
        body = [LayerSpec(kind, *args) for kind, args in layers.transformer_layers(parts)]
        if self.tied:
            attribute = ["word_embeddings.weight"]
            first = TiedLayerSpec("embedding", layers.Embedding, parts, tied_weight_attr=attribute)
            last = TiedLayerSpec(  # it passes the hidden state on; the loss reads its weight
                "embedding", layers.Embedding, parts, forward_fn=lambda _, hidden_SBD: hidden_SBD,
                tied_weight_attr=attribute,
            )  # fmt: skip
        else:
            first, last = LayerSpec(layers.Embedding, parts), LayerSpec(OutputLayer, parts)
        # Layers before the first transformer layer: embedding and, if any, the position table.
        before = len(body) - parts.model.num_layers
        inner = [bound + before for bound in stage_bounds[1:-1]]
        self._stage_parts = [0, *inner, len(body) + 2]
        topology = PipeModelDataParallelTopology(
            num_pp=layout.pp_size, num_mp=layout.tp_size, num_dp=layout.dp_size
        )
        # DeepSpeed prints its partition here; `--dry_run` and the start-up lines show ours.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__([first, *body, last], topology=topology)

    def _partition_layers(self, method: str = "uniform") -> None:
        """DeepSpeed's hook for the split, replaced: balanced by cost, head included."""
        self.parts = self._stage_parts
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    @contextlib.contextmanager
    def targets_of_step(self, targets: Iterable[Targets]) -> Iterator[None]:
        """Within it each forward pass of the last stage takes the next of these.

        They do not travel through the pipeline: every rank has read them (see `PrefixMasks`).
        """
        self._targets.extend(targets)
        try:
            yield
        finally:
            self._targets.clear()

    def forward(self, forward_input: Tensor) -> Tensor:
        """This stage's layers on one micro-batch: tokens [B, S] or the hidden state before them.

        Returns: the hidden state, on the last stage the scalar loss (see `LossFunction`).
        """
        self.prefix_masks.advance(forward_input.device)
        hidden_SBD = super().forward(forward_input)
        if self.stage_id < self.num_stages - 1:
            return hidden_SBD
        tied = self.tied_modules["embedding"].word_embeddings if self.tied else None
        head = self.forward_funcs[-1] if tied is None else tied
        return self.student_loss(hidden_SBD, head.weight, self._targets.popleft())


@contextlib.contextmanager
def gathered(parameter: nn.Parameter, *, write: bool = False) -> Iterator[None]:
    """The whole of a tensor-parallel shard that ZeRO 3 may have cut up further."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield


def initialize_weights(
    student: nn.Module,
    parts: layers.ModelParts,
    seed: int,
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> dict[str, WeightSpec]:
    """Fill this rank's parameters: the same model from the same seed at every layout.

    Args:
        weights: (canonical name, whole weight) of every weight, in place of random ones. Rows of
            the vocabulary behind the student's are left out.
    Returns: the table of the whole model's weights.
    Mutates: the parameters and their tensor-parallel marks.
    Raises: RuntimeError for a parameter that the weight table or `weights` lacks.
    """
    table = weight_table(parts.model, parts.vocab_size, parts.num_positions)
    parameters = layers.canonical_parameters(student)
    if unknown := sorted(set(parameters) - set(table)):
        raise RuntimeError(f"missing from the weight table: {', '.join(unknown)}")
    if weights is None:
        weights = ((name, initial_weight(table[name], parts.model, seed)) for name in parameters)
    filled = set()
    for name, full in weights:
        if name not in parameters:  # another stage's
            continue
        parameter, spec = parameters[name], table[name]
        # megatron-core sets this mark in the initialisation that ours replaces. By it gradient
        # norms count a replicated weight once and a sharded one on every rank.
        parameter.tensor_model_parallel = spec.sharding != "replicated"  # type: ignore[attr-defined]
        rows = full[: spec.shape[0]] if spec.sharding == "vocab_rows" else full
        part = shard(rows, spec, parts.tp_rank, parts.tp_size, parts.padded_vocab)
        with gathered(parameter, write=True), torch.no_grad():
            parameter.copy_(part)
        filled.add(name)
    if missing := sorted(set(parameters) - filled):
        raise RuntimeError(f"no weights for {', '.join(missing)}")
    return table


def sum_partial_gradients(student: nn.Module, group: dist.ProcessGroup) -> None:
    """Add up, over tp, the gradients of weights that saw only this rank's tokens or heads, as they
    appear.

    For the ZeRO stages that give a gradient away before the step is over; elsewhere
    `gradients.sum_partial` does it once per step, as megatron-core does.

    Collectives: an all-reduce over tp per such weight (D numbers, or a learned position table) and
        micro-batch.
    """

    def all_reduce(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in student.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(all_reduce)


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: matrices decay, norms and biases do not."""
    named = layers.canonical_parameters(student)
    sizes = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in named.items()}
    groups = [
        {"params": [p for n, p in named.items() if sizes[n] >= 2], "weight_decay": weight_decay},
        {"params": [p for n, p in named.items() if sizes[n] < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
