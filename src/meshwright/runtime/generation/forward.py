"""One pass of one stage over a batch with a KV cache: a prompt's tokens at once, or one new token per sequence.

In: token ids [b, q] on the first stage, hidden states [b, q, h] on the others. Out: hidden states, or on the last stage
the logits of the last token, [b, vocabulary / tp].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from meshwright.runtime.generation.kv_cache import SLIDING, KVCache
from meshwright.runtime.stage import StageModule


def forward_cached(stage: StageModule, inputs: Tensor, cache: KVCache) -> Tensor:
    """Run the stage's part of the model; the cache grows by the inputs' tokens."""
    tokens = inputs.shape[1]
    positions = cache.positions(tokens)
    hidden = stage.embed(inputs, positions) if stage.plan.first else inputs
    proxy = hidden.new_empty((inputs.shape[0], tokens, 1))
    masks: dict[str, Tensor | None] = {}
    rotations: dict[str | None, Any] = {}
    for index, layer in stage.layers.items():
        kind = stage.layer_type(int(index))
        rotary_kind = kind if stage.family.rotary_by_layer else None
        if kind not in masks:
            masks[kind] = cache.mask(tokens, stage.config.sliding_window if kind == SLIDING else None)
        # gpt-neox calls the cache `layer_past`; modules take what they know and pass on the rest
        keywords: dict[str, Any] = {
            "attention_mask": masks[kind],
            "position_ids": positions,
            "layer_past" if stage.config.model_type == "gpt_neox" else "past_key_values": cache,
        }
        if stage.family.rotary:
            if rotary_kind not in rotations:
                rotations[rotary_kind] = stage.rotate(rotary_kind, proxy, positions)
            keywords["position_embeddings"] = rotations[rotary_kind]
        hidden = layer(hidden, **keywords)
    cache.advance(tokens)
    return stage.logits(hidden[:, -1:]).squeeze(1) if stage.plan.last else hidden
