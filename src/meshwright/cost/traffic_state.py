"""Traffic of parameters and gradients, per step or per microbatch: replicas (ZeRO-0), sharded state (ZeRO-1 to 3 as
torch's FSDP2 does it; Rajbhandari et al. 2020, section 7; Zhao et al. 2023), HSDP, experts' own replicas, the tied
embedding's group, sums that tensor parallelism leaves open, and the scalars of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray, IntArray
from meshwright.cost.traffic_elements import end_elements, gathered, held, held_dense, owned, state_shards
from meshwright.cost.traffic_layers import expert_stride
from meshwright.cost.traffic_term import Scene, TrafficTerm
from meshwright.ledger import GRADIENT_BUCKET_BYTES, Collective, Phase
from meshwright.models.counting import parts_with_units
from meshwright.models.spec import Attention, LayerKind, Part, TensorSpec

SCALAR_BYTES = 8.0  # the squared gradient norm, in fp64
LOSS_BYTES = 16.0  # loss and token count, in fp64


@dataclass(frozen=True)
class Unit:
    """What is gathered and reduced together on a stage: `elements` per call and `count` calls [n, S] (or [n, 1]), over
    `shards` ranks that share it and `replicas` of those. `padded`: elements of the buffers that shards are gathered
    into."""

    what: str
    axis: str
    elements: FloatArray
    padded: FloatArray
    count: FloatArray
    shards: IntArray
    replicas: IntArray
    stride: IntArray


def state_terms(x: Scene) -> list[TrafficTerm]:
    """Every term of parameters, gradients and scalars."""
    units = [u for u in _units(x) if ((u.shards * u.replicas) > 1).any()]
    terms = [term for unit in units for term in (*_replica_terms(x, unit), *_shard_terms(x, unit))]
    return [*terms, *_tensor_parallel_sums(x), *_tied_embedding(x), *_scalars(x)]


def data_stride(c: Candidates) -> IntArray:
    """The dp x cp group: cp runs of stride tp, a pipeline apart; see TrafficTerm on strides."""
    return np.where(c.cp == 1, c.pp * c.tp, np.where(c.pp == 1, c.tp, c.tp * c.pp))


def _units(x: Scene) -> list[Unit]:
    """One unit per decoder layer, one for the rest of a stage, and one per layer for routed experts."""
    c, stages, model = x.candidates, x.stages, x.model
    world = c.dp * c.cp
    replicas = np.maximum(world // c.zero_shards, 1)
    expert = np.zeros(stages.index.shape)
    dense, padded = np.zeros(stages.index.shape), np.zeros(stages.index.shape)
    for k, kind in enumerate(model.kinds):
        of_dense, of_expert = held(kind.tensors, x)
        dense = dense + stages.layers[:, :, k] * of_dense[:, None]
        padded = padded + stages.layers[:, :, k] * gathered(kind.tensors, x)[:, None]
        expert = expert + stages.layers[:, :, k] * of_expert[:, None]
    layers = stages.layers.sum(axis=2).astype(np.float64)
    moe_layers = x.layers_where([float(any(t.experts for t in k.tensors)) for k in model.kinds])
    # the first and the last chunk are units of their own, also where a V puts them on one stage
    apart = (c.pp * c.vpp > 1)[:, None]
    ends, padded_ends = (end_elements(x, count, apart) for count in (held_dense, gathered))
    end_units = np.where(apart, stages.first.astype(np.float64) + stages.last, 1.0) * (ends > 0)
    stride = data_stride(c)
    of_layers, of_ends = np.maximum(layers, 1), np.maximum(end_units, 1)
    shards = c.zero_shards
    units = [
        Unit("layer", "dp", dense / of_layers, padded / of_layers, layers, shards, replicas, stride),
        Unit("ends", "dp", ends / of_ends, padded_ends / of_ends, end_units, shards, replicas, stride),
    ]
    if moe_layers.any():
        each = expert / np.maximum(moe_layers, 1)
        shards = expert_state_shards(c)
        outer = np.where(c.expert_dp > 1, c.ep * expert_stride(c), 1)
        units.append(Unit("expert", "expert_dp", each, each, moe_layers, shards, c.expert_dp // shards, outer))
    return units


def _replica_terms(x: Scene, unit: Unit) -> list[TrafficTerm]:
    """ZeRO-0: gradients in one flat buffer, reduced in slices of a bucket, once per step."""
    plain = x.candidates.zero == 0
    size = np.where(plain, unit.shards * unit.replicas, 1)
    total = unit.elements * unit.count * x.workload.gradient_bytes
    calls = np.ceil(total / GRADIENT_BUCKET_BYTES)
    what = f"{unit.what} gradients"
    each = total / np.maximum(calls, 1)
    return [x.term(unit.axis, Collective.ALL_REDUCE, Phase.BACKWARD, what, size, unit.stride, calls, each)]


def _shard_terms(x: Scene, unit: Unit) -> list[TrafficTerm]:
    """Parameters are gathered in the working precision, once per step (ZeRO-1 and 2, kept until the step ends) or per
    microbatch forward and again backward (ZeRO-3); gradients are reduced in the gradients' format, once (ZeRO-1) or per
    microbatch. HSDP sums the shards across replicas after each reduction."""
    c = x.candidates
    m = x.microbatches[:, None]
    sharded, zero_3 = c.zero >= 1, (c.zero == 3)[:, None]
    size = np.where(sharded, unit.shards, 1)
    across = np.where(sharded, unit.replicas, 1)
    reductions = unit.count * np.where((c.zero >= 2)[:, None], m, 1.0)
    weights = unit.padded * x.element
    gradients = unit.padded * x.workload.gradient_bytes
    shard = gradients / unit.shards[:, None]
    outer = unit.stride * unit.shards
    forward, backward = Phase.FORWARD, Phase.BACKWARD
    gathered, reduced = f"{unit.what} parameters", f"{unit.what} gradients"
    once_or_each = unit.count * np.where(zero_3, m, 1.0)
    again = unit.count * np.where(zero_3, m, 0.0)
    gather, scatter, reduce = Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE
    return [
        x.term(unit.axis, gather, forward, gathered, size, unit.stride, once_or_each, weights),
        x.term(unit.axis, gather, backward, gathered, size, unit.stride, again, weights),
        x.term(unit.axis, scatter, backward, reduced, size, unit.stride, reductions, gradients),
        x.term(unit.axis, reduce, backward, f"{unit.what} gradient shards", across, outer, reductions, shard),
    ]


_INSIDE_A_BLOCK = ("q_norm", "k_norm", "q_a_", "kv_a_")
"""Replicated parts of attention that work on this rank's heads: norms of single heads, latent attention before them."""


