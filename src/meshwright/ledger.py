"""The ledger: what one rank does in one step - every collective with its bytes, every kind of memory.

The cost model predicts it, the dry run traces it, a live job records it; all three must agree.

Bytes of a call are the bytes of the larger of its two buffers on this rank: the tensor for all-reduce,
broadcast, send and receive; the gathered output for all-gather; the full input for reduce-scatter; the
input for all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GRADIENT_BUCKET_BYTES = 32 * 2**20
"""Gradients of plain replicas are reduced in slices of one flat buffer, at most this long (docs/ledger.md)."""


class Collective(StrEnum):
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    SEND = "send"
    RECEIVE = "receive"


class Phase(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class MemoryKind(StrEnum):
    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    BUFFERS = "buffers"  # gathered FSDP weights, pipeline and bucket buffers
    TEMPORARIES = "temporaries"
    KV_CACHE = "kv_cache"
    RESERVED = "reserved"  # driver context, communicator buffers, allocator slack


@dataclass(frozen=True)
class TrafficEntry:
    """One line of the traffic ledger: all calls of one collective of one axis in one phase of a step.

    `axis` is 'dp', 'tp', 'pp', 'cp', 'ep', 'expert_dp', 'expert_tp' or 'embedding' (the tied-embedding group).
    `what` says in words what is moved. `total_bytes` = sum over the calls.
    """

    axis: str
    collective: Collective
    phase: Phase
    what: str
    group_size: int
    calls: int
    total_bytes: int


@dataclass(frozen=True)
class Ledger:
    """What one rank does in one step."""

    traffic: tuple[TrafficEntry, ...]
    memory_bytes: dict[MemoryKind, int]
