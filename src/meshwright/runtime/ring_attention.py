"""Ring attention: keys and values travel around the cp ranks while each rank keeps its queries (Liu et al. 2023).

In: queries, keys and values [b, heads, s/c, d] of this rank's positions. Out: the attention of its queries over the
whole sequence, merged block by block with an online softmax. Backward runs the ring again; gradients of keys and values
travel with them and come home after c steps: each rank adds its part in fp32 and passes the sum on in the format of the
keys, as Transformer Engine does. Blocks that are masked wholly are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.ledger import Collective
from meshwright.runtime.collectives import tensor_bytes
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.tensor_parallel.cross_entropy import at_least_fp32

KEYS_AND_VALUES = "keys and values"
GRADIENTS = "key and value gradients"


@dataclass(frozen=True)
class RingPlan:
    """Which positions each rank holds, [c, s/c] in two runs each (on the CPU), and what a query may see."""

    axis: AxisGroup
    positions: Tensor
    scaling: float
    window: int | None = None

    def mask(self, queries: range, keys: range) -> Tensor | bool | None:
        """What of a block is allowed: True all, None nothing, else a mask [queries, keys]."""
        longest, shortest = queries[-1] - keys[0], queries[0] - keys[-1]
        if longest < 0 or (self.window is not None and shortest >= self.window):
            return None
        if shortest >= 0 and (self.window is None or longest < self.window):
            return True
        rows, columns = (torch.arange(run.start, run.stop) for run in (queries, keys))
        distance = rows.unsqueeze(1) - columns.unsqueeze(0)
        allowed = distance >= 0
        return allowed if self.window is None else allowed & (distance < self.window)

    def blocks(self, owner: int) -> Iterator[tuple[slice, slice, Tensor | bool]]:
        """The pairs of runs of own queries and the owner's keys that are not masked wholly."""
        halves = slice(0, self.run_length), slice(self.run_length, None)
        for rows, queries in zip(halves, self.runs(self.axis.rank), strict=True):
            for columns, keys in zip(halves, self.runs(owner), strict=True):
                allowed = self.mask(queries, keys)
                if allowed is not None:
                    yield rows, columns, allowed

    @property
    def run_length(self) -> int:
        return self.positions.shape[1] // 2

    def runs(self, rank: int) -> tuple[range, range]:
        """The two runs of positions of a rank as numbers: which blocks are masked never waits for a tensor."""
        first, second = (run * self.run_length for run in (rank, 2 * self.axis.size - 1 - rank))
        return range(first, first + self.run_length), range(second, second + self.run_length)


class _Hop:
    """A tensor on its way to the next rank, and the one that comes from the previous rank."""

    def __init__(self, tensor: Tensor, axis: AxisGroup, what: str) -> None:
        self._axis = axis
        self._sent = tensor
        self._arriving = torch.empty_like(tensor)
        size, dtype = tensor_bytes(tensor), tensor.dtype
        self._calls = (
            axis.record(Collective.SEND, what, size, dtype, axis.next_rank, asynchronous=True),
            axis.record(Collective.RECEIVE, what, size, dtype, axis.previous_rank, asynchronous=True),
        )
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, axis.next_rank, axis.group),
                dist.P2POp(dist.irecv, self._arriving, axis.previous_rank, axis.group),
            ]
        )

    def wait(self) -> Tensor:
        with self._axis.waiting(self._axis.previous_rank, *self._calls):
            for work in self._works:
                work.wait()
        return self._arriving


