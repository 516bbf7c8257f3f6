"""The peak memory of many candidates, each part priced once: what a rank holds depends on mesh, ZeRO and pipeline
shape, what is in flight on the in-layer setting and the schedule; a candidate is the sum of one row of each.

In: model, cluster, workload, a chunk of candidates. Out: peak bytes and the stage that has them [n], equal to those of
`training_memory` (tests/cost/test_memory_peak.py).
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from meshwright.cost.candidates import Chunk, FloatArray, IntArray, unit_keys
from meshwright.cost.memory import MemoryArrays, held_memory, in_flight, live_memory, training_memory
from meshwright.cost.stack import Stack
from meshwright.cost.stages import Stages, role_table, stage_keys, stages
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec

HELD = ("dp", "tp", "cp", "ep", "expert_tp")


def peak_memory(
    model: ModelSpec, cluster: Cluster, workload: Workload, chunk: Chunk, stack: Stack
) -> tuple[FloatArray, IntArray]:
    """Bytes on the fullest stage of every row, reserved memory included, and which stage that is."""
    if not _has_parts(stack):
        alone = _alone(model, cluster, workload, chunk, stack)
        return alone.peak_bytes, alone.peak_stage
    peak, role = _fullest_roles(model, cluster, workload, chunk, stack)
    shape = stage_keys(chunk.heads)
    return peak, role_table(model, shape).index[shape.inverse[chunk.of_row], role]


def peak_bytes(model: ModelSpec, cluster: Cluster, workload: Workload, chunk: Chunk, stack: Stack) -> FloatArray:
    """Bytes on the fullest stage of every row, reserved memory included."""
    if not _has_parts(stack):
        return _alone(model, cluster, workload, chunk, stack).peak_bytes
    return _fullest_roles(model, cluster, workload, chunk, stack)[0]


def _has_parts(stack: Stack) -> bool:
    """Whether memory is a sum of what is held and what is in flight."""
    return not (stack.step_bytes or stack.pending_messages)


def _alone(model: ModelSpec, cluster: Cluster, workload: Workload, chunk: Chunk, stack: Stack) -> MemoryArrays:
    """Every row priced by itself."""
    rows = chunk.take(np.arange(len(chunk)))
    return training_memory(model, cluster, workload, rows, stages(model, rows), unit_keys(rows), stack)


def _fullest_roles(
    model: ModelSpec, cluster: Cluster, workload: Workload, chunk: Chunk, stack: Stack
) -> tuple[FloatArray, IntArray]:
    """Bytes on the fullest stage of every row, and the role of that stage, where memory has parts."""
    heads = chunk.heads
    shape = stage_keys(heads)
    shapes = role_table(model, shape)
    shape_of = shape.inverse
    held_rows, held_of = chunk.distinct([shape_of, *(getattr(heads, name) for name in HELD)], chunk.sharding)
    live_rows, live_of = chunk.by_saving

    def roles(rows: IntArray) -> Stages:
        return shapes.take(shape_of.take(chunk.of_row.take(rows)))

    def by_stage(terms: dict[MemoryKind, FloatArray], rows: IntArray) -> FloatArray:
        """Bytes of all kinds by stage [S, rows]."""
        summed: FloatArray = np.asarray(reduce(np.add, terms.values()), dtype=np.float64)
        return np.ascontiguousarray(np.broadcast_to(summed, (len(rows), shapes.index.shape[1])).T)

    few, keys = chunk.take(held_rows), chunk.unit_keys(held_rows)
    held = by_stage(held_memory(model, workload, few, roles(held_rows), keys, stack), held_rows)
    few, keys = chunk.take(live_rows), chunk.unit_keys(live_rows)
    flying = in_flight(heads, shapes.take(shape_of)).T.take(chunk.of_row.take(live_rows), axis=1).T
    live = by_stage(live_memory(model, workload, few, roles(live_rows), keys, stack, flying), live_rows)
    peak, role = np.empty(len(chunk)), np.empty(len(chunk), dtype=np.int64)
    for start in range(0, len(chunk), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        peak[rows], role[rows] = _fullest(held, live, held_of[rows], live_of[rows])
    kept_back = float(cluster.reserved_bytes) + stack.workspace_bytes
    peak *= 1.0 + stack.allocator_slack
    peak += kept_back
    return peak, role


BLOCK_ROWS = 16_384
"""Rows whose stages are compared at once: their temporaries stay in the processor's cache."""


def _fullest(held: FloatArray, live: FloatArray, held_of: IntArray, live_of: IntArray) -> tuple[FloatArray, IntArray]:
    """The largest sum over stages of one column of each [S, .], and its stage (the first of equals)."""
    peak: FloatArray = held[0].take(held_of) + live[0].take(live_of)
    role = np.zeros(len(held_of), dtype=np.int64)
    for stage in range(1, len(held)):
        here: FloatArray = held[stage].take(held_of)
        here += live[stage].take(live_of)
        role[here > peak] = stage
        np.maximum(peak, here, out=peak)
    return peak, role
