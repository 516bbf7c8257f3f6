"""Memory of one decoder layer and of the model's ends, per distinct in-layer setting.

In: a model, a workload, a software stack and the distinct keys of the candidates (u rows). Out: parameter counts per
rank and the bytes a layer keeps for its backward pass per microbatch, [u, K] over the K layer kinds. Notation of
Korthikanti et al. 2022 ("Reducing activation recomputation"): s sequence, b microbatch, h hidden, a heads, t tensor
parallel size. Their per-layer total s b h (10 + 24/t + 5 a s / (h t)) is the sum of the terms here for GPT-3's layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import RECOMPUTES, Candidates, FloatArray
from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.layout.config import Precision, Recompute
from meshwright.models.counting import per_rank_elements
from meshwright.models.spec import (
    Attention,
    DenseMlp,
    LayerKind,
    LinearMixer,
    Matmul,
    ModelSpec,
    MoeMlp,
    Part,
    TensorSpec,
)

MASK_BYTES = 1.0  # a dropout mask element (Korthikanti et al. 2022, section 4.1)
FP32_BYTES = 4.0
LINEAR_INPUT_BYTES = {Precision.FP8: 1.0, Precision.MXFP8: 1.0, Precision.NVFP4: 0.5625}
"""Bytes of a kept input of a weight product where the product runs in fewer bits: the copy that the weight gradient
reads (Transformer Engine keeps the transposed fp8 copy; NVFP4 adds one fp8 scale per 16 elements)."""


@dataclass(frozen=True)
class LayerMemory:
    """Arrays [u, K]: parameters per rank, and bytes per microbatch and layer.

    `kept` is what the key's recompute setting keeps of an average layer, `whole` what a layer keeps without
    recomputation (the working set while one is recomputed), `working` what its backward pass allocates beside.
    """

    dense_parameters: FloatArray
    expert_parameters: FloatArray
    kept: FloatArray
    whole: FloatArray
    working: FloatArray


@dataclass(frozen=True)
class EndMemory:
    """Arrays [u]: parameters per rank of embedding, final norm and head; bytes per microbatch at the ends.

    `token_parameters` is the part of the embedding that a tied last stage holds again. `embedded` is kept per live
    microbatch on the first stage, `final` on the last; `logits` are alive at the loss, of one microbatch. `output` is
    that of a row-parallel product before its reduction.
    """

    embedding_parameters: FloatArray
    token_parameters: FloatArray
    head_parameters: FloatArray
    embedded: FloatArray
    final: FloatArray
    logits: FloatArray
    boundary: FloatArray
    output: FloatArray


def element_bytes(precision: Precision) -> float:
    """Bytes of a working weight or activation element."""
    return 4.0 if precision is Precision.FP32 else 2.0


def _parameters(tensors: tuple[TensorSpec, ...], keys: Candidates) -> tuple[FloatArray, FloatArray]:
    """Dense and expert elements on a rank [u]."""
    dense, expert = per_rank_elements(tensors, keys.tp, keys.ep, keys.expert_tp)
    return dense.astype(np.float64), expert.astype(np.float64)


def units_per_rank(units: int, tp: FloatArray) -> FloatArray:
    """Heads (or other indivisible units) on a rank: ceil, so that fewer units than ranks are replicated."""
    return np.ceil(units / tp)


def attended_kv_heads(attention: Attention, c: Candidates) -> FloatArray:
    """KV heads of a rank as its attention takes them [n]: repeated where they are fewer than the cp ranks that exchange
    heads (all-to-all), so that each rank gets one."""
    heads = units_per_rank(attention.kv_heads, c.tp.astype(np.float64))
    return np.where(c.heads_exchanged, np.maximum(heads, c.cp), heads)


@dataclass(frozen=True)
class Setting:
    """What the terms below read, as arrays [u]: tokens on a rank, tensor size, the share of a sequence-parallel
    region, bytes per element of activations and of kept inputs of weight products."""

    keys: Candidates
    stack: Stack
    workload: Workload
    tokens: FloatArray
    keys_per_query: FloatArray
    tp: FloatArray
    region: FloatArray
    element: float
    linear: float

    @property
    def block_input(self) -> FloatArray:
        """Share of the block's input that is kept: the shard alone where the stack gathers it again in the backward
        pass (Korthikanti et al. 2022, section 4.2.2)."""
        return self.region if self.stack.regathers_input else np.ones_like(self.region)


def setting(workload: Workload, keys: Candidates, stack: Stack) -> Setting:
    tp = keys.tp.astype(np.float64)
    element = element_bytes(keys.precision)
    return Setting(
        keys=keys,
        stack=stack,
        workload=workload,
        tokens=keys.micro_batch * (workload.seq / keys.cp),
        keys_per_query=np.full(len(keys), float(workload.seq)),
        tp=tp,
        region=np.where(keys.sequence_parallel, 1.0 / tp, 1.0),
        element=element,
        linear=LINEAR_INPUT_BYTES.get(keys.precision, element),
    )


def _softmax_attention(attention: Attention, matmuls: list[Matmul], x: Setting) -> tuple[FloatArray, FloatArray]:
    """Bytes kept of the mixer, and of its core alone (what selective recomputation drops)."""
    heads = units_per_rank(attention.heads, x.tp)
    kv_heads = attended_kv_heads(attention, x.keys)
    q = heads * attention.qk_dim
    kv = kv_heads * (attention.qk_dim + attention.v_dim)
    out = heads * attention.v_dim
    kept = x.tokens * (x.element * (q + kv + x.stack.attention_copies * q) + x.linear * out)
    if x.workload.flash_attention and x.linear != x.element:
        kept = kept + x.tokens * x.element * out  # the kernel keeps its own output beside the product's low-bit copy
    # MLA's low-rank products: their outputs are the inputs of a norm, and the norm's outputs of the next product
    low_rank = sum(m.n for m in matmuls if m.split == "none")
    kept = kept + x.tokens * low_rank * (x.element + x.linear)
    if x.workload.flash_attention:
        return kept, x.tokens * heads * FP32_BYTES  # log-sum-exp of each query (Dao et al. 2022, algorithm 1)
    pairs = x.tokens * x.keys_per_query * heads
    # softmax output 2 a s^2 b; with dropout its mask (1) and output (2): 5 a s^2 b (Korthikanti et al. 2022, eq. 1)
    return kept, pairs * (x.element + (MASK_BYTES + x.element if x.workload.dropout else 0.0))


def _linear_mixer(mixer: LinearMixer, x: Setting) -> FloatArray:
    """Linear attention or state space: convolution in and out, the gate, the output, and one state per chunk."""
    heads = units_per_rank(mixer.heads, x.tp)
    channels = np.ceil(mixer.conv_channels / x.tp)
    streams = 2 * channels + 2 * heads * mixer.value_dim  # conv input and output; gate and mixer output
    states = heads * mixer.key_dim * mixer.value_dim / mixer.chunk * mixer.state_bytes_per_element
    return x.tokens * (x.element * streams + x.linear * heads * mixer.value_dim + states)


def _dense_mlp(width: FloatArray, gated: bool, x: Setting, tokens: FloatArray) -> FloatArray:
    """Inputs of the activation function and of the second product. Gated: gate and up are kept; an unfused gate
    keeps the activated gate too."""
    streams = (2.0 if x.stack.fused_glu else 3.0) if gated else 1.0
    return tokens * width * (x.element * streams + x.linear)


def routed_tokens(mlp: MoeMlp, x: Setting) -> FloatArray:
    """Token copies that a rank's experts work on: top-k copies of the tokens of its tp x ep group, evenly spread,
    bounded by the capacity factor where tokens are dropped. Every expert_tp rank works on all copies of its group."""
    factor = 1.0 if x.workload.capacity_factor is None else x.workload.capacity_factor
    return x.tokens * mlp.top_k * factor * x.keys.expert_tp / x.tp


def _moe(mlp: MoeMlp, hidden: int, x: Setting) -> FloatArray:
    """Router scores, the permuted inputs, the experts' own activations, and their outputs before they are weighed."""
    copies = routed_tokens(mlp, x)
    hidden = mlp.latent or hidden
    width = mlp.width / x.keys.expert_tp
    router = x.tokens * x.region * mlp.experts * FP32_BYTES * x.stack.router_copies
    permuted = copies * hidden * (x.linear + (x.element if x.stack.keeps_expert_output else 0.0))
    kept = router + permuted + _dense_mlp(width, mlp.gated, x, copies)
    if mlp.shared_width:
        kept = kept + _dense_mlp(np.ceil(mlp.shared_width / x.tp), mlp.shared_gated, x, x.tokens)
    return kept


