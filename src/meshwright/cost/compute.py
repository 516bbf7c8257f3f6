"""Seconds that one rank computes for one microbatch, by distinct in-layer setting: layers [u, K], head and loss [u].

In: model, accelerator, workload, the distinct keys (u rows), the device's and the stack's constants. Out: `LayerTimes`
and `HeadTimes`. Every kernel is a roofline: products by `gemm`, attention by the efficiency of its kernel generation,
element-wise work by memory bandwidth. Notation: s sequence, b microbatch, h hidden, t tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.attention import AttentionTimes, attention_times, linear_mixer_times
from meshwright.cost.candidates import RECOMPUTES, Candidates, FloatArray
from meshwright.cost.device import NARROW, Device, peak_flops
from meshwright.cost.gemm import Gemm
from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Accelerator
from meshwright.layout.config import Precision, Recompute
from meshwright.models.spec import Attention, DenseMlp, LayerKind, LinearMixer, Matmul, ModelSpec, MoeMlp, Part

VOCAB_MULTIPLE = 128  # trainers pad the vocabulary so that each rank's share is a multiple of this (Megatron's default)
ELEMENT_BYTES = 2.0
FP32_BYTES = 4.0
FUSED_NORM_TENSORS = 2.0  # of 16-bit elements that a norm moves: read its input, write its output
EAGER_NORM_TENSORS = 16.0
"""An RMS norm of eager kernels in fp32: cast (6 bytes an element), square (8), mean (4), scale (8), cast (6) - 32."""


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer per microbatch, [u, K]. `forward` and `backward` are device time without communication;
    `recompute` what the backward pass computes again; `weight_gradient` the part of `backward` that zero-bubble
    schedules may delay."""

    forward: FloatArray
    backward: FloatArray
    recompute: FloatArray
    weight_gradient: FloatArray


@dataclass(frozen=True)
class HeadTimes:
    """Seconds per microbatch [u] of the final norm, LM head and loss, and of the embedding."""

    forward: FloatArray
    backward: FloatArray
    embedding: FloatArray


@dataclass(frozen=True)
class Shop:
    """Everything the kernel prices read: constants, and arrays [u] of the keys."""

    accelerator: Accelerator
    device: Device
    stack: Stack
    workload: Workload
    keys: Candidates
    gemm: Gemm  # products of weights
    gemm16: Gemm  # products kept in 16 bits: head, router, attention
    tokens: FloatArray  # of a microbatch on this context-parallel rank
    tp: FloatArray
    region: FloatArray  # share of a sequence-parallel region on this rank
    bandwidth: float

    @property
    def narrow(self) -> bool:
        return self.keys.precision in NARROW


def shop(accelerator: Accelerator, device: Device, stack: Stack, workload: Workload, keys: Candidates) -> Shop:
    """Set up the prices for a set of keys."""
    narrow = keys.precision in NARROW
    share = (device.gemm_fp8 if narrow else device.gemm) * stack.gemm_scale
    peak16 = peak_flops(accelerator, Precision.FP32 if keys.precision is Precision.FP32 else Precision.BF16)
    operand = {Precision.FP32: 4.0, Precision.NVFP4: 0.5625}.get(keys.precision, 1.0 if narrow else ELEMENT_BYTES)
    tp = keys.tp.astype(np.float64)
    return Shop(
        accelerator=accelerator,
        device=device,
        stack=stack,
        workload=workload,
        keys=keys,
        gemm=Gemm.of(accelerator, device, peak_flops(accelerator, keys.precision), share, operand),
        gemm16=Gemm.of(accelerator, device, peak16, device.gemm * stack.gemm_scale, max(operand, ELEMENT_BYTES)),
        tokens=keys.micro_batch * (workload.seq / keys.cp),
        tp=tp,
        region=np.where(keys.sequence_parallel, 1.0 / tp, 1.0),
        bandwidth=accelerator.memory_bandwidth * device.memory,
    )