def ring_attention(q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> Tensor:
    """[b, heads, s/c, d] -> [b, heads, s/c, d of v]; keys and values may have fewer heads."""
    return _RingAttention.apply(q, k, v, plan)  # pyright: ignore[reportReturnType]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> Tensor:
        axis = plan.axis
        kept = torch.cat((k, v), dim=-1).contiguous()
        travelling = kept
        precise = at_least_fp32(q)
        # largest logit, sum of exponentials and weighted values so far (Milakov & Gimelshein 2018)
        largest = precise.new_full((*q.shape[:3], 1), float("-inf"))
        total = torch.zeros_like(largest)
        mixed = precise.new_zeros((*q.shape[:3], v.shape[-1]))
        for step in range(axis.size):
            hop = _Hop(travelling, axis, KEYS_AND_VALUES) if step < axis.size - 1 else None
            for rows, columns, allowed in plan.blocks((axis.rank - step) % axis.size):
                scores, values = _scores(precise[:, :, rows], travelling[:, :, columns], k.shape[-1], plan, allowed)
                bigger = torch.maximum(largest[:, :, rows], scores.amax(dim=-1, keepdim=True))
                base = bigger.masked_fill(bigger == float("-inf"), 0.0)
                shrink = torch.exp(largest[:, :, rows] - base)
                weights = torch.exp(scores - base)
                total[:, :, rows] = total[:, :, rows] * shrink + weights.sum(dim=-1, keepdim=True)
                mixed[:, :, rows] = mixed[:, :, rows] * shrink + weights @ values
                largest[:, :, rows] = bigger
            travelling = hop.wait() if hop else travelling
        output = (mixed / total).to(q.dtype)
        ctx.save_for_backward(q, kept, output, largest + total.log())
        ctx.plan, ctx.key_width = plan, k.shape[-1]
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, travelling, output, log_total = ctx.saved_tensors
        plan: RingPlan = ctx.plan
        axis, width = plan.axis, ctx.key_width
        precise, grad = at_least_fp32(q), at_least_fp32(grads[0])
        delta = (grad * output).sum(dim=-1, keepdim=True)
        query_grad = torch.zeros_like(precise)
        key_value_grad = arrived = torch.zeros_like(travelling, dtype=precise.dtype)
        groups = q.shape[1] // travelling.shape[1]
        for step in range(axis.size):
            hop = _Hop(travelling, axis, KEYS_AND_VALUES) if step < axis.size - 1 else None
            for rows, columns, allowed in plan.blocks((axis.rank - step) % axis.size):
                block = travelling[:, :, columns]
                scores, values = _scores(precise[:, :, rows], block, width, plan, allowed)
                weights = torch.exp(scores - log_total[:, :, rows])
                value_grad = weights.transpose(-1, -2) @ grad[:, :, rows]
                score_grad = weights * (grad[:, :, rows] @ values.transpose(-1, -2) - delta[:, :, rows]) * plan.scaling
                keys = _repeated(at_least_fp32(block[..., :width]), groups)
                query_grad[:, :, rows] += score_grad @ keys
                key_grad = score_grad.transpose(-1, -2) @ precise[:, :, rows]
                key_value_grad[:, :, columns, :width] += _summed(key_grad, groups)
                key_value_grad[:, :, columns, width:] += _summed(value_grad, groups)
            home = _Hop(key_value_grad.to(travelling.dtype), axis, GRADIENTS)
            travelling = hop.wait() if hop else travelling
            arrived = home.wait()
            key_value_grad = arrived.to(precise.dtype)
        return query_grad.to(q.dtype), arrived[..., :width], arrived[..., width:], None


def _scores(q: Tensor, block: Tensor, width: int, plan: RingPlan, allowed: Tensor | bool) -> tuple[Tensor, Tensor]:
    """Masked logits [b, heads, queries, keys] of a block of keys and values, and its values for every head."""
    block = _repeated(at_least_fp32(block), q.shape[1] // block.shape[1])
    scores = q @ block[..., :width].transpose(-1, -2) * plan.scaling
    if isinstance(allowed, Tensor):
        scores = scores.masked_fill(~allowed.to(scores.device), float("-inf"))
    return scores, block[..., width:]


def _repeated(heads: Tensor, times: int) -> Tensor:
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


def _summed(heads: Tensor, times: int) -> Tensor:
    """The gradient of `_repeated`."""
    if times == 1:
        return heads
    return heads.unflatten(1, (-1, times)).sum(dim=2)
