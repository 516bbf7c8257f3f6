"""Backward in two parts: gradients of inputs now, gradients of weights later (zero-bubble schedules).

While a chunk's pass is marked as split, its linear layers run through a function whose backward computes the input
gradient only and leaves the weight gradient here as a closure; the executor runs the closures when the schedule says so
(Qi et al. 2023, arXiv 2401.10241). All other parameters (norms, embeddings) get their gradients with the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.runtime.state import local_tensor

WeightGradient = tuple[Tensor, Tensor]
"""(the parameter as the forward pass saw it, its local gradient)"""
Deferred = Callable[[], list[WeightGradient]]


class LeavesWeights(Protocol):
    """Who runs the closures."""

    def leave(self, deferred: Deferred) -> None: ...


class SplitBackward:
    """Of one chunk: whether the pass that runs now is split, and the weight gradients that its backward left."""

    def __init__(self) -> None:
        self.active = False
        self._deferred: list[Deferred] = []

    @contextmanager
    def during(self, split: bool) -> Iterator[None]:
        """Forward and backward inside are split, or not. (Recomputation repeats the forward pass in backward.)"""
        before, self.active = self.active, split
        try:
            yield
        finally:
            self.active = before

    def leave(self, deferred: Deferred) -> None:
        self._deferred.append(deferred)

    def collect(self) -> list[Deferred]:
        """What backward left since the last call."""
        collected, self._deferred = self._deferred, []
        return collected


def split_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, left_to: LeavesWeights
) -> Tensor:
    """A linear product of local tensors whose weight gradients are left to somebody. `weight` and `bias` are the
    parameters themselves (perhaps DTensors)."""
    # in a tuple, so that autograd does not see the parameters: their gradients come from the closures alone
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
        grad = grads[0]
        ctx.left_to.leave(partial(_weight_gradients, inputs.detach(), grad.detach(), *ctx.parameters, ctx.transposed))
        return grad @ (matrix.t() if ctx.transposed else matrix), None, None, None


def _weight_gradients(
    inputs: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> list[WeightGradient]:
    x, g = inputs.reshape(-1, inputs.shape[-1]), grad.reshape(-1, grad.shape[-1])
    found = [(weight, x.t() @ g if transposed else g.t() @ x)]
    if bias is not None:
        found.append((bias, g.sum(dim=0)))
    return found
