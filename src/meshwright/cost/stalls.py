"""Stalls: seconds that no kernel and no byte explains, of software that was seen to stop.

In: a model, candidates, their memory, the cluster, the traits of the stack. Out: seconds per step [n]; 0 for stacks
that state none. Where one of a stack's rules holds, every message between stages of a pipeline waits `message_stall_s`
as it is sent and again as it is received. Without a pipeline, every layer's tensor-parallel collectives wait for the
ranks of their group, `tp_wait_s` each, and whole gradients go round their ring bucket by bucket.
"""

from __future__ import annotations

import numpy as np

from meshwright.cost.candidates import RECOMPUTES, BoolArray, Candidates, FloatArray
from meshwright.cost.stack import Stack, StallRule
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import Recompute
from meshwright.models.spec import ModelSpec


def stalled_seconds(
    model: ModelSpec, candidates: Candidates, memory_bytes: FloatArray, cluster: Cluster, stack: Stack
) -> FloatArray:
    """What a step stalls in all [n]."""
    c = candidates
    piped = stack.message_stall_s * _messages_in_a_row(c)
    alone = stack.tp_wait_s * _ranks_waited_for(model, c) + _bucket_seconds(model, c, cluster, stack)
    stalled = np.where(stopped(c, cluster, stack, memory_bytes), np.where(c.pp > 1, piped, alone), 0.0)
    large = (c.pp == 1) & (c.world >= stack.stall_nodes * cluster.gpus_per_node)
    return stalled + np.where(large, stack.stall_s, 0.0)


def stopped(c: Candidates, cluster: Cluster, stack: Stack, memory_bytes: FloatArray | None = None) -> BoolArray:
    """Whether one of the stack's rules holds [n]; those that look at memory are left out where it is not given."""
    found = np.zeros(len(c), dtype=np.bool_)
    for rule in stack.stall_rules:
        if memory_bytes is not None:
            found |= _holds(rule, c, cluster) & (memory_bytes > rule.memory_share * cluster.accelerator.memory_bytes)
        elif not rule.memory_share:
            found |= _holds(rule, c, cluster)
    return found


def _holds(rule: StallRule, c: Candidates, cluster: Cluster) -> BoolArray:
    return (
        (c.world >= rule.nodes * cluster.gpus_per_node)
        & (c.pp >= rule.stages)
        & (c.tp >= rule.tp)
        & (c.dp >= rule.replicas)
        & (c.microbatches >= rule.microbatches)
        & ((rule.zero is None) | (c.zero == rule.zero))
    )


def _messages_in_a_row(c: Candidates) -> FloatArray:
    """Sends and receives that follow one another in a step: a stage in the middle has four per microbatch and chunk,
    each of two stages has two; the first microbatch also passes all stages forward and backward."""
    each = np.where(c.pp == 2, 2, 4) * c.vpp
    return (each * (c.microbatches - 1) + 2 * (c.pp * c.vpp - 1)).astype(np.float64)


def passes_of_a_layer(c: Candidates) -> FloatArray:
    """Forward, backward, and what of it is run again [n]."""
    full = c.recompute == RECOMPUTES.index(Recompute.FULL)
    return 2.0 + np.where(full, 1.0 / c.recompute_every, 0.0)


def _ranks_waited_for(model: ModelSpec, c: Candidates) -> FloatArray:
    """Ranks of a tensor-parallel group, summed over all layers and passes of a step without a pipeline [n]."""
    together = np.where(c.tp > 1, c.tp, 0)
    return passes_of_a_layer(c) * model.num_layers * c.microbatches * together


def _bucket_seconds(model: ModelSpec, c: Candidates, cluster: Cluster, stack: Stack) -> FloatArray:
    """Hops of the buckets of whole gradients (torch's DDP), each an all-reduce of two rounds over the replicas [n]."""
    if not stack.bucket_bytes:
        return np.zeros(len(c))
    buckets = model.parameters / c.tp * stack.gradient_bytes / stack.bucket_bytes
    return np.where(c.zero == 0, buckets * 2 * (c.dp - 1) * cluster.inter.latency_s, 0.0)
