"""What a running sequence keeps per layer and rank: keys and values of attention, the state of linear mixers.

In: a layer's mixer, tokens in the sequence, the tensor-parallel size (numbers or NumPy arrays). Out: elements for
attention (the cache's number format is the server's choice), bytes for linear mixers (the config states theirs).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.models.spec import Attention, LinearMixer

FloatArray = NDArray[np.float64]


def cached_elements(attention: Attention, tokens: ArrayLike, tp: ArrayLike = 1) -> FloatArray:
    """Cache elements of one sequence in one layer on one rank.

    A window bounds the tokens kept. KV heads are split over tp, ceil(kv_heads / tp) to a rank; the latent of MLA, a
    compressed cache and the indexer's keys are on every rank.
    """
    length = np.asarray(tokens, np.float64)
    ways = np.asarray(tp, np.float64)
    if attention.kv_compression > 1:
        recent = np.minimum(length, attention.window or 0) * attention.kv_window_elements
        return length * attention.kv_cache_elements + recent + 0 * ways
    kept = length if attention.window is None else np.minimum(length, attention.window)
    index = attention.indexer_dim if attention.indexer_heads else 0
    if attention.kv_replicated:
        return kept * attention.kv_cache_elements + 0 * ways
    share = np.ceil(attention.kv_heads / ways) / attention.kv_heads
    return kept * ((attention.kv_cache_elements - index) * share + index)


def state_bytes(mixer: LinearMixer, tp: ArrayLike = 1) -> FloatArray:
    """Bytes of one sequence's state in one layer on one rank, whatever its length; heads are split over tp."""
    share = np.ceil(mixer.heads / np.asarray(tp, np.float64)) / mixer.heads
    return mixer.state_bytes * share
