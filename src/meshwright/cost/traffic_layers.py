"""Traffic inside layers, per microbatch: tensor parallel (Shoeybi et al. 2019) with and without sequence parallelism
(Korthikanti et al. 2022, section 4.2.2), context parallel (ring attention, Liu et al. 2023; all-to-all, Jacobs et al.
2023), expert parallel (GShard, Lepikhin et al. 2020), and the model's ends: embedding, head, vocab-parallel cross
entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import RECOMPUTES, Candidates, FloatArray, IntArray
from meshwright.cost.layers import attended_kv_heads
from meshwright.cost.traffic_term import Scene, TrafficTerm
from meshwright.layout.config import Recompute
from meshwright.layout.split import layer_ranges
from meshwright.ledger import Collective, Phase
from meshwright.models.spec import Attention, LayerKind, LinearMixer, MoeMlp
from meshwright.schedules.placement import chunks_of_stage, is_v_shaped

FP32_BYTES = 4.0
COUNT_BYTES = 8.0  # an int64 token count


def layer_terms(x: Scene) -> list[TrafficTerm]:
    """Every per-microbatch term of layers and ends."""
    terms: list[TrafficTerm] = []
    if (x.candidates.tp > 1).any():
        terms += [*_block_terms(x), *_end_terms(x)]
    if (x.candidates.cp > 1).any():
        terms += _context_terms(x)
    if (x.candidates.ep * x.candidates.expert_tp > 1).any() or (x.candidates.tp > 1).any():
        terms += _expert_terms(x)
    return terms


def recomputed_share(x: Scene) -> FloatArray:
    """The share of a stage's layers of each kind whose forward pass runs again: [n, 1, 1] spread evenly, and [n, S, K]
    of a rank's own place, whose layers are counted by their index in the model."""
    full = x.candidates.recompute == RECOMPUTES.index(Recompute.FULL)
    even = np.where(full, 1.0 / x.candidates.recompute_every, 0.0)[:, None, None]
    if x.place is None or not (full & (x.candidates.recompute_every > 1)).any():
        return even
    share = np.broadcast_to(even, x.stages.layers.shape).copy()
    for row in np.flatnonzero(full):
        config = x.candidates.config(int(row))
        ranges = layer_ranges(config, x.model.num_layers)
        for role, stage in enumerate(x.stages.index[row].tolist()):
            own = chunks_of_stage(stage, config.pp, config.vpp, is_v_shaped(config.schedule))
            again = [x.model.pattern[i] for c in own for i in ranges[c] if i % config.recompute_every == 0]
            counts = np.bincount(np.array(again, dtype=np.int64), minlength=share.shape[2])
            share[row, role] = counts / np.maximum(x.stages.layers[row, role], 1)
    return share


def entered_blocks(kind: LayerKind) -> int:
    """Blocks of a layer that enter and leave the tensor-parallel region: its mixer, its dense or shared-expert MLP."""
    routed_only = isinstance(kind.mlp, MoeMlp) and not kind.mlp.shared_width
    return (kind.mixer is not None) + (kind.mlp is not None and not routed_only)


def repeated_outputs(kind: LayerKind) -> int:
    """Block outputs that recomputing a layer sums again: all but the layer's last, which no gradient needs unless a
    norm follows it. With routed experts alone, or a gate that weighs the shared expert, the last is needed too."""
    blocks = entered_blocks(kind)
    needed = kind.norms > 2
    if isinstance(kind.mlp, MoeMlp):
        needed = needed or not kind.mlp.shared_width or any("shared_expert_gate" in t.name for t in kind.tensors)
    return max(blocks - (0 if needed else 1), 0)


def _block_terms(x: Scene) -> list[TrafficTerm]:
    """Without sequence parallelism one all-reduce per block each way; with it an all-gather and a reduce-scatter."""
    c = x.candidates
    m = x.microbatches[:, None]
    plain, sharded = np.where(c.sequence_parallel, 1, c.tp), np.where(c.sequence_parallel, c.tp, 1)
    blocks = x.layers_where([entered_blocks(k) for k in x.model.kinds]) * m
    repeated = x.stages.layers * recomputed_share(x) * m[:, :, None]
    inputs_again = repeated @ np.array([entered_blocks(k) for k in x.model.kinds], dtype=np.float64)
    outputs_again = repeated @ np.array([repeated_outputs(k) for k in x.model.kinds], dtype=np.float64)
    one = np.ones_like(c.tp)

    def term(collective: Collective, phase: Phase, what: str, size: IntArray, calls: FloatArray) -> TrafficTerm:
        return x.term("tp", collective, phase, what, size, one, calls, x.hidden_bytes)

    reduce, gather, scatter = Collective.ALL_REDUCE, Collective.ALL_GATHER, Collective.REDUCE_SCATTER
    forward, backward = Phase.FORWARD, Phase.BACKWARD
    return [
        term(reduce, forward, "block output", plain, blocks),
        term(reduce, backward, "block output", plain, outputs_again),
        term(reduce, backward, "block input", plain, blocks),
        term(gather, forward, "block input", sharded, blocks),
        term(scatter, forward, "block output", sharded, blocks),
        term(gather, backward, "block input", sharded, inputs_again),
        term(scatter, backward, "block output", sharded, outputs_again),
        term(gather, backward, "block output", sharded, blocks),
        term(scatter, backward, "block input", sharded, blocks),
    ]