def _norm_bytes(tensors: tuple[TensorSpec, ...], x: Setting) -> float:
    """Bytes a norm keeps per element beside its output (which is the block's input): its input; an unfused RMS norm
    keeps it in fp32, and the normalised values. Layer norms (they have a bias) are one kernel in every framework."""
    fused = x.stack.fused_norm if x.workload.fused_norm is None else x.workload.fused_norm
    fused = fused or any(t.part is Part.NORM and t.name.endswith("bias") for t in tensors)
    return x.element if fused else FP32_BYTES + x.element


def layer_bytes(kind: LayerKind, hidden: int, x: Setting) -> tuple[FloatArray, FloatArray]:
    """Bytes that one layer of a kind keeps for a microbatch without recomputation, and the part that selective
    recomputation drops."""
    kept = x.tokens * hidden * kind.norms * _norm_bytes(kind.tensors, x) * x.region
    dropped = np.zeros_like(x.tokens)
    mask = MASK_BYTES * x.region if x.workload.dropout else 0.0
    if kind.mixer is not None:
        kept = kept + x.tokens * hidden * (x.linear * x.block_input + mask)
    if kind.mlp is not None:
        kept = kept + x.tokens * hidden * (x.linear * x.block_input + mask)
    if isinstance(kind.mixer, Attention):
        matmuls = [m for m in kind.matmuls if m.part is Part.ATTENTION]
        mixer, dropped = _softmax_attention(kind.mixer, matmuls, x)
        kept = kept + mixer + dropped
    elif isinstance(kind.mixer, LinearMixer):
        kept = kept + _linear_mixer(kind.mixer, x)
    if isinstance(kind.mlp, DenseMlp):
        kept = kept + _dense_mlp(np.ceil(kind.mlp.width / x.tp), kind.mlp.gated, x, x.tokens)
    elif isinstance(kind.mlp, MoeMlp):
        kept = kept + _moe(kind.mlp, hidden, x)
    return kept, dropped


