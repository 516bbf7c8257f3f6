"""Which rows a rank sends to which expert, and what it gets: the numbers of an exchange, on the host.

In: the experts that the model's router chose for this rank's tokens (`top_k_index` [n, k]). Out: an `Assignment`, the
copies of the tokens in the order of experts. A copy is numbered token x k + slot.

Balanced routing takes the place of the router's choice where nothing may depend on data (tracing): the copies of all
ranks of an ep group, one rank after the other, go to experts 0, 1, 2, ... in turn. The router's weights stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class Routing(StrEnum):
    """Who assigns tokens to experts."""

    MODEL = "model"
    BALANCED = "balanced"


@dataclass(frozen=True)
class Assignment:
    """`copies` [n k]: all copies, expert by expert. `rows` [n k]: where each lies in the buffer of `total` rows that is
    sent, `total` for those that are dropped (None: one after the other). `counts` [experts]: rows for each expert."""

    copies: Tensor
    rows: Tensor | None
    counts: Tensor
    total: int


def assign(experts_of_copies: Tensor, counts: Tensor) -> Assignment:
    """Dropless: every copy travels. `experts_of_copies` [n k]."""
    order = torch.argsort(experts_of_copies, stable=True)
    return Assignment(order, None, counts, int(order.shape[0]))


def assign_within_capacity(experts_of_copies: Tensor, experts: int, capacity: int) -> Assignment:
    """Every expert gets `capacity` rows of this rank: its first copies, in the order of tokens, padded with zeros.
    Copies beyond that are dropped (Lepikhin et al. 2020, section 2.2)."""
    order = torch.argsort(experts_of_copies, stable=True)
    sorted_experts = experts_of_copies[order]
    starts = torch.searchsorted(sorted_experts, torch.arange(experts, device=order.device))
    within = torch.arange(order.shape[0], device=order.device) - starts[sorted_experts]
    rows = torch.where(within < capacity, sorted_experts * capacity + within, experts * capacity)
    counts = torch.full((experts,), capacity, device=order.device)
    return Assignment(order, rows, counts, experts * capacity)


def capacity_of(copies: int, experts: int, factor: float) -> int:
    """Rows that one rank may send to one expert: its even share times the factor, rounded up."""
    return max(1, -int(-copies * factor // experts))


def balanced_experts(copies: int, experts: int, source: int, device: torch.device) -> Tensor:
    """[n k]: the experts of the copies of ep rank `source`."""
    return (torch.arange(copies, device=device) + source * copies) % experts


def balanced_counts(copies: int, experts: int, source: int) -> list[int]:
    """How many copies of ep rank `source` each expert gets."""
    whole, rest = divmod(copies, experts)
    first = source * copies
    extra = {(first + i) % experts for i in range(rest)}
    return [whole + (expert in extra) for expert in range(experts)]


def order_by_expert(blocks: list[list[int]], device: torch.device) -> Tensor | None:
    """Received rows lie source by source, each expert by expert: `blocks[source][expert]` rows. The permutation that
    lays them expert by expert, or None if they lie so already."""
    if len(blocks) == 1 or len(blocks[0]) == 1:
        return None
    counts = torch.tensor(blocks, dtype=torch.int64)
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    lengths, begins = counts.t().flatten(), starts.t().flatten()
    total = sum(sum(block) for block in blocks)
    shift = begins - (lengths.cumsum(0) - lengths)
    index = torch.repeat_interleave(shift, lengths, output_size=total) + torch.arange(total)
    return index.to(device)
