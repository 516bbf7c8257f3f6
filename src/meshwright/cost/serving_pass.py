"""Seconds of one forward pass of an inference engine: prompts being read and sequences being decoded, in any mix.

In: `Engine` (model, machine, candidates, formats) and a `Batch` [n] per dp replica. Out: seconds [n, S] of a pass on
each pipeline stage. Roofline per kernel: products at the efficiency of their shape or the bandwidth of their weights,
decoding attention at the bandwidth of the cache, prompt attention at its kernel's share of peak; all-reduces, expert
all-to-alls, launches and host time beside (Pope et al. 2022, "Efficiently scaling transformer inference", section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray
from meshwright.cost.collectives import Network, call_seconds
from meshwright.cost.device import Device, peak_flops
from meshwright.cost.gemm import Gemm
from meshwright.cost.kv_cache import read_bytes
from meshwright.cost.serving_stack import ServingStack
from meshwright.cost.stages import Stages
from meshwright.cost.traffic_layers import entered_blocks
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import Precision
from meshwright.ledger import Collective
from meshwright.models.flops import linear_mixer_flops_per_token, mean_keys
from meshwright.models.spec import Attention, DenseMlp, LayerKind, LinearMixer, Matmul, ModelSpec, MoeMlp

ELEMENT_BYTES = 2.0
SKINNY_TILES = ((32, 128), (16, 128))
"""Tiles of decode products, whose few rows would leave a training tile mostly empty."""

WEIGHT_BYTES = {
    Precision.FP32: 4.0,
    Precision.FP16: 2.0,
    Precision.BF16: 2.0,
    Precision.FP8: 1.0,
    Precision.MXFP8: 1.0 + 1 / 32,  # one 8-bit scale per 32 elements (OCP MX v1.0, section 5)
    Precision.NVFP4: 0.5 + 1 / 16,  # one 8-bit scale per 16 elements
}


@dataclass(frozen=True)
class Batch:
    """One forward pass of a dp replica, arrays [n]: `prompt_tokens` of prompts of mean length `prompt_length`, and
    `decoding` sequences, one token each, with `context` cached tokens on average; `logits` rows of the head."""

    prompt_tokens: FloatArray
    prompt_length: FloatArray
    decoding: FloatArray
    context: FloatArray
    logits: FloatArray

    @property
    def tokens(self) -> FloatArray:
        return self.prompt_tokens + self.decoding


@dataclass(frozen=True)
class Engine:
    """Everything a pass is priced from. `weight_bytes` per element of the layers' products."""

    model: ModelSpec
    cluster: Cluster
    device: Device
    network: Network
    stack: ServingStack
    candidates: Candidates
    stages: Stages
    weight_bytes: float
    kv_bytes: float
    products: Gemm
    wide: Gemm
    bandwidth: float


def engine(
    model: ModelSpec,
    cluster: Cluster,
    device: Device,
    network: Network,
    stack: ServingStack,
    candidates: Candidates,
    stages: Stages,
    kv_bytes: float,
    weight_bytes: float | None = None,
) -> Engine:
    """Set up prices. `weight_bytes` below the precision's own means weight-only quantisation."""
    accelerator = cluster.accelerator
    held = WEIGHT_BYTES[candidates.precision] if weight_bytes is None else weight_bytes
    narrow = candidates.precision in (Precision.FP8, Precision.MXFP8, Precision.NVFP4)
    share = (device.gemm_fp8 if narrow else device.gemm) * stack.gemm
    share *= {Precision.NVFP4: stack.gemm_fp4, Precision.FP8: stack.gemm_fp8}.get(candidates.precision, 1.0)
    thin = replace(device, tiles=device.tiles + SKINNY_TILES, quantisation=0.0, launch_s=0.0)
    thin = replace(thin, memory=device.memory * stack.stream)
    upcast = stack.upcast if not narrow and held < WEIGHT_BYTES[candidates.precision] else 1.0
    stored = replace(thin, memory=thin.memory * upcast)
    peak16 = peak_flops(accelerator, Precision.FP32 if candidates.precision is Precision.FP32 else Precision.BF16)
    return Engine(
        model=model,
        cluster=cluster,
        device=device,
        network=replace(network, call_s=stack.reduce_call_s),
        stack=stack,
        candidates=candidates,
        stages=stages,
        weight_bytes=held,
        kv_bytes=kv_bytes,
        products=Gemm.of(accelerator, stored, peak_flops(accelerator, candidates.precision), share * upcast, held),
        wide=Gemm.of(accelerator, thin, peak16, device.gemm * stack.gemm, ELEMENT_BYTES),
        bandwidth=accelerator.memory_bandwidth * device.memory * stack.stream,
    )


