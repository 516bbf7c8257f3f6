"""Plain data parallelism: whole replicas whose gradients are averaged while backward still runs.

Gradients accumulate in fp32 (or better) over all microbatches, in one flat buffer for layers, one for the ends of the
model and one for routed experts, whose replicas are others. In the last backward pass each slice of a buffer is
all-reduced as soon as the parameters in it are complete (Li et al. 2020). Without replicas it is just the accumulation.
Products of linear layers add themselves to the buffer (`leave`): no weight gradient is made only to be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.ledger import GRADIENT_BUCKET_BYTES, Phase
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.split_backward import LeftWeights
from meshwright.runtime.state import LocalParameter, local_tensor


@dataclass
class Bucket:
    """A slice of a flat gradient buffer, reduced in one call. `waiting`: parameters in it that are not complete."""

    what: str
    flat: Tensor
    of_experts: bool = False
    parameters: int = 0
    waiting: int = 0
    work: dist.Work | None = None
    launched: bool = False


class PlainDataParallel:
    """Owns the gradients of this rank's parameters. Call order per step: begin, before_backward per pass, finish."""

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        axis: AxisGroup,
        expert_axis: AxisGroup,
        bucket_bytes: int = GRADIENT_BUCKET_BYTES,
    ) -> None:
        self.axis = axis
        self.expert_axis = expert_axis
        self._parameters = list(parameters)
        self._final_chunks: set[int] = set()
        self._fresh: set[int] = set()
        self._buckets: list[Bucket] = []
        self._buckets_of: dict[int, list[Bucket]] = {}
        self._index_of = {id(p.live): i for i, p in enumerate(self._parameters)}
        for unit in ("layer", "ends", "expert"):
            for dtype in sorted({p.master.dtype for p in parameters}, key=str):
                # in the order in which backward completes them: last parameter first
                members = [
                    i
                    for i in reversed(range(len(self._parameters)))
                    if self._parameters[i].unit == unit and self._parameters[i].master.dtype == dtype
                ]
                if members:
                    self._add_buffer(members, f"{unit} gradients", bucket_bytes)

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        self._final_chunks.clear()
        self._fresh = set(range(len(self._parameters)))
        for bucket in self._buckets:
            bucket.waiting, bucket.work, bucket.launched = bucket.parameters, None, False

    def before_backward(self, chunk: int, last: bool, split: bool = False) -> None:
        """`last`: of the chunk in this step. `split`: weight gradients follow later, nothing is complete after it."""
        if last and not split:
            self._final_chunks.add(chunk)

    def leave(self, left: LeftWeights) -> None:
        """Take the weight gradients of a product of the pass that runs now, which autograd does not deliver."""
        left.add_to(self)
        for live in left.parameters:
            self._delivered(self._index_of[id(live)])

    def accumulate(self, live: Tensor, gradient: Tensor) -> None:
        """Add a weight gradient that backward left to somebody."""
        self._add(self._index_of[id(live)], gradient)

    def accumulate_product(self, live: Tensor, left: Tensor, right: Tensor) -> None:
        """The same for left @ right: the product is summed where it is made, if it is as precise as the sum."""
        index = self._index_of[id(live)]
        accumulated = self._parameters[index].gradient
        assert accumulated is not None
        if accumulated.dtype != left.dtype:
            self._add(index, left @ right)
        elif index in self._fresh:
            self._fresh.discard(index)
            torch.mm(left, right, out=accumulated)
        else:
            accumulated.addmm_(left, right)

    def after_weights(self, chunk: int, last: bool) -> None:
        """The weight gradients that one backward pass of a chunk had left are in; `last`: the chunk is complete."""
        if last:
            for index, parameter in enumerate(self._parameters):
                if parameter.chunk == chunk:
                    self._count(index)

    def finish(self) -> None:
        """Wait until every gradient is averaged."""
        for index in self._fresh:  # had no part in this step's loss
            gradient = self._parameters[index].gradient
            assert gradient is not None
            gradient.zero_()
        self._fresh.clear()
        with self.axis.recorder.during(Phase.BACKWARD):
            for bucket in self._buckets:
                self._launch(bucket)
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()

    def _add_buffer(self, members: list[int], what: str, bucket_bytes: int) -> None:
        first = self._parameters[members[0]].master
        sizes = [self._parameters[i].master.numel() for i in members]
        flat = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        length = max(1, bucket_bytes // first.element_size())
        of_experts = self._parameters[members[0]].unit == "expert"
        buckets = [Bucket(what, piece, of_experts) for piece in flat.split(length)]
        start = 0
        for index, view in zip(members, flat.split(sizes), strict=True):
            parameter = self._parameters[index]
            parameter.gradient = view.view(parameter.master.shape)
            within = buckets[start // length : (start + view.numel() - 1) // length + 1]
            for bucket in within:
                bucket.parameters += 1
            self._buckets_of[index] = within
            parameter.live.register_post_accumulate_grad_hook(partial(self._on_gradient, index))
            start += view.numel()
        self._buckets += buckets

    def _on_gradient(self, index: int, live: Tensor) -> None:
        assert live.grad is not None
        self._add(index, local_tensor(live.grad))
        live.grad = None
        self._delivered(index)

    def _delivered(self, index: int) -> None:
        """A pass has given its gradient of this parameter."""
        if self._parameters[index].chunk in self._final_chunks:
            self._count(index)

    def _add(self, index: int, gradient: Tensor) -> None:
        accumulated = self._parameters[index].gradient
        assert accumulated is not None
        if index in self._fresh:
            self._fresh.discard(index)
            accumulated.copy_(gradient)
        else:
            accumulated.add_(gradient)

    def _count(self, index: int) -> None:
        """A parameter is complete: reduce the slices of which it was the last."""
        for bucket in self._buckets_of[index]:
            bucket.waiting -= 1
            if bucket.waiting == 0:
                self._launch(bucket)

    def _launch(self, bucket: Bucket) -> None:
        if not bucket.launched:
            bucket.launched = True
            bucket.work = all_reduce(bucket.flat, self._axis_of(bucket), bucket.what, dist.ReduceOp.AVG, async_op=True)

    def _axis_of(self, bucket: Bucket) -> AxisGroup:
        return self.expert_axis if bucket.of_experts else self.axis
