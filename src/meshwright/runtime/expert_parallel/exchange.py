"""Tokens to the ranks of their experts and back: two all-to-alls over ep, a gather and a reduce-scatter over expert_tp.

In: copies of this rank's tokens, expert by expert, and how many rows go to each expert. Out: the rows of this rank's
experts, expert by expert; after the experts, the way back to where the copies came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.runtime.collectives import (
    all_gather_first_dim,
    all_to_all,
    all_to_all_first_dim,
    gather_rows_from_axis,
    reduce_scatter_rows_to_axis,
)
from meshwright.runtime.expert_parallel.routing import Assignment, Routing, balanced_counts, order_by_expert
from meshwright.runtime.process_groups import AxisGroup

TOKENS_PER_EXPERT = "tokens per expert"
DISPATCH = "dispatch"
COMBINE = "combine"
EXPERT_INPUT = "expert input"
EXPERT_OUTPUT = "expert output"


@dataclass(frozen=True)
class ExpertAxes:
    """The groups of an expert layer: `ep` ranks hold different experts, `expert_tp` ranks parts of the same ones."""

    ep: AxisGroup
    expert_tp: AxisGroup


@dataclass(frozen=True)
class Exchange:
    """One dispatch and its combine. `sent` and `received`: rows to and from each ep rank; `gathered`: rows of each
    expert_tp rank; `experts`: rows of each expert here, after the gather; `order`: the rows expert by expert."""

    axes: ExpertAxes
    sent: list[int]
    received: list[int]
    gathered: list[int]
    experts: list[int]
    order: Tensor | None

    def dispatch(self, copies: Tensor) -> Tensor:
        """[sum of sent, h] -> [sum of experts, h], expert by expert."""
        arrived = all_to_all(copies, self.axes.ep, DISPATCH, self.sent, self.received)
        together = gather_rows_from_axis(arrived, self.axes.expert_tp, EXPERT_INPUT, self.gathered)
        return together if self.order is None else together.index_select(0, self.order)

    def combine(self, outputs: Tensor) -> Tensor:
        """[sum of experts, h] partial sums over expert_tp -> [sum of sent, h]."""
        if self.order is not None:
            outputs = outputs.index_select(0, torch.argsort(self.order))
        own = reduce_scatter_rows_to_axis(outputs, self.axes.expert_tp, EXPERT_OUTPUT, self.gathered)
        return all_to_all(own, self.axes.ep, COMBINE, self.received, self.sent)


def prepare(assignment: Assignment, axes: ExpertAxes, routing: Routing, capacity: int | None) -> Exchange:
    """Tell the ranks how many rows come. Where that is known (capacity, balanced routing) nothing is read back from the
    device; with a capacity nothing is exchanged at all."""
    experts, ep, expert_tp = int(assignment.counts.shape[0]), axes.ep, axes.expert_tp
    here = experts // ep.size
    if capacity is not None:
        sent = [here * capacity] * ep.size
        blocks = [[capacity] * here] * (ep.size * expert_tp.size)
        return _exchange(axes, sent, blocks, assignment)
    arriving = all_to_all_first_dim(assignment.counts, ep, TOKENS_PER_EXPERT)
    everywhere = all_gather_first_dim(arriving, expert_tp, TOKENS_PER_EXPERT)
    if routing is Routing.BALANCED:
        by_source = [balanced_counts(assignment.total, experts, source) for source in range(ep.size)]
        first = ep.rank * here
        blocks = [counts[first : first + here] for counts in by_source] * expert_tp.size
        own = by_source[ep.rank]
        sent = [sum(own[peer * here : (peer + 1) * here]) for peer in range(ep.size)]
    else:
        blocks = [list(map(int, block)) for block in everywhere.view(-1, here).tolist()]
        sent = [int(n) for n in assignment.counts.view(ep.size, here).sum(dim=1).tolist()]
    return _exchange(axes, sent, blocks, assignment)


def _exchange(axes: ExpertAxes, sent: list[int], blocks: list[list[int]], assignment: Assignment) -> Exchange:
    """`blocks` [expert_tp x ep sources][experts here]."""
    ep, expert_tp = axes.ep.size, axes.expert_tp
    by_source = [sum(block) for block in blocks]
    gathered = [sum(by_source[r * ep : (r + 1) * ep]) for r in range(expert_tp.size)]
    received = by_source[expert_tp.rank * ep : (expert_tp.rank + 1) * ep]
    rows = [sum(column) for column in zip(*blocks, strict=True)]
    order = order_by_expert(blocks, assignment.counts.device)
    return Exchange(axes, sent, received, gathered, rows, order)
