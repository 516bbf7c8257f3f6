"""ExpertParallelMoE: the routed experts of a layer spread over the ep axis, in the place of transformers' own block.

In: the experts that the model's router chose for the tokens of this tp rank, and its weights. Out: the sum over those
experts, for all tokens that entered the block. Each tp rank routes its own 1/tp of the tokens: under sequence
parallelism those that it holds, else a slice, whose results are gathered again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.errors import InputError
from meshwright.ledger import Phase
from meshwright.runtime.collectives import own_rows, rows_of_all
from meshwright.runtime.expert_parallel.exchange import Exchange, ExpertAxes, prepare
from meshwright.runtime.expert_parallel.grouped import grouped_linear
from meshwright.runtime.expert_parallel.routing import (
    Assignment,
    Routing,
    assign,
    assign_within_capacity,
    balanced_counts,
    balanced_experts,
    capacity_of,
)
from meshwright.runtime.slices import TensorSlice
from meshwright.runtime.split_backward import SplitBackward
from meshwright.runtime.tensor_parallel.linear import local
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion

ROUTED_INPUT = "routed input"
ROUTED_OUTPUT = "routed output"


@dataclass(frozen=True)
class ExpertOptions:
    """How tokens find their experts. `capacity_factor` None: no copy is dropped."""

    routing: Routing = Routing.MODEL
    capacity_factor: float | None = None


@dataclass(frozen=True)
class ExpertRegion:
    """What an expert layer needs to know of the mesh."""

    axes: ExpertAxes
    region: TensorParallelRegion
    options: ExpertOptions

    @property
    def splits_tokens(self) -> bool:
        """Whether what enters the block is replicated over tp."""
        return self.region.axis.size > 1 and not self.region.sequence_parallel


@dataclass
class Load:
    """Since the step began: copies of this rank's tokens for every expert [experts], those beyond the capacity, and the
    rows that the experts here worked on."""

    tokens: Tensor | None = None
    dropped: Tensor | int = 0
    rows: int = 0


class ExpertParallelMoE(nn.Module):
    """The experts here: [experts/ep, 2 I/expert_tp, h] and [experts/ep, h, I/expert_tp], or transposed.

    Called as transformers calls its experts: (hidden states, top_k_index, top_k_weights). `watch` makes the router see
    the same tokens; the experts take what entered the router, so that one gather serves both in backward.
    """

    def __init__(self, experts: nn.Module, slices: dict[str, TensorSlice], region: ExpertRegion) -> None:
        super().__init__()
        self.slices = slices
        self.region = region
        self.experts = int(experts.num_experts)  # pyright: ignore[reportArgumentType]
        self.transposed = bool(experts.is_transposed)
        self.split: SplitBackward | None = None
        self.load = Load()
        self._gate: Callable[[Tensor], Tensor] = experts._apply_gate  # pyright: ignore[reportAttributeAccessIssue]
        self._tokens: Tensor | None = None
        for name, piece in slices.items():
            self.register_parameter(name, nn.Parameter(torch.empty(piece.local_shape, device="meta")))

    def watch(self, router: nn.Module) -> None:
        """Route this rank's tokens only, and keep them for the experts."""

        def pre_hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            if self.region.splits_tokens:
                tp = self.region.region.axis
                if tokens.shape[0] % tp.size:
                    raise InputError(
                        f"tp={tp.size} must divide the {tokens.shape[0]} tokens of a microbatch of experts"
                    )
                tokens = own_rows(tokens, tp, ROUTED_INPUT)
            self._tokens = tokens
            return (tokens, *args[1:])

        router.register_forward_pre_hook(pre_hook)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, self._tokens = self._tokens, None
        assert tokens is not None, "the router has not run"
        slots = top_k_index.shape[-1]
        assignment, capacity = self._assign(top_k_index)
        exchange = prepare(assignment, self.region.axes, self.region.options.routing, capacity)
        if self.region.axes.ep.recorder.phase is Phase.FORWARD:  # recomputation does not count
            self.load.rows += sum(exchange.experts)
        arrived = exchange.dispatch(_sent(tokens.index_select(0, assignment.copies // slots), assignment))
        returned = exchange.combine(self._experts(arrived, exchange))
        copies = _copies(returned, assignment).view(-1, slots, tokens.shape[-1])
        mixed = (copies * top_k_weights.unsqueeze(-1)).sum(dim=1).to(tokens.dtype)
        if self.region.splits_tokens:
            mixed = rows_of_all(mixed, self.region.region.axis, ROUTED_OUTPUT)
        assert mixed.shape == hidden_states.shape
        return mixed

    def _assign(self, top_k_index: Tensor) -> tuple[Assignment, int | None]:
        options, copies = self.region.options, top_k_index.numel()
        source = self.region.axes.ep.rank
        chosen = top_k_index.reshape(-1)
        if options.routing is Routing.BALANCED:
            chosen = balanced_experts(copies, self.experts, source, chosen.device)
            counts = torch.tensor(balanced_counts(copies, self.experts, source), device=chosen.device)
        else:
            counts = torch.bincount(chosen, minlength=self.experts)
        capacity = None
        if options.capacity_factor is not None:
            capacity = capacity_of(copies, self.experts, options.capacity_factor)
        self._count(counts, capacity)
        if capacity is None:
            return assign(chosen, counts), None
        return assign_within_capacity(chosen, self.experts, capacity), capacity

    def _count(self, counts: Tensor, capacity: int | None) -> None:
        if self.region.axes.ep.recorder.phase is not Phase.FORWARD:
            return
        self.load.tokens = counts.clone() if self.load.tokens is None else self.load.tokens + counts
        if capacity is not None:
            self.load.dropped = self.load.dropped + (counts - capacity).clamp(min=0).sum()

    def _experts(self, rows: Tensor, exchange: Exchange) -> Tensor:
        if "gate_up_proj" in self.slices:
            widened = self._product("gate_up_proj", rows, exchange.experts)
        else:
            halves = [self._product(name, rows, exchange.experts) for name in ("gate_proj", "up_proj")]
            widened = torch.cat(halves, dim=-1)
        return self._product("down_proj", self._gate(widened), exchange.experts)

    def _product(self, name: str, rows: Tensor, counts: list[int]) -> Tensor:
        out = grouped_linear(rows, self.get_parameter(name), counts, self.transposed, self.split)
        bias = f"{name}_bias"
        if bias not in self.slices:
            return out
        number = torch.arange(len(counts), device=rows.device)
        repeats = torch.tensor(counts, device=rows.device)
        of_row = torch.repeat_interleave(number, repeats, output_size=rows.shape[0])
        added = local(self.get_parameter(bias)).index_select(0, of_row)
        if name == "down_proj" and not self.region.axes.expert_tp.is_first:
            # added once to the sum over expert_tp; every rank sees the whole gradient of the sum, so also of the bias
            added = added - added.detach()
        return out + added


def _sent(copies: Tensor, assignment: Assignment) -> Tensor:
    """The rows to send: the copies in their order, or at their places within the experts' capacity."""
    if assignment.rows is None:
        return copies
    buffer = copies.new_zeros((assignment.total + 1, copies.shape[1]))
    return buffer.index_copy(0, assignment.rows, copies)[: assignment.total]


def _copies(returned: Tensor, assignment: Assignment) -> Tensor:
    """What came back, in the order of copies: zero for those that were dropped."""
    if assignment.rows is not None:
        returned = torch.cat((returned, returned.new_zeros((1, returned.shape[1])))).index_select(0, assignment.rows)
    return returned.index_select(0, torch.argsort(assignment.copies))
