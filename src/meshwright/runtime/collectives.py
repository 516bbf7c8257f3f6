"""Collectives on one axis, recorded in the ledger: plain calls, and pairs that autograd runs the other way.

In: a local tensor and the `AxisGroup` to talk to (axes of one rank are passed through untouched and unrecorded).
Activations are [batch, seq, hidden]; "sequence" functions work on dim 1.

    forward            backward            used where
    identity           all-reduce          a replicated input enters column-parallel products
    all-reduce         identity            row-parallel products leave partial sums
    all-gather (seq)   reduce-scatter      the same two places under sequence parallelism
    reduce-scatter     all-gather          (Korthikanti et al. 2022, section 4.2.2)
    all-to-all         all-to-all
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from meshwright.ledger import Collective
from meshwright.runtime.process_groups import AxisGroup


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def all_reduce(
    tensor: Tensor,
    axis: AxisGroup,
    what: str,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    async_op: bool = False,
) -> dist.Work | None:
    """In place. Returns the work to wait for if asynchronous."""
    if axis.size == 1:
        return None
    call = axis.record(Collective.ALL_REDUCE, what, tensor_bytes(tensor), tensor.dtype, asynchronous=async_op)
    with axis.waiting():
        work = dist.all_reduce(tensor, op=op, group=axis.group, async_op=async_op)
    return None if work is None else axis.under_way(work, call)


def broadcast(tensor: Tensor, axis: AxisGroup, what: str, source: int) -> None:
    """In place, from the axis rank `source`."""
    if axis.size > 1:
        axis.record(Collective.BROADCAST, what, tensor_bytes(tensor), tensor.dtype)
        with axis.waiting():
            dist.broadcast(tensor, src=axis.ranks[source], group=axis.group)


def all_gather_first_dim(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """[n, ...] -> [size * n, ...], in axis order."""
    if axis.size == 1:
        return tensor
    gathered = tensor.new_empty((axis.size * tensor.shape[0], *tensor.shape[1:]))
    axis.record(Collective.ALL_GATHER, what, tensor_bytes(gathered), gathered.dtype)
    contiguous = tensor.contiguous()
    with axis.waiting():
        dist.all_gather_single(gathered, contiguous, group=axis.group)
    return gathered


def reduce_scatter_first_dim(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """[size * n, ...] -> the summed [n, ...] of this rank."""
    return tensor if axis.size == 1 else _reduce_scatter(tensor, axis, what, async_op=False)[0]


def _reduce_scatter(tensor: Tensor, axis: AxisGroup, what: str, async_op: bool) -> tuple[Tensor, dist.Work | None]:
    """The sum, which is there when the work (if asynchronous) has been waited for."""
    call = axis.record(Collective.REDUCE_SCATTER, what, tensor_bytes(tensor), tensor.dtype, asynchronous=async_op)
    scattered = tensor.new_empty((tensor.shape[0] // axis.size, *tensor.shape[1:]))
    contiguous = tensor.contiguous()
    with axis.waiting():
        work = dist.reduce_scatter_single(scattered, contiguous, group=axis.group, async_op=async_op)
    return scattered, None if work is None else axis.under_way(work, call)


def all_to_all_first_dim(
    tensor: Tensor, axis: AxisGroup, what: str, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Exchange runs of rows: `sent[i]` rows go to axis rank i, `received[i]` come from it (None: even)."""
    if axis.size == 1:
        return tensor
    axis.record(Collective.ALL_TO_ALL, what, tensor_bytes(tensor), tensor.dtype)
    rows = tensor.shape[0] if received is None else sum(received)
    exchanged = tensor.new_empty((rows, *tensor.shape[1:]))
    contiguous = tensor.contiguous()
    with axis.waiting():
        dist.all_to_all_single(exchanged, contiguous, received, sent, group=axis.group)
    return exchanged


