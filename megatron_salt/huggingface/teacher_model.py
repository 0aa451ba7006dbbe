"""Any causal language model of transformers, frozen, as a teacher.

Letters: B micro-batch, S sequence, E teacher width, V the student's vocabulary, W its columns on
this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_salt.checkpoint.manifest import CheckpointManifest
from megatron_salt.huggingface.teacher_folder import read_hf_config, transformers_package
from megatron_salt.kernels import VocabShard
from megatron_salt.model.attention import PrefixMasks
from megatron_salt.parallel.groups import Groups, from_rank_0, same_error_everywhere

PROBE_TOKENS = 64
# What it may change, as a share of the largest number.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class HfModel(nn.Module):
    """A `TeacherModel` out of transformers, whose only chunk it is: how the layers of a body are
    called is each family's own.

    Args:
        head_VE: the whole head in the student's vocabulary.
        head, head_columns: see `FrozenModel`.
    """

    def __init__(
        self,
        body: nn.Module,
        head_VE: Tensor,
        seq_length: int,
        head: VocabShard | None,
        head_columns: int,
    ) -> None:
        super().__init__()
        self.body, self.hidden_size, self.seq_length = body, head_VE.shape[1], seq_length
        self.tp_size = 1  # it is not spread
        self.prefix_masks = PrefixMasks(seq_length, head_VE.dtype)
        self.head_WE: Tensor | None = None
        if head is not None:
            self.head_WE = head_VE.new_zeros((head_columns, self.hidden_size))
            self.head_WE[: head.num_columns] = head_VE[head.start : head.stop]

    def chunk(self, number: int, num_chunks: int) -> Sequence[nn.Module]:
        assert (number, num_chunks) == (0, 1)  # StepShape.of_run
        return [self]

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Last hidden states [S, B, E]; a head with a bias finds a one behind them, then zeros."""
        hidden_BSE = body_states(self.body, tokens_BS)
        if more := self.hidden_size - hidden_BSE.shape[-1]:
            hidden_BSE = F.pad(F.pad(hidden_BSE, (0, 1), value=1.0), (0, more - 1))
        return hidden_BSE.transpose(0, 1)

    def num_bytes(self) -> int:
        """Bytes of weights, buffers and head shard on this rank."""
        head = [] if self.head_WE is None else [self.head_WE]
        return sum(tensor.nbytes for tensor in [*self.parameters(), *self.buffers(), *head])

    def release(self) -> None:
        """Let go of every tensor; the object is of no use afterwards."""
        self.body, self.head_WE = nn.Module(), None


