"""The product of rows with the weights of the expert that each belongs to: rows lie expert by expert.

In: rows [r, in], stacked weights [experts, out, in] (or transposed [experts, in, out]) and how many rows each expert
has, known on the host. Out: [r, out]. Every floating type, on every device; where experts have as many rows each, one
batched product. Weights of experts without rows get a gradient of zero, so that every rank reduces the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.runtime.split_backward import Accumulator, SplitBackward, WeightGradient
from meshwright.runtime.state import local_tensor
from meshwright.runtime.tensor_parallel.linear import local


def grouped_linear(
    rows: Tensor, weight: Tensor, counts: Sequence[int], transposed: bool, split: SplitBackward | None = None
) -> Tensor:
    """`weight` is the parameter itself; while `split` is active its gradient is left for later."""
    if split is not None and split.active:
        return _Grouped.apply(rows, (weight,), tuple(counts), transposed, split)  # pyright: ignore[reportReturnType]
    return _Grouped.apply(rows, local(weight), tuple(counts), transposed, None)  # pyright: ignore[reportReturnType]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | tuple[Tensor],
        counts: tuple[int, ...],
        transposed: bool,
        split: SplitBackward | None,
    ) -> Tensor:
        stacked = local_tensor(weight[0]) if isinstance(weight, tuple) else weight
        ctx.save_for_backward(rows, stacked)
        ctx.parameter, ctx.counts, ctx.transposed, ctx.split = weight, counts, transposed, split
        return _products(rows, stacked if transposed else stacked.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        rows, stacked = ctx.saved_tensors
        grad = grads[0].contiguous()
        inputs = _products(grad, stacked.transpose(1, 2) if ctx.transposed else stacked, ctx.counts)
        if ctx.split is None:
            return inputs, _weight_gradient(rows, grad, ctx.counts, ctx.transposed), None, None, None
        left = _LeftOfExperts(rows.detach(), grad.detach(), ctx.parameter[0], ctx.counts, ctx.transposed)
        ctx.split.leave(left)
        return inputs, None, None, None, None


@dataclass(frozen=True, eq=False)
class _LeftOfExperts:
    """Rows of all experts and the gradients of their products with the stacked weights."""

    rows: Tensor
    grad: Tensor
    weight: Tensor
    counts: tuple[int, ...]
    transposed: bool

    @property
    def parameters(self) -> Sequence[Tensor]:
        return (self.weight,)

    def gradients(self) -> list[WeightGradient]:
        return [(self.weight, _weight_gradient(self.rows, self.grad, self.counts, self.transposed))]

    def add_to(self, sums: Accumulator) -> None:
        for parameter, gradient in self.gradients():
            sums.accumulate(parameter, gradient)


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _even(counts: Sequence[int]) -> int | None:
    """Rows of each expert, if all have as many."""
    return counts[0] if len(set(counts)) == 1 and counts[0] else None


def _products(rows: Tensor, matrices: Tensor, counts: Sequence[int]) -> Tensor:
    """rows [r, k] x matrices [experts, k, n] -> [r, n]"""
    each = _even(counts)
    if each is not None:
        return torch.bmm(rows.view(len(counts), each, -1), matrices).view(rows.shape[0], -1)
    result = rows.new_empty((rows.shape[0], matrices.shape[2]))
    for expert, run in _runs(counts):
        torch.mm(rows[run], matrices[expert], out=result[run])
    return result


def _weight_gradient(rows: Tensor, grad: Tensor, counts: Sequence[int], transposed: bool) -> Tensor:
    """[experts, out, in], or [experts, in, out] if transposed."""
    left, right = (rows, grad) if transposed else (grad, rows)
    each, experts = _even(counts), len(counts)
    if each is not None:
        return torch.bmm(left.view(experts, each, -1).transpose(1, 2), right.view(experts, each, -1))
    gradient = rows.new_zeros((experts, left.shape[1], right.shape[1]))
    for expert, run in _runs(counts):
        torch.mm(left[run].t(), right[run], out=gradient[expert])
    return gradient