def gather_sequence(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """[b, s/n, h] -> [b, s, h]; no copy beyond the collective's own when b is 1."""
    batch, seq = tensor.shape[:2]
    stacked = all_gather_first_dim(tensor.unsqueeze(0), axis, what)
    return stacked.transpose(0, 1).reshape(batch, axis.size * seq, *tensor.shape[2:])


def reduce_scatter_sequence(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """[b, s, h] partial sums -> the summed [b, s/n, h] of this rank."""
    return reduce_scatter_first_dim(_by_rank(tensor, axis), axis, what).squeeze(0)


def begin_reduce_scatter_sequence(tensor: Tensor, axis: AxisGroup, what: str) -> tuple[Tensor, dist.Work | None]:
    """The same, and the work to wait for before its result is read."""
    scattered, work = _reduce_scatter(_by_rank(tensor, axis), axis, what, async_op=True)
    return scattered.squeeze(0), work


def _by_rank(tensor: Tensor, axis: AxisGroup) -> Tensor:
    """[b, s, h] -> [n, b, s/n, h]: what goes to each rank (a view)."""
    batch, seq = tensor.shape[:2]
    return tensor.reshape(batch, axis.size, seq // axis.size, *tensor.shape[2:]).transpose(0, 1)


def gather_rows(tensor: Tensor, axis: AxisGroup, what: str, sizes: list[int]) -> Tensor:
    """[n_r, ...] of every rank r -> [sum of n, ...], in axis order; `sizes` are the n. Uneven ones travel as an
    all-to-all, which every backend has."""
    if len(set(sizes)) == 1:
        return all_gather_first_dim(tensor, axis, what)
    gathered = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
    axis.record(Collective.ALL_GATHER, what, tensor_bytes(gathered))
    repeated = tensor.repeat(axis.size, *[1] * (tensor.dim() - 1))
    with axis.waiting():
        dist.all_to_all_single(gathered, repeated, sizes, [tensor.shape[0]] * axis.size, group=axis.group)
    return gathered


def reduce_scatter_rows(tensor: Tensor, axis: AxisGroup, what: str, sizes: list[int]) -> Tensor:
    """[sum of n, ...] partial sums -> the summed [n_r, ...] of this rank."""
    if len(set(sizes)) == 1:
        return reduce_scatter_first_dim(tensor, axis, what)
    axis.record(Collective.REDUCE_SCATTER, what, tensor_bytes(tensor))
    own = sizes[axis.rank]
    parts = tensor.new_empty((axis.size * own, *tensor.shape[1:]))
    contiguous = tensor.contiguous()
    with axis.waiting():
        dist.all_to_all_single(parts, contiguous, [own] * axis.size, sizes, group=axis.group)
    return parts.view(axis.size, own, *tensor.shape[1:]).sum(dim=0)


class _CopyToAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
        ctx.axis, ctx.what = axis, what
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # in place: what enters here is the fresh gradient of the products that read the copy, nobody else holds it
        grad = grads[0].contiguous()
        all_reduce(grad, ctx.axis, ctx.what)
        return grad, None, None


class _ReduceFromAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
        reduced = tensor.contiguous()
        all_reduce(reduced, axis, what)
        if reduced is tensor:
            ctx.mark_dirty(tensor)
        return reduced

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
        ctx.axis, ctx.what = axis, what
        return gather_sequence(tensor, axis, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_sequence(grads[0], ctx.axis, ctx.what), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
        ctx.axis, ctx.what = axis, what
        return reduce_scatter_sequence(tensor, axis, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather_sequence(grads[0], ctx.axis, ctx.what), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, axis: AxisGroup, what: str, sent: list[int] | None, received: list[int] | None
    ) -> Tensor:
        ctx.axis, ctx.what, ctx.sent, ctx.received = axis, what, sent, received
        return all_to_all_first_dim(tensor, axis, what, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back = all_to_all_first_dim(grads[0], ctx.axis, ctx.what, ctx.received, ctx.sent)
        return back, None, None, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: AxisGroup, what: str, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.what, ctx.sizes = axis, what, sizes
        return gather_rows(tensor, axis, what, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return reduce_scatter_rows(grads[0], ctx.axis, ctx.what, ctx.sizes), None, None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: AxisGroup, what: str, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.what, ctx.sizes = axis, what, sizes
        return reduce_scatter_rows(tensor, axis, what, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return gather_rows(grads[0], ctx.axis, ctx.what, ctx.sizes), None, None, None


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
        ctx.axis, ctx.what = axis, what
        return tensor.chunk(axis.size)[axis.rank].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_first_dim(grads[0], ctx.axis, ctx.what), None, None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
        ctx.axis = axis
        return all_gather_first_dim(tensor, axis, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].chunk(ctx.axis.size)[ctx.axis.rank], None, None


def copy_to_axis(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """Identity forward, all-reduce of the gradient backward."""
    return tensor if axis.size == 1 else _CopyToAxis.apply(tensor, axis, what)  # pyright: ignore[reportReturnType]


def reduce_from_axis(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """All-reduce forward (in place where it can be), identity backward."""
    return tensor if axis.size == 1 else _ReduceFromAxis.apply(tensor, axis, what)  # pyright: ignore[reportReturnType]


def gather_sequence_from_axis(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """All-gather of the sequence forward, reduce-scatter backward."""
    return tensor if axis.size == 1 else _GatherSequence.apply(tensor, axis, what)  # pyright: ignore[reportReturnType]


def reduce_scatter_sequence_to_axis(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """Reduce-scatter of the sequence forward, all-gather backward."""
    if axis.size == 1:
        return tensor
    return _ReduceScatterSequence.apply(tensor, axis, what)  # pyright: ignore[reportReturnType]


def all_to_all(
    tensor: Tensor, axis: AxisGroup, what: str, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Exchange rows forward, and their gradients the other way backward."""
    if axis.size == 1:
        return tensor
    return _AllToAll.apply(tensor, axis, what, sent, received)  # pyright: ignore[reportReturnType]


def gather_rows_from_axis(tensor: Tensor, axis: AxisGroup, what: str, sizes: list[int]) -> Tensor:
    """All-gather of `sizes` rows forward, reduce-scatter backward."""
    if axis.size == 1:
        return tensor
    return _GatherRows.apply(tensor, axis, what, sizes)  # pyright: ignore[reportReturnType]


def reduce_scatter_rows_to_axis(tensor: Tensor, axis: AxisGroup, what: str, sizes: list[int]) -> Tensor:
    """Reduce-scatter into `sizes` rows forward, all-gather backward."""
    if axis.size == 1:
        return tensor
    return _ReduceScatterRows.apply(tensor, axis, what, sizes)  # pyright: ignore[reportReturnType]


def own_rows(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """This rank's 1/n of the rows of a replicated tensor; the all-gather of their gradients backward."""
    return tensor if axis.size == 1 else _OwnRows.apply(tensor, axis, what)  # pyright: ignore[reportReturnType]


def rows_of_all(tensor: Tensor, axis: AxisGroup, what: str) -> Tensor:
    """Every rank's rows on every rank; backward each takes the gradient of its own."""
    return tensor if axis.size == 1 else _AllGatherRows.apply(tensor, axis, what)  # pyright: ignore[reportReturnType]