def _end_terms(x: Scene) -> list[TrafficTerm]:
    """Embedding on the first stage; head input and loss on the last, of which the loss reduces the largest logit, then
    the sum of exponentials beside the label's logit, in fp32 per token."""
    c = x.candidates
    m = x.microbatches[:, None]
    plain, sharded = np.where(c.sequence_parallel, 1, c.tp), np.where(c.sequence_parallel, c.tp, 1)
    first, last = x.stages.first * m, x.stages.last * m
    one = np.ones_like(c.tp)
    reduce, gather, scatter = Collective.ALL_REDUCE, Collective.ALL_GATHER, Collective.REDUCE_SCATTER
    forward, backward = Phase.FORWARD, Phase.BACKWARD
    hidden, per_token = x.hidden_bytes, x.tokens * FP32_BYTES
    return [
        x.term("tp", reduce, forward, "embedding output", plain, one, first, hidden),
        x.term("tp", scatter, forward, "embedding output", sharded, one, first, hidden),
        x.term("tp", gather, backward, "embedding output", sharded, one, first, hidden),
        x.term("tp", reduce, backward, "head input", plain, one, last, hidden),
        x.term("tp", gather, forward, "head input", sharded, one, last, hidden),
        x.term("tp", scatter, backward, "head input", sharded, one, last, hidden),
        x.term("tp", reduce, forward, "largest logit", c.tp, one, last, per_token),
        x.term("tp", reduce, forward, "sum of exponentials and label logit", c.tp, one, last, 2 * per_token),
    ]


def _ring_terms(attention: Attention, x: Scene, layers: FloatArray, again: FloatArray) -> list[TrafficTerm]:
    """Keys and values take cp - 1 steps forward and again backward (also when the core is recomputed); their gradients
    take cp steps and so come home."""
    c = x.candidates
    ranks = np.where(c.heads_exchanged, 1, c.cp)
    steps = np.maximum(c.cp - 1, 0).astype(np.float64)[:, None]
    passed = x.tokens * np.ceil(attention.kv_heads / c.tp) * (attention.qk_dim + attention.v_dim) * x.element
    ring = [
        (Phase.FORWARD, "keys and values", layers * steps),
        (Phase.BACKWARD, "keys and values", layers * steps * (1.0 + again)),
        (Phase.BACKWARD, "key and value gradients", layers * (steps + 1.0)),
    ]
    return [
        x.term("cp", collective, phase, what, ranks, c.tp, calls, passed)
        for collective in (Collective.SEND, Collective.RECEIVE)
        for phase, what, calls in ring
    ]


def _exchange_terms(
    attention: Attention, x: Scene, layers: FloatArray, again: FloatArray, whole: FloatArray
) -> list[TrafficTerm]:
    """Queries, keys and values are exchanged from tokens to heads, the output back, and all four gradients the other
    way. Recomputing the core alone (counted in `again`, not in `whole`) stops before the output is exchanged: no
    gradient needs it."""
    c = x.candidates
    ranks = np.where(c.heads_exchanged, c.cp, 1)
    heads, kv_heads = np.ceil(attention.heads / c.tp), attended_kv_heads(attention, c)
    terms: list[TrafficTerm] = []
    for elements in (heads * attention.qk_dim, kv_heads * attention.qk_dim, kv_heads * attention.v_dim):
        terms += _both_ways(x, "tokens to heads", ranks, layers, again, elements)
    return terms + _both_ways(x, "heads to tokens", ranks, layers, whole, heads * attention.v_dim)


def _both_ways(
    x: Scene, what: str, ranks: IntArray, layers: FloatArray, again: FloatArray, elements: FloatArray
) -> list[TrafficTerm]:
    """One all-to-all of `elements` per token forward, one of their gradients backward."""
    nbytes = x.tokens * elements * x.element
    return [
        x.term("cp", Collective.ALL_TO_ALL, phase, what, ranks, x.candidates.tp, calls, nbytes)
        for phase, calls in ((Phase.FORWARD, layers), (Phase.BACKWARD, layers * (1.0 + again)))
    ]


