"""Plain data parallelism: whole replicas whose gradients are averaged in buckets while backward still runs.

Gradients accumulate in fp32 (or better) in flat buckets over all microbatches; in the last backward pass each bucket is
all-reduced as soon as its parameters are complete (Li et al. 2020). Without replicas it is just the accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.ledger import Phase
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.state import LocalParameter, local_tensor

BUCKET_BYTES = 25 * 2**20  # as torch's DistributedDataParallel
GRADIENTS = "gradient bucket"


@dataclass
class Bucket:
    """A flat gradient buffer. `waiting` counts parameters whose last gradient has not come."""

    flat: Tensor
    parameters: int
    waiting: int = 0
    work: dist.Work | None = None
    launched: bool = False


class PlainDataParallel:
    """Owns the gradients of this rank's parameters. Call order per step: begin, before_backward per pass, finish."""

    def __init__(self, parameters: Sequence[LocalParameter], axis: AxisGroup, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.axis = axis
        self._parameters = list(parameters)
        self._final_chunks: set[int] = set()
        self._fresh: set[int] = set()
        self._buckets: list[Bucket] = []
        for members in _bucket_members(self._parameters, bucket_bytes):
            self._add_bucket(members)

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        self._final_chunks.clear()
        self._fresh = set(range(len(self._parameters)))
        for bucket in self._buckets:
            bucket.waiting, bucket.work, bucket.launched = bucket.parameters, None, False

    def before_backward(self, chunk: int, last: bool) -> None:
        if last:
            self._final_chunks.add(chunk)

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

    def _add_bucket(self, members: list[int]) -> None:
        masters = [self._parameters[i].master for i in members]
        flat = torch.empty(sum(m.numel() for m in masters), dtype=masters[0].dtype, device=masters[0].device)
        bucket = Bucket(flat, len(members))
        self._buckets.append(bucket)
        for index, view in zip(members, flat.split([m.numel() for m in masters]), strict=True):
            parameter = self._parameters[index]
            parameter.gradient = view.view(parameter.master.shape)
            parameter.live.register_post_accumulate_grad_hook(partial(self._accumulate, index, bucket))

    def _accumulate(self, index: int, bucket: Bucket, live: Tensor) -> None:
        parameter = self._parameters[index]
        assert live.grad is not None
        assert parameter.gradient is not None
        if index in self._fresh:
            self._fresh.discard(index)
            parameter.gradient.copy_(local_tensor(live.grad))
        else:
            parameter.gradient.add_(local_tensor(live.grad))
        live.grad = None
        if parameter.chunk in self._final_chunks:
            bucket.waiting -= 1
            if bucket.waiting == 0:
                self._launch(bucket)

    def _launch(self, bucket: Bucket) -> None:
        if not bucket.launched:
            bucket.launched = True
            bucket.work = all_reduce(bucket.flat, self.axis, GRADIENTS, dist.ReduceOp.AVG, async_op=True)


def _bucket_members(parameters: Sequence[LocalParameter], bucket_bytes: int) -> list[list[int]]:
    """Indices of the parameters of each bucket, in the order in which backward completes them (last layer first).

    A bucket holds one chunk and one dtype only: chunks complete at different times.
    """
    buckets: list[list[int]] = []
    filled, kind = 0, None
    for index in reversed(range(len(parameters))):
        parameter = parameters[index]
        if not buckets or filled >= bucket_bytes or kind != (parameter.chunk, parameter.master.dtype):
            buckets.append([])
            filled = 0
        kind = (parameter.chunk, parameter.master.dtype)
        buckets[-1].append(index)
        filled += parameter.master.numel() * parameter.master.element_size()
    return buckets
