"""Bytes on a rank, part by part: the one set of formulas of `--dry_run` and `megatron-salt plan`.

Arithmetic on sizes; nothing is allocated. Each formula says which code allocates what it counts,
and tests/distributed/test_memory.py counts the tensors of real runs against it. Letters: B
micro-batch, S sequence, R rows of a replica's step, D student width, E teacher width, F inner MLP
width, Q and G widths of all query and all key heads, W vocabulary columns of a rank, w bytes of an
element in the model's precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_salt.config.deepspeed import DeepSpeedSettings
from megatron_salt.config.fields import RunConfig
from megatron_salt.model.weights import output_weight_name, padded_vocab, shard_shape, weight_table
from megatron_salt.parallel.layout import Layout, split_evenly
from megatron_salt.planner.sizes import BYTES, Sizes
from megatron_salt.teacher.plan import TeacherPlan, teaches_ahead

# Elements that DeepSpeed flattens at a time to reduce them (MEMORY_OPT_ALLREDUCE_SIZE).
REDUCED_TOGETHER = 500_000_000
# Bytes of optimiser state per parameter, beside a master copy; Adam's two moments for all others.
STATE_BYTES = {"sgd": 0, "adagrad": 4, "lion": 4}


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage. The first eight are there throughout the phase."""

    parameters: int
    """Number of parameters of this stage on one tensor-parallel rank (not bytes)."""
    weights: float
    gradients: float
    optimizer: float
    """Master weights and optimiser state."""
    teacher: float
    """Its layers, or this rank's part of them."""
    teacher_head: float
    """Its output head in this rank's vocabulary columns, on the last stage."""
    hidden_states: float
    """Buffers for the teacher's hidden states."""
    inputs: float
    """Tokens, labels and weights of this step and tokens of the next, rotary tables."""
    pipeline: float
    """DeepSpeed's buffers between stages, and the gathered input of sequence parallelism."""
    masks: float
    """Attention masks of rows with a prefix, of the micro-batches in flight."""
    activations: float
    """What the micro-batches in flight keep for their backward."""
    buckets: float
    """ZeRO's buffers for gradients on their way, while the backward runs."""
    loss: float
    """Largest of the loss (last stage), the backward of a layer and the teacher's own forward:
    what comes on top of the activations for a moment."""
    update: float
    """What gradient reduction and optimizer take, when the activations are gone."""

    @property
    def model_states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """At the worst moment."""
        teacher = self.teacher + self.teacher_head + self.hidden_states
        lasting = self.model_states + teacher + self.inputs + self.pipeline
        passing = self.masks + self.activations + self.buckets + self.loss
        return lasting + max(passing, self.update)


def stage_parameters(config: RunConfig, vocab_size: int, bounds: Sequence[int]) -> list[int]:
    """Parameters on one tensor-parallel rank of every stage; vocabulary padding included.

    Source: `weight_table`, from which the weights themselves are made. Layers are alike, so the
    first one's stand for all.
    """
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    padded = padded_vocab(model, vocab_size, tp)
    table = weight_table(model, vocab_size, config.num_positions)
    numel = {name: math.prod(shard_shape(spec, tp, padded)) for name, spec in table.items()}
    layer = sum(size for name, size in numel.items() if name.startswith("layers.0."))
    counts = [layer * (stop - start) for start, stop in pairwise(bounds)]
    for name, size in numel.items():
        if not name.startswith("layers."):
            first = name.startswith(("embedding", "position_embedding"))
            counts[0 if first else -1] += size
    if not model.untie_embeddings_and_output_weights and len(counts) > 1:
        counts[-1] += numel[output_weight_name(model)]  # the last stage's copy
    return counts


def communication_bytes(settings: DeepSpeedSettings) -> int:
    """Of one element of a gradient that travels between data-parallel ranks.

    Source: DeepSpeed's `communication_data_type`, by default the model's precision, whatever the
    gradients were added up in.
    """
    wanted = settings.values.get("communication_data_type")
    return BYTES[wanted or settings.precision]


