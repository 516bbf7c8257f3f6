"""Ring attention: keys and values travel around the cp ranks while each rank keeps its queries (Liu et al. 2023).

In: queries, keys and values [b, heads, s/c, d] of this rank's positions. Out: the attention of its queries over the
whole sequence, merged part by part with an online softmax (Milakov & Gimelshein 2018). Backward runs the ring again;
gradients of keys and values travel with them and come home after c steps: each rank adds its part in fp32 and passes
the sum on in the format of the keys, as Transformer Engine does. Pairs of runs that are masked wholly are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.ledger import Collective
from meshwright.runtime.attention_part import Merged, Pairs, PartKernel, Whole, kernel_for
from meshwright.runtime.collectives import tensor_bytes
from meshwright.runtime.process_groups import AxisGroup

KEYS_AND_VALUES = "keys and values"
GRADIENTS = "key and value gradients"


ALL = slice(None)


@dataclass(frozen=True)
class RingPlan:
    """Which positions each rank holds, [c, s/c] in two runs each (on the CPU), and what a query may see."""

    axis: AxisGroup
    positions: Tensor
    scaling: float
    window: int | None = None

    def parts(self, owner: int) -> Iterator[tuple[slice, slice, Pairs]]:
        """Own queries and the owner's keys that are computed in one call each, nothing that is masked wholly. A rank's
        own keys are one part, in which every query sees at least itself."""
        own = self.axis.rank
        first, second = slice(0, self.run_length), slice(self.run_length, None)
        if self.window is not None and self.window < self.positions.numel():
            yield from self._windowed_parts(owner, (first, second))
        elif owner == own:  # positions ascend, so what is causal in the sequence is causal among them
            yield ALL, ALL, Pairs(causal=True)
        elif owner < own:  # its first run lies before both of ours, its second behind both
            yield ALL, first, Pairs()
        else:  # our first run lies before both of its runs, our second behind both
            yield second, ALL, Pairs()

    def _windowed_parts(self, owner: int, halves: tuple[slice, slice]) -> Iterator[tuple[slice, slice, Pairs]]:
        if owner == self.axis.rank:
            yield ALL, ALL, Pairs(allowed=self._allowed(self.positions[owner], self.positions[owner]))
            return
        for rows, queries in zip(halves, self.runs(self.axis.rank), strict=True):
            for columns, keys in zip(halves, self.runs(owner), strict=True):
                longest, shortest = queries[-1] - keys[0], queries[0] - keys[-1]
                if longest < 0 or shortest >= self._window:
                    continue
                whole = shortest >= 0 and longest < self._window
                numbers = (torch.arange(run.start, run.stop) for run in (queries, keys))
                yield rows, columns, Pairs() if whole else Pairs(allowed=self._allowed(*numbers))

    @property
    def _window(self) -> int:
        return self.positions.numel() if self.window is None else self.window

    def _allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which pairs of positions are causal and within the window, [queries, keys]."""
        distance = queries.unsqueeze(1) - keys.unsqueeze(0)
        return (distance >= 0) & (distance < self._window)

    @property
    def run_length(self) -> int:
        return self.positions.shape[1] // 2

    def runs(self, rank: int) -> tuple[range, range]:
        """The two runs of positions of a rank as numbers: which parts are masked never waits for a tensor."""
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
        axis, width = plan.axis, k.shape[-1]
        kept = torch.cat((k, v), dim=-1).contiguous()
        travelling, merged = kept, None
        for step in range(axis.size):
            hop = _Hop(travelling, axis, KEYS_AND_VALUES) if step < axis.size - 1 else None
            for rows, columns, pairs in plan.parts((axis.rank - step) % axis.size):
                part = _part(q, travelling, rows, columns, width, pairs)
                found = part.kernel.forward(*part.heads, pairs, plan.scaling)
                if merged is None:
                    merged = Merged(*found)
                else:
                    merged.add(rows, *found)
            travelling = hop.wait() if hop else travelling
        assert merged is not None
        output = merged.output.to(q.dtype)
        ctx.save_for_backward(q, kept, output, merged.log_sum)
        ctx.plan, ctx.key_width = plan, width
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, travelling, output, log_total = ctx.saved_tensors
        plan: RingPlan = ctx.plan
        axis, width = plan.axis, ctx.key_width
        grad, home = grads[0], None
        query_grad = torch.zeros_like(q, dtype=log_total.dtype)
        for step in range(axis.size):
            hop = _Hop(travelling, axis, KEYS_AND_VALUES) if step < axis.size - 1 else None
            pair_grad = torch.zeros_like(travelling, dtype=log_total.dtype)
            for rows, columns, pairs in plan.parts((axis.rank - step) % axis.size):
                part = _part(q, travelling, rows, columns, width, pairs)
                whole = Whole(output[:, :, rows], log_total[:, :, rows])
                of_q, *of_pair = part.kernel.backward(grad[:, :, rows], whole, *part.heads, pairs, plan.scaling)
                query_grad[:, :, rows] += of_q
                pair_grad[:, :, columns] += torch.cat(of_pair, dim=-1)
            if home is not None:  # what the ranks before have summed came while this rank's part was computed
                pair_grad += home.wait()
            home = _Hop(pair_grad.to(travelling.dtype), axis, GRADIENTS)
            travelling = hop.wait() if hop else travelling
        assert home is not None
        received = home.wait()
        return query_grad.to(q.dtype), received[..., :width], received[..., width:], None


@dataclass(frozen=True)
class _Part:
    kernel: PartKernel
    heads: tuple[Tensor, Tensor, Tensor]


def _part(q: Tensor, block: Tensor, rows: slice, columns: slice, width: int, pairs: Pairs) -> _Part:
    """Own queries, the keys and the values of a part, and what computes it."""
    heads = (q[:, :, rows], block[:, :, columns, :width], block[:, :, columns, width:])
    return _Part(kernel_for(*heads, pairs), heads)
