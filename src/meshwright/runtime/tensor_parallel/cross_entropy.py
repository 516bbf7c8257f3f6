"""Cross entropy over logits whose vocabulary is split over tp, without ever gathering them.

In: logits [n, v/tp] and labels [n] (global ids, -100 ignored). Out: the sum of the token losses. Two small all-reduces
forward (largest logit; sum of exponentials with the label's logit), none backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.process_groups import AxisGroup

IGNORED = -100


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the token losses over whole logits, in fp32 or better."""
    return functional.cross_entropy(at_least_fp32(logits), labels, ignore_index=IGNORED, reduction="sum")


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, first_row: int, axis: AxisGroup) -> Tensor:
    """The same over split logits; `first_row` is the global id of this rank's first column."""
    if axis.size == 1:
        return cross_entropy_sum(logits, labels)
    return _VocabParallelCrossEntropy.apply(logits, labels, first_row, axis)  # pyright: ignore[reportReturnType]


def at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first_row: int, axis: AxisGroup) -> Tensor:
        precise = at_least_fp32(logits)
        largest = precise.amax(dim=-1)
        all_reduce(largest, axis, "largest logit", dist.ReduceOp.MAX)
        # in place where it is a copy: with the logits in fp32 beside it, it is the largest tensor of the step
        shifted = precise - largest.unsqueeze(-1) if precise is logits else precise.sub_(largest.unsqueeze(-1))

        column = labels - first_row
        mine = (column >= 0) & (column < logits.shape[-1])
        column = column.masked_fill(~mine, 0).unsqueeze(-1)
        label_logit = shifted.gather(-1, column).squeeze(-1).masked_fill(~mine, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack((exponentials.sum(dim=-1), label_logit))
        all_reduce(sums, axis, "sum of exponentials and label logit")

        counted = labels != IGNORED
        losses = (sums[0].log() - sums[1]).masked_fill(~counted, 0.0)
        ctx.save_for_backward(exponentials, sums[0], column, mine, counted)
        ctx.logits_dtype = logits.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials, total, column, mine, counted = ctx.saved_tensors
        scale = counted.to(exponentials.dtype) * grads[0]
        # in place and in one pass: backward runs once and the exponentials are the largest tensor of the step
        grad = exponentials.mul_((scale / total).unsqueeze(-1))
        grad.scatter_add_(-1, column, -(mine * scale).unsqueeze(-1))
        return grad.to(ctx.logits_dtype), None, None, None