def layer_times(model: ModelSpec, x: Shop) -> LayerTimes:
    """Every layer kind for every key."""
    columns = [_layer(kind, model, x) for kind in model.kinds]
    return LayerTimes(*(np.stack(c, axis=1) for c in zip(*columns, strict=True)))


def head_times(model: ModelSpec, x: Shop) -> HeadTimes:
    """LM head and loss: t h V / t products forward, twice that backward, and passes over the logits."""
    vocab = np.ceil(model.vocab / (VOCAB_MULTIPLE * x.tp)) * VOCAB_MULTIPLE
    hidden = np.full_like(x.tp, float(model.hidden))
    depth = 1 + model.mtp_layers
    logits = x.tokens * vocab
    # fused cross entropy: 16-bit logits written, read as fp32 statistics, gradient written in place
    loss = logits * (2 * ELEMENT_BYTES + FP32_BYTES) * x.stack.head_passes / x.bandwidth
    norm = x.tokens * model.hidden * x.region * 2 * ELEMENT_BYTES / x.bandwidth
    forward = x.gemm16.seconds(x.tokens, vocab, hidden) + loss + norm
    backward = x.gemm16.seconds(x.tokens, hidden, vocab) + x.gemm16.seconds(hidden, vocab, x.tokens) + loss + 2 * norm
    embedding = x.tokens * model.hidden * 2 * ELEMENT_BYTES / x.bandwidth + x.device.launch_s
    return HeadTimes(depth * forward, depth * backward, embedding)


def _layer(kind: LayerKind, model: ModelSpec, x: Shop) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    forward, data, weight = _products(kind, x)
    mixer = _mixer(kind, x)
    light = _elementwise(kind, model, x)
    whole_forward = forward + mixer.forward + light
    whole_backward = data + weight + mixer.backward + 2.0 * light
    share = np.where(x.keys.recompute == RECOMPUTES.index(Recompute.FULL), 1.0 / x.keys.recompute_every, 0.0)
    selective = x.keys.recompute == RECOMPUTES.index(Recompute.SELECTIVE)
    recompute = share * whole_forward + np.where(selective, mixer.forward, 0.0)
    return whole_forward, whole_backward, recompute, weight


def _mixer(kind: LayerKind, x: Shop) -> AttentionTimes:
    if isinstance(kind.mixer, Attention):
        flash = x.workload.attention or x.stack.attention
        kernel = flash if x.workload.flash_attention else "none"
        return attention_times(kind.mixer, kernel, x.workload, x.keys, x.accelerator, x.device, x.gemm16)
    if isinstance(kind.mixer, LinearMixer):
        return linear_mixer_times(kind.mixer, x.tokens, x.tp, x.device, x.gemm16, x.bandwidth)
    zero = np.zeros_like(x.tokens)
    return AttentionTimes(zero, zero)


