"""The load-balancing loss of routers, as transformers' ForCausalLM adds it where `output_router_logits` is set.

In: the logits of every router of a forward pass. Out: experts x sum over experts of (share of tokens) x (mean
probability), both over all layers and all tokens of one microbatch (Fedus et al. 2021, equations 4 to 6). Its tokens
lie on tp and cp ranks: shares and probabilities are summed over both; gradients need no exchange, as shares are
constants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.errors import InputError
from meshwright.ledger import Phase
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.families import expert_count, family_of
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.tensor_parallel.cross_entropy import at_least_fp32

BALANCE = "router balance"
HAVE_NONE = ("deepseek_v2", "deepseek_v3")
"""Families whose ForCausalLM adds no such loss, whatever the config says."""


def has_balance_loss(model_config: Any) -> bool:
    return (
        bool(expert_count(model_config, family_of(model_config)))
        and bool(getattr(model_config, "output_router_logits", False))
        and model_config.model_type not in HAVE_NONE
    )


def refuse_balance_over_stages(model_config: Any, stages: int) -> None:
    """The loss couples all layers: their shares are a product of means over layers."""
    if stages > 1 and has_balance_loss(model_config):
        raise InputError(
            f"the load-balancing loss couples all layers and cannot be run over pp={stages} stages; use pp=1, or set "
            "output_router_logits to false in the model's config"
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
    weight: float = 1.0
    _logits: list[Tensor] = field(default_factory=list[Tensor])

    def watch(self, router: nn.Module) -> None:
        """Keep the logits of every forward pass (recomputation repeats it, and is passed over)."""

        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
            if self.tokens.recorder.phase is Phase.FORWARD:
                self._logits.append(output[0])

        router.register_forward_hook(hook)

    def loss(self) -> Tensor:
        """Of the forward pass since the last call, weighted."""
        logits, self._logits = self._logits, []
        counts, probabilities = logits[0].new_zeros(self.experts), 0.0
        for of_layer in logits:
            chances = torch.softmax(of_layer, dim=-1)
            chosen = chances.topk(self.slots, dim=-1).indices.flatten()
            counts = counts.index_add(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
            probabilities = probabilities + at_least_fp32(chances).sum(dim=0)
        assert isinstance(probabilities, Tensor)
        both = torch.stack((counts.to(probabilities.dtype), probabilities.detach()))
        all_reduce(both, self.tokens, BALANCE)
        rows = sum(of_layer.shape[0] for of_layer in logits) * self.tokens.size
        own = self.experts * (both[0] * probabilities).sum() / rows**2
        whole = self.experts * (both[0] * both[1]).sum() / rows**2
        value = own + (whole / self.cp - own).detach()
        return value * (self.coefficient * self.weight)
