"""The load-balancing loss of routers, as transformers' ForCausalLM adds it where `output_router_logits` is set.

In: the logits of every router of a forward pass. Out: experts x sum over experts of (share of tokens) x (mean
probability), both over all layers and all tokens of one microbatch (Fedus et al. 2021, equations 4 to 6).

The loss is a product of sums over layers and tokens, so its gradient in one layer needs the choices of all. Each chunk
adds its sums to those that come with its input; the last one sums over the tp and cp ranks that share the tokens, knows
the loss, and the totals travel back with the gradients, just in time for each chunk's backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.ledger import Phase
from meshwright.models.from_config import NO_BALANCE_LOSS
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.families import expert_count, family_of
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.tensor_parallel.cross_entropy import at_least_fp32
from meshwright.schedules.actions import Action, ActionKind

BALANCE = "router balance"


def has_balance_loss(model_config: Any) -> bool:
    return (
        bool(expert_count(model_config, family_of(model_config)))
        and bool(getattr(model_config, "output_router_logits", False))
        and model_config.model_type not in NO_BALANCE_LOSS
    )


@dataclass
class RouterBalance:
    """Of one chunk. `tokens` is the ranks that share a microbatch's tokens, of which `cp` repeat the loss. `weight`:
    token losses that one microbatch's loss counts as, so that their mean over the global batch is the model's."""

    experts: int
    slots: int
    coefficient: float
    tokens: AxisGroup
    cp: int
    device: torch.device
    weight: float = 1.0
    _logits: list[Tensor] = field(default_factory=list[Tensor])

    def watch(self, router: nn.Module) -> None:
        """Keep the logits of every forward pass (recomputation repeats it, and is passed over)."""

        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
            if self.tokens.recorder.phase is Phase.FORWARD:
                self._logits.append(output[0])

        router.register_forward_hook(hook)

    def no_sums(self) -> Tensor:
        """[2, experts + 1]: tokens and probabilities of each expert; the last column counts rows."""
        return torch.zeros((2, self.experts + 1), dtype=torch.float64, device=self.device)

    def collect(self) -> tuple[Tensor, Tensor | None]:
        """Of the forward pass since the last call: its sums, and the probabilities among them [experts] with their
        graph (None without a router)."""
        logits, self._logits = self._logits, []
        sums, probabilities = self.no_sums(), None
        for of_layer in logits:
            chances = torch.softmax(of_layer, dim=-1)
            chosen = chances.topk(self.slots, dim=-1).indices.flatten()
            sums[0].index_add_(0, chosen, torch.ones_like(chosen, dtype=sums.dtype))
            sums[:, -1] += of_layer.shape[0]
            of_chunk = at_least_fp32(chances).sum(dim=0)
            probabilities = of_chunk if probabilities is None else probabilities + of_chunk
        if probabilities is not None:
            sums[1, :-1] = probabilities.detach()
        return sums, probabilities

    def complete(self, sums: Tensor) -> Tensor:
        """The sums over all chunks, in place also over the ranks that share the tokens."""
        all_reduce(sums, self.tokens, BALANCE)
        return sums

    def loss(self, totals: Tensor) -> Tensor:
        """This cp rank's part of the weighted loss."""
        return (totals[0, :-1] * totals[1, :-1]).sum() * (self._scale(totals) / self.cp)

    def gradient(self, totals: Tensor) -> Tensor:
        """Of the whole weighted loss in the probabilities of any chunk [experts]."""
        return totals[0, :-1] * self._scale(totals)

    def _scale(self, totals: Tensor) -> Tensor:
        return self.coefficient * self.weight * self.experts / totals[0, -1] ** 2


Key = tuple[int, int]
"""(chunk, microbatch)"""


class TravellingBalance:
    """A step's sums on one stage: which go beside a message of the schedule, and what each pass adds or needs."""

    def __init__(self, chunks: Mapping[int, RouterBalance], last: int) -> None:
        self._chunks = chunks
        self._last = last
        self._sums: dict[Key, Tensor] = {}  # up to and with a chunk
        self._totals: dict[Key, Tensor] = {}  # for the backward pass of a chunk
        self._probabilities: dict[Key, Tensor] = {}

    def beside(self, action: Action) -> Tensor:
        """What travels with a message: to be sent, or to be filled."""
        key = (action.chunk, action.microbatch)
        if action.kind is ActionKind.SEND_FORWARD:
            return self._sums[key]
        if action.kind is ActionKind.SEND_BACKWARD:
            return self._totals[key]
        buffer = self._chunks[action.chunk].no_sums()
        if action.kind is ActionKind.RECEIVE_FORWARD:
            self._sums[action.chunk - 1, action.microbatch] = buffer
        else:
            self._totals[key] = buffer
        return buffer

    def after_forward(self, chunk: int, microbatch: int, trains: bool) -> Tensor | None:
        """Take note of a chunk's pass; the loss, from the last one."""
        balance = self._chunks[chunk]
        own, probabilities = balance.collect()
        before = self._sums.get((chunk - 1, microbatch))
        sums = own if before is None else before + own
        self._sums[chunk, microbatch] = sums
        if trains and probabilities is not None:
            self._probabilities[chunk, microbatch] = probabilities
        if chunk != self._last:
            return None
        self._totals[chunk, microbatch] = balance.complete(sums)
        return balance.loss(sums)

    def before_backward(self, chunk: int, microbatch: int) -> tuple[Tensor, Tensor] | None:
        """The chunk's probabilities and the loss's gradient in them, if it has a router."""
        key = (chunk, microbatch)
        totals = self._totals.get(key)
        if totals is None:  # the next chunk is on this stage
            totals = self._totals[key] = self._totals[chunk + 1, microbatch]
        probabilities = self._probabilities.pop(key, None)
        if probabilities is None:
            return None
        return probabilities, self._chunks[chunk].gradient(totals).to(probabilities.dtype)
