"""FLOPs per token: products, attention, linear mixers, head; forward, backward, recompute; the published conventions.

In: a model (or layer kind) and a sequence length, a number or a NumPy array. Out: floating-point operations per token
(a multiply-add is 2), averaged over the sequence. Backward is twice forward (each product has two gradients).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.errors import InputError, suggestion
from meshwright.layout.config import Recompute
from meshwright.models.counting import counted_kinds, matmul_parameters
from meshwright.models.spec import Attention, LayerKind, LinearMixer, ModelSpec

FloatArray = NDArray[np.float64]

Convention = Literal["model_full", "model_causal", "model_full_emb2", "hw_full_recompute", "model_6N", "x8_6N"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
"""Formulas behind published TFLOP/s and MFU; see `model_flops_per_token`."""


def mean_keys(attention: Attention, seq: ArrayLike, *, causal: bool = True) -> FloatArray:
    """Mean number of keys that a query attends to. Causal attention over s tokens sees s/2; a window w limits that to
    w - w^2 / 2s (the first w queries see fewer), a chunked window to w/2; non-causal counts see min(s, w)."""
    s = np.asarray(seq, np.float64)
    half = 0.5 if causal else 1.0
    if attention.kv_compression > 1:
        compressed = s / attention.kv_compression * half
        if attention.top_k_keys is not None:
            compressed = np.minimum(compressed, attention.top_k_keys)
        return _windowed(s, attention, causal) + compressed
    keys = _windowed(s, attention, causal) if attention.window is not None else s * half
    if attention.top_k_keys is not None:
        k = float(attention.top_k_keys)
        picked = np.where(s > k, k - (k * k / (2 * s) if causal else 0.0), s * half)
        keys = np.minimum(keys, picked)
    return keys


def _windowed(s: FloatArray, attention: Attention, causal: bool) -> FloatArray:
    if attention.window is None:
        return np.zeros_like(s)
    w = np.minimum(s, float(attention.window))
    if not causal:
        return w
    return w / 2 if attention.chunked else w - w * w / (2 * s)


def attention_flops_per_token(attention: Attention, seq: ArrayLike, *, causal: bool = True) -> FloatArray:
    """Forward FLOPs of q k^T and probabilities v: 2 heads (qk + v) per query-key pair, and of the indexer that picks
    the keys of sparse attention (every earlier key is scored)."""
    pair = 2.0 * attention.heads * (attention.qk_dim + attention.v_dim)
    flops = pair * mean_keys(attention, seq, causal=causal)
    if attention.indexer_heads:
        s = np.asarray(seq, np.float64) * (0.5 if causal else 1.0) / attention.kv_compression
        flops = flops + 2.0 * attention.indexer_heads * attention.indexer_dim * s
    return flops


def linear_mixer_flops_per_token(mixer: LinearMixer) -> float:
    """Forward FLOPs of the chunked scan of a linear mixer, c tokens a chunk, state key x value per head.

    Between chunks: reading and updating the state, 2 x 2 d_k d_v. Within a chunk: scores and outputs over c/2 keys,
    2 (d_k + d_v) c/2 (Mamba-2, arXiv 2405.21060, section 6). The delta rule (gated delta net, Kimi delta attention)
    also solves the triangular system of the chunk for d_k + d_v columns and its c/2-key Gram matrix, and reads the
    state once more (arXiv 2406.06484, section 3.2). Plus the short convolution.
    """
    state, widths = mixer.key_dim * mixer.value_dim, mixer.key_dim + mixer.value_dim
    per_head = 4.0 * state + widths * mixer.chunk
    if mixer.delta_rule:
        per_head += 2.0 * state + widths * mixer.chunk + mixer.key_dim * mixer.chunk
    return mixer.heads * per_head + 2.0 * mixer.conv_channels * mixer.conv_kernel


def matmul_flops_per_token(kind: LayerKind) -> float:
    """Forward FLOPs of a layer's weight products (routed experts: top-k of them)."""
    return sum(2.0 * m.k * m.n * m.tokens_factor for m in kind.matmuls)


