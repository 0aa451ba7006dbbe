"""What layers cost, and the split of layers over pipeline stages that follows from it."""

from __future__ import annotations

from functools import cache
from itertools import accumulate

from megatron_salt.config.fields import ModelConfig


def layer_costs(model: ModelConfig, vocab_size: int, seq_length: int) -> tuple[float, ...]:
    """Multiply-adds per token of the pipeline's parts: embedding, L layers, head."""
    d, head = model.hidden_size, model.head_size
    query_size = model.num_attention_heads * head
    qkv = d * (query_size + 2 * model.query_groups * head)
    mlp = d * model.ffn_size * (3 if model.is_gated else 2)
    # Linear layers cost their weights. Scores and values look at half the sequence each (causal).
    layer = qkv + query_size * d + mlp + seq_length * query_size
    # The embedding is a look-up.
    return (0.0, *[float(layer)] * model.num_layers, float(d * vocab_size))


@cache  # the planner asks for the same ones at many sizes of the other axes
def balanced_stages(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Stage bounds over transformer layers, minimising the slowest stage's cost, then the next.

    Args:
        costs: `layer_costs`; the embedding stays on the first stage, the head on the last.
    Returns: `num_stages + 1` bounds over the L layers, from 0 to L; every stage has a layer.
    """
    num_layers = len(costs) - 2
    if num_stages > num_layers:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} pipeline stages")
    prefix = list(accumulate(costs[1:-1], initial=0.0))

    @cache
    def best(stage: int, start: int) -> tuple[tuple[float, ...], int]:
        """Costs of stages `stage`.. from layer `start`, largest first, and where this one stops."""
        embedding = costs[0] if stage == 0 else 0.0
        if stage == num_stages - 1:
            return (prefix[-1] - prefix[start] + embedding + costs[-1],), num_layers
        choices = []
        for stop in range(start + 1, num_layers - (num_stages - 2 - stage)):
            here = prefix[stop] - prefix[start] + embedding
            rest = best(stage + 1, stop)[0]
            # All stages, not the slowest alone: where a heavy head sets the pace the others must
            # be even too, because the first stage holds the most activations. Of equal splits the
            # one with fewer layers on later stages: the last one also computes the loss.
            choices.append((tuple(sorted((here, *rest), reverse=True)), -stop))
        largest_first, negative_stop = min(choices)
        return largest_first, -negative_stop

    bounds = [0]
    for stage in range(num_stages):
        bounds.append(best(stage, bounds[-1])[1])
    return tuple(bounds)
