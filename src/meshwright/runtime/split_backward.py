"""Backward in two parts: gradients of inputs now, gradients of weights where somebody else makes them.

A linear layer runs through a function whose backward computes the input gradient only and leaves the weight gradient
(`LeftWeights`): to the chunk while its pass is marked as split, whose executor makes them when the schedule says so
(Qi et al. 2023, arXiv 2401.10241); to the entering of a tensor-parallel block; or to plain data parallelism, which sums
them as they come. All other parameters (norms, embeddings) get their gradients with the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.runtime.state import local_tensor

WeightGradient = tuple[Tensor, Tensor]
"""(the parameter as the forward pass saw it, its local gradient)"""


class Accumulator(Protocol):
    """Who sums weight gradients up."""

    def accumulate(self, live: Tensor, gradient: Tensor) -> None: ...

    def accumulate_product(self, live: Tensor, left: Tensor, right: Tensor) -> None:
        """The gradient left @ right, [m, r] x [r, n], which need not exist by itself."""
        ...


class LeftWeights(Protocol):
    """The weight gradients of one product, not made yet: either as tensors, or added to what is accumulated."""

    @property
    def parameters(self) -> Sequence[Tensor]: ...

    def gradients(self) -> list[WeightGradient]: ...

    def add_to(self, sums: Accumulator) -> None: ...


class LeavesWeights(Protocol):
    """Who makes what backward leaves."""

    def leave(self, left: LeftWeights) -> None: ...


class SplitBackward:
    """Of one chunk: whether the pass that runs now is split, and the weight gradients that its backward left."""

    def __init__(self) -> None:
        self.active = False
        self._left: list[LeftWeights] = []

    @contextmanager
    def during(self, split: bool) -> Iterator[None]:
        """Forward and backward inside are split, or not. (Recomputation repeats the forward pass in backward.)"""
        before, self.active = self.active, split
        try:
            yield
        finally:
            self.active = before

    def leave(self, left: LeftWeights) -> None:
        self._left.append(left)

    def collect(self) -> list[LeftWeights]:
        """What backward left since the last call."""
        collected, self._left = self._left, []
        return collected


def split_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, left_to: LeavesWeights
) -> Tensor:
    """A linear product of local tensors whose weight gradients are left to somebody. `weight` and `bias` are the
    parameters themselves (perhaps DTensors)."""
    # in a tuple, so that autograd does not see the parameters: their gradients come from what is left alone
    return _SplitLinear.apply(inputs, (weight, bias), transposed, left_to)  # pyright: ignore[reportReturnType]


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, parameters: tuple[Tensor, Tensor | None], transposed: bool, left_to: LeavesWeights
    ) -> Tensor:
        weight, bias = parameters
        matrix, added = local_tensor(weight), None if bias is None else local_tensor(bias)
        ctx.save_for_backward(inputs, matrix)
        ctx.parameters, ctx.transposed, ctx.left_to = parameters, transposed, left_to
        return functional.linear(inputs, matrix.t() if transposed else matrix, added)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inputs, matrix = ctx.saved_tensors
        grad, (weight, bias) = grads[0], ctx.parameters
        ctx.left_to.leave(_LeftOfLinear(inputs.detach(), grad.detach(), weight, bias, ctx.transposed))
        return grad @ (matrix.t() if ctx.transposed else matrix), None, None, None


@dataclass(frozen=True, eq=False)
class _LeftOfLinear:
    """[.., in] and the gradient [.., out] of a product; the weight is [out, in], or [in, out] if transposed."""

    inputs: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor | None
    transposed: bool

    @property
    def parameters(self) -> Sequence[Tensor]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def gradients(self) -> list[WeightGradient]:
        left, right = self._factors()
        made = [(self.weight, left @ right)]
        if self.bias is not None:
            made.append((self.bias, self._rows(self.grad).sum(dim=0)))
        return made

    def add_to(self, sums: Accumulator) -> None:
        sums.accumulate_product(self.weight, *self._factors())
        if self.bias is not None:
            sums.accumulate(self.bias, self._rows(self.grad).sum(dim=0))

    def _factors(self) -> tuple[Tensor, Tensor]:
        inputs, grad = self._rows(self.inputs), self._rows(self.grad)
        return (inputs.t(), grad) if self.transposed else (grad.t(), inputs)

    @staticmethod
    def _rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1])
