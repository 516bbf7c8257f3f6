"""The textbook rule: the smallest tensor-parallel size that fits within the fast domain, then pipeline stages, the rest
data parallel - the plan that an engineer writes down without a search.

Micro batch 1, 1F1B, ZeRO-1 (distributed optimizer) and sequence parallel beside tp, as Narayanan et al. 2021 and
Korthikanti et al. 2022 recommend; experts are spread over the smallest ep that fits. Recomputation only where nothing
fits without. Whether a plan fits is the memory model's answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from meshwright.cost.candidates import RECOMPUTES, SCHEDULES, Candidates, Chunk
from meshwright.cost.memory_peak import peak_bytes
from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Precision, Recompute, Schedule
from meshwright.models.spec import ModelSpec, MoeMlp
from meshwright.planner.enumerate import context_sizes
from meshwright.planner.legality import legal
from meshwright.planner.table import divisors


def rule_of_thumb(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    global_batch: int,
    precision: Precision,
    stack: Stack,
    headroom: float,
) -> HybridParallelConfig | None:
    """The first plan of the textbook's order that fits with the headroom, else the first that fits at all, or None."""
    splits = list(_in_order(model, cluster, workload.seq, global_batch))
    if not splits:
        return None
    candidates = _textbook(splits, cluster.gpus, workload.seq, global_batch, precision)
    candidates = candidates.take(legal(model, cluster, workload.seq, candidates))
    if len(candidates) == 0:
        return None
    memory = peak_bytes(model, cluster, workload, Chunk.of(candidates), stack)
    fits = memory <= cluster.accelerator.memory_bytes
    roomy = memory <= (1.0 - headroom) * cluster.accelerator.memory_bytes
    fits = roomy if roomy.any() else fits
    if not fits.any():
        return None
    return candidates.config(int(np.argmax(fits)))


def _textbook(
    splits: list[tuple[int, ...]], gpus: int, seq: int, global_batch: int, precision: Precision
) -> Candidates:
    """Splits (tp, pp, cp, ep, recompute) with the textbook's other knobs."""
    tp, pp, cp, ep, recompute = np.array(splits, dtype=np.int64).T
    one = np.ones_like(tp)
    ranks = gpus // (tp * pp)
    return Candidates(
        dp=ranks // cp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        expert_tp=one,
        vpp=one,
        sequence_parallel=(tp > 1) & (seq % (tp * cp) == 0),
        micro_batch=one,
        global_batch=global_batch * one,
        schedule=one * SCHEDULES.index(Schedule.ONE_F_ONE_B),
        zero=(ranks > 1).astype(np.int64),
        zero_shards=ranks,
        recompute=recompute,
        recompute_every=one,
        heads_exchanged=one == 0,
        precision=precision,
    )


def _in_order(model: ModelSpec, cluster: Cluster, seq: int, global_batch: int) -> Iterator[tuple[int, ...]]:
    """Splits (tp, pp, cp, ep, recompute): tp within the domain, then pp at the largest, each with rising ep; the same
    again with full recompute. Context parallel only where the global batch has too few sequences for the replicas."""
    gpus = cluster.gpus
    sizes = divisors(gpus)
    tensor = [t for t in sizes if t <= min(cluster.domain, cluster.gpus_per_node)]
    cuts = [(t, 1) for t in tensor] + [(t, p) for p in sizes if 1 < p <= model.num_layers for t in reversed(tensor)]
    experts = max((k.mlp.experts for k in model.kinds if isinstance(k.mlp, MoeMlp)), default=1)
    for recompute in (Recompute.NONE, Recompute.FULL):
        for tp, pp in cuts:
            if gpus % (tp * pp):
                continue
            ranks = gpus // (tp * pp)
            contexts = [c for c in context_sizes(seq, gpus) if ranks % c == 0]
            cp = next((c for c in contexts if global_batch % (ranks // c) == 0), None)
            if cp is None:
                continue
            for ep in [e for e in divisors(ranks * tp) if experts % e == 0]:
                yield tp, pp, cp, ep, RECOMPUTES.index(recompute)