def model_states(parameters: int, settings: DeepSpeedSettings, layout: Layout) -> dict[str, float]:
    """Fields of `StageMemory` that follow from `parameters` parameters and the ZeRO stage.

    With P parameters, d data-parallel ranks, a bytes of an accumulated gradient:
      weights    w P; stage 3: w P / d, and of what is gathered at most stage3_max_live_parameters
      gradients  stage 0: w P; 1: w P, and a P beside them if a is not w; 2 and 3: a P / d;
                 bf16 with fp32 sums in stage 1: 4 P, whole on every rank (a bf16 gradient goes when
                 it is added; with bf16.immediate_grad_update false they stay: 2 P more)
      optimizer  state 8 P (Adam), and a master copy 4 P of 16-bit weights; both divided by d from
                 stage 1 on, where fp32 weights have a master copy too
      buckets    reduce_bucket_size elements in stages 1 to 3, twice with overlap_comm
      update     copies while gradients are reduced and the optimizer runs; PyTorch's own Adam
                 (torch_adam) makes two more of its part, which fused ones do not

    Source: ZeRO, arXiv 1910.02054, section 3, and DeepSpeed 0.19's `BF16_Optimizer`,
    `DeepSpeedZeroOptimizer` and `DeepSpeedZeroOptimizer_Stage3`, which keep more than it counts.
    """
    w, a, d = BYTES[settings.precision], BYTES[settings.accumulation], layout.dp_size
    stage, zero = settings.zero_stage, settings.values.get("zero_optimization", {})
    optimizer_section = settings.values.get("optimizer", {})
    state = STATE_BYTES.get(str(optimizer_section.get("type", "")).lower(), 8)
    # PyTorch's own Adam makes its denominator anew, twice, of a flat part of all weights.
    adam = optimizer_section.get("params", {})
    unfused = bool(adam.get("torch_adam")) and not adam.get("fused")
    scratch = 8.0 * parameters / d if unfused and stage > 0 else 0.0
    bucket = float(zero.get("reduce_bucket_size", REDUCED_TOGETHER)) * w
    weights: float = w  # of one parameter, as the next two
    gradients: float = w
    optimizer = (4 + state) / d
    buckets, gathered = 0.0, 0
    if stage == 0:  # fp32 alone; 16 bits need ZeRO
        optimizer = state
        update = float(w * min(parameters, REDUCED_TOGETHER) if d > 1 else 0)
    elif settings.uses_bf16_optimizer:
        # Sums are reduced in one piece: copied together unless that is too much, and in the
        # precision that travels.
        gradients = 4 if settings.values["bf16"].get("immediate_grad_update", True) else 6
        flat = 4.0 * parameters if parameters <= REDUCED_TOGETHER else 0.0
        sent = communication_bytes(settings)
        update = max(flat + (sent * parameters if sent != 4 else 0), scratch)
    elif stage == 3:
        weights, gradients, buckets, update = w / d, a / d, bucket, scratch
        gathered = w * min(parameters, int(zero.get("stage3_max_live_parameters", 1e9)))
    else:
        gradients = a / d if stage == 2 else w + (a if a != w else 0.0)
        buckets = bucket * (2 if zero.get("overlap_comm") else 1)
        # This rank's part of the gradient, flattened, in fp32 for the optimizer.
        update = parameters * (4 + (a if stage == 1 else 0)) / d
        if layout.pp_size > 1:  # the pipeline reduces at the end, and makes another bucket for that
            update += bucket + buckets
        update += scratch
    return {
        "weights": parameters * weights + gathered, "gradients": parameters * gradients,
        "optimizer": parameters * optimizer, "buckets": buckets, "update": update,
    }  # fmt: skip


def _norm_bytes(sizes: Sizes) -> int:
    """What a norm keeps: its input and its output, which the next product needs.

    RMSNorm's reciprocal root, and LayerNorm's mean with it, in fp32 on CUDA. The CPU has no fused
    RMSNorm: input and normalised input are kept in fp32.
    """
    model, w = sizes.config.model, sizes.width
    if model.normalization == "LayerNorm":
        per_token = 2 * w * model.hidden_size + 2 * (4 if sizes.on_cuda else w)
    elif sizes.on_cuda:
        per_token = 2 * w * model.hidden_size + 4
    else:
        per_token = (8 + w) * model.hidden_size + 4
    return sizes.local_tokens * per_token


