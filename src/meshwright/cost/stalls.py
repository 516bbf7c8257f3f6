"""Stalls: seconds that no kernel and no byte explains, of software that was seen to stop.

In: candidates, their memory, the cluster, the traits of the stack. Out: seconds per step [n]; 0 for stacks that state
none. Where one of a stack's rules holds, every message between stages of a pipeline waits `message_stall_s` as it is
sent and again as it is received. Without a pipeline, every microbatch waits `stall_s` from `stall_nodes` nodes on.
"""

from __future__ import annotations

import numpy as np

from meshwright.cost.candidates import BoolArray, Candidates, FloatArray
from meshwright.cost.stack import Stack, StallRule
from meshwright.hardware.spec import Cluster


def stalled_seconds(candidates: Candidates, memory_bytes: FloatArray, cluster: Cluster, stack: Stack) -> FloatArray:
    """What a step stalls in all [n]."""
    c = candidates
    stopped = np.zeros(len(c), dtype=np.bool_)
    for rule in stack.stall_rules:
        stopped |= _holds(rule, c, memory_bytes, cluster)
    messages = np.where(stopped & (c.pp > 1), _messages_in_a_row(c), 0.0)
    turns = np.where((c.world >= stack.stall_nodes * cluster.gpus_per_node) & (c.pp == 1), c.microbatches, 0)
    return stack.message_stall_s * messages + stack.stall_s * turns


def _holds(rule: StallRule, c: Candidates, memory_bytes: FloatArray, cluster: Cluster) -> BoolArray:
    return (
        (c.world >= rule.nodes * cluster.gpus_per_node)
        & (c.tp >= rule.tp)
        & (c.dp >= rule.replicas)
        & (c.microbatches >= rule.microbatches)
        & ((c.zero == 0) | (not rule.whole_gradients))
        & (memory_bytes > rule.memory_share * cluster.accelerator.memory_bytes)
    )


def _messages_in_a_row(c: Candidates) -> FloatArray:
    """Sends and receives that follow one another in a step: a stage in the middle has four per microbatch and chunk,
    each of two stages has two; the first microbatch also passes all stages forward and backward."""
    each = np.where(c.pp == 2, 2, 4) * c.vpp
    return (each * (c.microbatches - 1) + 2 * (c.pp * c.vpp - 1)).astype(np.float64)
