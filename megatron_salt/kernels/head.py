"""The three matrix products of an output head, with fp32 accumulation.

Letters: N tokens, D width of the hidden state, W vocabulary columns on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Head:
    """An output head's weight [W, D] and what is multiplied with it.

    16-bit operands with an fp32 result are one product on CUDA. The CPU has none such: there the
    weight is brought to fp32 a block of vocabulary columns at a time. The block in use and the next
    take at most an eighth of the byte budget.
    """

    def __init__(self, weight_WD: Tensor, budget_bytes: int) -> None:
        self.weight_WD = weight_WD
        self._converts = weight_WD.device.type != "cuda" and weight_WD.element_size() < 4
        self._columns_per_block = max(1, budget_bytes // 16 // (4 * weight_WD.shape[1]))
        columns = min(self._columns_per_block, weight_WD.shape[0])
        self.block_bytes = 2 * columns * 4 * weight_WD.shape[1] if self._converts else 0
        """Of both blocks in fp32, however many tokens there are."""

    def operand_dtype(self, logits_dtype: torch.dtype) -> torch.dtype:
        """In which dtype the products want the gradient of logits of a dtype."""
        return logits_dtype if self._converts else self.weight_WD.dtype

    def scratch_bytes_per_token(self) -> int:
        """Of what the products below make for a moment: hidden states or their gradient, also in
        fp32 where they are converted, and then the logits of a block."""
        width, size = self.weight_WD.shape[1], self.weight_WD.element_size()
        if not self._converts:
            return size * width
        return (4 + size) * width + 4 * min(self._columns_per_block, self.weight_WD.shape[0])

    def logits_(self, hidden_ND: Tensor, out_NW: Tensor) -> None:
        """out = hidden @ weight.T, in out's dtype. Mutates: out_NW."""
        if out_NW.dtype == hidden_ND.dtype:
            torch.mm(hidden_ND, self.weight_WD.t(), out=out_NW)
        elif not self._converts:
            torch.mm(hidden_ND, self.weight_WD.t(), out_dtype=out_NW.dtype, out=out_NW)
        else:
            hidden_ND = hidden_ND.float()
            for columns, weight_BD in self._blocks():
                out_NW[:, columns] = hidden_ND @ weight_BD.t()

    def hidden_gradient(self, grad_NW: Tensor) -> Tensor:
        """grad @ weight, rounded once to the weight's dtype. [N, D]"""
        if grad_NW.dtype == self.weight_WD.dtype:
            return grad_NW @ self.weight_WD
        total_ND = grad_NW.new_zeros((len(grad_NW), self.weight_WD.shape[1]), dtype=torch.float32)
        for columns, weight_BD in self._blocks():
            total_ND.addmm_(grad_NW[:, columns], weight_BD)
        return total_ND.to(self.weight_WD.dtype)

    def add_weight_gradient_(self, grad_NW: Tensor, hidden_ND: Tensor, out_WD: Tensor) -> None:
        """out += grad.T @ hidden, in fp32. Mutates: out_WD."""
        if grad_NW.dtype == hidden_ND.dtype == out_WD.dtype:
            out_WD.addmm_(grad_NW.t(), hidden_ND)
        elif not self._converts:
            torch.addmm(out_WD, grad_NW.t(), hidden_ND, out_dtype=out_WD.dtype, out=out_WD)
        else:
            hidden_ND = hidden_ND.float()
            for start in range(0, len(out_WD), self._columns_per_block):
                columns = slice(start, start + self._columns_per_block)
                out_WD[columns].addmm_(grad_NW[:, columns].t().float(), hidden_ND)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.weight_WD), self._columns_per_block):
            columns = slice(start, start + self._columns_per_block)
            yield columns, self.weight_WD[columns].float()