def layer_bytes(sizes: Sizes) -> int:
    """What one transformer layer keeps of a micro-batch for its backward, without recomputation.

    Derived from what the layers of `model/layers.py` save (no dropout, attention never whole), in
    the manner of Korthikanti et al., arXiv 2205.05198, section 4, whose 34 S B D are those of a
    GELU MLP of 4 D with dropout:
      two norms    `_norm_bytes`
      attention    w (3 Q + 3 G): rotated queries and keys, the product they came from (values are
                   a view of it), the result; w (2 Q + 2 G) without rotation; 4 bytes a head for
                   its log-sum. With a mask and groups, keys and values are repeated: w 4 Q
      MLP          SwiGLU 3 F on CUDA (both parts, their product), 5 F elsewhere; GELU 2 F
    """
    model, w, tp = sizes.config.model, sizes.width, sizes.layout.tp_size
    query = model.num_attention_heads * model.head_size // tp
    key = model.query_groups * model.head_size // tp
    rope = model.position_embedding_type == "rope"
    attention = 3 * query + 3 * key if rope else 2 * query + 2 * key
    if sizes.has_prefixes and key < query:
        attention = 4 * query if rope else 4 * query + 2 * key
    mlp = 2 if not model.is_gated else 3 if sizes.on_cuda else 5
    per_token = w * (attention + mlp * model.ffn_size // tp) + 4 * model.num_attention_heads // tp
    if model.qk_layernorm:  # as `_norm_bytes`, but what it reads is kept anyway
        heads = (model.num_attention_heads + model.query_groups) // tp
        per_token += 4 * heads if sizes.on_cuda else 8 * (query + key) + 4 * heads
    return 2 * _norm_bytes(sizes) + sizes.tokens * per_token


def activation_bytes(sizes: Sizes, stage: int) -> float:
    """What the micro-batches in flight of a stage keep; with full recomputation the input of every
    layer."""
    layers = sizes.bounds[stage + 1] - sizes.bounds[stage]
    num = sizes.in_flight(stage)
    norm = _norm_bytes(sizes) if stage == sizes.layout.pp_size - 1 else 0
    full = sizes.config.parallel.recompute_granularity == "full"
    kept = sizes.hidden_bytes if full else layer_bytes(sizes)
    return float(num * (layers * kept + norm))


def backward_bytes(sizes: Sizes) -> float:
    """Gradients that exist at once in the backward of an MLP: of its two products' results and of
    its input and output, of all tokens; with full recomputation the layer made again."""
    model = sizes.config.model
    inner = (3 if model.is_gated else 2) * model.ffn_size // sizes.layout.tp_size
    again = layer_bytes(sizes) if sizes.config.parallel.recompute_granularity == "full" else 0
    return float(sizes.width * sizes.tokens * (inner + 2 * model.hidden_size) + again)


def loss_bytes(sizes: Sizes) -> float:
    """The loss on a rank of the last stage: a chunk of tokens, and what waits for the backward, the
    gradients of the hidden states and, in fp32, of the head; the teacher's states in order.

    Source: `kernels.chunks.Heads.bytes_per_token`, `linear_kd_loss`, `LossFunction`.
    """
    model, salt, width = sizes.config.model, sizes.config.salt, sizes.width
    columns, teacher = sizes.columns, sizes.teacher
    logits = 4 if salt.logits_dtype == "fp32" else width
    converts = not sizes.on_cuda and width < 4
    per_token = columns * logits * (2 if teacher else 1)
    if logits != width and not converts:  # the products want the gradient in their precision
        per_token += columns * width
    budget, fixed = salt.loss_chunk_mib << 20, 0
    scratch = []
    for hidden_size in (model.hidden_size, teacher.model.hidden_size if teacher else 0):
        rows = min(max(1, budget // 16 // (4 * hidden_size)), columns) if hidden_size else 0
        scratch.append((4 + width) * hidden_size + 4 * rows if converts else width * hidden_size)
        fixed = max(fixed, 8 * rows * hidden_size if converts else 0)
    per_token += max(scratch)
    if sizes.config.parallel.sequence_parallel:
        per_token += 3 * model.hidden_size * width
    chunk = min(budget, sizes.tokens * per_token + fixed)
    states = sizes.tokens * teacher.model.hidden_size * width if teacher else 0
    return chunk + states + model.hidden_size * (4.0 * columns) + sizes.hidden_bytes


def teacher_forward_bytes(sizes: Sizes) -> float:
    """A piece of rows in a layer of the teacher, no gradients: its input, the normalised one and
    the larger of attention (the product, and rotated queries in three parts) and MLP.

    Source: `TeacherPass.run`, `layers.DecoderLayer`. Spread over ranks, each has its part of the
    heads and of the MLP.
    """
    if sizes.teacher is None:
        return 0.0
    model = sizes.teacher.model
    start, stop = sizes.shape.pieces[0]
    query, key = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
    mlp = 2 if not model.is_gated else 3 if sizes.on_cuda else 5
    inner = max(4 * query + 3 * key, mlp * model.ffn_size) / sizes.config.teacher_tp_size
    tokens = (stop - start) * sizes.config.data.seq_length
    return float(tokens * sizes.width * (2 * model.hidden_size + inner))


def mask_bytes(sizes: Sizes, stage: int) -> float:
    """[B, 1, S, S] in the model's precision for each micro-batch in flight, where rows have a
    prefix, and one of the teacher's (`PrefixMasks.use`)."""
    if not sizes.has_prefixes:
        return 0.0
    count = sizes.in_flight(stage) + (1 if sizes.teacher else 0)
    return float(count * sizes.tokens * sizes.config.data.seq_length * sizes.width)


def pipeline_bytes(sizes: Sizes, stage: int) -> float:
    """Hidden states that DeepSpeed's `PipelineEngine` holds, and megatron-core's gathered input.

    Buffers to receive an activation and a gradient (`pipe_recv_buf`, `grad_layer`); the received
    input of each micro-batch in flight with one gradient, beside its copy that the layers use; its
    output. Partitioned, buffers and outputs are 1/tp and the input is not copied. On the last stage
    the outputs of two micro-batches, and input and gradient of the last loss.
    """
    own, tp_size = sizes.hidden_bytes, sizes.layout.tp_size
    total = 0.0
    if sizes.config.parallel.sequence_parallel:
        total += own * tp_size
    last = sizes.layout.pp_size - 1
    if last == 0:
        return total
    part = own / tp_size if sizes.partitioned else own
    num = sizes.in_flight(stage)
    if stage > 0:
        copies = 0 if sizes.partitioned and sizes.on_cuda else num
        total += part + own * (copies + 1)
    if stage < last:
        total += part + num * part
    else:
        total += own * (min(2, sizes.settings.num_micro_batches) + 2)
    return total


def input_bytes(sizes: Sizes) -> float:
    """Tokens and labels (int64) and mask (fp32) of this step's rows and the next one's, the CE and
    KD weights of this one's (fp32), and cosine and sine of the rotary angles."""
    data, model = sizes.config.data, sizes.config.model
    rows = sizes.settings.micro_batch_size * sizes.settings.num_micro_batches
    total = rows * data.seq_length * (2 * (8 + 8 + 4) + 2 * 4)
    for each in (model, sizes.teacher.model if sizes.teacher else None):
        if each is not None and each.position_embedding_type == "rope":
            total += 2 * sizes.width * data.seq_length * each.head_size
    return float(total)


def hidden_state_bytes(sizes: Sizes, stage: int, plan: TeacherPlan | None) -> float:
    """Buffers for the teacher's hidden states, as `Teacher.prepare` makes them: on the last stage
    all R rows, twice when taught ahead; elsewhere the rows of the rank.

    Args:
        plan: who teaches which rows; None: equal shares.
    """
    if sizes.teacher is None:
        return 0.0
    layout, num_rows = sizes.layout, sizes.shape.num_rows
    if stage == layout.pp_size - 1:
        ahead = teaches_ahead(sizes.config.teacher.placement, layout)
        return float(sizes.hidden_row_bytes * num_rows * (2 if ahead else 1))
    if plan is None:
        pieces = sizes.shape.pieces
        first, last = split_evenly(len(pieces), sizes.shape.teachers_per_stage * layout.pp_size)[0]
        start, stop = pieces[first][0], pieces[last - 1][1]
    else:
        start, stop = plan.rows(stage, 0)
    return float(sizes.hidden_row_bytes * (stop - start))


def stage_memory(sizes: Sizes, plan: TeacherPlan | None = None) -> list[StageMemory]:
    """Bytes per rank of every stage: in the KD phase with a teacher, in the LM phase without.

    Args:
        plan: the teacher's, where it is known; else its rows are shared equally.
    """
    config, layout, teacher = sizes.config, sizes.layout, sizes.teacher
    result = []
    for stage, count in enumerate(stage_parameters(config, sizes.vocab_size, sizes.bounds)):
        last = stage == layout.pp_size - 1
        moment = max(backward_bytes(sizes), teacher_forward_bytes(sizes))
        if last:  # the head's gradient has been added to the others when the layers' turn comes
            moment = max(loss_bytes(sizes), moment)
        head = sizes.columns * teacher.model.hidden_size if teacher and last else 0
        whole = teacher.numel(config.teacher_tp_size) if teacher else 0
        result.append(
            StageMemory(
                parameters=count, **model_states(count, sizes.settings, layout),
                teacher=float(whole * sizes.width),
                teacher_head=float(head * sizes.width),
                hidden_states=hidden_state_bytes(sizes, stage, plan),
                inputs=input_bytes(sizes), pipeline=pipeline_bytes(sizes, stage),
                masks=mask_bytes(sizes, stage), activations=activation_bytes(sizes, stage),
                loss=moment,
            )
        )  # fmt: skip
    return result
