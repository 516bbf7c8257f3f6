"""Entering a block whose column-parallel products leave their weight gradients to the node that enters it.

In backward that node begins to sum the gradient of the block's input over tp, computes the weight gradients meanwhile,
and then waits: what Megatron-LM does for each product (`LinearWithGradAccumulationAndAsyncCommunication`), for all of a
block at once. Where nobody sums them up as they come (`sums`), the node has the parameters as inputs, so that autograd
delivers their gradients, with all that hangs on that (FSDP2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.runtime.collectives import gather_sequence
from meshwright.runtime.split_backward import LeavesWeights, LeftWeights
from meshwright.runtime.tensor_parallel.linear import ColumnParallelLinear, local
from meshwright.runtime.tensor_parallel.region import LAYER_INPUT, TensorParallelRegion


class DueWeights:
    """Of one pass through a block: the weight gradients that its products have left."""

    def __init__(self, sums: LeavesWeights | None) -> None:
        self._sums = sums
        self._left: list[LeftWeights] = []

    def leave(self, left: LeftWeights) -> None:
        self._left.append(left)

    def make(self) -> dict[int, Tensor]:
        """Those that autograd is to deliver, by the identity of the parameter (none where there are `sums`). What each
        was made of goes before the next is made."""
        found: dict[int, Tensor] = {}
        self._left.reverse()
        while self._left:
            if self._sums is not None:
                self._sums.leave(self._left.pop())
            else:
                found |= {id(parameter): gradient for parameter, gradient in self._left.pop().gradients()}
        return found


def enter(
    tensor: Tensor, products: Sequence[ColumnParallelLinear], region: TensorParallelRegion, what: str = LAYER_INPUT
) -> Tensor:
    """`region.enter` for what goes through these products, each once. Of a pass whose weight gradients have actions of
    their own (`split`), they are left to those; where there is no backward pass (generation), to nobody."""
    split = any(p.split is not None and p.split.active for p in products)
    if region.axis.size == 1 or split or not torch.is_grad_enabled():
        return region.enter(tensor, what)
    sums = products[0].sums_of(tensor) if products else None
    due = DueWeights(sums)
    for product in products:
        product.due = due
    parameters = [p for product in products for p in (product.weight, product.bias) if p is not None and sums is None]
    by_token = tensor.dim() == 2
    batched = tensor.unsqueeze(0) if by_token else tensor
    entered = _Enter.apply(batched, region, what, due, tuple(map(id, parameters)), *map(local, parameters))
    assert isinstance(entered, Tensor)
    return entered.squeeze(0) if by_token else entered


def hook(block: nn.Module, region: TensorParallelRegion) -> None:
    """Make a module enter the region with its hidden states (first argument, or `hidden_states` by keyword)."""
    products = [part for part in block.modules() if isinstance(part, ColumnParallelLinear)]

    def pre_hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (enter(args[0], products, region), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": enter(kwargs["hidden_states"], products, region)}

    block.register_forward_pre_hook(pre_hook, with_kwargs=True)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        region: TensorParallelRegion,
        what: str,
        due: DueWeights,
        names: tuple[int, ...],
        *_parameters: Tensor,
    ) -> Tensor:
        ctx.region, ctx.what, ctx.due, ctx.names = region, what, due, names
        return gather_sequence(tensor, region.axis, what) if region.sequence_parallel else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # in place where it can be: this is the fresh gradient of the products that read the copy, nobody else holds it
        summed, work = ctx.region.begin_sum(grads[0], ctx.what)
        gradients = ctx.due.make()
        assert work is not None
        work.wait()
        return summed, None, None, None, None, *(gradients.get(name) for name in ctx.names)