def _products(kind: LayerKind, x: Shop) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Forward, data-gradient and weight-gradient seconds of all weight products of a layer."""
    forward, data, weight = (np.zeros_like(x.tokens) for _ in range(3))
    for m, n, k, groups, wide in _shapes(kind, x):
        engine = x.gemm16 if wide else x.gemm
        forward += engine.seconds(m, n, k, groups)
        data += engine.seconds(m, k, n, groups)
        weight += engine.seconds(k, n, m, groups, result_bytes=FP32_BYTES)
        if x.narrow and not wide:
            cast = groups * _cast_seconds(m, n, k, x)
            forward += cast
            data += cast
    return forward, data, weight


def _cast_seconds(m: FloatArray, n: FloatArray, k: FloatArray, x: Shop) -> FloatArray:
    """Casting an input of a low-bit product: read 16 bits, write the value and its transpose (Transformer Engine)."""
    return x.stack.cast_passes * m * np.maximum(k, n) * (ELEMENT_BYTES + 2.0) / x.bandwidth


Shape = tuple[FloatArray, FloatArray, FloatArray, FloatArray, bool]


def _shapes(kind: LayerKind, x: Shop) -> list[Shape]:
    """(m, n, k, groups, kept in 16 bits) on a rank. Products that read the same input run as one where the
    stack fuses projections."""
    fused: dict[tuple[object, ...], Shape] = {}
    for index, product in enumerate(kind.matmuls):
        m, n, k, groups = _rank_shape(product, kind, x)
        wide = product.part is Part.ROUTER
        mergeable = x.stack.fused_projections and product.split == "column"
        key = (product.k, product.part, product.experts) if mergeable else (index,)
        if key in fused:
            fused[key] = (m, fused[key][1] + n, k, groups, wide)
        else:
            fused[key] = (m, n, k, groups, wide)
    return list(fused.values())


def _rank_shape(product: Matmul, kind: LayerKind, x: Shop) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Sizes of a product on one rank: columns or rows are divided by tp (expert_tp for experts)."""
    parts = x.keys.expert_tp.astype(np.float64) if product.experts else x.tp
    units = float(product.split_units or 0)
    share = np.ceil(units / parts) / units if units else 1.0 / parts
    n = product.n * (share if product.split == "column" else np.ones_like(parts))
    k = product.k * (share if product.split == "row" else np.ones_like(parts))
    if not product.experts:
        return x.tokens * product.tokens_factor, n, k, np.ones_like(parts)
    groups = np.maximum(product.experts / x.keys.ep, 1.0)
    rows = routed_tokens(product.tokens_factor, x)
    return rows / groups, n, k, groups


def routed_tokens(top_k: float, x: Shop) -> FloatArray:
    """Token copies that the slowest rank's experts work on: b s k / c x e_t / t of balanced routing, more where routing
    is uneven, never more than the capacity factor allows."""
    excess = x.stack.moe_imbalance
    if x.workload.capacity_factor is not None:
        excess = min(excess, x.workload.capacity_factor)
    return x.tokens * top_k * excess * x.keys.expert_tp / x.tp


def _elementwise(kind: LayerKind, model: ModelSpec, x: Shop) -> FloatArray:
    """Forward seconds of norms, residuals, rotary embedding, activation, and expert permutation. A fused stack reads
    and writes each tensor once; `elementwise_passes` scales the traffic of less fused ones."""
    hidden = x.tokens * model.hidden * x.region
    blocks = (kind.mixer is not None) + (kind.mlp is not None)
    dropout = 0.5 * blocks * hidden if x.workload.dropout else 0.0  # one-byte mask written
    fused = x.stack.fused_norm if x.workload.fused_norm is None else x.workload.fused_norm
    norm = FUSED_NORM_TENSORS if fused else EAGER_NORM_TENSORS / x.stack.elementwise_passes
    elements = norm * kind.norms * hidden + 3.0 * blocks * hidden * model.residual_streams + dropout
    if isinstance(kind.mixer, Attention):
        elements = elements + 2.0 * x.tokens * np.ceil(kind.mixer.heads / x.tp) * kind.mixer.qk_dim
    if isinstance(kind.mlp, DenseMlp):
        elements = elements + x.tokens * np.ceil(kind.mlp.width / x.tp) * (3.0 if kind.mlp.gated else 2.0)
    kernels = 2 * kind.norms + 2 * blocks
    if isinstance(kind.mlp, MoeMlp):
        copies = routed_tokens(float(kind.mlp.top_k), x)
        width = kind.mlp.width / x.keys.expert_tp * (3.0 if kind.mlp.gated else 2.0)
        shared = x.tokens * np.ceil(kind.mlp.shared_width / x.tp) * 3.0
        elements = elements + copies * (width + 4.0 * model.hidden * x.stack.permute_passes) + shared
        kernels += 8
    return elements * ELEMENT_BYTES * x.stack.elementwise_passes / x.bandwidth + kernels * x.device.launch_s
