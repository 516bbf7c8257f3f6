"""Context parallelism: each cp rank holds a part of every sequence, and attention alone looks beyond it.

In: the cp axis and the sequence length. Out: a `ContextShard` that says which tokens a rank holds (two runs, one from
either end, so that causal work is even), and an attention function for transformers: a ring of keys and values, or an
all-to-all from tokens to heads and back (DeepSpeed Ulysses, Jacobs et al. 2023). Sliding windows are respected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from meshwright.errors import InputError
from meshwright.layout.config import ContextVariant
from meshwright.runtime.collectives import all_to_all
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.ring_attention import RingPlan, ring_attention

TOKENS_TO_HEADS = "tokens to heads"
HEADS_TO_TOKENS = "heads to tokens"


HEADS_OF_CLASSIFIERS = ("summary_first_dropout", "classifier_dropout")
"""Dropout of heads that causal language models do not have, though their configs may."""


def refuse_dropout(model_config: Any) -> None:
    """Dropout masks are drawn for whole sequences; ring attention has no place to apply them."""
    for name, value in vars(model_config).items():
        if name in HEADS_OF_CLASSIFIERS:
            continue
        if name.endswith(("dropout", "_pdrop")) and isinstance(value, float) and value > 0:
            raise InputError(f"context parallelism runs without dropout, but the model has {name}={value}; set it to 0")


@dataclass(frozen=True)
class ContextShard:
    """Which tokens of a sequence each cp rank holds: runs r and 2c - 1 - r of 2c equal ones."""

    axis: AxisGroup
    seq: int
    variant: ContextVariant = ContextVariant.RING

    def __post_init__(self) -> None:
        if self.seq % (2 * self.axis.size):
            raise InputError(f"cp={self.axis.size} needs a sequence that 2 x cp divides, not {self.seq} tokens")

    def positions(self) -> Tensor:
        """[c, s/c] positions of every rank."""
        runs = torch.arange(self.seq).view(2 * self.axis.size, -1)
        ranks = range(self.axis.size)
        return torch.stack([torch.cat((runs[r], runs[2 * self.axis.size - 1 - r])) for r in ranks])

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's tokens of [b, s]."""
        return tensor[:, self.own_positions().to(tensor.device)]

    def own_positions(self) -> Tensor:
        """[s/c]"""
        return self.positions()[self.axis.rank]

    def attention_name(self) -> str:
        """Register the attention function of this shard with transformers; returns its name there."""
        name = f"meshwright_cp_{self.variant.name.lower()}"
        AttentionInterface.register(name, self._attend)
        # causality and windows are worked out from positions: transformers must not build a mask of the local length
        AttentionMaskInterface.register(name, _no_mask)
        return name

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **_others: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: [b, heads, s/c, d] in, [b, s/c, heads, d] out."""
        if dropout or attention_mask is not None or getattr(module, "attn_logit_softcapping", None):
            raise InputError("context parallelism runs causal attention without dropout, masks or soft-capping")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        plan = RingPlan(self.axis, self.positions(), scale, sliding_window)
        run: Callable[[Tensor, Tensor, Tensor, RingPlan], Tensor] = (
            ring_attention if self.variant is ContextVariant.RING else exchanged_attention
        )
        return run(query, key, value, plan).transpose(1, 2).contiguous(), None


def _no_mask(*_arguments: Any, **_keywords: Any) -> None:
    return None


def exchanged_attention(q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> Tensor:
    """Every rank gets some heads of the whole sequence, attends, and gives the tokens back."""
    cp = plan.axis.size
    if q.shape[1] % cp:
        raise InputError(f"cp={cp} by all-to-all must divide the {q.shape[1]} attention heads of a tp rank; use a ring")
    held = plan.positions.flatten().to(q.device)
    order = held.argsort()
    q, k, v = (_to_heads(_enough_heads(x, cp), plan)[:, :, order] for x in (q, k, v))
    mask = None
    if plan.window is not None and plan.window < len(order):
        distance = torch.arange(len(order), device=q.device).view(-1, 1) - torch.arange(len(order), device=q.device)
        mask = (distance >= 0) & (distance < plan.window)
    grouped = q.shape[1] != k.shape[1]
    mixed = functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=plan.scaling, enable_gqa=grouped
    )
    return _to_tokens(mixed[:, :, held], plan)


def _enough_heads(heads: Tensor, cp: int) -> Tensor:
    """KV heads fewer than cp are repeated; autograd sums their gradients."""
    count = heads.shape[1]
    if count % cp == 0:
        return heads
    if cp % count:
        raise InputError(f"cp={cp} by all-to-all neither divides {count} KV heads nor is a multiple; use a ring")
    return heads.repeat_interleave(cp // count, dim=1)


def _to_heads(tensor: Tensor, plan: RingPlan) -> Tensor:
    """[b, heads, s/c, d] -> [b, heads/c, s, d], tokens in the order of ranks."""
    cp = plan.axis.size
    batch, heads, tokens, width = tensor.shape
    by_rank = tensor.view(batch, cp, heads // cp, tokens, width).transpose(0, 1).contiguous()
    gathered = all_to_all(by_rank, plan.axis, TOKENS_TO_HEADS)  # [rank of the tokens, b, heads/c, s/c, d]
    return gathered.permute(1, 2, 0, 3, 4).reshape(batch, heads // cp, cp * tokens, width)


def _to_tokens(tensor: Tensor, plan: RingPlan) -> Tensor:
    """The way back: [b, heads/c, s, d] -> [b, heads, s/c, d]."""
    cp = plan.axis.size
    batch, heads, tokens, width = tensor.shape
    by_rank = tensor.view(batch, heads, cp, tokens // cp, width).permute(2, 0, 1, 3, 4).contiguous()
    gathered = all_to_all(by_rank, plan.axis, HEADS_TO_TOKENS)  # [rank of the heads, b, heads/c, s/c, d]
    return gathered.permute(1, 0, 2, 3, 4).reshape(batch, cp * heads, tokens // cp, width)
