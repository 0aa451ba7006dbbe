"""Gradients between backward and optimizer: added up and clipped where DeepSpeed does not, checked.

DeepSpeed keeps the sum over micro-batches in a place that depends on precision and ZeRO stage;
`accumulated` knows where. Letters: D student width, T tokens, K inputs and N outputs of a linear.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_salt.model.layers import canonical_parameters
from megatron_salt.model.weights import WeightSpec
from megatron_salt.parallel.groups import Groups


def accumulated(parameter: nn.Parameter, optimizer: Any) -> Tensor | None:
    """This rank's sum over micro-batches, where the optimizer keeps it; None: there is none yet.

    Not for ZeRO 2 and 3, which give gradients away as they appear.
    """
    if isinstance(optimizer, BF16_Optimizer):
        return getattr(parameter, "_hp_grad", None)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        gradient: Tensor | None = optimizer.get_param_gradient_attribute(parameter)
        return gradient
    return parameter.grad


def reduce_tied(engine: Any) -> None:
    """Add up the gradients of a tied weight over its stages.

    In place of DeepSpeed's own instruction, which knows `weight.grad` and `BF16_Optimizer`'s sums
    only, and leaves the parts alone where ZeRO 1 adds up micro-batches in another dtype.

    Collectives: one all-reduce of the weight over the stages that share it.
    """
    for weight, group in engine.module.get_tied_weights_and_groups():
        gradient = accumulated(weight, engine.optimizer)
        assert gradient is not None  # every stage has run a backward of its layers
        dist.all_reduce(gradient, group=group)


def sum_partial(student: nn.Module, optimizer: Any, group: dist.ProcessGroup) -> None:
    """Add up, over tp, the gradients of weights that saw only this rank's tokens or heads, once per
    step: those that carry megatron-core's mark `sequence_parallel`.

    Only where whole sums lie on every rank until the update (`DeepSpeedSettings.keeps_whole_sums`).

    Collectives: one all-reduce over tp of all of them: D numbers a norm, and a learned position
        table.
    """
    marked = [p for p in student.parameters() if getattr(p, "sequence_parallel", False)]
    found = [accumulated(parameter, optimizer) for parameter in marked]
    gradients = [gradient for gradient in found if gradient is not None]
    assert len(gradients) == len(marked)  # or they are kept elsewhere, and would not be added up
    if not gradients:  # one rank, or a pipeline stage without norms
        return
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat, group=group)
    torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))


def clip_fp32(engine: Any, groups: Groups) -> None:
    """Clip in fp32 without ZeRO, by the norm of the whole model's gradient, each weight once.

    Replaces DeepSpeed's own, which counts a tied embedding on both of its stages and keeps the
    norm to itself.

    Collectives: an all-reduce of one number over tp and one over pp. Host sync: one.
    """
    squares = torch.zeros((), dtype=torch.float64, device=groups.device)
    gradients = []
    for parameter in engine.module.parameters():
        if parameter.grad is None:
            continue
        gradients.append(parameter.grad)
        sharded = getattr(parameter, "tensor_model_parallel", False)
        replica = getattr(parameter, "ds_pipe_replicated", False)
        if (sharded or groups.tp_rank == 0) and not replica:
            # In fp64 only from the norms of the rows on: a copy of every gradient in fp64 takes
            # longer than all else that is done to gradients here.
            rows = torch.linalg.vector_norm(parameter.grad, dim=-1)
            squares += rows.double().square().sum()
    dist.all_reduce(squares, group=groups.tp)
    dist.all_reduce(squares, group=groups.pp)
    norm = math.sqrt(squares.item())
    engine._global_grad_norm = norm
    limit = engine.gradient_clipping()
    if norm + 1e-6 > limit:  # DeepSpeed's ZeRO clips with this epsilon; be the same
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))


@torch.no_grad()
def not_finite(student: nn.Module, groups: Groups) -> str | None:
    """Which of this rank's weights hold an inf or nan, in words; None if all are finite.

    Under ZeRO 3 of the parts that this rank owns. Host sync: one.
    """
    named = canonical_parameters(student)
    finite = [_own_part(p, groups).isfinite().all().to(groups.device) for p in named.values()]
    found = [n for n, good in zip(named, torch.stack(finite).tolist(), strict=True) if not good]
    return f"weight {', '.join(found)} has inf or nan" if found else None


def _own_part(parameter: nn.Parameter, groups: Groups) -> Tensor:
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter
    start = groups.dp_rank * part.numel()  # the last part is padded with anything
    return part.flatten()[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]


class _AccumulatingProduct:
    """Stands in for apex's extension of this name, with PyTorch's own product."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input_TK: Tensor, grad_TN: Tensor, main_grad_NK: Tensor) -> None:
        """main_grad += grad.T @ input, 16-bit operands added up in fp32. Mutates: main_grad_NK."""
        if input_TK.is_cuda:
            operands = main_grad_NK, grad_TN.t(), input_TK
            torch.addmm(*operands, out_dtype=torch.float32, out=main_grad_NK)
        else:
            main_grad_NK.addmm_(grad_TN.t().float(), input_TK.float())


