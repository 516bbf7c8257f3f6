"""The peak memory of many candidates, each part priced once: what a rank holds depends on mesh, ZeRO and pipeline
shape, what is in flight on the in-layer setting and the schedule; a candidate is the sum of one row of each.

In: model, cluster, workload, candidates. Out: peak bytes and the stage that has them [n], equal to those of
`training_memory` (tests/cost/test_memory_peak.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray, IntArray, UnitKeys, runs, unit_keys
from meshwright.cost.memory import held_memory, live_memory, training_memory
from meshwright.cost.stack import Stack
from meshwright.cost.stages import Stages, role_table, stage_keys, stages
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec

HELD = ("dp", "tp", "cp", "ep", "expert_tp")
LIVE = (
    *("dp", "tp", "sequence_parallel", "cp", "heads_exchanged", "ep", "expert_tp"),
    *("micro_batch", "global_batch", "schedule"),
)

Price = Callable[[ModelSpec, Workload, Candidates, Stages, UnitKeys, Stack], dict[MemoryKind, FloatArray]]


def peak_memory(
    model: ModelSpec, cluster: Cluster, workload: Workload, candidates: Candidates, stack: Stack
) -> tuple[FloatArray, IntArray]:
    """Bytes on the fullest stage of every candidate, reserved memory included, and which stage that is."""
    if stack.step_bytes or stack.pending_messages:  # terms that are no sum of one part each
        alone = training_memory(
            model, cluster, workload, candidates, stages(model, candidates), unit_keys(candidates), stack
        )
        return alone.peak_bytes, alone.peak_stage
    run = runs(candidates)
    shape = stage_keys(candidates, run)
    shapes = role_table(model, shape)
    frame, knobs = ([getattr(candidates, name) for name in names] for names in (HELD, ("zero", "zero_shards")))
    held_rows, held_of = run.distinct([shape.inverse, *frame], knobs)
    frame, knobs = ([getattr(candidates, name) for name in names] for names in (LIVE, ("recompute", "recompute_every")))
    live_rows, live_of = run.distinct([shape.inverse, *frame], knobs)

    def total(price: Price, rows: IntArray) -> FloatArray:
        """Bytes by stage [S, rows], the kinds added up."""
        few = candidates.take(rows)
        roles = shapes.take(shape.inverse[rows])
        terms = price(model, workload, few, roles, unit_keys(few), stack)
        summed: FloatArray = np.asarray(reduce(np.add, terms.values()), dtype=np.float64)
        return np.ascontiguousarray(np.broadcast_to(summed, roles.index.shape).T)

    held, live = total(held_memory, held_rows), total(live_memory, live_rows)
    peak: FloatArray = held[0][held_of] + live[0][live_of]
    role = np.zeros(len(candidates), dtype=np.int64)
    for stage in range(1, len(held)):
        here: FloatArray = held[stage][held_of] + live[stage][live_of]
        role[here > peak] = stage
        peak = np.maximum(peak, here)
    kept_back = float(cluster.reserved_bytes) + stack.workspace_bytes
    return peak * (1.0 + stack.allocator_slack) + kept_back, shapes.index[shape.inverse, role]