def _is_partial(tensor: TensorSpec, sequence_parallel: bool) -> bool:
    """Whether a replicated tensor sees only this rank's tokens (sequence parallel; routers always) or heads."""
    if tensor.split_units is not None or tensor.experts:
        return False
    of_router = tensor.part is Part.ROUTER and "shared_expert_gate" not in tensor.name
    of_heads = tensor.part in (Part.NORM, Part.ATTENTION) and any(n in tensor.name for n in _INSIDE_A_BLOCK)
    return sequence_parallel or of_router or of_heads


def _partial_elements(tensors: tuple[TensorSpec, ...], x: Scene) -> FloatArray:
    """Elements of the rank's shard whose gradients are summed over tp after the backward pass [n]."""
    sharded, plain = (owned([t for t in tensors if _is_partial(t, sp)], x) for sp in (True, False))
    return np.where(x.candidates.sequence_parallel, sharded, plain)


def _replicated_kv_elements(kind: LayerKind, x: Scene) -> FloatArray:
    """Elements of the rank's shard of KV heads that several tp ranks hold [n]."""
    if not isinstance(kind.mixer, Attention):
        return np.zeros(len(x.candidates))
    heads = kind.mixer.kv_heads
    if heads == kind.mixer.heads:
        return np.zeros(len(x.candidates))
    of_kv = [part for t in kind.tensors if t.part is Part.ATTENTION for part in parts_with_units(t, heads)]
    return np.where(x.candidates.tp > heads, owned(of_kv, x), 0.0)


