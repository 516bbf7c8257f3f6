"""KV cache: what the tokens of a sequence leave on a rank, in paged blocks, and how many sequences fit.

In: a model, candidates with their stages, bytes per cached element, tokens per sequence. Out: bytes [n, S] on a rank
of each stage. Covers grouped-query heads (max(1, kv / tp) heads per rank), MLA's compressed cache (whole on every tp
rank), sliding windows, compressed attention and the constant state of linear mixers.
"""

from __future__ import annotations

import numpy as np

from meshwright.cost.candidates import FloatArray, IntArray
from meshwright.cost.stages import Stages
from meshwright.models.spec import Attention, LayerKind, LinearMixer, ModelSpec

BLOCK_TOKENS = 16
"""Tokens of a cache block (Kwon et al. 2023, "PagedAttention", section 4.1; the default of vLLM)."""


def held_tokens(attention: Attention, tokens: FloatArray) -> FloatArray:
    """Cached keys of a sequence of `tokens`: all of them, the window's, or one per `kv_compression` earlier tokens."""
    window = tokens if attention.window is None else np.minimum(tokens, attention.window)
    if attention.kv_compression == 1:
        return window
    recent = np.minimum(tokens, attention.window or 0)
    return recent + tokens / attention.kv_compression


def heads_share(attention: Attention, tp: IntArray) -> FloatArray:
    """Share of a layer's cache on one tp rank: its KV heads, at least one; all of a cache that is not split."""
    if attention.kv_replicated:
        return np.ones(len(tp))
    return np.ceil(attention.kv_heads / tp) / attention.kv_heads


def layer_cache_bytes(kind: LayerKind, tokens: FloatArray, tp: IntArray, kv_bytes: float) -> FloatArray:
    """Bytes of one layer's cache of one sequence on a rank [n]: whole blocks of keys, or a linear mixer's state."""
    if isinstance(kind.mixer, Attention):
        blocks = np.ceil(held_tokens(kind.mixer, tokens) / BLOCK_TOKENS)
        return blocks * BLOCK_TOKENS * kind.mixer.kv_cache_elements * kv_bytes * heads_share(kind.mixer, tp)
    if isinstance(kind.mixer, LinearMixer):
        mixer = kind.mixer
        state = np.ceil(mixer.heads / tp) * (mixer.key_dim * mixer.value_dim * mixer.state_bytes_per_element)
        return state + np.ceil(mixer.conv_channels / tp) * (mixer.conv_kernel * 2.0)
    return np.zeros(len(tp))


def sequence_cache_bytes(
    model: ModelSpec, stages: Stages, tp: IntArray, tokens: FloatArray, kv_bytes: float
) -> FloatArray:
    """Bytes of one sequence's cache on a rank of every stage [n, S]."""
    total = np.zeros(stages.index.shape)
    for k, kind in enumerate(model.kinds):
        total += stages.layers[:, :, k] * layer_cache_bytes(kind, tokens, tp, kv_bytes)[:, None]
    return total


def read_bytes(kind: LayerKind, context: FloatArray, tp: IntArray, kv_bytes: float) -> FloatArray:
    """Bytes of one layer's cache that decoding one token of one sequence reads on a rank [n]."""
    if isinstance(kind.mixer, Attention):
        keys = held_tokens(kind.mixer, context)
        if kind.mixer.top_k_keys is not None:
            keys = np.minimum(keys, kind.mixer.top_k_keys)
        return keys * kind.mixer.kv_cache_elements * kv_bytes * heads_share(kind.mixer, tp)
    return 2.0 * layer_cache_bytes(kind, context, tp, kv_bytes)  # a state is read and written