def pass_seconds(x: Engine, batch: Batch) -> FloatArray:
    """Seconds of a pass on each stage [n, S], host time not included (see `host_seconds`)."""
    total = np.zeros(x.stages.index.shape)
    for k, kind in enumerate(x.model.kinds):
        total += x.stages.layers[:, :, k] * _layer_seconds(kind, x, batch)[:, None]
    total += x.stages.first * (batch.tokens * x.model.hidden * 2 * ELEMENT_BYTES / x.bandwidth)[:, None]
    total += x.stages.last * _head_seconds(x, batch)[:, None]
    return total + x.stages.sends * _boundary_seconds(x, batch)[:, None]


def host_seconds(x: Engine, sequences: FloatArray, device_s: FloatArray) -> FloatArray:
    """Host time that a pass of `device_s` does not hide [n]."""
    work = x.stack.sequence_host_s * sequences
    if not x.stack.host_overlap:
        return x.stack.step_host_s + work
    return x.stack.step_host_s + np.where(x.candidates.pp == 1, np.maximum(work - device_s, 0.0), work)


def _layer_seconds(kind: LayerKind, x: Engine, batch: Batch) -> FloatArray:
    seconds = np.zeros(len(x.candidates))
    for product in kind.matmuls:
        seconds = seconds + _product_seconds(product, kind, x, batch)
    if isinstance(kind.mixer, Attention):
        seconds = seconds + _attention_seconds(kind.mixer, kind, x, batch)
    elif isinstance(kind.mixer, LinearMixer):
        seconds = seconds + _linear_seconds(kind.mixer, kind, x, batch)
    return seconds + _elementwise_seconds(kind, x, batch) + _communication_seconds(kind, x, batch)


def _product_seconds(product: Matmul, kind: LayerKind, x: Engine, batch: Batch) -> FloatArray:
    c = x.candidates
    parts = (c.expert_tp if product.experts else c.tp).astype(np.float64)
    units = float(product.split_units or 0)
    share = np.ceil(units / parts) / units if units else 1.0 / parts
    n = product.n * (share if product.split == "column" else np.ones_like(parts))
    k = product.k * (share if product.split == "row" else np.ones_like(parts))
    if not product.experts:
        return x.products.seconds(batch.tokens, n, k)
    rows, active = expert_load(product.experts, product.tokens_factor, x, batch)
    uneven = rank_imbalance(x.stack.expert_imbalance, product.experts, c.ep.astype(np.float64))
    return x.products.seconds(uneven * rows / np.maximum(active, 1.0), n, k, active) / x.stack.expert_gemm


def rank_imbalance(busiest_expert: float, experts: int, ep: FloatArray) -> FloatArray:
    """Tokens of the busiest expert-parallel rank over the mean. A rank's load is the sum over its E / ep experts, whose
    excesses even out with the square root of their number; all ranks together are never uneven, and no rank gets more
    than every token."""
    return np.minimum(ep, 1.0 + (busiest_expert - 1.0) * np.sqrt((ep - 1.0) / experts))


def expert_load(experts: int, top_k: float, x: Engine, batch: Batch) -> tuple[FloatArray, FloatArray]:
    """Token copies on a rank's experts, and how many of its experts any token chose: of E experts a token misses each
    with probability 1 - k / E."""
    c = x.candidates
    sharing = np.maximum(c.ep * c.expert_tp / (c.tp * c.cp), 1.0)  # dp replicas that share the experts
    together = batch.tokens * sharing
    local = experts / c.ep
    active = local * (1.0 - (1.0 - min(top_k / experts, 1.0)) ** together)
    return together * top_k / c.ep, np.maximum(active, 1e-9)


def _attention_seconds(mixer: Attention, kind: LayerKind, x: Engine, batch: Batch) -> FloatArray:
    """Prompts: products over the pairs the mask leaves. Decoding: the cache is read once per sequence."""
    c = x.candidates
    heads = np.ceil(mixer.heads / c.tp)
    peak = x.wide.flops / max(x.device.gemm * x.stack.gemm, 1e-9)
    kernel = max(x.device.attention.values()) if x.device.attention else 0.5
    length = batch.prompt_length
    share = kernel * length / (length + x.device.attention_half_seq)
    keys = mean_keys(mixer, np.maximum(length, 1.0))
    prompts = 2.0 * batch.prompt_tokens * heads * keys * (mixer.qk_dim + mixer.v_dim) / (peak * np.maximum(share, 1e-9))
    read = batch.decoding * read_bytes(kind, batch.context, c.tp, x.kv_bytes)
    qk, v = mixer.absorbed_dims or (mixer.qk_dim, mixer.v_dim)
    pairs = batch.decoding * heads * np.minimum(batch.context, mixer.top_k_keys or np.inf)
    decoded = np.maximum(read / (x.bandwidth * x.stack.cache_stream), 2.0 * pairs * (qk + v) / (peak * kernel))
    return np.where(batch.prompt_tokens > 0, prompts, 0.0) + decoded