def provide_accumulating_product() -> None:
    """Let megatron-core's linears be built with gradient_accumulation_fusion, apex or not."""
    if not tensor_parallel_layers._grad_accum_fusion_available:
        tensor_parallel_layers.fused_weight_gradient_mlp_cuda = _AccumulatingProduct
        tensor_parallel_layers._grad_accum_fusion_available = True


class FusedAccumulation:
    """Weight gradients of megatron-core's linears, added by the product itself to DeepSpeed's sums.

    The backward then hands on no gradient, so DeepSpeed's hooks do not see these weights: they get
    their sums here, and `announce` says that these are there. Nothing for a model built without
    gradient_accumulation_fusion.
    """

    def __init__(self, student: nn.Module, optimizer: Any) -> None:
        self._optimizer = optimizer
        linears = ColumnParallelLinear, RowParallelLinear
        fused = {
            id(layer.weight)
            for layer in student.modules()
            if isinstance(layer, linears) and layer.gradient_accumulation_fusion
        }
        self._places: list[tuple[int, int]] = []
        for group, parameters in enumerate(optimizer.bf16_groups if fused else ()):
            for place, parameter in enumerate(parameters):
                if id(parameter) in fused:
                    parameter._hp_grad = optimizer.fp32_groups_gradients[group][place]
                    parameter.main_grad = parameter._hp_grad.view(parameter.shape)
                    self._places.append((group, place))
        assert len(self._places) == len(fused)

    def announce(self) -> None:
        """Before the update, which leaves out what it has not been told of."""
        for group, place in self._places:
            self._optimizer.fp32_groups_has_gradients[group][place] = True


class GradientCheck:
    """Does every weight get a gradient? Asked of what the optimizer is given, in a first step.

    A right loss and a falling one prove nothing: a weight that is cut off stays as it was drawn,
    and the others learn around it.

    Args:
        table: of the student's weights; a vocabulary's shard may hold no token of a step.
    """

    def __init__(self, student: nn.Module, table: dict[str, WeightSpec], groups: Groups) -> None:
        self._weights = canonical_parameters(student)
        self._table, self._groups = table, groups
        self._found: Tensor | None = None

    @torch.no_grad()
    def look(self) -> None:
        """Between the last backward and the update.

        Collectives: an all-reduce of each weight's gradient over dp, in fp32, a small one over tp.
        """
        found = []
        for parameter in self._weights.values():
            gradient = safe_get_full_grad(parameter)
            if gradient is None:
                found.append(torch.tensor([0, 1], device=self._groups.device))
            else:
                found.append(torch.stack([gradient.any(), gradient.isfinite().all()]).int())
        own = torch.stack(found).to(torch.int32)
        somewhere = own[:, 0].clone()
        dist.all_reduce(somewhere, op=dist.ReduceOp.MAX, group=self._groups.tp)
        for place, name in enumerate(self._weights):
            if self._table[name].sharding == "vocab_rows":
                own[place, 0] = somewhere[place]
        self._found = own

    def problem(self) -> str | None:
        """What `look` has found wrong on this rank, in words; None if all is well. Host sync: one.

        Raises: RuntimeError if nothing has looked.
        """
        if self._found is None:
            raise RuntimeError(
                "no optimizer step has been taken since the gradients were to be seen"
            )
        rows = list(zip(self._weights, self._found.tolist(), strict=True))
        bad = [name for name, (_, finite) in rows if not finite]
        if bad:
            return f"the gradient of {', '.join(bad)} is not finite"
        missing = [name for name, (nonzero, _) in rows if not nonzero]
        return f"{', '.join(missing)} got no gradient" if missing else None