def body_states(body: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Last hidden states [B, S, E] behind the last norm."""
    output = body(input_ids=tokens_BS, use_cache=False)
    return output.last_hidden_state


def load_hf_model(
    folder: Path,
    manifest: CheckpointManifest,
    groups: Groups,
    *,
    seq_length: int,
    dtype: torch.dtype,
    head: VocabShard | None,
    head_columns: int,
) -> HfModel:
    """The model of a Hugging Face folder, frozen, on every rank.

    Args:
        head, head_columns: see `FrozenModel`.
    Collectives: one broadcast per weight and buffer over all ranks; rank 0 alone reads the folder.
    Raises: ValueError on all ranks naming the folder and what of the model cannot be had.
    """
    config: Any = None
    with same_error_everywhere(f"loading teacher {folder}"):
        auto = transformers_package().AutoModelForCausalLM
        if groups.rank == 0:
            config = read_hf_config(folder)
    config = from_rank_0(config)
    head_VE = torch.empty(0)
    with same_error_everywhere(f"loading teacher {folder}"):
        if groups.rank == 0:
            model = _read(folder, auto, dtype).to(groups.device)
            check_weights(folder, model)
            head_VE = folded_head(folder, model, manifest.model.vocab_size, seq_length)
        else:
            with groups.device:
                model = auto.from_config(config, dtype=dtype)
    body = model.base_model.requires_grad_(False).eval()
    del model  # an output head of its own goes with it
    shape = from_rank_0(head_VE.shape)
    if groups.rank != 0:
        head_VE = torch.empty(shape, dtype=dtype, device=groups.device)
    dist.broadcast(head_VE, src=0)
    broadcast_body(body, groups)
    return HfModel(body, head_VE, seq_length, head, head_columns)


def _read(folder: Path, auto: Any, dtype: torch.dtype) -> Any:
    """The whole model on the CPU. Raises: ValueError naming weights that the files do not have."""
    try:
        model, about = auto.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # safetensors' own have no base in common with the others
        raise ValueError(f"teacher.hf = {folder}: transformers cannot read it: {error}") from error
    if missing := sorted(about["missing_keys"]):  # transformers would draw them
        raise ValueError(f"teacher.hf = {folder}: no weight for {missing[:5]}")
    return model.eval()


def check_weights(folder: Path, model: nn.Module) -> None:
    """Raise ValueError naming a weight that is not finite, or a matrix that is all zeros."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and not weight.any():
            raise ValueError(
                f"teacher.hf = {folder}: weight {name} is all zeros; this is not a trained model"
            )
        if not weight.isfinite().all():
            raise ValueError(f"teacher.hf = {folder}: {name} has inf or nan")


@torch.no_grad()
def folded_head(folder: Path, model: Any, vocab_size: int, seq_length: int) -> Tensor:
    """The head [V, E] whose products with the last hidden states are the model's logits.

    Math: logits = f (h W + b). f is folded into W and b, and b is a column of W that meets a one
        behind the states; with it E grows to the next multiple of 8. That this holds is tried on
        tokens, so what a model does to its logits need not be known here.
    Raises: ValueError saying what the logits are instead.
    """
    output, text = model.get_output_embeddings(), model.config.get_text_config()
    source = f"teacher.hf = {folder}: {type(model).__name__}"
    if output is None or model.base_model is model:
        raise ValueError(f"{source} has no output head of its own")
    weight, bias_V = output.weight, getattr(output, "bias", None)
    if len(weight) < vocab_size:
        raise ValueError(
            f"{source}: its output head has {len(weight)} rows, the student's vocabulary "
            f"{vocab_size} tokens"
        )
    if cap := getattr(text, "final_logit_softcapping", None):
        raise ValueError(
            f"{source}: final_logit_softcapping = {cap} bends its logits, which a head cannot: "
            "take another teacher"
        )
    tokens_BS = probe_tokens(vocab_size, min(PROBE_TOKENS, seq_length), weight.device)
    hidden_BSE = body_states(model.base_model, tokens_BS)
    logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits[..., :vocab_size].double()
    plain_BSV = output(hidden_BSE)[..., :vocab_size].double()
    if not logits_BSV.isfinite().all():
        raise ValueError(f"{source}: its logits are not finite in {weight.dtype}")
    fitted = float((logits_BSV * plain_BSV).sum() / plain_BSV.square().sum())
    # The factors of config.json are exact, a fitted one is not.
    named = [getattr(text, "logit_scale", None), 1.0 / (getattr(text, "logits_scaling", 0) or 1)]
    for factor in [1.0, *filter(None, named), fitted]:
        if close(factor * plain_BSV, logits_BSV, weight.dtype):
            break
    else:
        raise ValueError(
            f"{source}: its logits are not last hidden states times its output head, nor that "
            f"times one factor (the nearest is {fitted:.6g}): take another teacher"
        )
    head_VE = weight[:vocab_size] * factor
    if bias_V is not None:
        column_V1 = bias_V[:vocab_size, None] * factor
        head_VE = F.pad(torch.cat([head_VE, column_V1], dim=1), (0, 7 - weight.shape[1] % 8))
    return head_VE.contiguous()


def probe_tokens(vocab_size: int, length: int, device: torch.device) -> Tensor:
    """The same tokens [1, length] at every call, of the whole vocabulary."""
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (1, length), generator=drawn).to(device)


def close(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by no more than rounding to `dtype` explains."""
    return bool(((x - y).abs() <= ROUNDING[dtype] * y.abs().max()).all())


def broadcast_body(body: nn.Module, groups: Groups) -> None:
    """Give every rank rank 0's weights and buffers.

    Collectives: one broadcast of each over all ranks.
    Mutates: on other ranks their values, and shapes and dtypes where loading has changed them.
    """
    tensors = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    table = from_rank_0({name: (t.shape, t.dtype) for name, t in tensors.items()})
    with same_error_everywhere("building the teacher"):
        if table.keys() != tensors.keys():
            odd = sorted(table.keys() ^ tensors.keys())
            raise ValueError(f"rank {groups.rank} builds another model than rank 0 reads: {odd}")
    for name, (shape, dtype) in table.items():
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            tensor.data = torch.empty(shape, dtype=dtype, device=groups.device)
        whole = tensor.data.contiguous()
        dist.broadcast(whole, src=0)
        tensor.data = whole