def working_bytes(kind: LayerKind, hidden: int, x: Setting) -> FloatArray:
    """What a layer's backward pass allocates beside the kept tensors: the gradients of its widest block's inner
    tensors, and of its input and output over the whole sequence (gathered where sequence parallel)."""
    inner = np.zeros_like(x.tokens)
    if isinstance(kind.mlp, DenseMlp):
        inner = x.tokens * np.ceil(kind.mlp.width / x.tp) * (3.0 if kind.mlp.gated else 2.0)
    elif isinstance(kind.mlp, MoeMlp):
        width = kind.mlp.width / x.keys.expert_tp
        inner = routed_tokens(kind.mlp, x) * (width * (3.0 if kind.mlp.gated else 2.0) + hidden)
    if isinstance(kind.mixer, Attention):
        heads = units_per_rank(kind.mixer.heads, x.tp)
        kv_heads = attended_kv_heads(kind.mixer, x.keys)
        mixer = x.tokens * (heads + kv_heads) * (kind.mixer.qk_dim + kind.mixer.v_dim)
        inner = np.maximum(inner, mixer)
    return x.element * (inner + 2 * x.tokens * hidden)


def layer_memory(model: ModelSpec, workload: Workload, keys: Candidates, stack: Stack) -> LayerMemory:
    """Every term of a decoder layer for every distinct key and layer kind."""
    x = setting(workload, keys, stack)
    modes = np.array([RECOMPUTES.index(m) for m in (Recompute.SELECTIVE, Recompute.FULL)])
    columns: list[tuple[FloatArray, ...]] = []
    for kind in model.kinds:
        whole, dropped = layer_bytes(kind, model.hidden, x)
        boundary = x.tokens * model.hidden * model.residual_streams * x.element * x.region
        blocks = (kind.mixer is not None) + (kind.mlp is not None)
        whole = whole + blocks * x.tokens * model.hidden * (model.residual_streams - 1) * x.element * x.region
        selected = np.where(keys.recompute == modes[0], whole - dropped, whole)
        share = np.where(keys.recompute == modes[1], 1.0 / keys.recompute_every, 0.0)
        kept = selected * (1.0 - share) + boundary * share
        columns.append(
            (
                *_parameters(kind.tensors, keys),
                kept,
                whole,
                working_bytes(kind, model.hidden, x),
            )
        )
    dense, expert, kept, whole, working = (np.stack(c, axis=1) for c in zip(*columns, strict=True))
    return LayerMemory(dense, expert, kept, whole, working)


def end_memory(model: ModelSpec, workload: Workload, keys: Candidates, stack: Stack) -> EndMemory:
    """Every term of the embedding, the final norm, the head and the loss."""
    x = setting(workload, keys, stack)
    vocab = np.ceil(model.vocab / x.tp) if stack.vocab_parallel_loss else np.full_like(x.tp, float(model.vocab))
    hidden_bytes = x.tokens * model.hidden
    mask = MASK_BYTES if workload.dropout else 0.0
    embedding = model.embedding_tensors
    token = tuple(t for t in embedding if t.shape and t.shape[0] == model.vocab)
    return EndMemory(
        embedding_parameters=_parameters(embedding, keys)[0],
        token_parameters=_parameters(token, keys)[0] if model.tied_embeddings else np.zeros(len(keys)),
        head_parameters=_parameters(model.final_tensors + model.head_tensors, keys)[0],
        embedded=hidden_bytes * mask * x.region,
        final=hidden_bytes * (_norm_bytes(model.final_tensors, x) * x.region + x.element * x.block_input),
        logits=x.tokens * vocab * (FP32_BYTES if x.element == FP32_BYTES else stack.logit_bytes),
        boundary=hidden_bytes * model.residual_streams * x.element * x.region,
        output=hidden_bytes * x.element,
    )