def _context_terms(x: Scene) -> list[TrafficTerm]:
    """Attention by a ring or by all-to-all; a linear mixer gathers one state per rank each way."""
    c = x.candidates
    m = x.microbatches[:, None]
    selective = (c.recompute == RECOMPUTES.index(Recompute.SELECTIVE)).astype(np.float64)
    share = recomputed_share(x)
    exchange, ring = c.heads_exchanged.any(), not c.heads_exchanged.all()
    terms: list[TrafficTerm] = []
    gather = Collective.ALL_GATHER
    for k, kind in enumerate(x.model.kinds):
        layers = x.stages.layers[:, :, k] * m
        whole = share[:, :, k if share.shape[2] > 1 else 0]
        again = whole + selective[:, None]
        if isinstance(kind.mixer, Attention):
            terms += _ring_terms(kind.mixer, x, layers, again) if ring else []
            terms += _exchange_terms(kind.mixer, x, layers, again, whole) if exchange else []
        elif isinstance(kind.mixer, LinearMixer):
            per_head = kind.mixer.key_dim * kind.mixer.value_dim * FP32_BYTES
            heads = np.ceil(kind.mixer.heads / c.tp.astype(np.float64))
            state = (c.cp * c.micro_batch).astype(np.float64) * heads * per_head
            for phase, calls in ((Phase.FORWARD, layers), (Phase.BACKWARD, layers * (1.0 + again))):
                terms.append(x.term("cp", gather, phase, "mixer state", c.cp, c.tp, calls, state))
    return terms


@dataclass(frozen=True)
class _Routed:
    """Bytes of one MoE layer kind per microbatch [n]: routed copies on a rank, after expert_tp gathering, a whole
    hidden state, and the token counts that precede a dispatch."""

    copies: FloatArray
    gathered: FloatArray
    whole: FloatArray
    counts: FloatArray


def expert_stride(c: Candidates) -> IntArray:
    """Experts overlay dp x cp x tp: expert_tp innermost, then ep. Beyond cp x tp ranks the pipeline lies between."""
    return np.where(c.ep * c.expert_tp <= c.cp * c.tp, c.expert_tp, c.expert_tp * c.pp)


def _routed(mlp: MoeMlp, x: Scene) -> _Routed:
    c = x.candidates
    width = float(mlp.latent or x.model.hidden)
    factor = 1.0 if x.workload.capacity_factor is None else x.workload.capacity_factor
    copies = x.tokens / c.tp * mlp.top_k * factor * width * x.element
    return _Routed(copies, copies * c.expert_tp, x.hidden_bytes, np.full(len(c), mlp.experts * COUNT_BYTES))


def _expert_terms(x: Scene) -> list[TrafficTerm]:
    """Each tp rank routes its own 1/tp of the tokens: dispatch and combine are all-to-alls over ep each way; expert_tp
    ranks gather each other's copies and scatter the sums; without sequence parallelism the outputs of all tp ranks are
    gathered. Balanced routing is assumed: the mean over ranks is exact, a single dropless rank may differ."""
    terms: list[TrafficTerm] = []
    share = recomputed_share(x)
    for k, kind in enumerate(x.model.kinds):
        if isinstance(kind.mlp, MoeMlp):
            layers = x.stages.layers[:, :, k] * x.microbatches[:, None]
            terms += _moe_layer_terms(kind.mlp, x, layers, share[:, :, k if share.shape[2] > 1 else 0])
    return terms


def _moe_layer_terms(mlp: MoeMlp, x: Scene, layers: FloatArray, share: FloatArray) -> list[TrafficTerm]:
    c = x.candidates
    size = _routed(mlp, x)
    again = layers * (1.0 + share)
    told = layers if x.workload.capacity_factor is None else np.zeros_like(layers)  # a capacity is known to all
    told_again = told * share
    # recomputation stops before the last collective, which is this one where no shared expert comes after it
    gathered_again = again - layers if mlp.shared_width else np.zeros_like(layers)
    one = np.ones_like(c.tp)
    plain = np.where(c.sequence_parallel, 1, c.tp)
    stride = expert_stride(c)
    swap, gather, scatter = Collective.ALL_TO_ALL, Collective.ALL_GATHER, Collective.REDUCE_SCATTER
    forward, backward = Phase.FORWARD, Phase.BACKWARD
    return [
        x.term("ep", swap, forward, "tokens per expert", c.ep, stride, told, size.counts),
        x.term("ep", swap, backward, "tokens per expert", c.ep, stride, told_again, size.counts),
        x.term("ep", swap, forward, "dispatch", c.ep, stride, layers, size.copies),
        x.term("ep", swap, backward, "dispatch", c.ep, stride, again, size.copies),
        x.term("ep", swap, forward, "combine", c.ep, stride, layers, size.copies),
        x.term("ep", swap, backward, "combine", c.ep, stride, again, size.copies),
        x.term("expert_tp", gather, forward, "tokens per expert", c.expert_tp, one, told, size.counts * c.expert_tp),
        x.term(
            "expert_tp", gather, backward, "tokens per expert", c.expert_tp, one, told_again, size.counts * c.expert_tp
        ),
        x.term("expert_tp", gather, forward, "expert input", c.expert_tp, one, layers, size.gathered),
        x.term("expert_tp", scatter, forward, "expert output", c.expert_tp, one, layers, size.gathered),
        x.term("expert_tp", gather, backward, "expert output", c.expert_tp, one, again, size.gathered),
        x.term("expert_tp", scatter, backward, "expert input", c.expert_tp, one, again, size.gathered),
        x.term("tp", gather, forward, "routed output", plain, one, layers, size.whole),
        x.term("tp", gather, backward, "routed output", plain, one, gathered_again, size.whole),
        x.term("tp", gather, backward, "routed input", plain, one, layers, size.whole),
    ]
