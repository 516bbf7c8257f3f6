"""Linear layers split over tp by columns (outputs) or rows (inputs).

In: shapes as `TensorSlice`s of the Hugging Face weights; parameters start on the meta device with their local shape and
are filled by `materialize`. Column layers expect their input to have entered the region; row layers leave it, and add
their bias once, after the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from meshwright.runtime.slices import TensorSlice
from meshwright.runtime.split_backward import LeavesWeights, SplitBackward, split_linear
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion

Slices = Mapping[str, TensorSlice]
"""The slice behind each own parameter ('weight', and 'bias' where there is one)."""


def local(parameter: Tensor) -> Tensor:
    """The local tensor of a parameter, differentiably."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def declare(module: nn.Module, slices: Slices) -> None:
    """Register meta parameters of the local shapes."""
    for name in ("weight", "bias"):
        shape = slices[name].local_shape if name in slices else None
        module.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, device="meta")))


class _Linear(nn.Module):
    """Weight and bias with their slices, and the product over local tensors. `split` is set where a schedule may leave
    weight gradients for later. `sums`: who takes them at once in the other passes (None: autograd delivers them).
    `transposed`: the weight is stored [in, out]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, slices: Slices, transposed: bool) -> None:
        super().__init__()
        self.slices = dict(slices)
        self.transposed = transposed
        self.split: SplitBackward | None = None
        self.sums: LeavesWeights | None = None
        declare(self, slices)

    def product(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        left_to = self.split if self.split is not None and self.split.active else self.sums_of(inputs)
        if left_to is not None:
            return split_linear(inputs, self.weight, bias, self.transposed, left_to)
        weight = local(self.weight)
        return functional.linear(
            inputs, weight.t() if self.transposed else weight, None if bias is None else local(bias)
        )

    def sums_of(self, inputs: Tensor) -> LeavesWeights | None:
        """`sums`, where autograd comes by: it does so for the gradient of the inputs."""
        return self.sums if torch.is_grad_enabled() and inputs.requires_grad else None


class ColumnParallelLinear(_Linear):
    """y = x W^T + b with the outputs split: [.., in] -> [.., out/tp]. `due`: to whom the next call leaves its weight
    gradients (`entering`)."""

    def __init__(self, slices: Slices, transposed: bool = False) -> None:
        super().__init__(slices, transposed)
        self.due: LeavesWeights | None = None

    def forward(self, entered: Tensor) -> Tensor:
        due, self.due = self.due, None
        if due is not None:
            return split_linear(entered, self.weight, self.bias, self.transposed, due)
        return self.product(entered, self.bias)


class FusedColumnParallelLinear(nn.Module):
    """Several column-parallel products whose outputs a model expects side by side (q|k|v, gate|up).

    Each block has its own parameters, split by itself: a slice of the fused tensor would mix blocks across ranks.
    """

    def __init__(self, blocks: Sequence[Slices], transposed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ColumnParallelLinear(slices, transposed) for slices in blocks)

    def forward(self, entered: Tensor) -> Tensor:
        return torch.cat([block(entered) for block in self.blocks], dim=-1)


class RowParallelLinear(_Linear):
    """y = x W^T + b with the inputs split: [.., in/tp] -> [.., out], summed over tp."""

    def __init__(self, slices: Slices, region: TensorParallelRegion, transposed: bool = False) -> None:
        super().__init__(slices, transposed)
        self.region = region

    def forward(self, split: Tensor) -> Tensor:
        summed = self.region.leave(self.product(split, None))
        return summed if self.bias is None else summed + local(self.bias)


def even_blocks(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of consecutive blocks of the given widths."""
    edges = [0]
    for width in widths:
        edges.append(edges[-1] + width)
    return list(pairwise(edges))