def _tensor_parallel_sums(x: Scene) -> list[TrafficTerm]:
    """Once per step: gradients of replicated tensors that each tp rank saw a part of, and of shared KV heads, each in
    one flat buffer."""
    c, stages, model = x.candidates, x.stages, x.model
    if not (c.tp > 1).any():
        return []
    partial = np.zeros(stages.index.shape)
    shared = np.zeros(stages.index.shape)
    kv_heads = 1
    for k, kind in enumerate(model.kinds):
        partial = partial + stages.layers[:, :, k] * _partial_elements(kind.tensors, x)[:, None]
        shared = shared + stages.layers[:, :, k] * _replicated_kv_elements(kind, x)[:, None]
        if isinstance(kind.mixer, Attention):
            kv_heads = kind.mixer.kv_heads
    partial = partial + stages.first * _partial_elements(model.embedding_tensors, x)[:, None]
    partial = partial + stages.last * _partial_elements(model.final_tensors, x)[:, None]
    one = np.ones_like(c.tp)
    nbytes = x.workload.gradient_bytes
    reduce, phase = Collective.ALL_REDUCE, Phase.OPTIMIZER
    copies = np.maximum(c.tp // kv_heads, 1)
    return [
        x.term(
            "tp", reduce, phase, "replicated gradients", c.tp, one, (partial > 0).astype(np.float64), partial * nbytes
        ),
        x.term(
            "tp",
            reduce,
            phase,
            "shared KV head gradients",
            copies,
            one,
            (shared > 0).astype(np.float64),
            shared * nbytes,
        ),
    ]


def expert_state_shards(c: Candidates) -> IntArray:
    """Ranks that the state of an expert is spread over [n]: HSDP has as many copies of it as of the rest, unless that
    would leave each copy on one rank; then there is one copy."""
    copies = np.maximum(c.dp * c.cp // c.zero_shards, 1)
    return np.where(c.expert_dp > copies, c.expert_dp // copies, c.expert_dp)


def _tied_embedding(x: Scene) -> list[TrafficTerm]:
    """First and last stage sum the gradients of the table they share (Narayanan et al. 2021)."""
    c, stages = x.candidates, x.stages
    if not x.model.tied_tensors:
        return []
    apart = (c.pp > 1)[:, None] & (stages.first ^ stages.last)
    table = owned(x.model.tied_tensors, x) * x.workload.gradient_bytes
    size = np.where(apart.any(axis=1), 2, 1)
    stride = c.cp * c.tp * np.maximum(c.pp - 1, 1)
    phase, what = Phase.OPTIMIZER, "tied embedding gradients"
    return [x.term("embedding", Collective.ALL_REDUCE, phase, what, size, stride, apart.astype(np.float64), table)]


def _scalars(x: Scene) -> list[TrafficTerm]:
    """Loss with its token count over dp x cp, and the squared gradient norm over every axis that splits parameters; of
    routed experts over theirs."""
    c = x.candidates
    one = np.ones((len(c), 1))
    scalar = np.full(len(c), SCALAR_BYTES)
    loss = np.full(len(c), LOSS_BYTES)
    reduce, phase, norm = Collective.ALL_REDUCE, Phase.OPTIMIZER, "gradient norm"
    shards = state_shards(c)
    of_experts: list[TrafficTerm] = []
    if any(tensor.experts for kind in x.model.kinds for tensor in kind.tensors):
        expert_shards = np.where(c.zero >= 1, expert_state_shards(c), 1)
        stride, outer = expert_stride(c), c.ep * expert_stride(c)
        of_experts = [
            x.term("ep", reduce, phase, norm, c.ep, stride, one, scalar),
            x.term("expert_tp", reduce, phase, norm, c.expert_tp, np.ones_like(c.tp), one, scalar),
            x.term("expert_dp", reduce, phase, norm, expert_shards, outer, one, scalar),
        ]
    return [
        *of_experts,
        x.term("dp", reduce, Phase.FORWARD, "loss and token count", c.dp * c.cp, data_stride(c), one, loss),
        x.term("pp", reduce, Phase.FORWARD, "loss", c.pp, c.cp * c.tp, one, scalar),
        x.term("tp", reduce, phase, norm, c.tp, np.ones_like(c.tp), one, scalar),
        x.term("pp", reduce, phase, norm, c.pp, c.cp * c.tp, one, scalar),
        x.term("dp", reduce, phase, norm, shards, data_stride(c), one, scalar),
    ]