def mixer_flops_per_token(kind: LayerKind, seq: ArrayLike, *, causal: bool = True) -> FloatArray:
    """Forward FLOPs of a layer's token mixer beside its weight products."""
    if isinstance(kind.mixer, Attention):
        return attention_flops_per_token(kind.mixer, seq, causal=causal)
    flops = linear_mixer_flops_per_token(kind.mixer) if kind.mixer else 0.0
    return np.full_like(np.asarray(seq, np.float64), flops)


def head_flops_per_token(model: ModelSpec) -> float:
    """Forward FLOPs of the LM head, once more for every multi-token-prediction module."""
    return 2.0 * model.head_matmul.k * model.head_matmul.n * (1 + model.mtp_layers)


def layers_flops_per_token(model: ModelSpec, seq: ArrayLike, *, causal: bool = True) -> FloatArray:
    """Forward FLOPs of all decoder layers and multi-token-prediction modules."""
    total = np.zeros_like(np.asarray(seq, np.float64))
    for n, kind in counted_kinds(model):
        total = total + n * (matmul_flops_per_token(kind) + mixer_flops_per_token(kind, seq, causal=causal))
    return total


def forward_flops_per_token(model: ModelSpec, seq: ArrayLike, *, causal: bool = True) -> FloatArray:
    return layers_flops_per_token(model, seq, causal=causal) + head_flops_per_token(model)


def backward_flops_per_token(model: ModelSpec, seq: ArrayLike, *, causal: bool = True) -> FloatArray:
    return 2.0 * forward_flops_per_token(model, seq, causal=causal)


def recompute_flops_per_token(
    model: ModelSpec, seq: ArrayLike, recompute: Recompute, every: int = 1, *, causal: bool = True
) -> FloatArray:
    """Forward FLOPs done again in the backward pass: nothing, the attention cores, or one layer of `every`."""
    if recompute is Recompute.FULL:
        return layers_flops_per_token(model, seq, causal=causal) / every
    total = np.zeros_like(np.asarray(seq, np.float64))
    if recompute is Recompute.SELECTIVE:
        for n, kind in counted_kinds(model):
            total = total + n * mixer_flops_per_token(kind, seq, causal=causal)
    return total


def attention_term(model: ModelSpec, seq: ArrayLike, *, causal: bool = False) -> FloatArray:
    """A of the conventions: attention forward and backward, 12 L s heads head_dim where every query sees all s keys
    (6 L s heads (qk + v) for latent attention), half of it where `causal`. Windows and sparse selections limit the
    keys; linear mixers count their scan; prediction modules count as layers."""
    total = np.zeros_like(np.asarray(seq, np.float64))
    for n, kind in counted_kinds(model):
        total = total + n * 3.0 * mixer_flops_per_token(kind, seq, causal=causal)
    return total


def model_flops_per_token(model: ModelSpec, seq: ArrayLike, convention: str = "model_full") -> FloatArray:
    """FLOPs per trained token as published figures count them; N = matmul parameters with the LM head.

    model_full: 6N + A (PaLM appendix B; Korthikanti et al. 2022, eq. 7). model_causal: 6N + A/2. model_full_emb2:
    6(N + V h) + A, the input embedding counted as a product. hw_full_recompute: the layers once more, the head not
    (Narayanan et al. 2021, eq. 3). model_6N: 6N. x8_6N: 8N. A is `attention_term`. Multi-token-prediction modules are
    counted, with their pass of the head.
    """
    n, head = matmul_parameters(model), float(model.vocab * model.hidden)
    heads = head * (1 + model.mtp_layers)
    attention = attention_term(model, seq)
    formulas = {
        "model_full": 6 * n + attention,
        "model_causal": 6 * n + attention_term(model, seq, causal=True),
        "model_full_emb2": 6 * (n + head) + attention,
        "hw_full_recompute": 4 / 3 * (6 * (n - heads) + attention) + 6 * heads,
        "model_6N": 6 * n + 0 * attention,
        "x8_6N": 8 * n + 0 * attention,
    }
    if convention not in formulas:
        raise InputError(f"unknown FLOP convention {convention[:40]!r}{suggestion(convention, formulas)}")
    return formulas[convention]