def _linear_seconds(mixer: LinearMixer, kind: LayerKind, x: Engine, batch: Batch) -> FloatArray:
    c = x.candidates
    flops = batch.prompt_tokens * linear_mixer_flops_per_token(mixer) / c.tp
    peak = x.wide.flops / max(x.device.gemm * x.stack.gemm, 1e-9)
    states = batch.decoding * read_bytes(kind, batch.context, c.tp, x.kv_bytes)
    return flops / (peak * x.device.scan) + states / x.bandwidth


def _elementwise_seconds(kind: LayerKind, x: Engine, batch: Batch) -> FloatArray:
    """Norms, residuals, rotary embedding and activation, each tensor read and written once; and launches."""
    c = x.candidates
    tokens = batch.tokens
    elements = tokens * x.model.hidden * (2.0 * kind.norms + 6.0)
    if isinstance(kind.mixer, Attention):
        elements = elements + 2.0 * tokens * np.ceil(kind.mixer.heads / c.tp) * kind.mixer.qk_dim
    if isinstance(kind.mlp, DenseMlp):
        elements = elements + 3.0 * tokens * kind.mlp.width / c.tp
    elif isinstance(kind.mlp, MoeMlp):
        copies = expert_load(kind.mlp.experts, float(kind.mlp.top_k), x, batch)[0]
        moved = 4.0 * x.model.hidden * x.stack.permute_passes / x.stack.elementwise_passes
        elements = elements + copies * (3.0 * kind.mlp.width + moved)
    launches = x.stack.layer_kernels * x.stack.kernel_s
    return elements * ELEMENT_BYTES * x.stack.elementwise_passes / x.bandwidth + launches


def _communication_seconds(kind: LayerKind, x: Engine, batch: Batch) -> FloatArray:
    """Two all-reduces over tp per layer (Shoeybi et al. 2019); dispatch and combine over ep."""
    c = x.candidates
    hidden = batch.tokens * (x.model.hidden * ELEMENT_BYTES)
    one = np.ones_like(c.tp)
    blocks = max(entered_blocks(kind), (kind.mixer is not None) + (kind.mlp is not None))
    seconds = blocks * call_seconds(Collective.ALL_REDUCE, x.cluster, x.network, c.tp, one, hidden)
    if isinstance(kind.mlp, MoeMlp):
        copies = hidden * kind.mlp.top_k / c.tp
        stride = np.where(c.ep * c.expert_tp <= c.cp * c.tp, c.expert_tp, c.expert_tp * c.pp)
        spread = np.where(c.ep * c.expert_tp > c.cp * c.tp, copies, 0.0)  # within tp all ranks hold all tokens
        each = float(kind.mlp.top_k)  # a node gets a token once, however many of its experts were chosen
        exchange = call_seconds(Collective.ALL_TO_ALL, x.cluster, x.network, c.ep, stride, spread, each)
        seconds = seconds + 2.0 * exchange
    return seconds


def _head_seconds(x: Engine, batch: Batch) -> FloatArray:
    """Final norm and LM head on the rows that need logits, and the gathering of the logits over tp."""
    c = x.candidates
    vocab = np.ceil(x.model.vocab / c.tp)
    hidden = np.full(len(c), float(x.model.hidden))
    gathered = batch.logits * (x.model.vocab * ELEMENT_BYTES)
    gather = call_seconds(Collective.ALL_GATHER, x.cluster, x.network, c.tp, np.ones_like(c.tp), gathered)
    sampling = batch.logits * x.model.vocab * 2 * ELEMENT_BYTES / x.bandwidth
    return x.wide.seconds(batch.logits, vocab, hidden) + gather + sampling


def _boundary_seconds(x: Engine, batch: Batch) -> FloatArray:
    c = x.candidates
    nbytes = batch.tokens * (x.model.hidden * ELEMENT_BYTES)
    return call_seconds(Collective.SEND, x.cluster, x.network, c.pp, c.cp * c.tp, nbytes)
