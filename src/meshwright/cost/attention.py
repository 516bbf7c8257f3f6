"""Seconds of token mixers on one rank: softmax attention by kernel generation, chunked linear attention.

In: the mixer, the kernel, the keys (u rows). Out: forward and backward seconds [u] per layer and microbatch.
Flash kernels (Dao et al. 2022; Dao 2023; Shah et al. 2024) compute only the pairs a causal mask leaves; unfused
attention computes all of them and moves the score matrix through memory (Korthikanti et al. 2022, figure 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray
from meshwright.cost.device import Device
from meshwright.cost.gemm import Gemm
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Accelerator
from meshwright.models.flops import linear_mixer_flops_per_token, mean_keys
from meshwright.models.spec import Attention, LinearMixer

FLASH_BACKWARD_FLOPS = 2.5
"""Products of the backward kernel over the forward one's: five against two (Dao 2023, section 4.1)."""

SCORE_BYTES = 4.0
"""Bytes moved per score by a fused scale-mask-softmax kernel in 16 bits: read 2, written 2 (the products' own traffic
of the score matrix is in their roofline)."""

EAGER_SCORE_BYTES = 20.0
"""The same by kernels of their own: scale and mask each read 2 and write 2, softmax in fp32 reads 2 and writes 4, its
result is cast, read 4 and written 2."""

DROPOUT_SCORE_BYTES = 5.0  # scores read and written once more, and a one-byte mask


@dataclass(frozen=True)
class AttentionTimes:
    """Seconds per layer and microbatch."""

    forward: FloatArray
    backward: FloatArray


def attention_times(
    attention: Attention,
    kernel: str,
    workload: Workload,
    keys: Candidates,
    accelerator: Accelerator,
    device: Device,
    gemm: Gemm,
) -> AttentionTimes:
    """Attention core: scores, softmax, weighted sum. Context parallelism with causal balance gives every rank an equal
    share of the pairs (Megatron's zigzag; Brandon et al. 2023, striped attention)."""
    heads = np.ceil(attention.heads / keys.tp) * keys.micro_batch.astype(np.float64)
    seq = workload.seq
    widths = attention.qk_dim + attention.v_dim
    peak = gemm.flops / max(device.gemm, 1e-9)
    if kernel == "none":
        return _unfused(attention, workload, heads, keys, device, gemm)
    pairs = heads * (seq * float(mean_keys(attention, seq)) / keys.cp)
    # short sequences leave a kernel's pipeline half empty: a block of queries sees only a few blocks of keys
    share = device.attention[kernel] * seq / (seq + device.attention_half_seq)
    head_share = min(1.0, attention.v_dim / 128.0) ** device.attention_head_power
    forward = 2.0 * pairs * widths / (peak * share * head_share) + device.launch_s
    backward = FLASH_BACKWARD_FLOPS * 2.0 * pairs * widths / (peak * share * head_share * device.attention_backward)
    indexer = 2.0 * heads / max(attention.heads, 1) * attention.indexer_heads * attention.indexer_dim
    extra = indexer * seq * (seq + 1) / 2 / keys.cp / gemm.flops
    return AttentionTimes(forward + extra, backward + 2 * extra + 2 * device.launch_s)


def _unfused(
    attention: Attention, workload: Workload, heads: FloatArray, keys: Candidates, device: Device, gemm: Gemm
) -> AttentionTimes:
    """Batched products over all pairs, and the score matrix moved through memory by softmax and dropout."""
    gemm = gemm.batched()
    seq = float(workload.seq)
    rows = seq / keys.cp
    wide = np.full_like(rows, seq)
    qk, v = (np.full_like(rows, float(d)) for d in (attention.qk_dim, attention.v_dim))
    forward = gemm.seconds(rows, wide, qk, heads) + gemm.seconds(rows, v, wide, heads)
    backward = (
        gemm.seconds(rows, qk, wide, heads)
        + gemm.seconds(wide, qk, rows, heads)
        + gemm.seconds(wide, v, rows, heads)
        + gemm.seconds(rows, wide, v, heads)
    )
    scores = heads * rows * seq
    softmax = EAGER_SCORE_BYTES if workload.attention == "eager" else SCORE_BYTES
    moved = (softmax + (DROPOUT_SCORE_BYTES if workload.dropout else 0.0)) * scores / gemm.bandwidth
    return AttentionTimes(
        forward + moved * device.softmax_passes + 3 * device.launch_s,
        backward + 1.5 * moved * device.softmax_passes + 3 * device.launch_s,
    )


def linear_mixer_times(
    mixer: LinearMixer, tokens: FloatArray, tp: FloatArray, device: Device, gemm: Gemm, bandwidth: float
) -> AttentionTimes:
    """Chunked scan: its FLOPs at the share of peak such kernels reach, and the traffic of the short convolution, the
    gate and the output, which are kernels of their own."""
    heads = np.ceil(mixer.heads / tp)
    flops = tokens * linear_mixer_flops_per_token(mixer) * heads / mixer.heads
    peak = gemm.flops / max(device.gemm, 1e-9)
    channels = np.ceil(mixer.conv_channels / tp)
    moved = tokens * (4.0 * channels + 4.0 * heads * mixer.value_dim) * 2.0 / bandwidth
    forward = flops / (peak * device.scan) + moved + 4 * device.launch_s
    return AttentionTimes(forward, 2.0 * forward)
