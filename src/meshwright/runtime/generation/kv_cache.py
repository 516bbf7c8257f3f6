"""Keys and values of one batch on one rank: this stage's layers, this tp rank's KV heads, as long as it may grow.

In: what a layer's attention computes for its new tokens, [b, kv heads of this rank, q, d]. Out: keys and values of all
tokens so far. Layers call `update` as they call a transformers cache. A prompt shorter than its batch's longest stands
at the right end: its first slots are padding, and masks leave them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FULL, SLIDING = "full_attention", "sliding_attention"


class KVCache:
    """`padding` [b]: slots before each prompt's first token. `capacity`: tokens at most, padding included."""

    def __init__(self, padding: Tensor, capacity: int) -> None:
        self.padding = padding
        self.capacity = capacity
        self.length = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's new tokens; all of its keys and values so far. `advance` counts them once per pass."""
        if layer_idx not in self._keys:
            self._keys[layer_idx] = self._empty(keys)
            self._values[layer_idx] = self._empty(values)
        end = self.length + keys.shape[2]
        self._keys[layer_idx][:, :, self.length : end] = keys
        self._values[layer_idx][:, :, self.length : end] = values
        return self._keys[layer_idx][:, :, :end], self._values[layer_idx][:, :, :end]

    def advance(self, tokens: int) -> None:
        """A pass of `tokens` new tokens is through all layers."""
        self.length += tokens

    def positions(self, tokens: int) -> Tensor:
        """[b, tokens]: where the next tokens stand in their sequences; padding gets 0."""
        slots = torch.arange(self.length, self.length + tokens, device=self.padding.device)
        return (slots - self.padding.unsqueeze(1)).clamp_(min=0)

    def mask(self, tokens: int, window: int | None) -> Tensor | None:
        """[b, 1, tokens, length + tokens]: which keys each of the next tokens sees (None: plain causal or all)."""
        end = self.length + tokens
        narrow = window is not None and end > window
        if not narrow and not bool(self.padding.any()):
            return None  # attention's own causal rule, or a single query that sees everything
        keys = torch.arange(end, device=self.padding.device)
        queries = keys[self.length :].unsqueeze(1)
        sees = keys <= queries
        if window is not None:
            sees = sees & (keys > queries - window)
        sees = sees & (keys >= self.padding.view(-1, 1, 1))
        # padding sees itself: a row without any key has no softmax, and its NaN would spread through the values
        return (sees | (keys == queries)).unsqueeze(1)

    @property
    def bytes(self) -> int:
        """Bytes held on this rank."""
        held = (*self._keys.values(), *self._values.values())
        return sum(t.numel() * t.element_size() for t in held)

    def _empty(self, like: Tensor) -> Tensor:
        batch, heads, _, width = like.shape
        return like.new_empty((batch, heads, self.capacity, width))
